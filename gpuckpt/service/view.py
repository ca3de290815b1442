"""What the service tells of itself, as JSON: a versioned contract for the command line, the dashboard and scripts.

Times are seconds since 1970, durations seconds, sizes bytes. New fields may come; none changes its meaning within one
``schema``.
"""

from __future__ import annotations

from msgspec import Struct, field

SCHEMA = 1


class ReplicaView(Struct, frozen=True, kw_only=True):
    """One replica. ``since``: when its last request ended, or its phase began if none has."""

    name: str
    phase: str  # restoring, starting, waking, hot, freezing, standby, draining, stopping
    since: float
    requests: int
    memory: int  # bytes of its own, beside the golden's that it shares with others
    gpu: int  # bytes on GPUs; none of a standby
    pid: int | None
    gpus: dict[str, int] = {}  # the same by the GPU's UUID


class GoldenView(Struct, frozen=True, kw_only=True):
    """A model's golden."""

    name: str
    tier: str  # tmpfs, disk, none, moving, quarantined
    bytes: int


class ModelView(Struct, frozen=True, kw_only=True):
    """One model. ``tier``: the fastest that a request would find now (hot, standby, tmpfs, disk, cold)."""

    name: str
    aliases: list[str]
    tier: str
    golden: GoldenView
    replicas: list[ReplicaView]
    waiting: int  # requests that wait for a replica
    requests: int  # requests that replicas are at work on
    answered: int  # requests answered since the service began
    failed: int  # requests that got no answer from the model since then
    asked: float | None  # when the last request came
    trouble: str  # why its last start failed; empty if it did not
    retry_at: float | None  # no start before then
    warm: bool  # kept ready now, by its schedule or for the start
    drained: bool  # takes no requests until it is woken
    scale: int | None  # hot replicas that were asked to be kept
    expected_memory: int  # what one more replica is expected to hold
    rules: dict[str, int | float | str | None]  # min_standby, max_replicas, concurrency, idle_freeze, ..., pin


class UseView(Struct, frozen=True, kw_only=True):
    """One budget. ``limit`` None: there is none."""

    used: int
    limit: int | None


class GpuView(Struct, frozen=True, kw_only=True):
    """One GPU: what replicas hold of it, and what they may; what others hold is not theirs."""

    uuid: str
    name: str
    used: int
    limit: int


class HistogramView(Struct, frozen=True, kw_only=True):
    """Seconds to the first token: ``counts[i]`` requests took at most ``bounds[i]``; the last count is for longer."""

    bounds: list[float]
    counts: list[int]
    p50: float | None
    p95: float | None


class EventView(Struct, frozen=True, kw_only=True):
    """Something that happened. ``seq`` counts up by one; ``seconds`` is how long it took."""

    seq: int
    time: float
    kind: (
        str  # restored, started, woken, frozen, stopped, moved, failed, lost, quarantined, adopted, reloaded, draining
    )
    model: str = ""
    replica: str = ""
    reason: str = ""
    tier: str = ""  # where a replica came from: standby, tmpfs, disk, cold
    seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


class PoolView(Struct, frozen=True, kw_only=True):
    """Everything at one moment."""

    schema: int = SCHEMA
    version: str
    pid: int
    state: str  # starting, ready, draining
    started: float
    now: float
    listen: list[str]
    memory: UseView  # of all replicas
    gpu: UseView  # of all GPUs together
    store: UseView  # goldens in the tmpfs
    host_memory: UseView  # of the whole machine: used, total
    models: list[ModelView]
    ttft: dict[str, HistogramView]  # by the tier that the request found: hot, standby, tmpfs, disk, cold
    events: list[EventView]  # the last ones, oldest first
    gpus: list[GpuView] = []  # in the driver's order; none where there are none, or nobody can tell
