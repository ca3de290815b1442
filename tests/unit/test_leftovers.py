"""Restores that hang: they are found by conmon, and ended."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpuckpt import proc
from gpuckpt.containers.leftovers import end_restore

# A shell that is called like conmon, below it one with the runtime's words, below that somebody who sleeps.
MONITOR = """sh -c "echo up; sleep 600; :" runc "$6" & wait $!"""


@contextmanager
def monitor(folder: Path, name: str, verb: str, program: str = "conmon") -> Iterator[subprocess.Popen[str]]:
    (folder / "config.json").write_text(json.dumps({"root": {"path": f"{folder}/state/replicas/a/rootfs"}}))
    words = [program, "-c", MONITOR, "-c", "abc", "-b", str(folder), "-n", name, verb]
    with subprocess.Popen(words, executable="/bin/sh", stdout=subprocess.PIPE, text=True) as made:
        try:
            assert made.stdout and made.stdout.readline() == "up\n"
            yield made
        finally:
            for pid in reversed(proc.processes_below(made.pid)):
                subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)


def test_a_restore_is_ended_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    with monitor(tmp_path, "gpuckpt-a", "restore") as made:
        below = proc.processes_below(made.pid)
        assert end_restore("gpuckpt-a", tmp_path / "state") is True
        assert made.wait(10) == -signal.SIGKILL
        assert all(proc.is_killed(pid) for pid in below)


@pytest.mark.parametrize(
    ("name", "verb", "program", "state"),
    [
        ("gpuckpt-ab", "restore", "conmon", "state"),
        ("gpuckpt-a", "create", "conmon", "state"),
        ("gpuckpt-a", "restore", "other", "state"),
        ("gpuckpt-a", "restore", "conmon", "another"),
    ],
)
def test_nothing_else_is(tmp_path: Path, name: str, verb: str, program: str, state: str) -> None:
    with monitor(tmp_path, name, verb, program) as made:
        assert end_restore("gpuckpt-a", tmp_path / state) is False
        assert made.poll() is None
