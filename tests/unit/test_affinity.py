"""Threads keep the processors that they were bound to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from gpuckpt.host import affinity

# Two threads, one bound to the first processor that it may run on; says when it is done, ends with its stdin.
PROGRAM = """
import os, sys, threading
def bound():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(threading.get_native_id(), flush=True)
    sys.stdin.read()
threading.Thread(target=bound).start()
"""


@pytest.fixture
def process() -> Iterator[tuple[int, int]]:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdin is not None
    yield child.pid, int(child.stdout.readline())
    child.stdin.close()
    child.wait()
    child.stdout.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="with one processor nothing can be bound")
def test_bound_threads_are_found_and_bound_again(process: tuple[int, int]) -> None:
    pid, thread = process
    first = min(os.sched_getaffinity(0))
    found = affinity.bound(pid)
    assert found == {str(first): (thread,)}
    os.sched_setaffinity(thread, os.sched_getaffinity(0))
    assert affinity.bound(pid) == {}
    assert affinity.bind(pid, found) == []
    assert os.sched_getaffinity(thread) == {first}
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)


def test_processors_that_are_not_here_are_named(process: tuple[int, int]) -> None:
    pid, thread = process
    notes = affinity.bind(pid, {"70000-70001": (thread, 1)})
    assert len(notes) == 1 and "70000-70001" in notes[0]


@pytest.mark.parametrize(("text", "numbers"), [("", set()), ("3", {3}), ("0-2,8", {0, 1, 2, 8})])
def test_lists_of_processors(text: str, numbers: set[int]) -> None:
    assert affinity.processors(text) == numbers
