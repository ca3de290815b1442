"""What podman and the OCI runtime leave where something was killed: restores that hang, records of what is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path

from gpuckpt import proc
from gpuckpt.containers.checks import RUNTIMES
from gpuckpt.errors import GpuckptError

_RUN = Path("/run")  # below it OCI runtimes keep their records


def end_restore(container: str, owner: Path) -> bool:
    """Kill what restores the container of that name at this moment; False if nothing does.

    ``owner``: the state folder below which its root lies; another gpuckpt's, which may have the name now, goes on.

    CRIU waits for each of the processes that it makes, for ever if one of them is killed at the wrong moment. podman
    waits for CRIU, holding the container's lock, for which everybody waits who asks for the container. conmon, between
    them, goes, too: it would start podman's clean-up and wait for that, and leave the dead unburied meanwhile, whom the
    runtime takes for alive.
    """
    found = [monitor for monitor in _monitors(container) if _restores(monitor) and _belongs(monitor, owner)]
    for monitor in found:
        identity = _option(monitor, b"-c")
        _signal(monitor, signal.SIGSTOP)  # podman is told, by its end, when the rest is done
        try:
            for pid in proc.processes_below(monitor):
                if pid != monitor:
                    _signal(pid, signal.SIGKILL)
            _unmount(identity)
        finally:
            _signal(monitor, signal.SIGKILL)
    return bool(found)


def _unmount(container: str) -> None:
    """Take away the root file system that runc shows to CRIU below its own records.

    It removes these with everything below them: a container's files, one by one, if it was killed while that was there.
    """
    for runtime in RUNTIMES:
        root = _RUN / runtime / container / "criu-root"
        if os.path.ismount(root):
            proc.run(["umount", "--lazy", root], check=False)


def unmount_yards(bundle: Path) -> None:
    """Take away the control groups that a killed CRIU has left mounted in a container's bundle (its "cgroup yard").

    podman removes the bundle with all that is below it: it cannot remove a group's files, so the container stays, and
    could remove groups of others in which there is nobody at the moment.
    """
    for yard in bundle.glob(".criu.cgyard.*"):
        if os.path.ismount(yard):
            proc.run(["umount", "--lazy", yard], check=False)  # with what is mounted below


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def restores(container: str) -> list[int]:
    """The runtime's processes that restore the container of that name."""
    return [pid for monitor in _monitors(container) for pid in _restores(monitor)]


def _restores(monitor: int) -> list[int]:
    return [pid for pid in _children(monitor) if b"restore" in _words(pid)]


def forget(container: str) -> None:
    """Remove what a removed container has left with the OCI runtime: its records in /run, and control groups.

    Where conmon was killed, podman does not tell the runtime.
    """
    _unmount(container)
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


def _belongs(monitor: int, owner: Path) -> bool:
    """Whether the root of the container that a conmon looks after lies below ``owner``, as its bundle says."""
    try:
        config = json.loads((Path(_option(monitor, b"-b")) / "config.json").read_text())
        root = Path(config["root"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return root.resolve().is_relative_to(owner.resolve())


def _option(pid: int, option: bytes) -> str:
    words = _words(pid)
    return os.fsdecode(words[words.index(option) + 1]) if option in words[:-1] else ""


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _words(pid: int) -> list[bytes]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []
