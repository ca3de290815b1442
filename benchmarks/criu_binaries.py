"""The same restore with every CRIU on this machine: the one that gpuckpt uses, the distribution's, and any given.

    python -m benchmarks.criu_binaries --criu /usr/sbin/criu --criu /opt/criu-dev/criu

Each makes goldens of its own, because images belong to the version that wrote them. One that cannot dump or restore
here is recorded as unavailable, with CRIU's own words. Writes criu_binaries.json.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server, sample_of
from benchmarks.journal import Document, Sample, summary
from benchmarks.ours import no_such_program
from benchmarks.restore import median_phases
from benchmarks.suite import Method, Run
from benchmarks.workspace import criu_program
from gpuckpt import proc

USUAL = ("/usr/sbin/criu", "/usr/local/sbin/criu", "/usr/bin/criu")


@dataclass
class Binary:
    """Goldens made and restored with one CRIU, in one mode."""

    name: str
    gpuckpt: Gpuckpt
    server: Server
    program: Path
    mode: str
    n: int | None = None

    @property
    def golden(self) -> str:
        return f"{self.name}".replace("/", "-").replace(" ", "-")[:20].rstrip("-.")

    def prepare(self) -> None:
        self.gpuckpt.create(self.golden, self.server, "--mode", self.mode, "--criu", str(self.program))
        self.gpuckpt.restore(self.golden, "--criu", str(self.program))  # does it work at all?
        self.gpuckpt.stop(self.golden)

    def measure(self) -> Sample:
        try:
            return sample_of(self.gpuckpt.restore(self.golden, "--criu", str(self.program)))
        finally:
            self.gpuckpt.stop(self.golden)

    def close(self) -> None:
        self.gpuckpt.stop(self.golden)
        self.gpuckpt.rm(self.golden)


def version(program: Path) -> str:
    """What the program calls itself, e.g. ``4.2.1``; ``unknown`` where it does not run."""
    done = proc.run([program, "--version"], check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("Version:")]
    return lines[0].split()[1] if lines else "unknown"


def programs(given: Sequence[Path]) -> list[Path]:
    """Every CRIU there is, the one that gpuckpt uses first, none twice."""
    found = [criu_program(), *given]
    found += [Path(path) for path in (*USUAL, shutil.which("criu")) if path and Path(path).exists()]
    return list({path.resolve(): path for path in found}.values())


def body(run: Run) -> None:
    gpuckpt, server = Gpuckpt(run.space), Server.chosen(run.options)
    methods: list[Method] = []
    known = {}
    for number, program in enumerate(programs(run.options.criu)):
        label = f"criu{number + 1}-{version(program)}"
        known[label] = str(program)
        methods += [Binary(f"{label}-{mode}", gpuckpt, server, program, mode) for mode in ("mapped", "copy")]
    run.journal.fact("programs", known)
    if not any(Path(path).exists() for path in USUAL):
        run.journal.unavailable("the distribution's CRIU", str(no_such_program("criu", "criu")))
    with contextlib.ExitStack() as stack:
        run.rounds(run.prepare(methods, stack))


def summarise(document: Document) -> Document:
    return {
        name: {
            "ttft_s": summary(samples, "ttft_s"),
            "restore_s": summary(samples, "restore_s"),
            "phases": median_phases(samples),
        }
        for name, samples in document["runs"].items()
    }


def parser() -> argparse.ArgumentParser:
    made = suite.parser("criu_binaries", __doc__, n=10, budget=1200)
    suite.add_workload(made)
    made.set_defaults(server="filler:500")
    made.add_argument("--criu", type=Path, action="append", default=[], help="another CRIU; repeatable")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("criu_binaries", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
