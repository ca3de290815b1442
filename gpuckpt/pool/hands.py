"""What the pool has done for it: the operations on replicas and goldens, as the loop sees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gpuckpt.cuda.driver import Gpu
from gpuckpt.manifest import Held
from gpuckpt.pool.state import Golden, Phase


@dataclass(frozen=True)
class Made:
    """A replica that answers: its name, where it listens, what it holds, and where the time went (seconds).

    ``memory`` in bytes; ``gpus``: on GPUs, ``carried``: bytes of that which are in host memory while it is frozen.
    ``pid`` is its first process: it is gone when that is.
    """

    name: str
    endpoint: Any
    memory: int = 0
    gpus: tuple[Held, ...] = ()
    carried: int = 0
    pid: int | None = None
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What there is of a model; ``replicas`` are those of an earlier service that can be used, hot or standby,
    ``prepared`` those that wait for their restore.

    ``prefix`` is what its replicas' names begin with, ``served`` what its own server calls it, ``memory`` what a
    replica will hold at most after its restore, ``gpus`` what on GPUs, ``fixed`` whether only on these, ``carried``
    the bytes of that which the host holds of a standby.
    """

    prefix: str
    golden: Golden
    golden_bytes: int = 0
    memory: int = 0
    served: str | None = None
    replicas: tuple[tuple[Made, Phase], ...] = ()
    prepared: tuple[str, ...] = ()
    gpus: tuple[Held, ...] = ()
    fixed: bool = False
    carried: int = 0


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its golden, and what follows ``gpuckpt create NAME`` if there is none."""

    golden: str
    create: tuple[str, ...] = ()


class Hands(Protocol):
    """Operations on one model's replicas and golden. Each raises GpuckptError if it fails, and then leaves nothing.

    A golden that turns out to be damaged raises VerificationError.
    """

    async def look(self, model: str) -> Found:
        """What there is of its golden."""
        ...

    async def adopt(self, model: str) -> Found:
        """The same with the replicas of an earlier service; what of these cannot be used is removed."""
        ...

    async def restore(self, model: str, replica: str, gpus: tuple[Held, ...]) -> Made:
        """A replica of its golden, on these GPUs if they have room."""
        ...

    async def make(self, model: str, *, replace: bool) -> None:
        """Start the model's server cold and make its golden; without ``replace`` one that is there now is kept."""
        ...

    async def prepare(self, model: str, replica: str) -> None:
        """Make the replica's container, so that its restore takes less."""
        ...

    async def wake(self, model: str, replica: str, gpus: tuple[Held, ...]) -> tuple[Held, ...]:
        """Thaw it, on these GPUs if they have room: what it holds there now, nothing if nobody can tell."""
        ...

    async def freeze(self, model: str, replica: str) -> tuple[Held, ...]:
        """Make a standby of it: what it held on GPUs, nothing if nobody can tell."""
        ...

    async def stop(self, model: str, replica: str) -> None: ...
    async def move(self, model: str, to: Golden) -> None: ...

    async def distrust(self, model: str) -> None:
        """Have every byte of its golden read at its next use: it was found wrong."""
        ...

    async def healthy(self, model: str, replica: str, timeout: float) -> bool:
        """Whether it answers its health check within so many seconds."""
        ...

    async def doomed(self, model: str, replica: str) -> bool:
        """Whether a frozen one was killed: it may not notice before it is thawed."""
        ...

    async def canary(self, model: str, replica: str) -> tuple[str, ...]:
        """Replay its golden's canary: the differences from the recorded answer, or none. Raises if it fails."""
        ...

    async def memory(self, model: str, replica: str) -> int:
        """Bytes of host memory that are its own now."""
        ...


class Workplace(Hands, Protocol):
    """Hands with a life of their own, as the service has them: models come and go, and it ends."""

    async def open(self) -> None:
        """Make ready to work. Raises GpuckptError if that is not possible here."""
        ...

    def set_sources(self, sources: Mapping[str, Source], leaving: Iterable[str]) -> None:
        """Other models from now on; what is ``leaving`` is still to be looked after and stopped."""
        ...

    def store_size(self) -> int:
        """Bytes that the store has room for."""
        ...

    async def gpus(self, replicas: Sequence[str]) -> tuple[tuple[Gpu, ...], dict[str, tuple[Held, ...]]] | None:
        """The GPUs that replicas may be on, with what is free there now, and what these hold; None if nobody can tell.

        Of a replica whose processes the driver does not know nothing is told.
        """
        ...

    def interrupt(self) -> None:
        """Have goldens that are being made given up, and make no more: who waits for them is told that they failed."""
        ...

    def close(self) -> None:
        """Work no more; what is being done is waited for."""
        ...
