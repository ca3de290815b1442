"""A driver without a GPU: states of made-up processes, what was called when, and refusals on demand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gpuckpt.cuda.driver import DriverError, Gpu, State

MIB = 1 << 20
H100 = "NVIDIA H100 80GB HBM3"


def gpu(number: int, *, free: int = 80_000, name: str = H100, memory: int = 80_000, mig: bool = False) -> Gpu:
    """A device with so many MiB."""
    return Gpu(f"GPU-{number:08x}-0000-0000-0000-000000000000", name, memory * MIB, free * MIB, mig)


@dataclass
class Process:
    """Bytes that it holds, by device; where they lie is its state."""

    bytes: dict[str, int]
    state: State = "running"


@dataclass
class FakeDriver:
    """Obeys the driver's rules: which step follows which, what does not fit, what can never be mended."""

    devices: dict[str, Gpu] = field(default_factory=lambda: {one.uuid: one for one in (gpu(0),)})
    processes: dict[int, Process] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)
    refuse: dict[tuple[str, int], DriverError] = field(default_factory=dict)
    hang: dict[tuple[str, int], threading.Event] = field(default_factory=dict)
    before: Callable[[str, int], None] = lambda step, pid: None
    shares: bool = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, pid: int, mib: int, device: str | None = None) -> None:
        """A process with so many MiB on a device."""
        uuid = device or next(iter(self.devices))
        self.processes[pid] = Process({uuid: mib * MIB})
        self._take(self.processes[pid].bytes, 1)

    def state(self, pid: int) -> State | None:
        self.before("state", pid)
        found = self.processes.get(pid)
        return found.state if found else None

    def lock(self, pid: int, timeout: float) -> None:
        self._step("lock", pid, "running", "locked")

    def checkpoint(self, pid: int) -> None:
        self._step("checkpoint", pid, "locked", "checkpointed")
        with self._lock:
            self._take(self.processes[pid].bytes, -1)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        if unknown := set(gpus.values()) - self.devices.keys():
            raise DriverError("CUDA_ERROR_INVALID_VALUE", f"there is no {unknown}")
        with self._lock:
            process = self.processes[pid]
            wanted = {gpus.get(uuid, uuid): count for uuid, count in process.bytes.items()}
            lacking = any(self.devices[uuid].free < count for uuid, count in wanted.items())
            other = any(
                self.devices[gpus.get(uuid, uuid)].name != self.devices[uuid].name
                for uuid in process.bytes
                if uuid in self.devices
            )
        if other:
            raise DriverError("CUDA_ERROR_INVALID_VALUE", "another type of device")
        if lacking:
            process.state = "failed"  # as the real one: it can never be restored
            raise DriverError("CUDA_ERROR_OUT_OF_MEMORY", "")
        self._step("restore", pid, "checkpointed", "locked")
        with self._lock:
            process.bytes = wanted
            self._take(wanted, 1)

    def unlock(self, pid: int) -> None:
        self._step("unlock", pid, "locked", "running")

    def carry(self, file: int, uuid: str) -> int:
        self.before("carry", 0)
        if error := self.refuse.get(("carry", 0)):
            raise error
        # Memory of the device: a file without a name is as free when nobody has it open.
        made = os.memfd_create("device memory")
        os.pwrite(made, os.pread(file, os.fstat(file).st_size, 0), 0)
        return made

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(self.devices.values())

    def memory(self, pid: int) -> dict[str, int]:
        process = self.processes[pid]
        return dict(process.bytes) if process.state in ("running", "locked") else {}

    def version(self) -> str:
        return "570.86.15"

    def _step(self, step: str, pid: int, wanted: State, then: State) -> None:
        self.before(step, pid)
        if over := self.hang.get((step, pid)):
            over.wait(60)  # until the test lets it go on
            time.sleep(0.02)  # who does not wait for it now is sooner
        if error := self.refuse.get((step, pid)):
            raise error
        with self._lock:
            process = self.processes.get(pid)
            if process is None:
                raise DriverError("CUDA_ERROR_NOT_INITIALIZED", "")
            if process.state != wanted:
                raise DriverError("CUDA_ERROR_ILLEGAL_STATE", f"{process.state}, not {wanted}")
            process.state = then
            self.calls.append((step, pid))

    def _take(self, bytes: Mapping[str, int], sign: int) -> None:
        for uuid, count in bytes.items():
            one = self.devices[uuid]
            self.devices[uuid] = Gpu(one.uuid, one.name, one.memory, one.free - sign * count, one.mig)
