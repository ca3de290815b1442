"""vLLM's KV cache given back while its weights stay, and had again at the same addresses.

In sleep mode vLLM allocates it from a pool of its own (CuMemAllocator) under a tag of its own. None of vLLM's levels of
sleep will do: level 1 copies the weights to host memory, level 2 drops them. So its two calls to map and to unmap an
allocation are used, and nothing else of its sleep; requests are held back by the engine meanwhile (vllm_control.py).

The tag is not enough to know the cache by. Until vLLM had another one for it (its pull request 53508, of August 2026),
all that is made while the cache is set up was allocated under this one, too: tables of blocks, what attention's
backends and captured graphs keep. It must outlive the cache. So what is given back is what the cache's own tensors lie
in; allocations without any of them stay, and what lies beside them in one allocation is copied to host memory.

A KV cache begins as zeros: kernels may read what they then mask, and a NaN is not masked by zero. New memory is
whatever it was, so zeros are written. Scales of an 8-bit cache are the model's, and lie with its weights, or each
token's, and lie in the cache. Some versions set the model's to 1 when they wake up; that is not asked for here.

Where vLLM notes for itself what is unmapped (``is_asleep``), that is kept right.

Written from the source of vLLM 0.33 and its pull requests since 0.20; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# What vLLM calls the memory of its KV cache, in some versions with what else is set up beside it.
CACHES = "kv_cache"


class _Given(NamedTuple):
    """An allocation that is given back."""

    address: int
    size: int
    data: Any  # vLLM's record of it
    beside: list[tuple[int, bytes]]  # what it held besides the cache, and where


class Caches:
    """What a worker has given back of its KV cache."""

    def __init__(self) -> None:
        self._given: dict[int, _Given] = {}

    def release(self, tensors: Iterable[Any]) -> int:
        """Give back what these tensors lie in and is not given back yet; returns the bytes.

        What has been given back when it fails is known, and can be had again.
        """
        cumem = _cumem()
        spans = sorted(_spans(tensors))
        _synchronize()
        released = 0
        for address, data in sorted(cumem.CuMemAllocator.instance.pointer_to_data.items()):
            size = int(data.handle[1])
            if data.tag != CACHES or address in self._given or getattr(data, "is_asleep", False):
                continue
            others = list(_between(spans, address, address + size))
            if others == [(address, size)]:
                continue
            read = ((at, _read(cumem.libcudart, at, count)) for at, count in others)
            # Zeros, as beyond a cache's end, come back by themselves.
            beside = [(at, content) for at, content in read if content.count(0) != len(content)]
            cumem.unmap_and_release(data.handle)
            self._given[address] = _Given(address, size, data, beside)
            _mark(data, True)
            released += size
        _tidy()
        return released

    def take(self) -> None:
        """Have all of it again, zeros; as before if that fails. Raises MemoryError if there is too little."""
        if not self._given:
            return
        cumem = _cumem()
        _tidy()
        wanted, free = sum(given.size for given in self._given.values()), _free()
        if free < wanted:
            raise MemoryError(
                f"of the device's memory {free >> 20} MiB are free, the KV cache takes {wanted >> 20} MiB"
            )
        taken: list[_Given] = []
        try:
            for given in self._given.values():
                cumem.create_and_map(given.data.handle)
                taken.append(given)
                cumem.libcudart.cudaMemset(given.address, 0, given.size)
                for at, content in given.beside:
                    _write(cumem.libcudart, at, content)
            _synchronize()
        except Exception:
            for given in taken:
                cumem.unmap_and_release(given.data.handle)
            raise
        for given in taken:
            _mark(given.data, False)
        self._given.clear()


def _spans(tensors: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Begin and end of the memory behind tensors; some models have several for a layer, or none."""
    for each in tensors:
        if isinstance(each, (list, tuple)):
            yield from _spans(each)
        elif each is not None:
            storage = each.untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _between(spans: list[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of what no span covers from ``begin`` to ``end``; spans are in order, and may overlap."""
    for first, last in spans:
        if last <= begin or first >= end:
            continue
        if first > begin:
            yield begin, first - begin
        begin = last
    if begin < end:
        yield begin, end - begin


def _read(libcudart: Any, address: int, count: int) -> bytes:
    held = ctypes.create_string_buffer(count)
    libcudart.cudaMemcpy(ctypes.addressof(held), address, count)
    return held.raw


def _write(libcudart: Any, address: int, content: bytes) -> None:
    held = ctypes.create_string_buffer(content, len(content))
    libcudart.cudaMemcpy(address, ctypes.addressof(held), len(content))


def _mark(data: Any, asleep: bool) -> None:
    if hasattr(data, "is_asleep"):
        data.is_asleep = asleep


def _cumem() -> Any:
    """The module with vLLM's pool, and with what maps and unmaps. Raises RuntimeError if there is no pool."""
    from vllm.device_allocator import cumem

    if cumem.CuMemAllocator.instance is None:
        raise RuntimeError("vLLM has allocated nothing that it could give back: sleep mode is off")
    return cumem


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


def _tidy() -> None:
    """Give back what torch keeps for later: it would be in a dump, and is room for the cache."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _free() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])
