"""What this process has open: for tests of what must be closed again.

Tests share their process with each other. What an earlier one has left to the garbage collector, or to a thread, may be
closed at any time, so that two counts are equal by chance alone: only what has come since tells something.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time

Files = set[tuple[int, str]]


def opened() -> Files:
    """The descriptors of this process, each with what it leads to."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they were listed
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return found


def left_open(before: Files, patience: float = 60.0) -> Files:
    """What was opened after ``before`` and is not closed within ``patience`` seconds: by whom may be another thread."""
    end = time.monotonic() + patience
    gc.collect()
    while (left := opened() - before) and time.monotonic() < end:
        time.sleep(0.01)
    return left
