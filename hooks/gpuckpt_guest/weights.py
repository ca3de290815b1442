"""Weights of a model that is larger than the device: layers come from host memory as they are needed, and go again.

Each layer's weights lie in host memory in one piece, pinned where the device is a GPU. The device has a few slots, each
for a layer. A layer's parameters are views of the slot that holds it; while a layer computes the next ones are on their
way. Passes run the layers in order, over and over: the slot that is taken is the one whose layer is needed last.

What several layers share stays on the device, and so does all that is no layer: embeddings, norms, the head.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kv.hand import Hand

_ALIGN = 256  # bytes: what kernels like, and the same as an allocator gives


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter's place in its layer's piece."""

    parameter: Any
    offset: int
    bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any


class _Slot:
    """Device memory for one layer. ``landed``: the bytes of ``layer`` are there."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.layer = -1
        self.landed = threading.Event()
        self.error: Exception | None = None


class PagedWeights:
    """Weights of layers, of which ``budget`` bytes are on the device at a time. For use by the engine's thread."""

    def __init__(self, layers: Sequence[Any], device: Any, budget: int) -> None:
        """Takes the layers' parameters over. Raises ValueError if the budget does not hold two layers."""
        self.device = torch.device(device)
        self._parts = _own(layers)
        sizes = [_size(parts) for parts in self._parts]
        self.largest = max(sizes, default=0)
        count = min(len(layers), budget // self.largest) if self.largest else len(layers)
        if self.largest and count < 2:
            raise ValueError(
                f"{budget} bytes for weights hold less than two layers of {self.largest}: one computes, one comes"
            )
        self.bytes = sum(sizes)
        cuda = self.device.type == "cuda"
        self._host = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for size in sizes]
        for parts, host in zip(self._parts, self._host, strict=True):
            for part in parts:
                _view(part, host).copy_(part.parameter.data)
                part.parameter.data = torch.empty(0, dtype=part.dtype, device=self.device)
        self._slots = [
            _Slot(torch.empty(self.largest, dtype=torch.uint8, device=self.device)) for _ in range(max(1, count))
        ]
        self._of: dict[int, _Slot] = {}
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self.loaded = self.waited = 0  # layers that were copied; that were waited for
        self._hand = Hand("weights", lambda then, result, error: then(result, error))

    @property
    def slots(self) -> int:
        """Layers that are on the device at a time."""
        return len(self._slots)

    def close(self) -> None:
        """End the thread; nothing comes any more."""
        self._hand.end()

    def need(self, layer: int) -> None:
        """See to it that a layer's weights are there, and that the next ones are on their way."""
        slot = self._of.get(layer)
        if slot is None:
            slot = self._begin(layer, layer)
        if not slot.landed.is_set():
            self.waited += 1
            slot.landed.wait()
        if slot.error is not None:
            error, slot.layer = slot.error, -1  # the next pass tries again
            del self._of[layer]
            raise error
        # Not further ahead than there are slots: what would be taken for it is needed sooner.
        for ahead in range(1, len(self._slots)):
            following = (layer + ahead) % len(self._parts)
            if following not in self._of:
                self._begin(following, layer)

    def _begin(self, layer: int, at_work: int) -> _Slot:
        slot = self._taken(at_work)
        for part in self._parts[slot.layer] if slot.layer >= 0 else ():
            part.parameter.data = torch.empty(0, dtype=part.dtype, device=self.device)
        self._of.pop(slot.layer, None)
        slot.layer, slot.landed, slot.error = layer, threading.Event(), None
        self._of[layer] = slot
        for part in self._parts[layer]:
            part.parameter.data = _view(part, slot.memory)
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self.device))  # what still reads the slot's last layer
        landed = slot.landed

        def then(_: Any, error: Exception | None) -> None:
            slot.error = error  # told to who waits for it
            self.loaded += error is None
            landed.set()

        self._hand.do(lambda: self._copy(slot, layer, ready), then)
        return slot

    def _taken(self, at_work: int) -> _Slot:
        """A free slot, or the one whose layer is needed last by a pass that is at ``at_work``; never that one's."""
        free = next((slot for slot in self._slots if slot.layer < 0), None)
        if free is not None:
            return free
        count = len(self._parts)
        return max(
            (slot for slot in self._slots if slot.layer != at_work),
            key=lambda slot: ((slot.layer - at_work) % count, slot.landed.is_set()),
        )

    def _copy(self, slot: _Slot, layer: int, ready: Any) -> None:
        host = self._host[layer]
        if self._stream is None:
            slot.memory[: host.numel()].copy_(host)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            slot.memory[: host.numel()].copy_(host, non_blocking=True)
        self._stream.synchronize()


def _own(layers: Sequence[Any]) -> list[list[_Part]]:
    """The parameters that only one layer has, with their places."""
    users = Counter(id(parameter) for layer in layers for parameter in set(layer.parameters()))
    made = []
    for layer in layers:
        parts: list[_Part] = []
        offset = 0
        seen: set[int] = set()
        for parameter in layer.parameters():
            if users[id(parameter)] > 1 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            data = parameter.data
            dense = data.is_contiguous() or data.t().is_contiguous() if data.dim() == 2 else data.is_contiguous()
            stride = tuple(data.stride()) if dense else tuple(torch.empty(data.shape, device="meta").stride())
            parts.append(_Part(parameter, offset, data.nbytes, tuple(data.shape), stride, data.dtype))
            offset += -(-data.nbytes // _ALIGN) * _ALIGN
        made.append(parts)
    return made


def _size(parts: Sequence[_Part]) -> int:
    return max((part.offset + -(-part.bytes // _ALIGN) * _ALIGN for part in parts), default=0)


def _view(part: _Part, memory: Any) -> Any:
    return (
        memory[part.offset : part.offset + part.bytes]
        .view(part.dtype)
        .as_strided(part.shape, part.stride, int(memory.storage_offset() + part.offset) // part.dtype.itemsize)
    )
