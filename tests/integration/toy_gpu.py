"""A driver for toy GPUs: folders, in which programs/gpu_server.py keeps what it holds. Everything else is real."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuckpt import proc
from gpuckpt.cuda.driver import DriverError, Gpu, State

MIB = 1 << 20


class ToyDriver:
    """Implements :class:`gpuckpt.cuda.driver.Driver`; ``folder`` holds a folder for each device."""

    def __init__(self, folder: Path, capacity: int = 2000 * MIB) -> None:
        self.folder = folder
        self.capacity = capacity
        self.calls: list[str] = []
        self._asking = threading.Lock()

    @property
    def shares(self) -> bool:
        return False

    def state(self, pid: int) -> State | None:
        found: State | None = self._report(pid)["state"]
        return found

    def lock(self, pid: int, timeout: float) -> None:
        self._act("lock", 1, pid, "locked")

    def checkpoint(self, pid: int) -> None:
        self._act("checkpoint", 2, pid, "checkpointed")

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        (self._notes(pid) / f"toy-{proc.inside(pid)}.map").write_text(json.dumps(dict(gpus)))
        self._act("restore", 3, pid, "locked")

    def unlock(self, pid: int) -> None:
        self._act("unlock", 4, pid, "running")

    def carry(self, file: int, uuid: str) -> int:
        raise DriverError("NOT_SUPPORTED", "")

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(
            Gpu(one.name, "Toy GPU", self.capacity, self.capacity - sum(file.stat().st_size for file in one.iterdir()))
            for one in sorted(self.folder.iterdir())
        )

    def memory(self, pid: int) -> dict[str, int]:
        name = f"{self._hostname(pid)}-{proc.inside(pid)}"
        files = {device.name: device / name for device in self.folder.iterdir()}
        return {device: file.stat().st_size for device, file in files.items() if file.exists()}

    def version(self) -> str:
        return "0.0"

    def _hostname(self, pid: int) -> str:
        # uname(2) of another process: its namespace's, which only a process in it can ask for.
        done = proc.run(["nsenter", "-t", str(pid), "-u", "hostname"], timeout=60)
        return done.stdout.strip()

    def _notes(self, pid: int) -> Path:
        return Path(f"/proc/{pid}/root/run/gpuckpt")

    def _report(self, pid: int) -> dict[str, Any]:
        return self._signal(pid, 5)

    def _act(self, name: str, number: int, pid: int, then: State) -> None:
        self.calls.append(name)
        if self._signal(pid, number)["state"] != then:
            raise DriverError("TOY", f"{name} of {pid} failed")

    def _signal(self, pid: int, number: int) -> dict[str, Any]:
        file = self._notes(pid) / f"toy-{proc.inside(pid)}.json"
        before = _read(file).get("number")
        os.kill(pid, signal.SIGRTMIN + number)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if (found := _read(file)) and found["number"] != before:
                return found
            time.sleep(0.002)
        raise DriverError("TOY", f"process {pid} does not answer")


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        return {}
