"""How long until a model server says its first word: started cold, restored by copying, restored by mapping, cloned.

Makes a model of the 0.5B shape where there is none and starts vLLM with it cold, twice: one start becomes a golden
whose memory is mapped (the default), the other one whose memory is copied. Restores both a few times, makes four clones
side by side, and compares every answer with that of the server that was never dumped. Writes demo.json and ttft.png.
Whatever ends it, the replicas and the goldens are removed (--keep keeps the mapped golden).

    make demo                             or, when everything is set up:
    python -m benchmarks.demo -n 10 --keep
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import environment, harness, memory, models
from benchmarks.harness import CommandFailed, Outcome
from benchmarks.statistics import Summary
from benchmarks.terminal import Terminal
from gpuckpt import proc
from gpuckpt.errors import (
    BusyError,
    GpuckptError,
    NotFoundError,
    PreflightError,
    VerificationError,
)

JSON_VERSION = 1
LEAST_RESTORES = 5
# A small KV cache, and every core: vLLM sets one aside by default, which of two would be half.
SERVER_ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_NUM_OF_RESERVED_CPU=0")
# In the environment of every server of the demo: the mark by which a golden is known as one that it may remove.
MARK = "GPUCKPT_DEMO"
SERVER_ARGUMENTS = ("--max-model-len", "2048")
CLONES = 4


class Demo:
    """One run: ``name`` is the golden's and the replica's, ``output`` where the results go."""

    def __init__(self, *, name: str, restores: int, keep: bool, output: Path, terminal: Terminal) -> None:
        self.name = name
        self.restores = restores
        self.keep = keep
        self.output = output
        self.terminal = terminal
        self.prefix = environment.prefix()
        self.model = self.prefix / "models" / models.QWEN.folder
        self.load = os.getloadavg()  # other work on the machine at the begin is in every number
        self.ours: list[str] = []  # names of the goldens that are ours to remove

    def run(self) -> dict[str, Any]:
        """Everything, in order; the result as it was written to demo.json. Leaves no replica, whatever happens."""
        say, title = self.terminal.say, self.terminal.title
        self._require_setup()
        self.output.mkdir(parents=True, exist_ok=True)
        finished = False
        try:
            say(self.terminal.bold(f"gpuckpt demo: vLLM started cold, then restored {self.restores} times, and cloned"))
            title("1  The model")
            self._make_model()
            title("2  The cold start: what every start costs without gpuckpt")
            cold = self._create(self.name)
            title(f"3  The restore, {self.restores} times: what a start costs with it")
            restored, equal = self._restore_all(self.name)
            title(f"4  {CLONES} clones of one golden, side by side")
            clones = self._clone()
            title("5  For comparison: the same server, its memory copied back as CRIU does it by itself")
            again = self._create(self.copied, "--mode", "copy")
            copied, equal_too = self._restore_all(self.copied)
            title("6  The result")
            result = self._result([cold, again], restored, [*equal, *equal_too], copied, clones)
            self._write(result)
            for line in table(result):
                say(line)
            self._figure(result)
            finished = True
        finally:
            self._clean_up(keep=self.keep and finished)
        if not result["canary_match"]:
            raise VerificationError("a restored server answered differently from the one that was never dumped")
        return result

    def _require_setup(self) -> None:
        if os.geteuid() != 0:
            raise PreflightError("must run as root", remedy="sudo make demo")
        if not (self.prefix / "server" / "bin" / "python").exists():
            raise PreflightError(
                f"there is no server environment in {self.prefix}",
                remedy="make setup-server (or make demo, which does it)",
            )

    def _make_model(self) -> None:
        say = self.terminal.say
        if models.made(self.prefix, models.QWEN):
            say(f"  {self.model} is there already")
        else:
            say("  No download: the 0.5B shape of Qwen2 with seeded random weights. It loads and computes like the")
            say("  published model and repeats itself exactly; what it says makes no sense.")
        # Makes nothing if the folder holds this very model; that is its decision, not ours.
        with self.terminal.waiting(lambda: models.progress(self.prefix, models.QWEN)) as tick:
            models.make(self.prefix, models.QWEN, tick)
        size = (self.model / "model.safetensors").stat().st_size
        say(f"  {size / 1e9:.2f} GB of weights in {self.model}")

    @property
    def copied(self) -> str:
        """Name of the golden whose memory is copied."""
        return f"{self.name}-copied"

    def _create(self, name: str, *options: str) -> Outcome:
        say = self.terminal.say
        self._make_way(name)
        arguments = ["create", name, *options, "--replace"]
        for pair in (*SERVER_ENVIRONMENT, f"{MARK}=1"):
            arguments += ["--env", pair]
        tail = ["--", "--model", str(self.model), *SERVER_ARGUMENTS]
        say(f"  $ gpuckpt {' '.join([*arguments, *tail])}")
        say("  Imports, weights, KV cache, first request. The running server is then frozen into a golden in memory.")
        show = sys.stderr.isatty()  # then gpuckpt shows its own stages, live
        with self.terminal.waiting(lambda: "starting vLLM, then freezing it") as tick:
            outcome = harness.run(
                [*arguments, "--format", "json", *tail],
                cwd=self.output,
                tick=(lambda: None) if show else tick,
                show_progress=show,
            )
        size = outcome.document["image_bytes"] / 2**30
        say(
            f"  first token after {self.terminal.bold(f'{outcome.ttft_s:.2f} s')}; "
            f"warmed up and frozen: {size:.2f} GiB, {outcome.wall_s - outcome.ttft_s:.1f} s more, paid once"
        )
        return outcome

    def _make_way(self, name: str) -> None:
        """Stop what an earlier run left under this name; refuse to touch a golden or replica that is not the demo's."""
        try:
            earlier = self._gpuckpt("inspect", name).document
        except CommandFailed as failure:
            if failure.code != NotFoundError.exit_code:
                raise
            earlier = None
        if earlier is not None:
            if MARK not in earlier["launch"]["env"]:
                raise BusyError(
                    f"there is a golden named {name} that no earlier demo made",
                    cause="the demo would replace it, and remove it at the end",
                    remedy=f"choose another name (python -m benchmarks.demo --name NAME), or gpuckpt rm {name}",
                )
            self.terminal.say(f"  (replaces the golden {name} of an earlier run)")
            self._stop_replicas(name)
        self.ours.append(name)

    def _restore_all(self, name: str) -> tuple[list[Outcome], list[bool]]:
        say, terminal = self.terminal.say, self.terminal
        canary = self._gpuckpt("inspect", name).document["canary"]
        say(f"  $ gpuckpt restore {name}")
        say("  A new container each time, made beforehand (--prepare 1) as podman's own restore wants it to exist.")
        say("  The command replays a recorded question and compares tokens and logprobs;")
        say("  then this script asks again by itself and compares with the server that was never dumped.")
        same = f"{len(canary['tokens'])} tokens and logprobs equal, twice"
        restored: list[Outcome] = []
        equal: list[bool] = []
        for number in range(1, self.restores + 1):
            self._gpuckpt("restore", name, "--prepare", "1")
            with terminal.waiting(lambda number=number: f"restore {number}") as tick:  # type: ignore[misc]
                outcome = harness.run(["restore", name, "--format", "json"], cwd=self.output, tick=tick)
            try:
                difference = harness.differences(harness.endpoint_of(outcome.document), canary)
            except GpuckptError as error:
                error.log = error.log or self._last_words(name)
                raise
            restored.append(outcome)
            equal.append(bool(outcome.document["canary_match"]) and difference is None)
            verdict = terminal.red(difference) if difference else terminal.green(same)
            say(f"  {number:3}  first token after {terminal.bold(f'{outcome.ttft_s:.3f} s')}   {verdict}")
            self._gpuckpt("stop", name)
        return restored, equal

    def _clone(self) -> dict[str, Any]:
        """Make the clones at once; what they took, in time and memory."""
        say, terminal = self.terminal.say, self.terminal
        names = [f"{self.name}-{number}" for number in range(1, CLONES + 1)]
        words = [word for name in names for word in ("--as", name)]
        say(f"  $ gpuckpt restore {self.name} {' '.join(words)}")
        with terminal.waiting(lambda: f"{CLONES} clones") as tick:
            outcome = harness.run(["restore", self.name, *words, "--format", "json"], cwd=self.output, tick=tick)
        made = outcome.document["replicas"]
        times = [(one["first_token_monotonic_ns"] - outcome.spawned_ns) / 1e9 for one in made]
        equal = len(made) == CLONES and all(one["canary_match"] for one in made)
        for one, at in zip(made, times, strict=True):
            verdict = terminal.green("answer equal") if one["canary_match"] else terminal.red("another answer")
            say(f"  {one['replica']:<10} first token after {terminal.bold(f'{at:.3f} s')}   {verdict}")
        own = [proc.own_memory_of(proc.processes_below(memory.pid_of(name))) for name in names]
        say(f"  each holds {mean(own) / 1e6:.0f} MB of memory of its own")
        self._gpuckpt("stop", *names)
        return {
            "replicas": len(made),
            "ttft_s": [round(at, 6) for at in times],
            "all_answered_s": round(max(times, default=0.0), 6),
            "bytes_per_replica": round(mean(own)),
            "canary_match": equal,
        }

    def _result(
        self,
        cold: Sequence[Outcome],
        restored: Sequence[Outcome],
        equal: Sequence[bool],
        copied: Sequence[Outcome],
        clones: dict[str, Any],
    ) -> dict[str, Any]:
        summary, copy = (Summary(tuple(outcome.ttft_s for outcome in each)) for each in (restored, copied))
        usual = min(cold, key=lambda each: each.ttft_s)
        return {
            "version": JSON_VERSION,
            "clock": "from just before the command is spawned to the first streamed token, CLOCK_MONOTONIC",
            "model": models.QWEN.about,
            # Of the start that the phases below belong to: the faster one, so that no ratio is flattered.
            "cold_ttft_s": round(usual.ttft_s, 6),
            "cold_ttft_s_each": [round(each.ttft_s, 6) for each in cold],
            "restore_ttft_s": summary.as_dict(),
            "copy_ttft_s": copy.as_dict(),
            "clones": clones,
            "speedup": round(usual.ttft_s / summary.p50, 3),
            "canary_match": all(equal) and clones["canary_match"],
            "canary_matches": list(equal),
            "image_bytes": cold[0].document["image_bytes"],
            "create_wall_s": round(cold[0].wall_s, 6),
            "tier": restored[0].document["tier"],
            "phases": {
                "cold": usual.phases_to_first_token(),
                # Of the run in the middle, not medians of each phase: these would not add up.
                "restore": min(restored, key=lambda each: abs(each.ttft_s - summary.p50)).phases_to_first_token(),
                "copy": min(copied, key=lambda each: abs(each.ttft_s - copy.p50)).phases_to_first_token(),
            },
            "runs": [
                {
                    "ttft_s": round(each.ttft_s, 6),
                    "wall_s": round(each.wall_s, 6),
                    "phases": each.phases_to_first_token(),
                }
                for each in restored
            ],
            "load_average": [round(load, 2) for load in self.load],
            "machine": environment.machine(self.prefix),
        }

    def _write(self, result: dict[str, Any]) -> None:
        (self.output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")

    def _figure(self, result: dict[str, Any]) -> None:
        with self.terminal.waiting(lambda: "drawing"):
            from benchmarks import figures  # matplotlib takes a second to import

            figures.ttft(result, self.output / "ttft.png")
        self.terminal.say(f"\n  {_relative(self.output / 'demo.json')}   every number")
        self.terminal.say(f"  {_relative(self.output / 'ttft.png')}    the figure")

    def _clean_up(self, *, keep: bool) -> None:
        for name in self.ours:
            with self.terminal.waiting(lambda: "cleaning up"):
                self._stop_replicas(name)
                if not (keep and name == self.name):
                    self._quietly("rm", "--force", name)
        if not self.ours:
            return
        if keep:
            self.terminal.say(f"\nThe golden is kept: gpuckpt restore {self.name}; gpuckpt rm {self.name}")
        else:
            self.terminal.say("\nThe goldens and their replicas are removed again (--keep keeps one golden).")

    def _stop_replicas(self, name: str) -> None:
        """Stop what runs of the golden ``name``."""
        for golden in self._gpuckpt("ls").document.get("goldens", []):
            if golden["name"] == name and golden["replicas"]:
                self._quietly("stop", *(one["name"] for one in golden["replicas"]))

    def _last_words(self, replica: str) -> tuple[str, ...]:
        """What the replica's server printed last, or why that cannot be known."""
        try:
            return tuple(harness.run(["logs", replica, "--tail", "20"], cwd=self.output).stdout.splitlines())
        except CommandFailed as failure:
            return tuple(failure.lines())

    def _gpuckpt(self, *words: str) -> Outcome:
        return harness.run([*words, "--format", "json"], cwd=self.output)

    def _quietly(self, *words: str) -> None:
        """Run a command whose object may be gone already; anything else that goes wrong is said, not raised."""
        try:
            self._gpuckpt(*words)
        except CommandFailed as failure:
            if failure.code != NotFoundError.exit_code:
                for line in failure.lines():
                    self.terminal.say(line)


def table(result: dict[str, Any]) -> list[str]:
    """The result for a terminal: the times, and the phases of both side by side."""
    cold, restore, copy, clones = (result[key] for key in ("cold_ttft_s", "restore_ttft_s", "copy_ttft_s", "clones"))
    lines = [
        f"  {'first token after':<34} {'p50':>9}   {'p95':>9}",
        f"  {'cold start, the faster of two':<34} {cold:9.2f} s",
        f"  {'restore, memory copied':<34} {copy['p50']:9.3f} s {copy['p95']:9.3f} s "
        f"{cold / copy['p50']:8.1f} × faster",
        f"  {'restore, memory mapped (default)':<34} {restore['p50']:9.3f} s {restore['p95']:9.3f} s "
        f"{cold / restore['p50']:8.1f} × faster",
        f"  {str(clones['replicas']) + ' clones at once, the last':<34} {clones['all_answered_s']:9.3f} s"
        f"   {clones['bytes_per_replica'] / 1e6:.0f} MB of its own each",
        "",
        f"  Where the time goes (mapped restore: the middle one of {restore['n']}); both columns add up",
    ]
    left, right = (
        [f"{row['name']:<27} {row['seconds']:8.3f} s" for row in result["phases"][kind]] for kind in ("cold", "restore")
    )
    lines.append(f"  {'COLD START':<38}    RESTORE")
    for index in range(max(len(left), len(right))):
        here = left[index] if index < len(left) else ""
        there = right[index] if index < len(right) else ""
        lines.append(f"  {here:<38}    {there}".rstrip())
    answers = "every answer was" if result["canary_match"] else "NOT every answer was"
    lines += ["", f"  {answers} the never-dumped server's, token for token, logprob for logprob."]
    lines.append(f"  {environment.in_words(result['machine'])}")
    return lines


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _restores(text: str) -> int:
    if not text.isdigit() or int(text) < LEAST_RESTORES:
        raise argparse.ArgumentTypeError(f"a number from {LEAST_RESTORES} on: fewer say nothing about percentiles")
    return int(text)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "-n", "--restores", type=_restores, default=LEAST_RESTORES, help="restores (at least %(default)s)"
    )
    made.add_argument("--name", default="demo", help="name of the golden (default: %(default)s)")
    made.add_argument("--keep", action="store_true", help="keep the golden at the end of a good run")
    made.add_argument("--output", type=Path, default=harness.ROOT / "build" / "demo", help="folder of the results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or that of the command that failed."""
    options = parser().parse_args(argv)
    terminal = Terminal()
    demo = Demo(
        name=options.name,
        restores=options.restores,
        keep=options.keep,
        output=options.output.absolute(),
        terminal=terminal,
    )
    return harness.status_of(demo.run)


if __name__ == "__main__":
    sys.exit(main())
