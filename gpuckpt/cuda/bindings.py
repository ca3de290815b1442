"""The driver through its own interfaces: cuda-core for the state of processes, NVML for devices.

To be used by one long-lived process only (helper.py): the first call initialises CUDA, which takes seconds on a machine
with many devices, and is paid by every process anew.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from gpuckpt.cuda.driver import DriverError, Gpu, State
from gpuckpt.errors import PreflightError

# What the driver says of a process that has no CUDA context, or is no process at all.
_NO_CONTEXT = ("CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_CONTEXT")


class Bindings:
    """The real driver. Raises PreflightError if this machine cannot: no driver, no packages, too old."""

    def __init__(self) -> None:
        try:
            import pynvml
            from cuda.bindings import driver
            from cuda.core import checkpoint
        except ImportError as error:
            raise PreflightError(
                "GPU state cannot be handled: a Python package is missing",
                cause=str(error),
                remedy="install gpuckpt with its GPU packages: pip install 'gpuckpt[cuda]'",
            ) from error
        self._nvml: Any = pynvml
        self._processes: Any = checkpoint
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise PreflightError(
                "NVIDIA's driver does not answer", cause=str(error), remedy="gpuckpt doctor"
            ) from error
        (code,) = driver.cuInit(0)
        if code != driver.CUresult.CUDA_SUCCESS:
            raise PreflightError("CUDA cannot be initialised", cause=code.name, remedy="gpuckpt doctor")
        self._lock = threading.Lock()

    def state(self, pid: int) -> State | None:
        try:
            found: State = _called(lambda: self._processes.Process(pid).state)
        except DriverError as error:
            if error.code in _NO_CONTEXT:
                return None
            raise
        return found

    def lock(self, pid: int, timeout: float) -> None:
        _called(lambda: self._processes.Process(pid).lock(timeout_ms=max(1, int(timeout * 1000))))

    def checkpoint(self, pid: int) -> None:
        _called(lambda: self._processes.Process(pid).checkpoint())

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        pairs = {old.removeprefix("GPU-"): new.removeprefix("GPU-") for old, new in gpus.items()}
        _called(lambda: self._processes.Process(pid).restore(gpu_mapping=pairs or None))

    def unlock(self, pid: int) -> None:
        _called(lambda: self._processes.Process(pid).unlock())

    def gpus(self) -> tuple[Gpu, ...]:
        nvml = self._nvml
        found = []
        for handle in self._handles():
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            try:
                mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
            except nvml.NVMLError:  # a type that has none
                mig = False
            found.append(
                Gpu(_text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), memory.total,
                    memory.free, mig)
            )  # fmt: skip
        return tuple(found)

    def memory(self, pid: int) -> dict[str, int]:
        nvml = self._nvml
        found: dict[str, int] = {}
        for handle in self._handles():
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == pid and process.usedGpuMemory is not None:
                    uuid = _text(nvml.nvmlDeviceGetUUID(handle))
                    found[uuid] = found.get(uuid, 0) + process.usedGpuMemory
        return found

    def version(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def _handles(self) -> list[Any]:
        with self._lock:  # NVML is safe for threads; a device that goes between the two calls is not
            return [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(self._nvml.nvmlDeviceGetCount())]


def _called(work: Any) -> Any:
    """The result; whatever the binding raises as a DriverError."""
    try:
        return work()
    except Exception as error:  # cuda-core raises CUDAError, and RuntimeError for what this driver does not have
        text = str(error)
        code = next((word.strip(":,") for word in text.split() if word.startswith("CUDA_ERROR_")), type(error).__name__)
        raise DriverError(code, text.removeprefix(f"{code}:").strip()) from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
