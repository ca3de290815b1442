"""Sessions of the guest server, from outside: a client, its records, and activations as plain bytes."""

from gpuckpt.sessions.client import Client, Generating, address
from gpuckpt.sessions.records import (
    Branches,
    Breakpoint,
    Condition,
    Edit,
    Engine,
    Event,
    Lens,
    Memory,
    Pause,
    Result,
    Sampling,
    Session,
    Variant,
    Vectors,
)
from gpuckpt.sessions.tensors import Tensor, read, write

__all__ = [
    "Branches",
    "Breakpoint",
    "Client",
    "Condition",
    "Edit",
    "Engine",
    "Event",
    "Generating",
    "Lens",
    "Memory",
    "Pause",
    "Result",
    "Sampling",
    "Session",
    "Tensor",
    "Variant",
    "Vectors",
    "address",
    "read",
    "write",
]
