"""Repeat one way of bringing a server back.

    python -m benchmarks.run --iterations 20                        mapped restores
    python -m benchmarks.run --iterations 5 --method podman_tmpfs
    python -m benchmarks.run --method copy_tmpfs --keep-going       until interrupted

The methods are those of benchmarks.restore. Writes run-METHOD.json and prints every time as it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from benchmarks import analyze, restore, suite
from benchmarks.suite import Run

FOR_EVER = 1_000_000


def body(run: Run) -> None:
    known = restore.methods(run)
    with contextlib.ExitStack() as stack:
        try:
            run.rounds(run.prepare([known[run.options.method]], stack))
        finally:
            for line in analyze.table([run.journal.document | restore.summarise(run.journal.document)]):
                run.say(line)


def parser() -> argparse.ArgumentParser:
    made = suite.parser("run", __doc__, n=10, budget=3600)
    suite.add_workload(made)
    made.add_argument("--iterations", type=int, metavar="N", help="the same as --n")
    made.add_argument("--keep-going", action="store_true", help="do not stop before the budget is spent")
    methods = [name for name in restore.ABOUT if name not in ("cold_first", "cold_create")]
    made.add_argument("--method", choices=methods, default="mapped", help="(default: %(default)s)")
    made.set_defaults(cold_n=None)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(argv)
    words = list(sys.argv[1:] if argv is None else argv)
    wanted = FOR_EVER if options.keep_going else options.iterations
    if wanted:
        words += ["--n", str(wanted)]
    return suite.main(f"run-{options.method}", made, body, argv=words, summarise=restore.summarise)


if __name__ == "__main__":
    sys.exit(main())
