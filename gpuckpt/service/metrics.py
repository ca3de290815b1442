"""What the service counts: Prometheus' metrics, and the same numbers for the dashboard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from gpuckpt.pool.book import Event
from gpuckpt.pool.state import Golden, Phase, State
from gpuckpt.service.front import Record
from gpuckpt.service.view import HistogramView

TIERS = ("hot", "standby", "tmpfs", "disk", "cold")
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REMEMBERED = 1000  # times to the first token, for the quantiles that the dashboard shows


class Metrics:
    """Counts events and requests; ``state`` is asked for the rest when somebody reads."""

    def __init__(self, state: Callable[[], State], connections: Callable[[], int]) -> None:
        self._state = state
        self._connections = connections
        self.registry = CollectorRegistry()
        histogram = partial(Histogram, buckets=BOUNDS, registry=self.registry)
        self._ttft = histogram("gpuckpt_ttft_seconds", "From the request to its answer's first byte", ["tier"])
        self._wait = histogram("gpuckpt_wait_seconds", "From the request to its replica", ["tier"])
        self._phases = histogram("gpuckpt_restore_phase_seconds", "Phases of restores", ["phase"])
        counter = partial(Counter, registry=self.registry)
        self._wakes = counter("gpuckpt_wakes", "Replicas brought up", ["model", "tier", "outcome"])
        self._evictions = counter("gpuckpt_evictions", "Replicas removed", ["model", "reason"])
        self._lost = counter("gpuckpt_replicas_lost", "Replicas that died or were given up", ["model", "reason"])
        self._moves = counter("gpuckpt_golden_moves", "Goldens moved between tiers", ["model", "to"])
        self._quarantined = counter("gpuckpt_goldens_quarantined", "Goldens found damaged", ["model"])
        self._canaries = counter("gpuckpt_canaries", "Canaries of hot replicas", ["model", "outcome"])
        self._requests = counter("gpuckpt_requests", "Requests of clients", ["model", "outcome", "code"])
        self._retries = counter("gpuckpt_retries", "Requests given to another replica", ["model"])
        self.registry.register(self)
        self._recent: dict[str, deque[float]] = {tier: deque(maxlen=_REMEMBERED) for tier in TIERS}
        self._counts: dict[str, list[int]] = {tier: [0] * (len(BOUNDS) + 1) for tier in TIERS}
        self.answered: dict[str, int] = {}
        self.failed: dict[str, int] = {}

    # ------------------------------------------------------------------ what happens

    def event(self, event: Event) -> None:
        """Count something that happened in the pool."""
        match event.kind:
            case "restored" | "started" | "woken":
                self._wakes.labels(event.model, event.tier, "ok").inc()
                for name, seconds in event.phases.items():
                    self._phases.labels(name).observe(seconds)
            case "failed" if event.tier:
                self._wakes.labels(event.model, event.tier, "failed").inc()
            case "stopped":
                self._evictions.labels(event.model, event.reason.partition(":")[0]).inc()
            case "lost":
                self._lost.labels(event.model, event.reason.partition(":")[0]).inc()
            case "moved":
                self._moves.labels(event.model, event.reason.partition(":")[0]).inc()
            case "quarantined":
                self._quarantined.labels(event.model).inc()

    def canary(self, model: str, outcome: str) -> None:
        """Count a canary."""
        self._canaries.labels(model, outcome).inc()

    def request(self, record: Record) -> None:
        """Count a request."""
        model = record.model or "-"
        self._requests.labels(model, record.outcome or "failed", str(record.status)).inc()
        if record.retries:
            self._retries.labels(model).inc(len(record.retries))
        if record.tier:
            self._wait.labels(record.tier).observe(record.waited)
        if record.outcome in ("ok", "error"):
            self.answered[model] = self.answered.get(model, 0) + 1
        elif record.outcome != "gone" and record.model:
            self.failed[model] = self.failed.get(model, 0) + 1
        if record.first is not None and record.tier and record.status < 400:
            self._ttft.labels(record.tier).observe(record.first)
            self._recent[record.tier].append(record.first)
            place = next((at for at, bound in enumerate(BOUNDS) if record.first <= bound), len(BOUNDS))
            self._counts[record.tier][place] += 1

    # ------------------------------------------------------------------ what is read

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def ttft(self) -> dict[str, HistogramView]:
        """Times to the first token, by the tier that the request found."""
        return {
            tier: HistogramView(
                bounds=list(BOUNDS),
                counts=list(counts),
                p50=_quantile(self._recent[tier], 0.5),
                p95=_quantile(self._recent[tier], 0.95),
            )
            for tier, counts in self._counts.items()
        }

    def collect(self) -> Iterable[Metric]:
        """What is there right now (called by the registry)."""
        state = self._state()
        replicas = GaugeMetricFamily("gpuckpt_replicas", "Replicas by phase", labels=["model", "phase"])
        waiting = GaugeMetricFamily("gpuckpt_queue_requests", "Requests that wait for a replica", labels=["model"])
        working = GaugeMetricFamily(
            "gpuckpt_requests_at_work", "Requests that replicas are at work on", labels=["model"]
        )
        held = GaugeMetricFamily(
            "gpuckpt_bytes", "Bytes by tier: of replicas their own, else of goldens", labels=["tier"]
        )
        gpu = GaugeMetricFamily("gpuckpt_gpu_bytes", "GPU memory of replicas")
        connections = GaugeMetricFamily("gpuckpt_connections", "Connections of clients")
        sums = dict.fromkeys(TIERS[:-1], 0)
        total_gpu = 0
        for model in state.models:
            for phase in Phase:
                replicas.add_metric([model.name, phase], sum(one.phase is phase for one in model.replicas))
            waiting.add_metric([model.name], model.waiting)
            working.add_metric([model.name], sum(one.requests for one in model.replicas))
            for one in model.replicas:
                sums["standby" if one.phase is Phase.STANDBY else "hot"] += one.memory
                total_gpu += 0 if one.phase is Phase.STANDBY else sum(share.bytes for share in one.gpus)
            if model.golden in (Golden.TMPFS, Golden.DISK):
                sums[str(model.golden)] += model.golden_bytes
        for tier, size in sums.items():
            held.add_metric([tier], size)
        gpu.add_metric([], total_gpu)
        connections.add_metric([], self._connections())
        return [replicas, waiting, working, held, gpu, connections]


def _quantile(values: deque[float], part: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]
