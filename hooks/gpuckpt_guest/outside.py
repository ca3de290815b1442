"""Weights that can be kept outside of the process: all in one region, given back and taken again at the same address.

A frozen server need not carry its weights: they are the same for all its clones, and lie once in a file of the host
(flat.py). Before it is frozen the region's memory is given back, its addresses are kept, and whatever points there, a
tensor, a view, a captured launch, is right again when the bytes are. What the model shares lies there once.

On a CPU the region is mapped anew where it lies, which drops its pages; madvise(MADV_DONTNEED) would too, but is
refused to clones whose memory is mapped from a golden. Pages that are not there are in no dump.

On a GPU the region is reserved addresses, and physical memory that is mapped there. Written from the driver's
documentation (CUDA driver API, virtual memory management); that part has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import carried, flat
from .carried import Opened
from .flat import HostLane, Lanes, Region

_ALIGN = 256  # bytes: what kernels like, and the same as an allocator gives
_LARGE = 2 << 20  # a large page
# To drop gigabytes of pages takes long enough to let others have the interpreter meanwhile.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10


class Memory(Protocol):
    """Addresses that stay, and memory there that comes and goes."""

    @property
    def bytes(self) -> Any:
        """All of it as a tensor of bytes, which may be touched while the memory is there."""
        ...

    @property
    def lanes(self) -> Lanes:
        """Ways between it and files."""
        ...

    @property
    def carried(self) -> Opened:
        """How memory is had that the host has carried to the same device."""
        ...

    def release(self) -> None:
        """Give the memory back. Raises OSError."""
        ...

    def take(self) -> None:
        """Have memory there again, of any content. Raises OSError if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Woken:
    """What was read, the seconds of "map" and of "stream" or "copy", and what is to be told about them."""

    bytes: int
    phases: dict[str, float]
    told: str = ""


class OutsideWeights:
    """The parameters and buffers of a model. For use by the thread that computes with them.

    Buffers come back as they were when they were saved: what a forward writes into one would be lost.
    """

    def __init__(self, model: Any, device: Any, label: str) -> None:
        """Moves them to the device, into one region. ``label`` tells them from another model's of the same shape."""
        self.asleep = False
        with torch.inference_mode():
            parts = _parts(model)
            self.bytes = sum(_up(part.bytes, _ALIGN) for part in parts)
            self._memory = memory(torch.device(device), max(1, self.bytes))
            self._regions = [Region(label, self._memory.bytes.data_ptr(), self.bytes)]
            at = 0
            while parts:
                part = parts.pop(0)  # its old memory is free before the next one is copied
                part.move(self._memory.bytes, at)
                at += _up(part.bytes, _ALIGN)

    def save(self, file: int) -> int:
        """Write them into a file; returns its size. Raises OSError."""
        assert not self.asleep
        return flat.write(file, self._regions, self._memory.lanes)

    def sleep(self) -> int:
        """Give their memory back; returns how much. Nothing may compute with them from now on. Raises OSError."""
        if self.asleep:
            return 0
        self._memory.release()
        self.asleep = True
        return self.bytes

    def wake(self, file: int, handle: int | None = None) -> Woken:
        """Take them again from a file, or from the same bytes on the device, for which ``handle`` stands.

        Raises FlatError if the file is not theirs, or OSError; they are asleep then as before.
        """
        if not self.asleep:
            return Woken(0, {"map": 0.0, "stream": 0.0})
        flat.check(file, self._regions)
        began = time.perf_counter()
        self._memory.take()
        mapped = time.perf_counter()
        try:
            found = carried.stream(file, self._regions, self._memory.lanes, handle, self._memory.carried)
        except BaseException:
            self._memory.release()
            raise
        self.asleep = False
        phases = {"map": mapped - began, found.phase: time.perf_counter() - mapped}
        return Woken(found.bytes, phases, found.told)


# ---------------------------------------------------------------------- what a model has


