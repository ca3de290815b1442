"""What the samples of the warm pool's benchmark say: summaries, differences, targets. Computed from the JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import front
from benchmarks.journal import Document, Sample, summary
from benchmarks.statistics import bootstrap_interval, median
from benchmarks.targets import Target, targets

TIERS = ("hot", "standby", "tmpfs", "disk", "disk_evicted", "cold")

TARGETS = (
    Target(
        "first token of a standby, beyond that of a hot replica, p50",
        "standby_beyond_hot.value",
        0.1,
        ("tiers.hot.ttft_s", "tiers.standby.ttft_s"),
        at_most=True,
        unit="s",
    ),
    Target(
        "first token from a golden in memory, p50",
        "tiers.tmpfs.ttft_s.p50",
        0.6,
        ("tiers.tmpfs.ttft_s",),
        at_most=True,
        unit="s",
    ),
    Target(
        "from one to eight replicas that have answered, p50",
        "scale_out.all_s.p50",
        3,
        ("scale_out.all_s",),
        at_most=True,
        unit="s",
    ),
    Target(
        "the front adds to each event of 64 streams, p50",
        "front.64 streams.added_event_p50_ms.p50",
        1,
        ("front.64 streams.added_event_p50_ms",),
        at_most=True,
        unit="ms",
    ),
    Target(
        "the front adds to each event of 64 streams, p99",
        "front.64 streams.added_event_p99_ms.p50",
        3,
        ("front.64 streams.added_event_p99_ms",),
        at_most=True,
        unit="ms",
    ),
    Target("twelve replicas of two models all answered", "many.all_answered", 1, (), unit="bool"),
    Target("twelve replicas answered as recorded", "many.canaries_equal", 1, (), unit="bool"),
)


def summarise(document: Document) -> Document:
    """Everything that is computed of a journal's samples."""
    runs: dict[str, list[Sample]] = document["runs"]
    found: Document = {}
    tiers = {
        tier: {"ttft_s": summary(runs[tier], "ttft_s"), "phases": median_phases(runs[tier])}
        for tier in TIERS
        if runs.get(tier)
    }
    if tiers:
        found["tiers"] = tiers
    for name, above in (("standby_beyond_hot", "standby"), ("front_beyond_direct", "hot")):
        below = "hot" if above == "standby" else "direct"
        if runs.get(above) and runs.get(below):
            found[name] = beyond(*([float(one["ttft_s"]) for one in runs[kind]] for kind in (above, below)))
    for name in ("scale_out", "burst"):
        if samples := runs.get(name):
            found[name] = {
                "replicas": min(int(one["replicas"]) for one in samples),
                "all_s": summary(samples, "all_s"),
                "answered_s": [round(value, 6) for value in middle(samples)["answered_s"]],
                "phases": {row["name"]: row["seconds"] for row in middle(samples)["phases"]},
            }
    if runs.get("many"):
        found["many"] = many(runs)
    pairs = {name: samples for name, samples in runs.items() if samples and any("added_" in key for key in samples[0])}
    if pairs:
        found |= front.summarise({"runs": pairs})
    found["targets"] = targets(found, TARGETS)
    return found


def median_phases(samples: Sequence[Sample]) -> dict[str, float]:
    """The median of each phase over the samples, in the order in which they first come; missing ones count as 0."""
    names: dict[str, None] = {}
    for sample in samples:
        names |= dict.fromkeys(row["name"] for row in sample["phases"])
    tables = [{row["name"]: float(row["seconds"]) for row in sample["phases"]} for sample in samples]
    return {name: round(median([table.get(name, 0.0) for table in tables]), 6) for name in names}


def beyond(above: Sequence[float], below: Sequence[float]) -> Document:
    """How much longer one takes than the other: the difference of the medians, and its 95 % interval.

    The samples were taken in rounds, one of each: drawn again as pairs, as far as both have them.
    """
    pairs = list(zip(above, below, strict=False))

    def difference(drawn: Sequence[float]) -> float:
        chosen = [pairs[int(index)] for index in drawn]
        return median([pair[0] for pair in chosen]) - median([pair[1] for pair in chosen])

    low, high = bootstrap_interval(list(map(float, range(len(pairs)))), difference)
    return {
        "value": round(median(above) - median(below), 6),
        "interval": [round(low, 6), round(high, 6)],
        "n": min(len(above), len(below)),
    }


def middle(samples: Sequence[Sample]) -> Sample:
    """The sample whose time is nearest to the median: one that was measured, and adds up."""
    aim = median([float(sample["all_s"]) for sample in samples])
    return min(samples, key=lambda sample: abs(float(sample["all_s"]) - aim))


def many(runs: dict[str, list[Sample]]) -> Document:
    """The last sample of replicas of several models side by side, and what they would take started separately."""
    sample = dict(runs["many"][-1])
    sample.pop("round", None)
    alone: dict[str, Any] = {}
    for name, held in sample["by_model"].items():
        colds = [one["alone_bytes"] for one in (*runs.get("cold", ()), *runs.get(f"cold_{name}", ()))
                 if one.get("alone_bytes") and one.get("model") == name]  # fmt: skip
        if colds:
            alone[name] = {"each_bytes": round(median(colds)), "bytes": round(median(colds)) * held["replicas"]}
    found: Document = {**sample, "n": len(runs["many"])}
    if len(alone) == len(sample["by_model"]):
        whole = sum(each["bytes"] for each in alone.values())
        taken = sample["available_drop_bytes"] + sum(sample["goldens_bytes"].values())
        found["separately"] = {
            "by_model": alone,
            "bytes": whole,
            "fits": whole <= sample["memory_total_bytes"],
            "over_with_goldens": round(whole / taken, 3) if taken > 0 else None,
        }
    return found
