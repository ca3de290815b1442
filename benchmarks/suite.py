"""What all benchmarks share: options, the budget of time, and rounds in which every method has its turn.

Methods that are compared are measured in one run, one sample of each per round and in an order that is shuffled anew
each time: whatever else the machine does then meets all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks import environment, harness
from benchmarks.harness import CommandFailed
from benchmarks.journal import Document, Journal, Sample, Summarise
from benchmarks.workspace import Workspace, workspace
from gpuckpt.errors import GpuckptError, InterruptedByUser

_LONGEST_REST = 180.0  # seconds that a run waits for other work to end
_GIVEN_UP = 2  # failures in a row after which a method is not tried again


class Unavailable(Exception):
    """A method does not exist, or does not work, on this machine; the text says why."""


class Method(Protocol):
    """One way of doing what is compared. ``n``: how many samples it wants, None for as many as the run."""

    @property
    def name(self) -> str: ...

    @property
    def n(self) -> int | None: ...

    def prepare(self) -> None:
        """Off the clock, once; raises Unavailable where it cannot work."""

    def measure(self) -> Sample:
        """One sample; leaves nothing running."""

    def close(self) -> None:
        """Remove what :meth:`prepare` made."""


@dataclass
class Budget:
    """Seconds that a run may take; ``spent`` when they are over."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    @property
    def elapsed(self) -> float:
        return self.clock() - self.begun

    @property
    def spent(self) -> bool:
        return self.elapsed >= self.seconds


@dataclass
class Run:
    """One run of one benchmark, as its body sees it."""

    options: argparse.Namespace
    journal: Journal
    budget: Budget
    space: Workspace

    @property
    def n(self) -> int:
        return int(self.options.n)

    def say(self, text: str) -> None:
        say(f"[{self.budget.elapsed:6.0f} s] {text}")

    def out_of_time(self) -> bool:
        """Is the budget spent? Then the journal says so, and the body should return."""
        spent = self.budget.spent
        if spent:
            self.journal.document["status"] = "budget"
        return spent

    def prepare(self, methods: Iterable[Method], stack: contextlib.ExitStack) -> list[Method]:
        """Prepare each method; those that cannot work here are noted and left out."""
        ready = []
        for method in methods:
            if self.out_of_time():
                self.journal.unavailable(method.name, "the budget was spent before it could be prepared")
                continue
            self.say(f"prepare {method.name}")
            stack.callback(self._close, method)
            try:
                method.prepare()
            except (Unavailable, CommandFailed, GpuckptError) as error:
                reason = reason_of(error)
                self.journal.unavailable(method.name, reason)
                self.say(f"  {method.name} is unavailable: {reason}")
            else:
                ready.append(method)
        return ready

    def _close(self, method: Method) -> None:
        try:
            method.close()
        except (Unavailable, CommandFailed, GpuckptError, OSError) as error:
            self.say(f"  {method.name} could not be cleaned up at once: {reason_of(error)}")

    def rounds(self, methods: Sequence[Method], series: Callable[[Method], str] = lambda method: method.name) -> None:
        """Take samples of all methods in turn until each has its n, or the budget is spent."""
        wanted = {method.name: min(method.n or self.n, self.n) if self.options.quick else method.n or self.n
                  for method in methods}  # fmt: skip
        failed = dict.fromkeys(wanted, 0)
        for index, order in enumerate(orders(list(methods), max(wanted.values(), default=0), self.options.seed)):
            for method in order:
                name = series(method)
                if index >= wanted[method.name] or self.journal.count(name) > index or failed[method.name] >= _GIVEN_UP:
                    continue
                if self.out_of_time():
                    self.say("the budget is spent; what was measured is kept")
                    return
                try:
                    sample = method.measure()
                except (Unavailable, CommandFailed, GpuckptError) as error:
                    failed[method.name] += 1
                    reason = reason_of(error)
                    self.journal.fail(name, reason, code_of(error))
                    self.say(f"  {name} failed: {reason}")
                    if failed[method.name] >= _GIVEN_UP:
                        self.journal.unavailable(name, f"failed {_GIVEN_UP} times in a row: {reason}")
                else:
                    failed[method.name] = 0
                    self.journal.add(name, sample | {"round": index})
                    self.say(f"  {index + 1:3}  {name:<24} {shown(sample)}")


def say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone while we clean up
        print(text, flush=True)


