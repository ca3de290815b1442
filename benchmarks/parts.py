"""A suite whose parts are processes in the server's environment, where torch is; each writes a document."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment, harness
from benchmarks.journal import Document
from benchmarks.suite import Budget, say

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
            made["commit"] = self.commit
            out.write_text(json.dumps(made, indent=1) + "\n")
        return made

    def document(self, key: str) -> Document | None:
        """What a part wrote the last time, if it did."""
        file = self.work / f"{key}.json"
        if not file.exists():
            return None
        made: Document = json.loads(file.read_text())
        return made
