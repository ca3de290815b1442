"""What the pool has done for it: the operations on replicas and goldens, as the loop sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from gpuckpt.pool.state import Golden, Phase


@dataclass(frozen=True)
class Made:
    """A replica that answers: its name, where it listens, what it holds in bytes, and where the time went (seconds)."""

    name: str
    endpoint: Any
    memory: int = 0
    gpu: int = 0
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What there is of a model when the service starts; replicas of an earlier one that answer, hot or standby.

    ``prefix`` is what its replicas' names begin with.
    """

    prefix: str
    golden: Golden
    golden_bytes: int = 0
    memory: int = 0
    gpu: int = 0
    replicas: tuple[tuple[Made, Phase], ...] = ()


class Hands(Protocol):
    """Operations on one model's replicas and golden. Each raises GpuckptError if it fails, and then leaves nothing.

    A golden that turns out to be damaged raises VerificationError.
    """

    async def look(self, model: str) -> Found: ...
    async def restore(self, model: str, replica: str) -> Made: ...
    async def start(self, model: str, replica: str) -> Made: ...
    async def wake(self, model: str, replica: str) -> None: ...
    async def freeze(self, model: str, replica: str) -> None: ...
    async def stop(self, model: str, replica: str) -> None: ...
    async def move(self, model: str, to: Golden) -> None: ...
