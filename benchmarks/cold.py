"""What a start costs without a golden: `podman run` of the server, from the command to the first token.

    python -m benchmarks.cold

vLLM runs in eager mode, so no compilation is in it and a compile cache would change nothing. Writes cold.json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server
from benchmarks.ours import Goldens
from benchmarks.restore import summarise
from benchmarks.stock import Bench, Cold
from benchmarks.suite import Run


def body(run: Run) -> None:
    server = Server.chosen(run.options)
    goldens = Goldens(Gpuckpt(run.space), run.journal, server)
    stock = Bench(run.space, goldens, server, "mapped", run.journal)
    run.journal.fact("compile_cache", "none: eager mode compiles nothing")
    with contextlib.ExitStack() as stack:
        # The golden is made for its launch line and its recorded answer; its making is a cold start, too.
        run.rounds(run.prepare([Cold(stock, n=None)], stack))


def parser() -> argparse.ArgumentParser:
    made = suite.parser("cold", __doc__, n=3, budget=1200)
    suite.add_workload(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("cold", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
