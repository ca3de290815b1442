"""What the pool knows at one moment: plain values, from which :mod:`gpuckpt.pool.policy` decides.

Times are seconds on one monotonic clock, sizes are bytes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gpuckpt.cuda.driver import Gpu
from gpuckpt.manifest import Held


class Phase(enum.StrEnum):
    """What a replica is doing. The first three will be hot soon."""

    RESTORING = "restoring"
    STARTING = "starting"  # cold; a golden is made of it before it serves
    WAKING = "waking"
    HOT = "hot"
    FREEZING = "freezing"
    STANDBY = "standby"
    DRAINING = "draining"  # answers what it has, takes nothing new
    STOPPING = "stopping"


COMING = frozenset({Phase.RESTORING, Phase.STARTING, Phase.WAKING})
"""Phases that end in hot."""
GOING = frozenset({Phase.DRAINING, Phase.STOPPING})
"""Phases that end with the replica gone."""


class Golden(enum.StrEnum):
    """Where a model's golden is."""

    TMPFS = "tmpfs"
    DISK = "disk"
    NONE = "none"
    MOVING = "moving"
    QUARANTINED = "quarantined"  # it failed verification: kept for a look, not used


class Pin(enum.StrEnum):
    """What a model is never taken below."""

    NO = "no"
    STANDBY = "standby"
    HOT = "hot"


@dataclass(frozen=True, slots=True)
class Rules:
    """What is wanted of one model; see the commented example of the configuration."""

    min_standby: int = 0
    max_replicas: int = 1
    concurrency: int = 8
    idle_freeze: float = 60.0
    idle_release: float = 600.0
    idle_disk: float | None = None
    priority: int = 0
    pin: Pin = Pin.NO
    memory: int | None = None
    prepare: int | None = None  # containers prepared ahead; None: for as many replicas as there may be

    @property
    def ahead(self) -> int:
        """How many containers there are to be, those of replicas counted."""
        return self.max_replicas if self.prepare is None else min(self.prepare, self.max_replicas)


@dataclass(frozen=True, slots=True)
class Replica:
    """One container of a model. ``since``: when its last request ended, or its phase began if none has.

    ``gpus``: what it holds on GPUs, or will hold when it has come; of a standby what it held. ``carried`` are the bytes
    of it that are the host's to hold while it is frozen. ``checking``: its health is being looked at, so it must
    neither freeze nor go right now.
    """

    name: str
    phase: Phase
    since: float
    requests: int = 0
    memory: int = 0
    gpus: tuple[Held, ...] = ()
    carried: int = 0
    checking: bool = False

    @property
    def idle(self) -> bool:
        """Whether nobody needs it at this moment."""
        return not (self.requests or self.checking)


@dataclass(frozen=True, slots=True)
class Model:
    """One model: its rules, its golden, its replicas and who waits for them.

    ``memory`` and ``gpus`` are what one more replica is expected to hold while it is hot, with the GPUs that its golden
    was made on; ``fixed``: it can be on no others; ``carried`` as of a replica. ``cold`` is what a server holds that is
    started cold, which shares nothing with anybody. ``asked``: when the last request for it came. Because the last ones
    failed, no replica is begun before ``retry_at``, its golden is not made unasked before ``make_at``, nor moved before
    ``move_at``, and no container prepared before ``prepare_at``. ``warm``: kept ready now by its schedule. ``scale``:
    so many hot replicas are kept, as somebody has ordered; none at 0, whatever the rules say. ``drained``: it gives its
    replicas up and gets no new ones. ``prepared``: containers that wait for a restore, without a process; another one
    is made now if ``preparing``. ``cramped``: bytes that the tmpfs lacked when its golden was made.
    """

    name: str
    rules: Rules
    golden: Golden = Golden.NONE
    golden_bytes: int = 0
    memory: int = 0
    gpus: tuple[Held, ...] = ()
    fixed: bool = False
    carried: int = 0
    cold: int = 0
    replicas: tuple[Replica, ...] = ()
    waiting: int = 0
    asked: float = 0.0
    retry_at: float = 0.0
    make_at: float = 0.0
    move_at: float = 0.0
    warm: bool = False
    scale: int | None = None
    drained: bool = False
    prepared: int = 0
    preparing: bool = False
    cramped: int = 0
    prepare_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of what all replicas (``memory``) and all goldens in the tmpfs (``store``) hold; None: none.

    Of each GPU replicas may hold ``memory``, and as much as ``free`` now, because others hold the rest: what is free
    there and what they hold already.
    """

    memory: int | None = None
    gpus: tuple[Gpu, ...] | None = None
    store: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Everything at one moment. ``draining``: the daemon goes down, nothing new is begun."""

    now: float
    models: tuple[Model, ...]
    budget: Budget = Budget()
    draining: bool = False


# ---------------------------------------------------------------------- what can be done


@dataclass(frozen=True, slots=True)
class Restore:
    """Restore another replica from the model's golden; ``standby``: freeze it as soon as it has proved itself.

    ``gpus``: what it will hold on GPUs, and on which it will find room; the same of the two below.
    """

    model: str
    standby: bool = False
    gpus: tuple[Held, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """Start a server cold, make the model's golden of it, and restore a replica from that."""

    model: str
    gpus: tuple[Held, ...] = ()


@dataclass(frozen=True, slots=True)
class Wake:
    """Thaw a standby."""

    model: str
    replica: str
    gpus: tuple[Held, ...] = ()


@dataclass(frozen=True, slots=True)
class Freeze:
    """Make a standby of a hot replica."""

    model: str
    replica: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Remove a replica; ``reason`` is a word for the metrics."""

    model: str
    replica: str
    reason: str


@dataclass(frozen=True, slots=True)
class Move:
    """Move the model's golden to another tier."""

    model: str
    to: Golden
    reason: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make the container of a later replica, up to the point where only its processes are missing."""

    model: str


Action = Restore | Start | Wake | Freeze | Stop | Move | Prepare
