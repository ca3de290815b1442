"""What machine this is, as far as it matters to a restored process."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct


class Machine(Struct, frozen=True):
    """Kernel release, architecture, and the processor's model and feature flags (sorted)."""

    kernel: str
    machine: str
    cpu_model: str
    cpu_flags: tuple[str, ...]


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """Read the identity of this machine; a processor without flags in /proc/cpuinfo gives an empty tuple."""
    model = "unknown"
    flags: tuple[str, ...] = ()
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            key = key.strip()
            if key in ("model name", "CPU part") and model == "unknown":
                model = value.strip()
            elif key in ("flags", "Features"):
                flags = tuple(sorted(value.split()))
                break
    system = os.uname()
    return Machine(system.release, system.machine, model, flags)
