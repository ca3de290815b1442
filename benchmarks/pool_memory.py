"""What the pool's replicas hold of the machine's memory, and what the same servers take when each is started by itself.

The latter is measured while the pool makes a golden: the server runs then as it would without gpuckpt.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import memory
from benchmarks.density import settled
from benchmarks.memory import pid_of
from benchmarks.pool_process import PoolProcess
from gpuckpt.errors import GpuckptError
from gpuckpt.proc import processes_below
from gpuckpt.service.view import ModelView

_EVERY = 0.5  # seconds between two readings
_RECENT = 20  # readings
_LOOK = 0.2  # seconds between two looks for the container: each is a run of podman


class Reading(NamedTuple):
    """The books of a server's processes at one moment."""

    processes: int
    of: dict[str, int]

    @property
    def alone(self) -> int:
        """Bytes that nobody else could share: anonymous and shared memory. Libraries' pages are left out."""
        return self.of["Pss_Anon"] + self.of["Pss_Shmem"] + self.of["Swap"]


def read(processes: Sequence[dict[str, int]]) -> Reading:
    """The sum of several processes' books; those that have ended, and are only not waited for yet, hold nothing."""
    living = [each for each in processes if each["Rss"]]
    return Reading(len(living), {key: sum(each[key] for each in living) for key in memory.rollup("")})


def whole(readings: Sequence[Reading]) -> Reading | None:
    """The last reading of the whole server: it has started, helpers of its start have gone, none of it has ended yet.

    So with as many processes as most of the last readings have.
    """
    readings = [reading for reading in readings if reading.processes]
    if not readings:
        return None
    counted = Counter(reading.processes for reading in readings[-_RECENT:])
    usual = max(counted, key=lambda processes: (counted[processes], processes))
    return next(reading for reading in reversed(readings) if reading.processes == usual)


class ColdWatch:
    """Reads what the server of which ``golden`` is made holds, from a thread, for the length of a ``with``."""

    def __init__(self, golden: str) -> None:
        self._golden = golden
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"memory of {golden}", daemon=True)
        self.readings: list[Reading] = []

    def __enter__(self) -> ColdWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def result(self) -> dict[str, int] | None:
        """What it held before it was frozen; None if it was never seen whole."""
        if (found := whole(self.readings)) is None:
            return None
        return {
            "alone_bytes": found.alone,
            "pss_bytes": found.of["Pss"],
            "rss_bytes": found.of["Rss"],
            "most_alone_bytes": max(reading.alone for reading in self.readings),
            "processes": found.processes,
        }

    def _watch(self) -> None:
        pid = 0
        while not pid:
            try:
                pid = pid_of(self._golden)  # 0 while the container waits to be started
            except GpuckptError:
                pid = 0
            if self._ended.wait(0 if pid else _LOOK):
                return
        # Only this process: the golden's trial restore comes later, under the same name.
        while Path(f"/proc/{pid}").exists():
            self.readings.append(read([memory.of_processes([each]) for each in processes_below(pid)]))
            if self._ended.wait(_EVERY):
                return


def of_replicas(model: ModelView) -> list[dict[str, Any]]:
    """For each replica: its own bytes as the pool counts them, and the kernel's books of its processes."""
    found = []
    for one in model.replicas:
        if one.pid is not None:
            taken = memory.below(one.pid)
            found.append(
                {
                    "name": one.name,
                    "phase": one.phase,
                    "own_bytes": one.memory,
                    "pss_bytes": taken["Pss"],
                    "rss_bytes": taken["Rss"],
                    "private_bytes": taken["Private_Dirty"],
                    "anonymous_bytes": taken["Pss_Anon"],
                }
            )
    return found


def noted(pool: PoolProcess, seconds: float = 8.0) -> None:
    """Wait until the pool has looked at its replicas' memory again, which it does with each health check."""
    time.sleep(seconds)


def machine() -> int:
    """MemAvailable, come to rest."""
    return settled()