@dataclass(slots=True)
class _Part:
    """One piece of memory, and the tensors that are views of it."""

    storage: Any
    tensors: list[Any]

    @property
    def bytes(self) -> int:
        return int(self.storage.nbytes())

    def move(self, region: Any, at: int) -> None:
        """Have it lie at an offset of the region."""
        room = region[at : at + self.bytes]
        room.copy_(torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage))
        for tensor in self.tensors:
            size = tensor.dtype.itemsize
            base = (int(region.storage_offset()) + at) // size + int(tensor.storage_offset())
            tensor.data = room.view(tensor.dtype).as_strided(tuple(tensor.shape), tuple(tensor.stride()), base)


def _parts(model: Any) -> list[_Part]:
    """The memory of all parameters and buffers, each once, in the model's order."""
    found: dict[int, _Part] = {}
    seen: set[int] = set()
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or id(tensor) in seen or not tensor.untyped_storage().nbytes():
                continue
            seen.add(id(tensor))
            storage = tensor.untyped_storage()
            found.setdefault(storage._cdata, _Part(storage, [])).tensors.append(tensor)
    return list(found.values())


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


# ---------------------------------------------------------------------- memory


def memory(device: torch.device, size: int) -> Memory:
    """Memory of the device. Raises OSError."""
    return CudaRegion(device, size) if device.type == "cuda" else HostRegion(size)


class HostRegion:
    """Of this process: private and anonymous."""

    lanes: Lanes = HostLane

    def __init__(self, size: int) -> None:
        self.carried: Opened = carried.of_host
        self._size = _up(size, mmap.PAGESIZE)
        # It begins where a large page does, or the first and the last of them would be small ones.
        base = _map(None, self._size + _LARGE)
        self._base = _up(base, _LARGE)
        held = (ctypes.c_char * self._size).from_address(self._base)
        weakref.finalize(held, _libc.munmap, base, self._size + _LARGE)
        self.bytes = torch.frombuffer(held, dtype=torch.uint8)

    def release(self) -> None:
        _map(self._base, self._size)

    def take(self) -> None:
        """Pages are there when they are written to."""


def _map(at: int | None, size: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_FIXED if at is not None else 0)
    found = _libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"{os.strerror(code)}: {size >> 20} MiB for the weights")
    # A kernel without large pages refuses, and small ones do as well.
    _libc.madvise(found, size, mmap.MADV_HUGEPAGE)
    return int(found)


class CudaRegion:
    """Of a GPU."""

    def __init__(self, device: torch.device, size: int) -> None:
        from .carried_cuda import mapped
        from .cuda_driver import checked, driver, tensor_at
        from .flat_cuda import lanes
        from .kv.memory import grain

        if device.index is None:  # a thread of a flat file's says which one it is for
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._size = _up(size, grain(device).granule)
        self._base = int(checked(driver().cuMemAddressReserve(self._size, 0, 0, 0)))
        self.bytes = tensor_at(self._base, self._size, device)
        self.lanes: Lanes = lanes(device)
        self.carried: Opened = functools.partial(mapped, number=device.index)
        self._handle: Any = None
        self.take()

    def take(self) -> None:
        from .cuda_driver import access, checked, driver, properties

        handle = checked(driver().cuMemCreate(self._size, properties(self._device), 0))
        mapped = False
        try:
            checked(driver().cuMemMap(self._base, self._size, 0, handle, 0))
            mapped = True
            checked(driver().cuMemSetAccess(self._base, self._size, [access(self._device)], 1))
        except BaseException:
            if mapped:
                checked(driver().cuMemUnmap(self._base, self._size))
            checked(driver().cuMemRelease(handle))
            raise
        self._handle = handle

    def release(self) -> None:
        from .cuda_driver import checked, driver

        torch.cuda.synchronize(self._device)  # a kernel may still read there
        checked(driver().cuMemUnmap(self._base, self._size))
        checked(driver().cuMemRelease(self._handle))
        self._handle = None
