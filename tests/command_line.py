"""The program as its entry point runs it, or in a process of its own, and what it left behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuckpt.cli import main
from gpuckpt.golden.replica import Replica
from gpuckpt.store.layout import Layout

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Done:
    """Run the program as its entry point does. Wrong input ends in an exit code; a traceback would fail the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["gpuckpt", *arguments])
        try:
            with pytest.raises(SystemExit) as leaving:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(leaving.value.code, int)
    return Done(leaving.value.code, stdout.getvalue(), stderr.getvalue())


def started(*arguments: str) -> Done:
    """The same in a process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuckpt", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def replica_of(machine: Layout, name: str, golden: str) -> Replica:
    folder = machine.replicas / name
    folder.mkdir()
    made = Replica(name, golden, folder, state="ready")
    made.save()
    return made
