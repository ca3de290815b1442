"""The numbers of the acceptance on a GPU that one looks for, out of its steps, and what they should reach.

Of a dry run there are none: what its stand-ins say stays in its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_record import Document
from benchmarks.gpu_steps import STEPS
from benchmarks.restore import median_phases
from benchmarks.targets import Target, targets

SERVERS = "server."
# Seconds to the first token, from the golden and from standby, by the model's shape.
_WANTED = {"8b": (1.4, 0.85), "1.5b": (1.0, 0.6)}


def key(shape: str) -> str:
    """A shape's name as it may be in a dotted path."""
    return shape.replace(".", "_")


def _times(shape: str, golden: float, standby: float) -> Iterator[Target]:
    for tier, limit, words in (("golden", golden, "from the golden"), ("standby", standby, "from standby")):
        path = f"ttft.guest-{key(shape)}-eager.{tier}"
        name = f"first token of the {shape.upper()} model {words}, p50"
        yield Target(name, f"{path}.p50", limit, (path,), at_most=True, unit="s")


TARGETS = (
    *(target for shape, wanted in _WANTED.items() for target in _times(shape, *wanted)),
    Target("device memory of suspended processes", "suspended_bytes_most", 0, (), at_most=True, unit="B"),
    Target("answers that differ after a wake", "answers_different", 0, (), at_most=True),
    Target("CRIU brings a suspended CUDA process back", "criu_cuda", 1, (), unit="bool"),
    Target(
        "an activation's copy, against 1.5 times its bytes at full speed and 20 µs, the slowest size",
        "activation.worst_over_bound", 1, ("activation.by_size",), at_most=True, unit="×",
    ),
    Target("sessions that were answered, of 50 in half of their memory", "oversubscribed.completed", 50, ()),
    Target("of them with other tokens or bits", "oversubscribed.mismatches", 0, (), at_most=True),
    Target("a session's way over bare copies, the slower one", "paging_share", 0.85, (), unit="×"),
)  # fmt: skip


def summarise(document: Document) -> Document:
    """The keys of the document that are computed from its steps."""
    steps = document["steps"]
    counted = {
        word: sum(step["status"] == word for step in steps.values()) for word in ("ok", "failed", "skipped", "left")
    }
    made: Document = {"counts": counted, "not_measured": not_measured(document)}
    if document["dry"]:
        return made | {"targets": targets({}, TARGETS)}
    found = numbers(steps)
    return made | found | {"targets": targets(found, TARGETS)}


def not_measured(document: Document) -> dict[str, str]:
    """Every step that gave no number, and why."""
    found = {}
    for step in STEPS:
        kept = document["steps"].get(step.name)
        if kept is None:
            found[step.name] = "it was not reached"
        elif kept["status"] != "ok":
            found[step.name] = f"{kept['status']}: {kept['reason']}"
        elif document["dry"]:
            found[step.name] = "a dry run measures nothing"
    return found


def numbers(steps: Document) -> Document:
    """Whatever steps have found, measured or not: :func:`summarise` has those of measurements."""
    data = {name: step["data"] for name, step in steps.items() if step["data"]}
    made: Document = {"ttft": {}, "phases": {}}
    held: list[int] = []
    differing: list[int] = []
    for name, found in data.items():
        if name.startswith("phases.") and "sizes" in found:
            sizes = {size: one for size, one in found["sizes"].items() if "checkpoint_s" in one}
            made["phases"] |= sizes
            # Where NVML names no processes, nothing is what it says of those that run, too: no proof of anything.
            held += [
                value
                for one in sizes.values()
                for before, value in zip(one["device_bytes"]["before"], one["device_bytes"]["suspended"], strict=True)
                if before
            ]
        if name.startswith(SERVERS) and "model" in found:
            shape = found["model"]
            tiers = {"golden": found.get("golden_ttft_s"), "standby": found.get("standby_ttft_s")}
            made["ttft"][f"{shape['server']}-{key(shape['shape'])}-{shape['how']}"] = {
                **shape,
                **{tier: kept for tier, kept in tiers.items() if kept},
                **({"cold_s": found["cold_ttft_s"]} if "cold_ttft_s" in found else {}),
                "phases": {
                    "golden": median_phases(found.get("golden_samples", [])),
                    "suspend": _medians(found, "suspend_phases"),
                    "wake": _medians(found, "wake_phases"),
                },
            }
        if found.get("cycles"):
            held += [one["suspended"]["processes"] for one in found["cycles"] if one["running"]["processes"]]
            differing.append(found["answers_different"])
    if held:
        made["suspended_bytes_most"] = max(held)
    if differing:
        made["answers_different"] = sum(differing)
    if (status := steps.get("probe.criu-cuda", {}).get("status")) in ("ok", "failed"):
        made["criu_cuda"] = status == "ok"
    return made | _engine(data)


def _medians(found: Document, key: str) -> dict[str, float]:
    """Of the phases that a command told of in each cycle."""
    return median_phases([{"phases": cycle.get(key) or []} for cycle in found.get("cycles", [])])


def _engine(data: dict[str, Document]) -> Document:
    made: Document = {}
    if by_size := data.get("engine.checkpoint", {}).get("by_size"):
        speed = data["engine.checkpoint"]["bandwidth_bytes_per_s"]
        made["activation"] = {
            "by_size": {size: one["complete_over_bound"] for size, one in by_size.items()},
            "worst_over_bound": max(one["complete_over_bound"]["p50"] for one in by_size.values()),
            "bandwidth_gbps": round(speed["p50"] / 1e9, 3),
            # Of a large copy's speed, what a single activation gets.
            "share": {size: round(_share(one, speed["p50"]), 4) for size, one in by_size.items()},
        }
    if copies := data.get("engine.paging", {}).get("copies"):
        made["paging_share"] = min(copies[way]["value"] for way in ("out", "in"))
    if factors := data.get("engine.oversubscribe", {}).get("factors"):
        run = factors["2"]
        made["oversubscribed"] = {
            "sessions": data["engine.oversubscribe"]["sessions"],
            "completed": run["completed"],
            "mismatches": run["token_mismatches"] + run["logits_mismatches"],
            "seconds_over_undisturbed": run["seconds_over_undisturbed"],
        }
    return made


def _share(one: dict[str, Any], bandwidth: float) -> float:
    took: float = one["complete_us"]["p50"] / 1e6
    return int(one["bytes"]) / took / bandwidth
