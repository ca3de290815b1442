"""What podman and the OCI runtime leave where something was killed: restores that hang, records of what is gone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from gpuckpt import proc
from gpuckpt.containers.checks import RUNTIMES
from gpuckpt.errors import GpuckptError

_RUN = Path("/run")  # below it OCI runtimes keep their records


def end_restore(container: str) -> bool:
    """Kill what restores the container of that name at this moment; False if nothing does.

    CRIU waits for each of the processes that it makes, for ever if one of them is killed at the wrong moment. podman
    waits for CRIU, holding the container's lock, for which everybody waits who asks for the container. conmon, between
    them, is left alone: it tells podman how it ended.
    """
    found = [pid for pid in _monitors(container) for pid in _children(pid) if b"restore" in _words(pid)]
    for restoring in found:
        for pid in reversed(proc.processes_below(restoring)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return bool(found)


def forget(container: str) -> None:
    """Remove what a removed container has left with the OCI runtime: its records in /run, and control groups.

    Where conmon was killed, podman does not tell the runtime.
    """
    for runtime in RUNTIMES:
        if (_RUN / runtime / container).is_dir():
            with contextlib.suppress(GpuckptError):  # nothing that counts: a few kilobytes, and nobody runs in them
                proc.run([runtime, "delete", "--force", container], timeout=10)


def _monitors(container: str) -> list[int]:
    """The processes of conmon that look after the container: podman gives it the container's name."""
    name = os.fsencode(container)
    return [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and (words := _words(int(entry))) and words[0].endswith(b"conmon") and name in words
    ]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _words(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []
