"""What the time of a restore depends on: memory, processes, mappings. Mapped against copied, one variable at a time.

    python -m benchmarks.sweep                     0.1 to 8 GB; 1 to 8 processes; 100 to 10,000 mappings

The server is synthetic (benchmarks/servers/filler.py); its request touches the same thousand pages whatever its size.
Writes sweep.json with `flatness`: the first token at 8 GB over that at 0.5 GB, mapped, both in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import memory, suite
from benchmarks.driver import Gpuckpt, Server, sample_of
from benchmarks.journal import Document, Sample, answers_equal, summary
from benchmarks.suite import Run, Unavailable
from benchmarks.targets import ratio

BUDGET = 4500.0
SIZES = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
PROCESSES = (1, 2, 4, 8)
MAPPINGS = (100, 1000, 10000)
REFERENCE = 0.5  # GB of the golden that is restored in the rounds of every size
SPARE = 2 << 30  # bytes of memory that a measurement leaves to the machine
AXES = ("memory", "processes", "mappings")


@dataclass(frozen=True)
class Point:
    """One golden of one sweep: ``x`` is the value of the variable."""

    axis: str
    x: float
    gigabytes: float
    processes: int = 1
    mappings: int = 1

    @property
    def server(self) -> Server:
        return Server.filler(
            round(self.gigabytes * 1000), processes=self.processes, mappings=max(self.mappings, self.processes)
        )

    @property
    def label(self) -> str:
        return f"{self.x:g}"


@dataclass
class Restored:
    """Restores of one point's golden in one mode; makes the golden, and removes it when the point is done."""

    gpuckpt: Gpuckpt
    point: Point
    mode: str
    series: str
    n: int | None = None

    @property
    def name(self) -> str:
        return self.series

    @property
    def golden(self) -> str:
        return f"{self.point.axis[:3]}-{self.point.label.replace('.', '_')}-{self.mode}"

    def prepare(self) -> None:
        needed = int(self.point.gigabytes * 1e9) * 2 + SPARE  # the server and its golden, or golden and replica
        if (free := memory.available()) < needed:
            raise Unavailable(f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
        self.gpuckpt.create(self.golden, self.point.server, "--mode", self.mode)

    def measure(self) -> Sample:
        self.gpuckpt.restore(self.golden, "--prepare", "1")
        outcome = self.gpuckpt.restore(self.golden)  # one that fails leaves nothing
        self.gpuckpt.stop_replica(outcome)
        return sample_of(outcome) | {"x": self.point.x}

    def close(self) -> None:
        self.gpuckpt.rm(self.golden)


def points(options: argparse.Namespace) -> list[Point]:
    """The sweeps, in their order; each varies one thing and keeps the others."""
    found = [Point("memory", x, x) for x in numbers(options.sizes)]
    found += [Point("processes", x, options.fixed, processes=int(x)) for x in numbers(options.processes)]
    found += [Point("mappings", x, options.fixed, mappings=int(x)) for x in numbers(options.mappings)]
    return [point for point in found if point.axis in options.axes.split(",")]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",") if word]


def series(point: Point, mode: str) -> str:
    return f"{point.axis} {point.label} {mode}"


def body(run: Run) -> None:
    gpuckpt = Gpuckpt(run.space)
    for point in points(run.options):
        if run.out_of_time():
            return
        names = [series(point, mode) for mode in ("mapped", "copy")]
        if all(run.journal.count(name) >= run.n for name in names):
            continue
        with contextlib.ExitStack() as stack:
            methods = [Restored(gpuckpt, point, "mapped", names[0])]
            # The largest points are compared with a small one in the same rounds, not with one of an hour ago.
            if point.axis == "memory" and point.x > REFERENCE:
                small = Point("memory", REFERENCE, REFERENCE)
                methods.append(Restored(gpuckpt, small, "mapped", f"{names[0]} reference"))
            if fits(point, copies=3):
                methods.append(Restored(gpuckpt, point, "copy", names[1]))
            else:
                run.journal.unavailable(names[1], "two goldens and a copied replica do not fit into the memory")
            run.rounds(run.prepare(methods, stack))


def fits(point: Point, *, copies: int) -> bool:
    """Do so many copies of the point's memory fit at once?"""
    return memory.available() > int(point.gigabytes * 1e9) * copies + SPARE


def summarise(document: Document) -> Document:
    """For each axis and mode the points with their times; and the flatness."""
    found: Document = {"sweeps": {}, "sweeps_fixed_gb": document["options"]["fixed"]}
    for name, samples in document["runs"].items():
        axis, x, *rest = name.split(" ")
        if axis not in AXES or len(rest) != 1 or not samples:
            continue
        found["sweeps"].setdefault(axis, {}).setdefault(rest[0], {})[x] = {
            "ttft_s": summary(samples, "ttft_s"),
            "restore_s": summary(samples, "restore_s"),
            "canaries_equal": answers_equal(document, name),
        }
    largest = document["runs"].get("memory 8 mapped")
    reference = document["runs"].get("memory 8 mapped reference")
    if largest and reference:
        of = ratio([sample["ttft_s"] for sample in largest], [sample["ttft_s"] for sample in reference])
        found |= {"flatness": of["value"], "flatness_interval": of["interval"]}
        found["flatness_reference"] = summary(reference, "ttft_s")
    return found


def _axes(text: str) -> str:
    if unknown := sorted(set(text.split(",")) - set(AXES)):
        raise argparse.ArgumentTypeError(f"no sweep is called {', '.join(unknown)}; there are {', '.join(AXES)}")
    return text


def parser() -> argparse.ArgumentParser:
    made = suite.parser("sweep", __doc__, n=10, budget=BUDGET)
    made.add_argument("--sizes", default=",".join(f"{x:g}" for x in SIZES), help="GB (default: %(default)s)")
    made.add_argument("--processes", default=",".join(map(str, PROCESSES)), help="(default: %(default)s)")
    made.add_argument("--mappings", default=",".join(map(str, MAPPINGS)), help="(default: %(default)s)")
    made.add_argument("--fixed", type=float, default=1.0, help="GB where memory is not varied (default: %(default)g)")
    made.add_argument("--axes", type=_axes, default=",".join(AXES), help="only these sweeps (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("sweep", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
