"""Many replicas of one golden at once: how long until all answer, and what each further one costs in memory.

    python -m benchmarks.density                    1, 2, 4, 8, 16 replicas of vLLM, several times each

Writes density.json: `bytes_per_extra_replica` (from MemAvailable; from Pss and private pages for comparison) and
`clones16`. Memory is read after every replica has answered one request, once no replica is asked any more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks import harness, memory, suite
from benchmarks.asking import until_answered
from benchmarks.driver import Gpuckpt, Server
from benchmarks.harness import Outcome
from benchmarks.journal import Document, Sample, answers_equal, summary
from benchmarks.ours import Goldens
from benchmarks.statistics import median
from benchmarks.suite import Run

BUDGET = 2400.0
COUNTS = (1, 2, 4, 8, 16)
GOLDEN = "density"
QUANTITIES = ("wall_s", "first_answer_s", "all_answer_s", "available_drop_bytes", "pss_bytes", "private_bytes")


@dataclass
class Clones:
    """``count`` replicas of the golden by one command, each asked once more by us, at the same time."""

    goldens: Goldens
    server: Server
    count: int
    n: int | None = None

    @property
    def name(self) -> str:
        return f"replicas_{self.count}"

    @property
    def replicas(self) -> list[str]:
        return [f"r{number}" for number in range(1, self.count + 1)]

    def prepare(self) -> None:
        self.goldens.gpuckpt.require_option("restore", "--as")
        self.goldens.need(GOLDEN, self.server, "mapped")

    def measure(self) -> Sample:
        gpuckpt, canary = self.goldens.gpuckpt, self.goldens.made[GOLDEN]["canary"]
        before = settled()
        words = [word for name in self.replicas for word in ("--as", gpuckpt.name(name))]
        try:
            outcome = gpuckpt.restore(GOLDEN, *words)
            documents = replicas_of(outcome)
            ready = time.monotonic_ns()
            with ThreadPoolExecutor(self.count) as pool:
                answers = list(
                    pool.map(
                        lambda document: until_answered(harness.endpoint_of(document), canary, timeout=300), documents
                    )
                )
            after = settled()
            taken = [memory.below(memory.pid_of(str(document["replica"]))) for document in documents]
            groups = [memory.cgroup_of(memory.pid_of(str(document["replica"]))) for document in documents]
            return {
                "replicas": self.count,
                "wall_s": round(outcome.wall_s, 6),
                "first_answer_s": round((min(tokens(documents)) - outcome.spawned_ns) / 1e9, 6),
                "all_answer_s": round((max(tokens(documents)) - outcome.spawned_ns) / 1e9, 6),
                "asked_again_s": round((max(each.first_token_ns for each in answers) - ready) / 1e9, 6),
                "all_answered": len(documents) == self.count and all(tokens(documents)),
                "canaries_equal": all(document["canary_match"] for document in documents)
                and all(each.difference is None for each in answers),
                "available_drop_bytes": before - after,
                "pss_bytes": sum(each["Pss"] for each in taken),
                "private_bytes": sum(each["Private_Dirty"] for each in taken),
                "anonymous_bytes": sum(each["Pss_Anon"] for each in taken),
                "cgroup_bytes": sum(filter(None, groups)) if any(groups) else None,
            }
        finally:
            for name in self.replicas:
                gpuckpt.stop(name)

    def close(self) -> None:
        pass


def replicas_of(outcome: Outcome) -> list[dict[str, Any]]:
    """The documents of the replicas that a restore made: one, or several in a list."""
    found = outcome.document.get("replicas")
    return list(found) if found is not None else [outcome.document]


def tokens(documents: Sequence[dict[str, Any]]) -> list[int]:
    """When each replica's first token came."""
    return [int(document["first_token_monotonic_ns"]) for document in documents]


def settled(*, samples: int = 5, pause: float = 0.2) -> int:
    """MemAvailable when it has come to rest: the median of a few readings after a moment."""
    time.sleep(pause * 2)
    readings = []
    for _ in range(samples):
        readings.append(memory.available())
        time.sleep(pause)
    return int(median(readings))


def per_extra(samples: Sequence[Sample], quantity: str) -> float | None:
    """What each further replica takes: the slope of the least-squares line through the medians over the counts."""
    by_count: dict[int, list[float]] = {}
    for sample in samples:
        if sample.get(quantity) is not None:
            by_count.setdefault(int(sample["replicas"]), []).append(float(sample[quantity]))
    points = [(count, median(values)) for count, values in by_count.items()]
    if len(points) < 2:
        return None
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    above = sum((x - middle_x) * (y - middle_y) for x, y in points)
    return above / sum((x - middle_x) ** 2 for x, _ in points)


def summarise(document: Document) -> Document:
    every = [sample for samples in document["runs"].values() for sample in samples if "replicas" in sample]
    slopes = {
        name: per_extra(every, quantity)
        for name, quantity in (
            ("bytes_per_extra_replica", "available_drop_bytes"),
            ("pss_bytes_per_extra_replica", "pss_bytes"),
            ("private_bytes_per_extra_replica", "private_bytes"),
            ("anonymous_bytes_per_extra_replica", "anonymous_bytes"),
            ("cgroup_bytes_per_extra_replica", "cgroup_bytes"),
        )
    }
    by_count: dict[str, Any] = {}
    for name, samples in document["runs"].items():
        if name.startswith("replicas_"):
            by_count[name.removeprefix("replicas_")] = {
                quantity: summary(samples, quantity)
                for quantity in QUANTITIES
            } | {
                "all_answered": all(sample["all_answered"] for sample in samples)
                and not document["failures"].get(name),
                "canaries_equal": answers_equal(document, name, "canaries_equal"),
            }  # fmt: skip
    found: Document = {
        "density": {name: None if value is None else round(value) for name, value in slopes.items()}
        | {"by_replicas": by_count}
    }
    if most := by_count.get("16"):
        found["clones16"] = {
            "all_answered": most["all_answered"],
            "canaries_equal": most["canaries_equal"],
            "seconds_until_all_answer": most["all_answer_s"]["p50"],
            "all_answer_s": most["all_answer_s"],
        }
    return found


def body(run: Run) -> None:
    server = Server.chosen(run.options)
    goldens = Goldens(Gpuckpt(run.space), run.journal, server)
    counts = [int(word) for word in run.options.replicas.split(",")]
    with contextlib.ExitStack() as stack:
        run.rounds(run.prepare([Clones(goldens, server, count) for count in counts], stack))


def parser() -> argparse.ArgumentParser:
    made = suite.parser("density", __doc__, n=10, budget=BUDGET)
    suite.add_workload(made)
    made.add_argument("--replicas", default=",".join(map(str, COUNTS)), help="numbers of replicas (%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("density", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
