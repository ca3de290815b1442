"""Run gpuckpt's own commands as a user would and take their times from outside.

Every clock is CLOCK_MONOTONIC, which is one and the same in all processes of a machine: a command prints when the
first token came, we know when we spawned it, and the difference holds everything in between, the interpreter's start
included.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from gpuckpt.errors import GpuckptError, InterruptedByUser
from gpuckpt.timing import UNACCOUNTED, now_ns
from gpuckpt.workload.endpoint import Endpoint

ROOT = Path(__file__).resolve().parents[1]
_STOP_LIMIT = 120.0  # seconds that an interrupted command has to put everything back
Phases = list[dict[str, Any]]


class CommandFailed(Exception):
    """A command ended with a status other than 0; ``error`` is its own description, if it gave one."""

    def __init__(self, argv: Sequence[str], code: int, error: dict[str, Any], stderr: str) -> None:
        super().__init__(f"{' '.join(argv)} ended with status {code}")
        self.code = code
        self.error = error
        self.stderr = stderr

    def lines(self) -> Iterator[str]:
        """What the command itself said, in its own order: what, why, what to do, the log."""
        yield f"{self}: {self.error.get('message', 'it gave no reason')}"
        if cause := self.error.get("cause"):
            yield f"  why:    {cause}"
        if remedy := self.error.get("remedy"):
            yield f"  remedy: {remedy}"
        for line in self.error.get("log") or self.stderr.splitlines()[-20:]:
            yield f"  │ {line}"
        if path := self.error.get("log_path"):
            yield f"  whole log: {path}"


@dataclass(frozen=True)
class Outcome:
    """A command that succeeded: its JSON document, when it was spawned and had ended (ns), all that it printed."""

    document: dict[str, Any]
    spawned_ns: int
    ended_ns: int
    stdout: str = ""

    @property
    def wall_s(self) -> float:
        return (self.ended_ns - self.spawned_ns) / 1e9

    @property
    def ttft_s(self) -> float:
        """Seconds from just before the command was spawned to the first streamed token."""
        return float(self.document["first_token_monotonic_ns"] - self.spawned_ns) / 1e9

    def phases_to_first_token(self) -> Phases:
        """The command's phases up to the first token; with `unaccounted` they add up to :attr:`ttft_s`.

        The command's own clock begins with its process. The moment between our spawning it and that is added to its
        start-up, so that nothing is left out (nor counted twice: the kernel rounds a process's start down to 10 ms).
        """
        own = self.document.get("ttft_s") or self.document["cold_ttft_s"]
        early = self.ttft_s - own
        rows: Phases = []
        for row in self.document["phases"]:
            if row["name"] != UNACCOUNTED:
                extra = early if not rows else 0.0
                rows.append({"name": row["name"], "seconds": round(row["seconds"] + extra, 6)})
            if row["name"] in ("first token", "cold: first token"):
                break
        return with_rest(rows, self.ttft_s)


def status_of(work: Callable[[], object]) -> int:
    """Do it; what fails is told on standard error as the commands tell it. The exit status: 0, or the failure's."""
    try:
        with interrupts():
            work()
    except CommandFailed as failure:
        print(*failure.lines(), sep="\n", file=sys.stderr)
        return failure.code if failure.code > 0 else 1
    except InterruptedByUser as interrupted:
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    except GpuckptError as error:
        from gpuckpt.cli.render import show_error

        show_error(error, as_json=False)
        return error.exit_code
    return 0


def with_rest(rows: Phases, total: float) -> Phases:
    """``rows`` and what is missing from ``total``, as the row `unaccounted`."""
    return [*rows, {"name": UNACCOUNTED, "seconds": round(total - sum(row["seconds"] for row in rows), 6)}]


def run(
    arguments: Sequence[str],
    *,
    cwd: Path,
    tick: Callable[[], None] = lambda: None,
    show_progress: bool = False,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run ``gpuckpt ARGUMENTS`` to its end (with --format json, if its result is to be read).

    ``tick`` is called five times a second. ``cwd`` should be a folder of ours: gpuckpt reads a .env from it.
    ``env`` is added to our own environment.
    ``show_progress`` leaves it our stderr, where it shows its stages if that is a terminal. Raises CommandFailed.
    Whatever interrupts us is passed on as SIGTERM, and the command's own roll-back is waited for.
    """
    argv = [sys.executable, "-m", "gpuckpt", *arguments]
    spawned = now_ns()
    # A session of its own: Ctrl-C reaches us alone, and we stop the command in one way whatever the reason is.
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if show_progress else subprocess.PIPE,
        start_new_session=True,
    )
    try:
        while True:
            try:
                stdout, stderr = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        _stop(process)
        raise
    ended = now_ns()
    text = (stderr or b"").decode(errors="replace")
    try:
        document = json.loads(stdout)
    except ValueError:
        document = {}
    if process.returncode != 0:
        raise CommandFailed(["gpuckpt", *arguments], process.returncode, document.get("error", {}), text)
    return Outcome(document, spawned, ended, stdout.decode(errors="replace"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=_STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal raise InterruptedByUser once; later ones wait for the clean-up."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def handle(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedByUser(f"interrupted by {signal.Signals(number).name}")

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def endpoint_of(restored: dict[str, Any]) -> Endpoint:
    """Where the replica of a `gpuckpt restore --format json` listens."""
    if restored["socket"]:
        return Endpoint(socket=Path(restored["socket"]))
    url = urlsplit(restored["url"])
    return Endpoint(host=url.hostname or "127.0.0.1", port=url.port or 80)


def differences(endpoint: Endpoint, canary: dict[str, Any]) -> str | None:
    """Ask a replica the golden's recorded question, streamed, with code that shares nothing with the command's check.

    ``canary`` is that of `gpuckpt inspect --format json`: the tokens and log-probabilities of the server that was
    never dumped. Returns None if the answer is the same, else the first difference.
    """
    request = canary["request"]
    got: list[tuple[str, float]] = []
    for _, event in endpoint.stream(request["method"], request["path"], json.loads(request["body"])):
        for choice in event.get("choices", []):
            pieces = choice.get("logprobs") or {"tokens": [], "token_logprobs": []}
            got += zip(pieces["tokens"], pieces["token_logprobs"], strict=True)
    return first_difference(got, canary)


def first_difference(got: Sequence[tuple[str, float]], canary: dict[str, Any]) -> str | None:
    """The first token or logprob in which an answer differs from the recorded one; None if it does not."""
    expected = list(zip(canary["tokens"], canary["logprobs"], strict=True))
    for index, (here, there) in enumerate(zip(got, expected, strict=False)):
        if here != there:
            return f"token {index} is {here}, the server that was never dumped gave {there}"
    return None if len(got) == len(expected) else f"{len(got)} tokens came, {len(expected)} were recorded"
