"""Which processes of a container hold device memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gpuckpt.cuda.driver import Driver

# Every CUDA process has these open: the control device, and that of unified memory.
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm")
_ANY = "/dev/nvidia"


def holders(driver: Driver, pids: Sequence[int], *, proc: Path = Path("/proc")) -> list[int]:
    """Those of ``pids`` that have a CUDA context, in their order.

    The driver is only asked about processes that have its devices open: asked about one whose peer is locked it may not
    answer before that is unlocked.
    """
    return [pid for pid in pids if has_devices(pid, proc=proc) and driver.state(pid) is not None]


def has_devices(pid: int, *, proc: Path = Path("/proc")) -> bool:
    """Whether the process has NVIDIA's devices open; False if it has ended."""
    return any(target.startswith(_DEVICES) for target in _open_files(proc / str(pid) / "fd"))


def device_files(pid: int, *, proc: Path = Path("/proc")) -> list[str]:
    """Every file of NVIDIA's driver that the process has open."""
    return sorted({target for target in _open_files(proc / str(pid) / "fd") if target.startswith(_ANY)})


def _open_files(folder: Path) -> Iterator[str]:
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for entry in folder.iterdir():
            with suppress(OSError):
                yield os.readlink(entry)
