"""The driver through its own interfaces: cuda-bindings for the state of processes, NVML for devices.

To be used by one long-lived process only (helper.py): the first call initialises CUDA, which takes seconds on a machine
with many devices, and is paid by every process anew. cuda-core has a module for the state of processes as well
(``cuda.core.checkpoint``); it turns the driver's codes into sentences, and one of them, CUDA_ERROR_NOT_SUPPORTED, into
the advice to update the driver, which it also is for a process whose kind of memory no driver can move.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from gpuckpt.cuda.driver import NO_CONTEXT, DriverError, Gpu, State, host_memory
from gpuckpt.errors import PreflightError

# 12.9.0 keeps Python's lock during a call, so that one that hangs keeps all others waiting; 12.8 moreover takes for a
# state what the driver has not written, and fails on processes without CUDA. 13.0.0 and 13.0.1 cannot restore.
_OLDEST = (12, 9, 1)
_NEEDED = ("GetState", "Lock", "Checkpoint", "Restore", "Unlock")
# Not in 12.9, one of them not in 13.3.0 either.
_MOVING = ("CUcheckpointGpuPair", "CUcheckpointRestoreArgs")
_STATES: dict[str, State] = {
    "CU_PROCESS_STATE_RUNNING": "running",
    "CU_PROCESS_STATE_LOCKED": "locked",
    "CU_PROCESS_STATE_CHECKPOINTED": "checkpointed",
    "CU_PROCESS_STATE_FAILED": "failed",
}


class Bindings:
    """The real driver. Raises PreflightError if this machine cannot: no driver, no packages, too old."""

    def __init__(self) -> None:
        try:
            import pynvml
            from cuda.bindings import __version__, driver
        except ImportError as error:
            raise PreflightError(
                "GPU state cannot be handled: a Python package is missing",
                cause=str(error),
                remedy=f"{sys.executable} -m pip install cuda-bindings nvidia-ml-py",
            ) from error
        version = tuple(int(part) for part in re.findall(r"\d+", __version__)[:3])
        lacking = [name for name in _NEEDED if not hasattr(driver, f"cuCheckpointProcess{name}")]
        if version < _OLDEST or lacking:
            raise PreflightError(
                f"GPU state cannot be handled with the package cuda-bindings {__version__}",
                cause=f"it lacks cuCheckpointProcess{lacking[0]}" if lacking else "12.9.1 is the oldest that can do it",
                remedy=f"{sys.executable} -m pip install -U cuda-bindings",
            )
        self._nvml: Any = pynvml
        self._cuda: Any = driver
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise PreflightError(
                "NVIDIA's driver does not answer", cause=str(error), remedy="gpuckpt doctor"
            ) from error
        try:
            self._call(driver.cuInit, 0)
        except DriverError as error:
            raise PreflightError("CUDA cannot be initialised", cause=error.message, remedy="gpuckpt doctor") from error
        self._lock = threading.Lock()

    @property
    def shares(self) -> bool:
        return True

    def state(self, pid: int) -> State | None:
        try:
            found = self._call(self._cuda.cuCheckpointProcessGetState, pid)
        except DriverError as error:
            if error.code in NO_CONTEXT:
                return None
            raise
        name = self._cuda.CUprocessState(found).name
        if name not in _STATES:
            raise DriverError("UNKNOWN_STATE", name)
        return _STATES[name]

    def lock(self, pid: int, timeout: float) -> None:
        arguments = self._cuda.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, int(timeout * 1000))
        self._call(self._cuda.cuCheckpointProcessLock, pid, arguments)

    def checkpoint(self, pid: int) -> None:
        self._call(self._cuda.cuCheckpointProcessCheckpoint, pid, None)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        if gpus and not all(hasattr(self._cuda, name) for name in _MOVING):
            raise DriverError("CUDA_ERROR_NOT_SUPPORTED", "moving to other devices needs cuda-bindings 13.0.2 or newer")
        buffers: list[Any] = []  # the UUIDs are read from them during the call
        pairs = []
        for old, new in gpus.items():
            pair = self._cuda.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = self._uuid(old, buffers), self._uuid(new, buffers)
            pairs.append(pair)
        arguments = None
        if pairs:
            arguments = self._cuda.CUcheckpointRestoreArgs()
            arguments.gpuPairs, arguments.gpuPairsCount = pairs, len(pairs)
        self._call(self._cuda.cuCheckpointProcessRestore, pid, arguments)

    def unlock(self, pid: int) -> None:
        self._call(self._cuda.cuCheckpointProcessUnlock, pid, None)

    def carry(self, file: int, uuid: str) -> int:
        from gpuckpt.cuda.carrier import carry

        count = int(self._call(self._cuda.cuDeviceGetCount))
        for number in range(count):
            device = self._call(self._cuda.cuDeviceGet, number)
            if self._call(self._cuda.cuDeviceGetUuid, device).bytes.hex() == uuid.removeprefix("GPU-").replace("-", ""):
                return carry(self._cuda, self._call, file, device)
        raise DriverError("NO_DEVICE", f"CUDA does not know {uuid}")

    def _uuid(self, text: str, buffers: list[Any]) -> Any:
        buffers.append(ctypes.create_string_buffer(bytes.fromhex(text.removeprefix("GPU-").replace("-", "")), 16))
        return self._cuda.CUuuid(ctypes.addressof(buffers[-1]))

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call the driver; its result, if it gives one. Whatever it refuses is a DriverError with its code."""
        try:
            status, *results = function(*arguments)
        except RuntimeError as error:  # the library is missing, or has no such function
            raise DriverError(type(error).__name__, str(error)) from error
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            _, words = self._cuda.cuGetErrorString(status)
            raise DriverError(status.name, _text(words) if words else "")
        return results[0] if results else None

    def gpus(self) -> tuple[Gpu, ...]:
        nvml = self._nvml
        found = []
        with self._asked():
            for handle in self._handles():
                try:
                    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                    total, free = memory.total, memory.free
                except nvml.NVMLError_NotSupported:
                    total, free = host_memory()
                try:
                    mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
                except nvml.NVMLError:  # a type that has none
                    mig = False
                uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)
                found.append(Gpu(_text(uuid), _text(name), total, free, mig))
        return tuple(found)

    def memory(self, pid: int) -> dict[str, int]:
        nvml = self._nvml
        found: dict[str, int] = {}
        with self._asked():
            for handle in self._handles():
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                    if process.pid == pid:
                        if process.usedGpuMemory is None:
                            raise DriverError("MEMORY_UNTOLD", f"NVML does not tell what process {pid} holds")
                        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                        found[uuid] = found.get(uuid, 0) + process.usedGpuMemory
        return found

    def version(self) -> str:
        with self._asked():
            return _text(self._nvml.nvmlSystemGetDriverVersion())

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Whatever NVML refuses is a DriverError as well."""
        try:
            yield
        except self._nvml.NVMLError as error:
            raise DriverError(type(error).__name__, str(error)) from error

    def _handles(self) -> list[Any]:
        with self._lock:  # NVML is safe for threads; a device that goes between the two calls is not
            return [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(self._nvml.nvmlDeviceGetCount())]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
