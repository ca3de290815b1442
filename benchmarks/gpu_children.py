"""Processes that the acceptance on a GPU starts, and their end: a step that hangs is cut off, and nothing of it stays.

Whatever a step starts, and whatever that starts, daemons and containers too, is a descendant of the run: the kernel
gives orphans to the nearest ancestor that has asked for them. So what is ended is known by its id, never by its name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from gpuckpt import proc

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER, see prctl(2)
_LOOK = 0.05  # seconds between two looks at a process
_BURIALS = 0.5  # and at what orphans have left
_KIND, _HARD = 2.0, 5.0  # seconds that those have who are asked to end, and those who are killed


class Ended(Struct, frozen=True):
    """How a process ended: its status, None if it was cut off; seconds; its last words on standard error."""

    code: int | None
    seconds: float
    said: tuple[str, ...] = ()


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run(
    argv: Sequence[str | Path],
    *,
    limit: float,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace: float = 15.0,
) -> Ended:
    """Run it for at most ``limit`` seconds; then it has ``grace`` seconds to put everything back.

    Its standard output is ours, its standard error goes to ``log``. Whatever interrupts us, it ends before we go on.
    """
    began = time.monotonic()
    with log.open("wb") as words:
        process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stderr=words,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    late = False
    try:
        if not _ended(process, limit):
            late = True
            process.terminate()
            _ended(process, grace)
    finally:
        if process.poll() is None:
            if not late:  # we are interrupted
                process.terminate()
                _ended(process, grace)
            process.kill()
            process.wait()
    took = time.monotonic() - began
    return Ended(None if late else process.returncode, took, proc.tail(log.read_text(errors="replace"), 12))


def _ended(process: subprocess.Popen[bytes], limit: float) -> bool:
    until = time.monotonic() + limit
    look = 0.0
    while process.poll() is None:
        now = time.monotonic()
        if now > until:
            return False
        if now >= look:  # seldom: what is measured meanwhile shares the processors
            _bury({process.pid})
            look = now + _BURIALS
        time.sleep(_LOOK)
    return True


def _bury(known: Collection[int]) -> None:
    """Collect the remains of orphans, who are nobody's else; those of ``known`` are waited for by others."""
    for pid in _children():
        if pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """By /proc/PID/stat, for not every kernel lists them."""
    mine = str(os.getpid())
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) and stat[1] == mine:
            found.append(int(entry))
    return found


def _stat(pid: int) -> list[str]:
    """What follows the name in /proc/PID/stat: state, parent …; empty if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def descendants() -> set[int]:
    """Of this process, without itself."""
    return set(proc.processes_below(os.getpid())) - {os.getpid()}


def sweep(before: Collection[int], *, sleep: Callable[[float], None] = time.sleep) -> list[str]:
    """End all descendants that were not there ``before``; the names of those that cannot be ended."""
    left: set[int] = set()
    for number, patience in ((signal.SIGTERM, _KIND), (signal.SIGKILL, _HARD)):
        until = time.monotonic() + patience
        told: set[int] = set()
        while True:
            _bury(before)
            left = {pid for pid in descendants() - set(before) if not _is_dead(pid)}
            for pid in left - told:  # those too that were started meanwhile
                told.add(pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            if not left or time.monotonic() > until:
                break
            sleep(_LOOK)
    return sorted(f"{_name(pid)} ({pid})" for pid in left)


def _is_dead(pid: int) -> bool:
    stat = _stat(pid)
    return not stat or stat[0] in "ZX"


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process"