def orders(methods: list[Any], rounds: int, seed: int) -> Iterator[list[Any]]:
    """For each round the methods in an order of its own; the same ``seed`` gives the same orders."""
    for index in range(rounds):
        order = list(methods)
        random.Random(f"{seed} {index}").shuffle(order)
        yield order


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line for a journal."""
    if isinstance(error, CommandFailed):
        parts = [error.error.get("message"), error.error.get("cause"), *(error.error.get("log") or ())[-3:]]
        text = "; ".join(str(part) for part in parts if part) or error.stderr.strip()[-600:]
        return f"status {error.code}: {text}"
    if isinstance(error, GpuckptError):
        return "; ".join(part for part in (error.message, error.cause, *error.log[-3:]) if part)
    return str(error)


def code_of(error: BaseException) -> int | None:
    """The exit status that gpuckpt gives it; None for what is no failure of gpuckpt."""
    if isinstance(error, CommandFailed):
        return error.code
    return error.exit_code if isinstance(error, GpuckptError) else None


def shown(sample: Sample) -> str:
    """The numbers of a sample that a watcher wants to see."""
    found = [f"{key} {value:.3f}" for key, value in sample.items() if isinstance(value, float)][:4]
    return "  ".join(found)


def parser(name: str, about: str | None, *, n: int, budget: float) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("-n", "--n", type=_positive, default=None, help=f"samples of each method (default: {n})")
    made.add_argument("--quick", action="store_true", help="one sample of each: does it work at all?")
    made.add_argument("--out", type=Path, default=harness.ROOT / "build" / "bench", help="folder of the results")
    made.add_argument("--budget", type=float, default=budget, help="seconds after which to stop (default: %(default)g)")
    made.add_argument("--seed", type=int, default=1, help="seed of the order of measurements (default: %(default)s)")
    made.add_argument("--resume", action="store_true", help="go on with the results that are there")
    made.set_defaults(default_n=n)
    return made


def add_workload(made: argparse.ArgumentParser) -> None:
    """The option that chooses what is served."""
    made.add_argument(
        "--model", type=Path, default=environment.prefix() / "models" / "qwen2-0.5b-random", help="model that is served"
    )
    made.add_argument(
        "--server", default="vllm", metavar="vllm|filler:MB", help="serve this instead of vLLM (default: %(default)s)"
    )


def rest(
    cores: int,
    *,
    load: Callable[[], float] = lambda: environment.load()[0],
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Wait until other work is in few of the numbers: one-minute load below 1 for two cores; the seconds it took."""
    limit, step, waited = max(1.0, cores / 2), 5.0, 0.0
    while load() >= limit and waited < _LONGEST_REST:
        if not waited:
            say(f"waiting for the machine to come to rest: load {load():.1f}, below {limit:g} is wanted")
        sleep(step)
        waited += step
    if waited:
        say(f"  load {load():.1f} after {waited:.0f} s")
    return waited


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("a number from 1 on")
    return int(text)


def main(
    name: str,
    made: argparse.ArgumentParser,
    body: Callable[[Run], None],
    *,
    argv: Sequence[str] | None = None,
    summarise: Summarise = lambda document: {},
    store_size: str = "",
) -> int:
    """Parse, measure, clean up; returns the exit status. Whatever ends it, the journal says how it ended."""
    options = made.parse_args(argv)
    options.out = options.out.absolute()
    options.n = options.n or (1 if options.quick else options.default_n)
    kept: Document = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("out", "resume", "default_n")
    }
    try:
        journal = Journal(
            options.out,
            name,
            options=kept,
            machine=environment.machine(),
            summarise=summarise,
            resume=options.resume,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    budget = Budget(options.budget)
    status = "failed"
    try:
        with harness.interrupts():
            if not options.quick:
                journal.fact("waited_for_rest_s", rest(journal.document["machine"]["cores"]))
                journal.document["load_average"] = environment.load()
                budget = Budget(options.budget)  # waiting takes none of it
            with workspace(store_size=store_size) as space:
                body(Run(options, journal, budget, space))
        status = "budget" if journal.document["status"] == "budget" else "complete"
    except InterruptedByUser as interrupted:
        status = "interrupted"
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    except CommandFailed as failure:
        print(*failure.lines(), sep="\n", file=sys.stderr)
        journal.fact("error", reason_of(failure))
        return failure.code if failure.code > 0 else 1
    except GpuckptError as error:
        print(reason_of(error), file=sys.stderr)
        journal.fact("error", reason_of(error))
        return error.exit_code
    finally:
        journal.document["elapsed_s"] = round(budget.elapsed, 1)
        journal.document["load_average_at_end"] = environment.load()
        journal.end(status)
    print(f"{journal.file}: {status}")
    return 0
