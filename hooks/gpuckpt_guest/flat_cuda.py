"""The way of flat files (flat.py) to and from a GPU: a stream and two pinned slots for each thread.

Slots are pinned when a file is read or written, and no longer: pinned memory would be in a dump, and be pinned again
page by page when that is restored. To pin the 16 MiB of a thread takes a few milliseconds, of all threads at once.

Written from torch's and the driver's documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .cuda_driver import tensor_at
from .flat import Lanes, RingLane, memory
from .kv.store import pages


def lanes(device: Any) -> Lanes:
    """Ways to the memory of ``device``."""
    return lambda: RingLane(CudaCopier(torch.device(device)))


class CudaCopier:
    """Copies on a stream of its own. For use by the thread that made it."""

    def __init__(self, device: torch.device) -> None:
        # A thread begins on the first device.
        torch.cuda.set_device(device)
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._slots: list[Any] = []
        self._landed: dict[int, Any] = {}

    def slots(self, count: int, size: int) -> Sequence[memoryview]:
        runtime = torch.cuda.cudart()
        for _ in range(count):
            slot = pages(size)
            torch.cuda.check_error(int(runtime.cudaHostRegister(slot.data_ptr(), size, 0)))
            self._slots.append(slot)
        return [memory(slot.data_ptr(), size) for slot in self._slots]

    def to_device(self, slot: int, address: int, size: int) -> None:
        self._copy(slot, tensor_at(address, size, self._device), self._slots[slot][:size])

    def to_host(self, slot: int, address: int, size: int) -> None:
        self._copy(slot, self._slots[slot][:size], tensor_at(address, size, self._device))

    def _copy(self, slot: int, target: Any, source: Any) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        # Made once for each slot: an event is recorded again as often as one likes. Who waits for one sleeps: with a
        # thread for each core, spinning would take the time of those that copy.
        if slot not in self._landed:
            self._landed[slot] = torch.cuda.Event(blocking=True)
        self._landed[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        if slot in self._landed:
            self._landed[slot].synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        while self._slots:
            slot = self._slots.pop()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(slot.data_ptr())))
