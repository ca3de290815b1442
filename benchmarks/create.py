"""Where the time of making a golden goes, by mode: copied and mapped.

    python -m benchmarks.create                              vLLM
    python -m benchmarks.create --server filler:1000 -n 10

Writes create.json: wall time, time to the server's first token, and what freezing adds, with the median phases.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server
from benchmarks.journal import Document, Sample, summary
from benchmarks.restore import median_phases
from benchmarks.suite import Run


@dataclass
class Create:
    """`gpuckpt create` in one mode; the golden is removed off the clock."""

    name: str
    gpuckpt: Gpuckpt
    server: Server
    mode: str
    n: int | None = None

    def prepare(self) -> None:
        pass

    def measure(self) -> Sample:
        golden = f"{self.mode}"
        try:
            outcome = self.gpuckpt.create(golden, self.server, "--mode", self.mode)
        finally:
            self.gpuckpt.rm(golden)
        return {
            "wall_s": round(outcome.wall_s, 6),
            "ttft_s": round(outcome.ttft_s, 6),
            "freeze_s": round(outcome.wall_s - outcome.ttft_s, 6),
            "image_bytes": outcome.document["image_bytes"],
            "phases": outcome.document["phases"],
        }

    def close(self) -> None:
        pass


def body(run: Run) -> None:
    gpuckpt, server = Gpuckpt(run.space), Server.chosen(run.options)
    with contextlib.ExitStack() as stack:
        run.rounds(run.prepare([Create(mode, gpuckpt, server, mode) for mode in ("copy", "mapped")], stack))


def summarise(document: Document) -> Document:
    return {
        name: {quantity: summary(samples, quantity) for quantity in ("wall_s", "ttft_s", "freeze_s", "image_bytes")}
        | {"phases": median_phases(samples)}
        for name, samples in document["runs"].items()
    }


def parser() -> argparse.ArgumentParser:
    made = suite.parser("create", __doc__, n=10, budget=1500)
    suite.add_workload(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("create", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
