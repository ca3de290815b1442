"""A device's memory for caches: where blocks lie, and where they are seen.

Attention wants a session's keys as one tensor; memory that is shared, evicted and brought back piece by piece does not
lie in one piece. So a piece has two addresses, as a process' memory has: the one where it lies, in a block, and the one
where a session sees it, in a range. To show a piece elsewhere changes a mapping and copies nothing.

On a CPU the blocks are a memory file, and a range is address space into which parts of that file are mapped
(mmap(2), MAP_FIXED): kernels compute on the mapped tensors as on any others.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# Mappings are changed without letting go of the interpreter's lock: who lets go of it for a few microseconds, time and
# again, starves other threads, which take longer to wake up than that, and never come to ask for it.
_libc = ctypes.PyDLL(None, use_errno=True)
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
_FAILED = ctypes.c_void_p(-1).value
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_NOTHING, _SHOWN = 0, mmap.PROT_READ | mmap.PROT_WRITE  # PROT_NONE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


# Tensors of bytes: from where, to where.
Pairs = Sequence[tuple[Any, Any]]


# Where it is to appear, in which place its block lies, where in that it begins.
Piece = tuple[int, int, int]


class Range(Protocol):
    """Addresses in which a session sees its blocks."""

    @property
    def bytes(self) -> Any:
        """All of it as a tensor of bytes; only what is shown may be touched."""
        ...

    def show(self, pieces: Iterable[Piece], size: int) -> None:
        """Have ``size`` bytes of blocks appear there, of each piece."""
        ...

    def hide(self, at: int, size: int) -> None:
        """Have nothing appear there any more."""
        ...

    def clear(self) -> None:
        """Have nothing appear anywhere any more."""
        ...


class Memory(Protocol):
    """``places`` blocks of ``size`` bytes on one device."""

    places: int
    size: int
    strided: bool  # pieces of several blocks side by side are copied as fast by one call as by one call each

    @property
    def held(self) -> int:
        """Bytes of the device that blocks have, those that are free but have been used included."""
        ...

    def block(self, place: int) -> Any:
        """The block that lies there, as a tensor of ``size`` bytes."""
        ...

    def blocks(self, place: int, count: int) -> Any:
        """Blocks side by side [count, size]."""
        ...

    def reserve(self, size: int) -> Range:
        """Addresses for so many bytes, of which nothing is there yet."""
        ...

    def trim(self, places: Sequence[int]) -> None:
        """What lies in these places is not needed: the machine may have the memory, until they are used again."""
        ...

    def fit(self, bytes: int, free: Sequence[int]) -> None:
        """Hold no more than so many bytes of the device: what the ``free`` places beyond that have goes."""
        ...

    def written(self) -> Any:
        """A moment for :meth:`read` and :meth:`write`: what the calling thread has asked for so far is done first."""
        ...

    def read(self, pairs: Pairs, ready: Any) -> None:
        """Copy from blocks to host memory; for any thread. Returns when it is done."""
        ...

    def write(self, pairs: Pairs, ready: Any) -> None:
        """Copy from host memory to blocks; for any thread. Returns when it is done."""
        ...


@dataclass(frozen=True)
class Grain:
    """What a device's memory can show: pieces of multiples of ``granule`` bytes, at most ``pieces`` at once."""

    granule: int
    pieces: int


def grain(device: Any) -> Grain:
    """The device's. On a CPU each piece is a mapping, of which a process can have so many (vm.max_map_count)."""
    if torch.device(device).type == "cuda":
        from . import cuda_memory

        return cuda_memory.grain(torch.device(device))
    with open("/proc/sys/vm/max_map_count") as file:
        most = int(file.read())
    return Grain(mmap.PAGESIZE, most // 2)


def memory(device: Any, places: int, size: int) -> Memory:
    """Blocks on the device. Raises OSError."""
    if torch.device(device).type == "cuda":
        from .cuda_memory import CudaMemory

        return CudaMemory(torch.device(device), places, size)
    return HostMemory(places, size)


class HostMemory:
    """The memory of a CPU, limited like that of a device. Pages are taken from the machine when they are first used."""

    strided = True

    def __init__(self, places: int, size: int) -> None:
        if size % mmap.PAGESIZE:
            raise ValueError(f"a block of {size} bytes is no multiple of a page")
        self.places = places
        self.size = size
        self._file = os.memfd_create("gpuckpt-kv", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, places * size)
        self._blocks = _tensor(_map(None, places * size, self._file, 0), places * size).view(places, size)

    @property
    def held(self) -> int:
        return os.fstat(self._file).st_blocks * 512

    def block(self, place: int) -> Any:
        return self._blocks[place]

    def blocks(self, place: int, count: int) -> Any:
        return self._blocks.narrow(0, place, count)

    def reserve(self, size: int) -> HostRange:
        return HostRange(self._file, self.size, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)

    def trim(self, places: Sequence[int]) -> None:
        for place in places:
            code = _libc.fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, place * self.size, self.size)
            if code:
                raise OSError(ctypes.get_errno(), "free blocks could not give their pages back")

    def fit(self, bytes: int, free: Sequence[int]) -> None:
        """Pages are given back when there is time (:meth:`trim`): the machine is not the device."""

    def written(self) -> None:
        return None

    def read(self, pairs: Pairs, ready: None) -> None:
        self.write(pairs, ready)

    def write(self, pairs: Pairs, ready: None) -> None:
        copy_all(pairs)


class HostRange:
    """Address space of this process."""

    def __init__(self, file: int, block: int, size: int) -> None:
        self._file = file
        self._block = block
        self._size = size
        self._base = _map(None, size, None, 0)
        self.bytes = _tensor(self._base, size)

    def show(self, pieces: Iterable[Piece], size: int) -> None:
        base, last, file, block = self._base, self._size - size, self._file, self._block
        for at, place, offset in pieces:
            if not 0 <= at <= last:  # what lies behind belongs to others
                raise ValueError(f"{at} to {at + size} is outside of the {self._size} bytes that are reserved")
            _map(base + at, size, file, place * block + offset)

    def hide(self, at: int, size: int) -> None:
        _map(self._base + at, size, None, 0)

    def clear(self) -> None:
        self.hide(0, self._size)


def copy_all(pairs: Pairs) -> None:
    """Copy all of them in one call: between two of them no other thread of Python's must let this one go on."""
    if pairs:
        sources, targets = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources, non_blocking=True)


_HIDDEN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def _map(at: int | None, size: int, file: int | None, offset: int) -> int:
    """Map a part of the file, or nothing; returns the address. Raises OSError: there are too many mappings, say."""
    fixed = 0 if at is None else _MAP_FIXED
    if file is None:
        found = _libc.mmap(at, size, _NOTHING, _HIDDEN | fixed, -1, offset)
    else:
        found = _libc.mmap(at, size, _SHOWN, mmap.MAP_SHARED | fixed, file, offset)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)


def _tensor(base: int, size: int) -> Any:
    """The bytes at an address as a tensor; they are unmapped when nothing refers to them any more, views included."""
    held = (ctypes.c_char * size).from_address(base)
    weakref.finalize(held, _libc.munmap, base, size)
    return torch.frombuffer(held, dtype=torch.uint8)
