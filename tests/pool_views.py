"""Pools as the service would tell of them: a lively one, an empty one, a large one."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from gpuckpt.service.view import EventView, GoldenView, HistogramView, ModelView, PoolView, ReplicaView, UseView

GIB = 1 << 30
MIB = 1 << 20
BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
RESTORE = {"checks": 0.04, "container": 0.21, "restore": 0.47, "health": 0.11, "unaccounted": 0.02}
COLD = {"cold: container": 0.6, "cold: server start": 31.2, "cold: first token": 1.9}


def a_replica(name: str, phase: str, since: float, **other: Any) -> ReplicaView:
    """One replica; a process of its own unless it is still coming."""
    coming = phase in ("restoring", "starting")
    told: dict[str, Any] = {"requests": 0, "memory": 0 if coming else 380 * MIB, "gpu": 0, **other}
    told.setdefault("pid", None if coming else 20_000 + sum(map(ord, name)))
    return ReplicaView(name=name, phase=phase, since=since, **told)


def a_model(name: str, tier: str = "tmpfs", *, golden: GoldenView | str | None = None, **other: Any) -> ModelView:
    """One model; ``golden``: its golden, or the tier of one of its name."""
    rules: dict[str, int | float | str | None] = {
        "min_standby": 0,
        "max_replicas": 2,
        "concurrency": 8,
        "idle_freeze": 60.0,
        "idle_release": 600.0,
        "idle_disk": None,
        "priority": 0,
        "pin": "no",
        **other.pop("rules", {}),
    }
    size = other.pop("bytes", 3 * GIB)
    told: dict[str, Any] = {
        "aliases": [],
        "replicas": [],
        "waiting": 0,
        "answered": 0,
        "failed": 0,
        "asked": None,
        "trouble": "",
        "retry_at": None,
        "warm": False,
        "drained": False,
        "scale": None,
        "expected_memory": 420 * MIB,
        **other,
    }
    if not isinstance(golden, GoldenView):
        place = golden or {"hot": "tmpfs", "standby": "tmpfs", "cold": "none"}.get(tier, tier)
        golden = GoldenView(name=name, tier=place, bytes=0 if place == "none" else size)
    told["golden"] = golden
    told.setdefault("requests", sum(one.requests for one in told["replicas"]))
    return ModelView(name=name, tier=tier, rules=rules, **told)


def a_histogram(counts: Mapping[float, int], p50: float | None, p95: float | None) -> HistogramView:
    """``counts`` by their upper bound; infinity is for the longer ones."""
    return HistogramView(
        bounds=list(BOUNDS), counts=[counts.get(bound, 0) for bound in (*BOUNDS, float("inf"))], p50=p50, p95=p95
    )


def a_pool(now: float, models: Sequence[ModelView] = (), **other: Any) -> PoolView:
    """A pool of these models; what they hold is added up."""
    replicas = [replica for model in models for replica in model.replicas]
    stored = sum(model.golden.bytes for model in models if model.golden.tier in ("tmpfs", "moving"))
    memory = sum(replica.memory for replica in replicas)
    told: dict[str, Any] = {
        "version": "0.1.0",
        "pid": 4211,
        "state": "ready",
        "started": now - 11_524,
        "listen": ["127.0.0.1:8400", "unix:/run/gpuckpt/front.sock"],
        "memory": UseView(used=memory, limit=24 * GIB),
        "gpu": UseView(used=sum(replica.gpu for replica in replicas), limit=None),
        "store": UseView(used=stored, limit=32 * GIB),
        "host_memory": UseView(used=memory + stored + 7 * GIB, limit=62 * GIB),
        "ttft": {},
        "events": [],
        **other,
    }
    return PoolView(now=now, models=list(models), **told)


def empty(now: float) -> PoolView:
    """A service that has just begun, without a model."""
    return a_pool(
        now, started=now - 4, memory=UseView(used=0, limit=None), host_memory=UseView(used=5 * GIB, limit=62 * GIB)
    )


def lively(now: float) -> PoolView:
    """Models in all tiers, one that cannot be started, one whose golden was refused; sixty events."""
    models = [
        a_model(
            "qwen3-8b", "hot", bytes=int(9.3 * GIB), aliases=["chat", "default"], waiting=2, asked=now - 0.4,
            answered=18_233, failed=2, rules={"max_replicas": 4, "pin": "hot", "priority": 10},
            replicas=[
                a_replica("qwen3-8b.1", "hot", now - 1, requests=8, memory=int(2.1 * GIB), gpu=int(17.6 * GIB)),
                a_replica("qwen3-8b.2", "hot", now - 2, requests=5, memory=int(1.8 * GIB), gpu=int(17.2 * GIB)),
                a_replica("qwen3-8b.3", "restoring", now - 0.6),
            ],
        ),
        a_model(
            "llama-3.2-3b-instruct", "hot", bytes=int(5.1 * GIB), asked=now - 48, answered=2_410,
            rules={"min_standby": 1, "idle_freeze": 120.0},
            replicas=[
                a_replica("llama-3.2-3b-instruct.1", "hot", now - 46, memory=int(1.1 * GIB), gpu=int(8.4 * GIB)),
                a_replica("llama-3.2-3b-instruct.2", "standby", now - 350, memory=int(6.2 * GIB)),
            ],
        ),
        a_model(
            "bge-m3", "standby", bytes=int(2.2 * GIB), aliases=["embed"], asked=now - 213, answered=64_011, warm=True,
            replicas=[a_replica("bge-m3.1", "standby", now - 150, memory=640 * MIB)],
        ),
        a_model(
            "mistral-small-24b", "tmpfs", bytes=int(11.8 * GIB), asked=now - 1_310, answered=88,
            rules={"idle_disk": 1800.0},
        ),
        a_model("phi-4-mini", "disk", bytes=int(4.4 * GIB), asked=now - 9_120, answered=12),
        a_model(
            "deepseek-r1-distill-7b", "cold", asked=now - 36, failed=4, waiting=1, retry_at=now + 14,
            trouble="the server did not answer within 120 s\nRuntimeError: CUDA error: out of memory",
            rules={"priority": -1},
        ),
        a_model("gemma-3-4b", "cold", golden="quarantined", bytes=int(3.6 * GIB), asked=now - 7_000, answered=301),
    ]  # fmt: skip
    ttft = {
        "hot": a_histogram({0.01: 310, 0.02: 4120, 0.05: 11_903, 0.1: 3_360, 0.2: 702, 0.5: 96, 1.0: 11}, 0.034, 0.142),
        "standby": a_histogram({0.05: 12, 0.1: 104, 0.2: 221, 0.5: 60, 1.0: 9, 2.0: 2}, 0.138, 0.41),
        "tmpfs": a_histogram({0.5: 4, 1.0: 87, 2.0: 112, 5.0: 14, 10.0: 1}, 1.12, 2.71),
        "disk": a_histogram({2.0: 2, 5.0: 11, 10.0: 8, 20.0: 3}, 4.4, 13.8),
        "cold": a_histogram({20.0: 1, 50.0: 5, 100.0: 2, float("inf"): 1}, 36.2, 112.0),
    }
    return a_pool(
        now,
        models,
        gpu=UseView(used=int(43.2 * GIB), limit=80 * GIB),
        store=UseView(used=int(28.4 * GIB), limit=36 * GIB),
        host_memory=UseView(used=int(47.3 * GIB), limit=126 * GIB),
        ttft=ttft,
        events=a_history(now),
    )


def a_history(now: float) -> list[EventView]:
    """Sixty events of the last quarter of an hour, always the same ones."""
    chance = random.Random(7)
    told: list[tuple[float, dict[str, Any]]] = []

    def happened(ago: float, kind: str, model: str, replica: int = 0, **other: Any) -> None:
        name = f"{model}.{replica}" if replica else ""
        told.append((now - ago, {"kind": kind, "model": model, "replica": name, **other}))

    def spent(table: dict[str, float]) -> dict[str, Any]:
        phases = {name: seconds * chance.uniform(0.8, 1.4) for name, seconds in table.items()}
        return {"seconds": sum(phases.values()), "phases": phases}

    for ago in (880, 640, 431, 237, 96):
        happened(ago, "restored", "qwen3-8b", 2, **spent({**RESTORE, "restore": 1.31}))
        happened(ago - chance.uniform(60, 80), "frozen", "qwen3-8b", 2, seconds=chance.uniform(0.2, 0.5))
        happened(ago - chance.uniform(90, 93), "woken", "qwen3-8b", 2, seconds=chance.uniform(0.05, 0.12))
    for ago in range(860, 60, -130):
        happened(ago, "woken", "llama-3.2-3b-instruct", 1, seconds=chance.uniform(0.02, 0.2))
        happened(ago - 64, "frozen", "llama-3.2-3b-instruct", 1, seconds=chance.uniform(0.1, 0.3))
    for ago in range(835, 160, -100):
        happened(ago, "woken", "bge-m3", 1, seconds=chance.uniform(0.004, 0.03))
        happened(ago - 61.5, "frozen", "bge-m3", 1, seconds=chance.uniform(0.01, 0.05))
    happened(790, "adopted", "bge-m3", 1)
    happened(760, "reloaded", "", reason="added phi-4-mini; changed bge-m3")
    happened(745, "moved", "mistral-small-24b", seconds=38.5, reason="tmpfs: asked")
    happened(744, "restored", "mistral-small-24b", 1, **spent(RESTORE))
    happened(683, "frozen", "mistral-small-24b", 1, seconds=0.3)
    happened(82, "stopped", "mistral-small-24b", 1, seconds=0.21, reason="idle")
    happened(610, "moved", "phi-4-mini", seconds=24.9, reason="disk: room")
    happened(655, "started", "phi-4-mini", 1, **spent({**COLD, **RESTORE}))
    happened(640, "stopped", "phi-4-mini", 1, seconds=0.34, reason="room")
    happened(520, "lost", "llama-3.2-3b-instruct", 1, reason="3 health checks in a row got no answer")
    happened(519.6, "stopped", "llama-3.2-3b-instruct", 1, seconds=0.4, reason="lost")
    happened(518, "restored", "llama-3.2-3b-instruct", 1, **spent(RESTORE))
    refused = "memory of process 1 differs from the golden's digest at pages-3.img"
    happened(404, "failed", "gemma-3-4b", 1, reason=refused)
    happened(404, "quarantined", "gemma-3-4b", reason=refused)
    for ago in (312, 187, 30):
        happened(ago, "failed", "deepseek-r1-distill-7b", 1, reason="the server did not answer within 120 s")
    told.sort(key=lambda one: one[0])
    return [EventView(seq=101 + at, time=when, **what) for at, (when, what) in enumerate(told[-60:])]


def large(now: float, count: int = 40) -> PoolView:
    """Many models, a few events each."""
    chance = random.Random(3)
    models = []
    events = []
    for number in range(count):
        name = f"team-{number % 7}/model-{number:02d}-{'instruct' if number % 3 else 'base'}"
        tier = ("hot", "standby", "tmpfs", "disk", "cold")[number % 5]
        held = [a_replica(f"model-{number:02d}.1", tier, now - number)] if tier in ("hot", "standby") else []
        models.append(
            a_model(name, tier, bytes=chance.randrange(300, 900) * MIB, replicas=held, asked=now - number * 7.0)
        )
        events += [(now - chance.uniform(0, 600), name, kind) for kind in ("restored", "frozen", "stopped")]
    told = [
        EventView(seq=seq, time=when, kind=kind, model=name, replica=f"{name}.1", seconds=0.4)
        for seq, (when, name, kind) in enumerate(sorted(events), start=1)
    ]
    return a_pool(now, models, events=told, memory=UseView(used=16 * 380 * MIB, limit=8 * GIB))
