"""A GPU's memory for caches, by the driver's virtual memory management: pieces of physical memory, mapped where needed.

A piece is as large as the driver's granularity (2 MiB). A handle can only be mapped from its begin, so each piece has a
handle of its own; it is mapped once where its block lies, and again wherever a session sees it. Pieces are created when
their place is first used, and given back when they are free and the engine rests.

Written from the driver's documentation (CUDA driver API, virtual memory management); it has not run on a GPU yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..cuda_driver import access, checked, driver, properties, tensor_at
from .memory import Grain, Pairs, Piece, copy_all


def grain(device: torch.device) -> Grain:
    """The driver's granularity; of mappings there may be as many as one likes."""
    torch.cuda.current_stream(device)  # the context
    flag = driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return Grain(int(checked(driver().cuMemGetAllocationGranularity(properties(device), flag))), 1 << 40)


class CudaMemory:
    """``places`` blocks of ``size`` bytes on a GPU."""

    strided = False  # torch would gather them first

    def __init__(self, device: torch.device, places: int, size: int) -> None:
        self.device = device
        self.places = places
        self.size = size
        self.granule = grain(device).granule
        if size % self.granule:
            raise ValueError(f"a block of {size} bytes is no multiple of the driver's {self.granule}")
        self._handles: dict[int, list[Any]] = {}
        self._blocks = _Addresses(self, places * size)
        self._streams = {way: torch.cuda.Stream(device) for way in ("out", "in")}
        weakref.finalize(self, _release_all, self._handles)

    def block(self, place: int) -> Any:
        self.handles(place)
        return self._blocks.bytes[place * self.size : (place + 1) * self.size]

    def blocks(self, place: int, count: int) -> Any:
        for each in range(place, place + count):
            self.handles(each)
        return self._blocks.bytes[place * self.size : (place + count) * self.size].view(count, self.size)

    def handles(self, place: int) -> list[Any]:
        """The pieces of a place, which are created if it has not been used yet."""
        if place not in self._handles:
            kind = properties(self.device)
            made: list[Any] = []
            try:
                while len(made) < self.size // self.granule:
                    made.append(checked(driver().cuMemCreate(self.granule, kind, 0)))
                self._blocks.map(place * self.size, made)
            except BaseException:
                _release(made)
                raise
            self._handles[place] = made
        return self._handles[place]

    def reserve(self, size: int) -> CudaRange:
        return CudaRange(self, -(-size // self.granule) * self.granule)

    @property
    def held(self) -> int:
        return len(self._handles) * self.size

    def trim(self, places: Sequence[int]) -> None:
        self._let_go([place for place in places if place in self._handles])

    def fit(self, bytes: int, free: Sequence[int]) -> None:
        over = len(self._handles) - bytes // self.size
        if over > 0:
            self._let_go([place for place in free if place in self._handles][:over])

    def _let_go(self, places: Sequence[int]) -> None:
        if places:
            torch.cuda.synchronize(self.device)
        for place in places:
            self._blocks.unmap(place * self.size, self.size)
            _release(self._handles.pop(place))

    def written(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def read(self, pairs: Pairs, ready: Any) -> None:
        self._copy("out", pairs, ready)

    def write(self, pairs: Pairs, ready: Any) -> None:
        self._copy("in", pairs, ready)

    def _copy(self, way: str, pairs: Pairs, ready: Any) -> None:
        stream = self._streams[way]
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            stream.wait_event(ready)
            copy_all(pairs)
        stream.synchronize()


def _release(handles: Sequence[Any]) -> None:
    for handle in handles:
        checked(driver().cuMemRelease(handle))


def _release_all(handles: dict[int, list[Any]]) -> None:
    for made in handles.values():
        _release(made)


def _free_addresses(base: int, size: int, mapped: dict[int, int]) -> None:
    torch.cuda.synchronize()
    for at, length in mapped.items():
        checked(driver().cuMemUnmap(base + at, length))
    checked(driver().cuMemAddressFree(base, size))


class _Addresses:
    """Reserved addresses of a GPU, and the tensor of their bytes, of which only what is mapped may be touched."""

    def __init__(self, memory: CudaMemory, size: int) -> None:
        self._memory = weakref.ref(memory)
        self._device, self._granule = memory.device, memory.granule
        self.base = int(checked(driver().cuMemAddressReserve(size, 0, 0, 0)))
        # What is mapped, by offset: addresses are free once nothing is.
        self._mapped: dict[int, int] = {}
        weakref.finalize(self, _free_addresses, self.base, size, self._mapped)
        self.bytes = tensor_at(self.base, size, memory.device)

    def map(self, at: int, handles: Sequence[Any]) -> None:
        """Have these pieces appear at an offset, one behind the other."""
        for number, handle in enumerate(handles):
            checked(driver().cuMemMap(self.base + at + number * self._granule, self._granule, 0, handle, 0))
        self._mapped[at] = len(handles) * self._granule
        checked(driver().cuMemSetAccess(self.base + at, len(handles) * self._granule, [access(self._device)], 1))

    def unmap(self, at: int, size: int) -> None:
        """Have nothing appear there any more."""
        checked(driver().cuMemUnmap(self.base + at, size))
        self._mapped.pop(at, None)


class CudaRange:
    """Addresses in which a session sees its blocks."""

    def __init__(self, memory: CudaMemory, size: int) -> None:
        self._memory = memory
        self._size = size
        self._addresses = _Addresses(memory, size)
        self._shown: dict[int, int] = {}  # sizes of what is shown
        self.bytes = self._addresses.bytes

    def show(self, pieces: Iterable[Piece], size: int) -> None:
        for at, place, offset in pieces:
            self._show(at, place, offset, size)

    def _show(self, at: int, place: int, offset: int, size: int) -> None:
        if not 0 <= at <= self._size - size:
            raise ValueError(f"{at} to {at + size} is outside of the {self._size} bytes that are reserved")
        if at in self._shown:
            self.hide(at, size)
        granule = self._memory.granule
        handles = self._memory.handles(place)[offset // granule : (offset + size) // granule]
        self._addresses.map(at, handles)
        self._shown[at] = size

    def hide(self, at: int, size: int) -> None:
        if at not in self._shown:
            return
        stream = torch.cuda.current_stream(self._memory.device)
        if not stream.query():
            stream.synchronize()  # a kernel may still read there
        self._addresses.unmap(at, size)
        del self._shown[at]

    def clear(self) -> None:
        for at, size in list(self._shown.items()):
            self.hide(at, size)
