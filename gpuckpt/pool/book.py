"""What the loop keeps of models and replicas, and what it tells of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from gpuckpt import manifest
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Golden, Model, Phase, Replica, Rules

_LONGEST_PREFIX = 34  # so that a number still fits into a replica's name


class RefusedError(Exception):
    """A request that gets no replica: ``status`` is the HTTP status that says so, ``retry_after`` in seconds.

    LateError: no replica was free within the request's deadline.
    """

    def __init__(self, message: str, *, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class LateError(RefusedError):
    """See :class:`RefusedError`."""


@dataclass(frozen=True)
class Event:
    """Something that happened: to a model, mostly to a replica of it.

    ``tier`` is where the replica came from, ``phases`` say where the time went, in seconds.
    """

    time: float  # of the day, seconds since 1970
    kind: str  # made, restored, started, woken, frozen, stopped, moved, failed, lost, quarantined, adopted
    model: str
    replica: str = ""
    reason: str = ""
    tier: str = ""
    seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Held:
    """A replica and what the loop keeps of it.

    ``heard``: when its server last sent something, or was sent a request; ``served`` counts its requests; ``checks``
    counts those who look at its health right now; ``proved``: when its canary last held. ``golden``: which of its
    model's goldens it is of (see :attr:`Of.goldens`). ``gpus``, ``carried``: see :class:`gpuckpt.pool.state.Replica`.
    """

    name: str
    model: str
    phase: Phase
    since: float
    endpoint: Any = None
    pid: int | None = None
    requests: int = 0
    served: int = 0
    golden: int = 0
    memory: int = 0
    gpus: tuple[manifest.Held, ...] = ()
    carried: int = 0
    heard: float = 0.0
    checks: int = 0
    proved: float | None = None

    def made(self, made: Made) -> None:
        """It answers."""
        self.endpoint, self.pid, self.memory = made.endpoint, made.pid, made.memory
        self.gpus, self.carried = made.gpus, made.carried

    @property
    def on_host(self) -> int:
        """Bytes of host memory that it holds now: of a frozen one also what it had on GPUs and does not give up."""
        return self.memory + (self.carried if self.phase is Phase.STANDBY else 0)

    @property
    def on_gpus(self) -> dict[str, int]:
        """Bytes that it holds on GPUs now, by UUID; of one that is coming, that it will hold."""
        return {} if self.phase is Phase.STANDBY else {one.uuid: one.bytes for one in self.gpus}

    def seen(self) -> Replica:
        """As the policy sees it."""
        return Replica(
            self.name,
            self.phase,
            self.since,
            self.requests,
            self.on_host,
            self.gpus,
            self.carried,
            checking=self.checks > 0,
        )


@dataclass(slots=True, eq=False)
class Of:
    """A model and what the loop keeps of it.

    ``served`` is what its own server calls it. ``estimate``: what a replica will hold, as long as none has shown it;
    ``most``: the most that one has held. ``preparing``: the container that is being made, or removed, right now.
    ``asked``: when the last request came, ``requested``: whether one did, or it is only when we began. ``goldens``
    counts those that were put aside, ``damaged`` those since one was right. ``leaving``: it is no longer configured,
    and goes with its last replica.
    """

    name: str
    rules: Rules
    prefix: str
    golden: Golden = Golden.NONE
    golden_bytes: int = 0
    served: str | None = None
    estimate: int = 0
    most: int = 0
    gpus: tuple[manifest.Held, ...] = ()
    fixed: bool = False
    carried: int = 0
    replicas: dict[str, Held] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)
    preparing: str | None = None
    prepare_at: float = 0.0
    waiters: deque[asyncio.Future[Held]] = field(default_factory=deque)
    asked: float = 0.0
    requested: bool = False
    failures: int = 0
    damaged: int = 0
    goldens: int = 0
    retry_at: float = 0.0
    make_at: float = 0.0
    move_at: float = 0.0
    trouble: str = ""
    warm: bool = False
    scale: int | None = None
    drained: bool = False
    cramped: int = 0
    leaving: bool = False

    def found(self, seen: Found) -> None:
        """Its golden is as it was just seen."""
        self.golden, self.golden_bytes, self.served = seen.golden, seen.golden_bytes, seen.served
        self.estimate = seen.memory or self.estimate
        if seen.golden is not Golden.NONE:  # else another will be like the one that was
            self.gpus, self.fixed, self.carried = seen.gpus, seen.fixed, seen.carried

    def weighs(self, held: Held, memory: int) -> None:
        """A replica of it holds so many bytes."""
        held.memory = memory
        self.most = max(self.most, memory)

    def next_name(self) -> str:
        """A name for another replica: one that is prepared, if there is any."""
        if self.prepared:
            return min(self.prepared, key=lambda name: (len(name), name))
        return self._free_name()

    def name_to_prepare(self) -> str:
        """A name for a container that is to be prepared."""
        return self._free_name()

    def _free_name(self) -> str:
        taken = self.replicas.keys() | self.prepared | {self.preparing}
        names = (f"{self.prefix[:_LONGEST_PREFIX]}.{number}" for number in itertools.count(1))
        return next(name for name in names if name not in taken)

    @property
    def expected(self) -> int:
        """Bytes that another replica is expected to hold."""
        return self.rules.memory or self.most or self.estimate

    def has(self, *phases: Phase) -> bool:
        """Whether a replica is in one of these."""
        return any(one.phase in phases for one in self.replicas.values())

    def tier(self) -> str:
        """The tier that a request finds: the fastest one that something is in, or is coming from."""
        if self.has(Phase.HOT):
            return "hot"
        if self.has(Phase.STANDBY, Phase.WAKING, Phase.FREEZING):
            return "standby"
        place = Golden.DISK if self.golden is Golden.MOVING else self.golden
        return str(place) if place in (Golden.TMPFS, Golden.DISK) else "cold"

    def refuse(self, refused: RefusedError) -> None:
        """Tell all who wait."""
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_exception(refused)

    def seen(self) -> Model:
        """As the policy sees it."""
        return Model(
            name=self.name,
            rules=self.rules,
            golden=self.golden,
            golden_bytes=self.golden_bytes,
            memory=self.expected,
            gpus=self.gpus,
            fixed=self.fixed,
            carried=self.carried,
            cold=max(self.estimate, self.most),
            cramped=self.cramped,
            replicas=tuple(one.seen() for one in self.replicas.values()),
            waiting=len(self.waiters),
            asked=self.asked,
            retry_at=self.retry_at,
            make_at=self.make_at,
            move_at=self.move_at,
            warm=self.warm,
            scale=self.scale,
            drained=self.drained,
            prepared=len(self.prepared),
            preparing=self.preparing is not None,
            prepare_at=self.prepare_at,
        )
