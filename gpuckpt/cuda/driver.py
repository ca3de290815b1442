"""What is asked of NVIDIA's driver about the device state of processes, and its own implementations.

The driver moves a process' device memory to host memory and back: *lock* (its CUDA calls wait from now on, what is on
the device finishes), *checkpoint* (device memory goes to host memory, the GPU is free), *restore*, *unlock*. The states
between are the driver's (CUprocessState in the CUDA Driver API, "CUDA Checkpointing").
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from msgspec import Struct

from gpuckpt.errors import GpuckptError, PreflightError

State = Literal["running", "locked", "checkpointed", "failed"]
# What the driver says of a process that has no CUDA context, or is no process at all.
NO_CONTEXT = ("CUDA_ERROR_NOT_INITIALIZED", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_CONTEXT")


class Gpu(Struct, frozen=True):
    """A device: its UUID (``GPU-…``), the type's name, bytes of memory in all and free, whether it is cut by MIG.

    One that shares the host's memory (GB10) has no memory of its own: what is free on the host is free for it.
    """

    uuid: str
    name: str
    memory: int
    free: int
    mig: bool = False


class DriverError(GpuckptError):
    """The driver refused. ``code`` is its name for the reason, CUDA_ERROR_… where it has one; ``detail`` its words."""

    exit_code = PreflightError.exit_code

    def __init__(self, code: str, detail: str) -> None:
        told = f"{code}: {detail}" if detail else code
        super().__init__(f"NVIDIA's driver refused: {told}", remedy="gpuckpt doctor; dmesg, for lines with NVRM")
        self.code = code
        self.detail = detail


class Driver(Protocol):
    """Device state of processes on this host, by process id. Any method may be called by any thread."""

    @property
    def shares(self) -> bool:
        """Whether :meth:`carry` works: it has memory of its own, which another process can see."""
        ...

    def state(self, pid: int) -> State | None:
        """The process' state; None if it has no CUDA context."""
        ...

    def lock(self, pid: int, timeout: float) -> None:
        """Have its CUDA calls wait, and what is on the device finish, within ``timeout`` seconds. DriverError."""
        ...

    def checkpoint(self, pid: int) -> None:
        """Move the device memory of a locked process to host memory. DriverError."""
        ...

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        """Move it back, to the devices ``gpus`` names by UUID, from old to new; empty: where it was. DriverError.

        The process is locked then. One whose restore has failed for lack of memory can never be restored.
        """
        ...

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on. DriverError."""
        ...

    def carry(self, file: int, uuid: str) -> int:
        """Read an open file into memory of the device, and return an open file that stands for that memory.

        It is free again when nobody has that open any more. Raises DriverError, NOT_SUPPORTED where it cannot share.
        """
        ...

    def gpus(self) -> tuple[Gpu, ...]:
        """The devices of this host."""
        ...

    def memory(self, pid: int) -> dict[str, int]:
        """Bytes of device memory that the process holds, by UUID."""
        ...

    def version(self) -> str:
        """The driver's version, ``570.86.15``."""
        ...


def host_memory(file: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """Bytes of the host's memory, in all and free: what NVIDIA's tools do not tell of a device that shares it."""
    rows = dict(line.split(":", 1) for line in file.read_text().splitlines())
    total, free = (int(rows[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    return total, free
