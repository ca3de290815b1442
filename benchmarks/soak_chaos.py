"""The soak's chaos: replicas, CRIU and the daemon killed or stopped at random moments, from one seed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pool_process import PoolProcess
from gpuckpt import proc
from gpuckpt.errors import GpuckptError

_DEEDS = ("replica", "process", "replica", "daemon", "criu", "stop", "process", "replica")
_CRIU_SECONDS = 15.0  # the longest that is waited for a CRIU to kill


class Chaos(threading.Thread):
    """Does something bad every ``mean_s`` seconds on average, until ``until``; what it did is in ``done``.

    ``damage`` is called once, half-way, and damages a golden; it returns what it did.
    """

    def __init__(
        self, pool: PoolProcess, *, seed: str, until: float, mean_s: float, damage: Callable[[], str] | None = None
    ) -> None:
        super().__init__(daemon=True)
        self._pool, self._until, self._mean, self._damage = pool, until, mean_s, damage
        self._half = (time.monotonic() + until) / 2
        self._random = random.Random(seed)
        self.done: list[dict[str, Any]] = []
        self.killed: list[float] = []  # when the daemon was
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Do it; what goes wrong with chaos itself is kept."""
        try:
            while True:
                pause = self._random.expovariate(1 / self._mean)
                if time.monotonic() + pause >= self._until:
                    return
                time.sleep(pause)
                if self._damage is not None and time.monotonic() > self._half:
                    self._note("damage", self._damage())
                    self._damage = None
                    continue
                self._do(self._random.choice(_DEEDS))
        except BaseException as error:
            self.failure = error

    def _note(self, deed: str, what: str) -> None:
        self.done.append({"at": time.monotonic(), "deed": deed, "what": what})

    def _do(self, deed: str) -> None:
        if deed == "daemon":
            assert self._pool.process is not None
            pid = self._pool.process.pid
            self.killed.append(time.monotonic())
            self._pool.kill()
            self._note(deed, f"process {pid}")
            time.sleep(self._random.random())
            self._pool.start()  # as systemd would
            return
        if deed == "criu":
            self._kill_criu()
            return
        try:
            replicas = [one for model in self._pool.view().models for one in model.replicas if one.pid]
        except GpuckptError:
            return
        if not replicas:
            return
        replica = self._random.choice(replicas)
        assert replica.pid
        inside = proc.processes_below(replica.pid)
        victim = self._random.choice(inside) if deed == "process" and inside else replica.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP if deed == "stop" else signal.SIGKILL)
            self._note(deed, f"{replica.name} ({replica.phase}), process {victim}")

    def _kill_criu(self) -> None:
        until = min(self._until, time.monotonic() + _CRIU_SECONDS)
        while time.monotonic() < until:
            for pid in criu_of(self._pool.folder):
                time.sleep(self._random.random() * 0.1)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self._note("criu", f"process {pid}")
                    return
            time.sleep(0.005)


def criu_of(folder: Path) -> list[int]:
    """The CRIU processes that a gpuckpt with its folders below ``folder`` has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _comm(int(entry.name)) == "criu" and _is_of(int(entry.name), folder):
            found.append(int(entry.name))
    return found


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_of(pid: int, folder: Path) -> bool:
    """Whether one of its ancestors names the folder in its command line: podman's service has its socket there."""
    mark = str(folder).encode()
    while pid > 1:
        try:
            if mark in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False
