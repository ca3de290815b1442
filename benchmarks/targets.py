"""What the numbers should reach, and which of it they do. Works on merged documents alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.statistics import median, ratio_interval

Document = dict[str, Any]
FEW = 10  # samples below which a number is marked, and a target that it meets does not count as met

# Name of the ratio, what is above the line, what below: medians of `ttft_s`.
RATIOS = (
    ("cold_over_mapped", "cold", "mapped"),
    ("podman_tmpfs_over_mapped", "podman_tmpfs", "mapped"),
    ("podman_tmpfs_huge_over_mapped", "podman_tmpfs_huge", "mapped"),
    ("podman_disk_over_mapped", "podman_disk", "mapped"),
    ("import_over_mapped", "podman_import", "mapped"),
    ("copy_tmpfs_over_mapped", "copy_tmpfs", "mapped"),
    ("mapped_over_podman_pause", "mapped", "podman_pause"),
)


@dataclass(frozen=True)
class Target:
    """A number at ``path`` in the merged document, and the least (or, ``at_most``, the most) that it should be.

    ``made_of``: paths of what it is computed from; the least ``n`` in there is the target's. Empty where the number is
    not a sample of anything, as a count of failures.
    """

    name: str
    path: str
    limit: float
    made_of: tuple[str, ...]
    at_most: bool = False
    unit: str = ""

    def met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


TARGETS = (
    Target(
        "cold start over mapped restore",
        "ratios.cold_over_mapped.value",
        90,
        ("cold.ttft_s", "mapped.ttft_s"),
        unit="×",
    ),
    Target(
        "podman from tmpfs over mapped restore",
        "ratios.podman_tmpfs_over_mapped.value",
        10,
        ("podman_tmpfs.ttft_s", "mapped.ttft_s"),
        unit="×",
    ),
    Target(
        "podman import over mapped restore",
        "ratios.import_over_mapped.value",
        25,
        ("podman_import.ttft_s", "mapped.ttft_s"),
        unit="×",
    ),
    Target(
        "first token of a mapped restore, p50", "mapped.ttft_s.p50", 0.35, ("mapped.ttft_s",), at_most=True, unit="s"
    ),
    Target(
        "memory of a further replica",
        "density.bytes_per_extra_replica",
        100e6,
        ("density.by_replicas",),
        at_most=True,
        unit="bytes",
    ),
    Target(
        "decoding against the never-dumped server",
        "steady_state.ratio",
        0.98,
        ("steady_state.short", "steady_state.long"),
    ),
    Target(
        "8 GB over 0.5 GB, mapped",
        "flatness",
        1.25,
        ("sweeps.memory.mapped.8.ttft_s", "flatness_reference"),
        at_most=True,
    ),
    Target("16 replicas all answered", "clones16.all_answered", 1, ("density.by_replicas.16",), unit="bool"),
    Target("16 replicas answered as recorded", "clones16.canaries_equal", 1, ("density.by_replicas.16",), unit="bool"),
    Target(
        "restore itself over a trivial server's",
        "ratios.restore_over_trivial.value",
        2,
        ("mapped.restore_s", "trivial.restore_s"),
        at_most=True,
        unit="×",
    ),
)


def at(document: Document, path: str) -> Any:
    """The value at a dotted path, or None."""
    found: Any = document
    for word in path.split("."):
        found = found.get(word) if isinstance(found, dict) else None
    return found


def least_n(found: Any) -> int | None:
    """The least number of samples in a part of the document, at whatever depth; None where there is none."""
    if not isinstance(found, dict):
        return None
    return found["n"] if "n" in found else least(map(least_n, found.values()))


def least(counts: Iterable[int | None]) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def targets(document: Document, wanted: Iterable[Target] = TARGETS) -> list[Document]:
    """Every target with its value, its n and whether it is met; None for all where it was not measured.

    ``enough``: whether n suffices for a target that is met to count as met; it does where nothing is sampled.
    """
    found = []
    for target in wanted:
        value = at(document, target.path)
        known = value is not None
        n = least(least_n(at(document, path)) for path in target.made_of) if known else None
        found.append(
            {
                "name": target.name,
                "path": target.path,
                "limit": target.limit,
                "direction": "at most" if target.at_most else "at least",
                "unit": target.unit,
                "value": value,
                "n": n,
                "enough": known and (not target.made_of or (n is not None and n >= FEW)),
                "met": target.met(float(value)) if known else None,
            }
        )
    return found


def ratios(methods: Document) -> Document:
    """Ratios of medians with their intervals, of the methods that were measured."""
    found = {}
    for name, above, below in RATIOS:
        if above in methods and below in methods:
            found[name] = ratio(methods[above]["ttft_s"]["samples"], methods[below]["ttft_s"]["samples"])
    pair = [at(methods, f"{name}.restore_s.samples") for name in ("mapped", "trivial")]
    if all(pair):
        found["restore_over_trivial"] = ratio(*pair)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> Document:
    """The ratio of two medians and its 95 % interval, both sides resampled on their own."""
    low, high = _interval(tuple(above), tuple(below))
    return {"value": round(median(above) / median(below), 4), "interval": [round(low, 4), round(high, 4)]}


@functools.lru_cache(maxsize=1024)
def _interval(above: tuple[float, ...], below: tuple[float, ...]) -> tuple[float, float]:
    return ratio_interval(above, below)  # once for the same samples: results are computed anew after every sample
