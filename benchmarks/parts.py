"""A suite whose parts are processes in the server's environment, where torch is; each writes a document."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment, harness
from benchmarks.journal import Document
from benchmarks.suite import Budget, rest, say
from benchmarks.targets import Target, targets
from gpuckpt.errors import InterruptedByUser

_LIMIT = 1.5  # times its budget: a part that takes longer is ended


@dataclass(frozen=True)
class Part:
    """One process: `benchmarks.SUITE_NAME` on a model, for so many seconds; ``key`` is its place in the result."""

    name: str
    model: str
    seconds: float
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name}-{self.model}"


class Runner:
    """Starts the parts of a suite one after the other; what failed is in ``failures``.

    ``options``: out, budget, device, seed. ``models``: folders below the prefix by shape.
    """

    def __init__(self, options: argparse.Namespace, suite: str, models: Mapping[str, str]) -> None:
        self.options = options
        self.suite = suite
        self.models = models
        self.python = environment.prefix() / "server" / "bin" / "python"
        self.work: Path = options.out / suite
        self.failures: dict[str, str] = {}
        self.budget = Budget(options.budget)
        self.commit: str | None = None

    def run(self, name: str, argv: Sequence[str | Path], seconds: float) -> bool:
        """Whether a process in the server's environment ended well; its words go where ours go."""
        environ = {
            **os.environ,
            "PYTHONPATH": str(harness.ROOT),
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }
        process = subprocess.Popen(
            [str(word) for word in argv],
            cwd=harness.ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = f"it took more than {seconds:g} s"
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if status != 0:
            self.failures[name] = status if isinstance(status, str) else f"it ended with status {status}"
            say(f"  {name} failed: {self.failures[name]}")
        return status == 0

    def model(self, shape: str) -> Path:
        """The folder of a model; makes it where there is none."""
        folder: Path = environment.prefix() / "models" / self.models[shape]
        script = harness.ROOT / "scripts" / "make_model.py"
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.run(f"model {shape}", [self.python, script, "--shape", shape, folder], 300)
        return folder

    def part(self, part: Part, *more: str | Path) -> Document | None:
        """One part's document; ``more``: options for it."""
        if self.budget.spent:
            self.failures[part.key] = "the budget was spent before it began"
            return None
        say(f"[{self.budget.elapsed:5.0f} s] {part.key}")
        out = self.work / f"{part.key}.json"
        out.unlink(missing_ok=True)
        argv: list[str | Path] = [self.python, "-m", f"benchmarks.{self.suite}_{part.name}", "--model"]
        argv += [environment.prefix() / "models" / self.models[part.model], "--out", out, "--budget", str(part.seconds)]
        argv += ["--device", self.options.device, "--seed", str(self.options.seed), *part.options, *more]
        if not self.run(part.key, argv, _LIMIT * part.seconds + 60):
            return None
        made = self.document(part.key)
        if made is not None:  # a later run with --only may take it over
            made |= {"commit": self.commit, "of": self._kind()}
            out.write_text(json.dumps(made, indent=1) + "\n")
        return made

    def document(self, key: str) -> Document | None:
        """What a part wrote the last time, if it did."""
        file = self.work / f"{key}.json"
        if not file.exists():
            return None
        made: Document = json.loads(file.read_text())
        # A trial is no measurement, and another machine's is none of this one.
        return made if made.get("of", self._kind()) == self._kind() else None

    def _kind(self) -> Document:
        machine = environment.machine()
        return {"quick": self.options.quick, "cpu_model": machine["cpu_model"], "cores": machine["cores"]}

    def rest(self, document: Document) -> None:
        """Wait until the machine is quiet; a trial does not."""
        if not self.options.quick:
            document["waited_for_rest_s"] = rest(document["machine"]["cores"])
        document["load_average"] = environment.load()


def main(
    runner: Runner,
    version: int,
    measure: Callable[[Document], None],
    goals: Sequence[Target],
    draw: Callable[[Document, Path], list[str]],
) -> int:
    """Measure into build/bench/SUITE.json, draw, and show the targets; the exit status.

    ``measure`` fills the document, which has what is known beforehand. An interruption writes nothing.
    """
    options = runner.options
    if not runner.python.exists():
        print(f"there is no {runner.python}: make setup-server", file=sys.stderr)
        return 4
    runner.work.mkdir(parents=True, exist_ok=True)
    document: Document = {
        "version": version,
        "benchmark": runner.suite,
        "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": {"quick": options.quick, "only": options.only, "seed": options.seed, "device": options.device},
        "machine": environment.machine(),
    }
    runner.commit = document["machine"]["commit"]
    try:
        with harness.interrupts():
            measure(document)
    except InterruptedByUser as interrupted:
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    document["failures"] = runner.failures
    document["load_average_at_end"] = environment.load()
    document["elapsed_s"] = round(runner.budget.elapsed, 1)
    document["targets"] = targets(document, goals)
    file = options.out / f"{runner.suite}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    drawn = draw(document, options.out)
    for line in table(document):
        say(line)
    say(f"{file}; figures: {', '.join(drawn) or 'none'}")
    return 1 if runner.failures else 0


def table(document: Document) -> list[str]:
    """The targets as lines for people."""
    lines = []
    for target in document["targets"]:
        value = target["value"]
        verdict = "not measured" if value is None else "met" if target["met"] else "MISSED"
        if value is not None and not target["enough"]:
            verdict += " (few samples)"
        shown = "–" if value is None else f"{float(value):.3f}"
        limit = f"{target['direction']} {target['limit']:g} {target['unit']}".strip()
        lines.append(f"  {target['name']:<76} {shown:>10}  {limit:<16} {verdict}")
    return lines


def parser(suite: str, about: str | None, names: Sequence[str], *, budget: float) -> argparse.ArgumentParser:
    """The options of a suite whose parts have these names."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{suite}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def known(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := sorted(set(wanted) - set(names)):
            raise argparse.ArgumentTypeError(
                f"no part is called {', '.join(unknown)}; there are {', '.join(sorted(names))}"
            )
        return wanted

    made.add_argument("--quick", action="store_true", help="little, and few samples: does it work at all?")
    made.add_argument(
        "--only",
        type=known,
        help=f"measure only some of {', '.join(sorted(names))}; the others are as the last run in --out left them",
    )
    made.add_argument("--device", default="auto", help="auto (the default), cpu, cuda")
    made.add_argument("--seed", type=int, default=1, help="of prompts and orders (default: %(default)s)")
    made.add_argument("--budget", type=float, default=budget, help="seconds after which to stop (default: %(default)g)")
    made.add_argument("--out", type=Path, default=harness.ROOT / "build" / "bench", help="folder of the results")
    return made
