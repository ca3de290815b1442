"""Weights of a model that is larger than the device: some layers stay, the others come from host memory in turns.

Passes run the layers in order, over and over. So the layers that come in turns are spread evenly over the model, and
share two slots of device memory: while one of them computes, and the layers that stay behind it, the next one is on its
way. Their weights lie in host memory, each layer's in one piece, pinned where the device is a GPU; its parameters are
views of the slot that it is in.

What several layers share stays on the device, and so does all that is no layer: embeddings, norms, the head.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kv.hand import Hand
from .kv.store import pages, pinned_pages

ALIGN = 256  # bytes: what kernels like, and the same as an allocator gives
_SLOTS = 2  # one computes, one comes
# Of the free memory of a GPU, at the most, is for weights; the rest is for caches and what layers compute.
_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter's place in its layer's piece."""

    parameter: Any
    offset: int
    bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any


def room(layers: int, others: int, device: Any) -> int | None:
    """Bytes for the layers' weights on a GPU that does not hold them all beside some caches; else None.

    ``layers``, ``others``: bytes of the layers' weights, and of all else that stays there.
    """
    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    mine = int(free * _SHARE) - others
    return mine if mine < layers else None


class _Slot:
    """Device memory for one layer. ``landed``: the bytes of ``layer`` are there."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.layer = -1
        self.landed = threading.Event()
        self.error: Exception | None = None


class PagedWeights:
    """Weights of layers, of which ``budget`` bytes are on the device at a time. For use by the engine's thread."""

    def __init__(self, layers: Sequence[Any], device: Any, budget: int, model: Any = None) -> None:
        """Takes over the parameters of the layers that come in turns; the others are to be moved to the device.

        ``model``: what the layers are a part of; what it shares with them stays, too. Raises ValueError if the budget
        does not hold two layers.
        """
        self.device = torch.device(device)
        parts = _own(layers, model)
        sizes = [_size(each) for each in parts]
        self.bytes, self.largest = sum(sizes), max(sizes, default=0)
        self.count = len(layers)
        fit = min(self.count, budget // self.largest) if self.largest else self.count
        if self.largest and fit < _SLOTS:
            least_mib = -(-_SLOTS * self.largest // (1 << 20))
            raise ValueError(
                f"{budget >> 20} MiB for weights hold less than two layers, one that computes and one that comes;"
                f" --weights-mib must be at least {least_mib}"
            )
        turns = self.count - fit + _SLOTS if fit < self.count else 0
        # The layers that come in turns, in order.
        self.turns = sorted({number * self.count // turns for number in range(turns)}) if turns else []
        cuda = self.device.type == "cuda"
        self._parts = {layer: parts[layer] for layer in self.turns}
        self._host = {layer: (pinned_pages if cuda else pages)(sizes[layer]) for layer in self.turns}
        for layer, mine in self._parts.items():
            for part in mine:
                _view(part, self._host[layer]).copy_(part.parameter.data)
                part.parameter.data = torch.empty(0, dtype=part.dtype, device=self.device)
        memory = [torch.empty(self.largest, dtype=torch.uint8, device=self.device) for _ in self.turns[:_SLOTS]]
        self._slots = [_Slot(each) for each in memory]
        self._of: dict[int, _Slot] = {}
        self._stream = torch.cuda.Stream(self.device) if cuda and self.turns else None
        self.at = 0  # the layer that was needed last
        self.loaded = self.waited = 0  # layers that were copied; that were waited for
        self._hand = Hand("weights", lambda then, result, error: then(result, error))

    def close(self) -> None:
        """End the thread; nothing comes any more."""
        self._hand.end()

    def ahead(self, layer: int) -> int:
        """How many layers further a pass is that needs this one next; those that are ahead by one can share a copy."""
        return (layer - self.at) % self.count if layer < self.count else -1

    def need(self, layer: int) -> None:
        """See to it that a layer's weights are there, and that the next ones are on their way."""
        self.at = layer
        wanted = self._next(layer)
        if layer in self._parts:
            slot = self._of.get(layer) or self._begin(layer, wanted)
            if not slot.landed.is_set():
                self.waited += 1
                slot.landed.wait()
            if slot.error is not None:
                error, slot.layer = slot.error, -1  # the next pass tries again
                del self._of[layer]
                raise error
        for following in wanted:
            if following not in self._of:
                self._begin(following, wanted)

    def _next(self, layer: int) -> list[int]:
        """Those whose turn it is from a layer on."""
        first = bisect.bisect_left(self.turns, layer)
        return [*self.turns[first:], *self.turns[:first]][:_SLOTS]

    def _begin(self, layer: int, wanted: Sequence[int]) -> _Slot:
        slot = next(slot for slot in self._slots if slot.layer not in wanted)
        for part in self._parts.get(slot.layer, ()):
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

    def _copy(self, slot: _Slot, layer: int, ready: Any) -> None:
        host = self._host[layer]
        if self._stream is None:
            slot.memory[: host.numel()].copy_(host)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            slot.memory[: host.numel()].copy_(host, non_blocking=True)
        self._stream.synchronize()


def _own(layers: Sequence[Any], model: Any) -> list[list[_Part]]:
    """The parameters that only one layer has, and nothing else of the model, with their places."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    users = Counter(id(parameter) for layer in layers for parameter in set(layer.parameters()))
    users.update(
        id(parameter)
        for module in (model.modules() if model is not None else ())
        if id(module) not in inside
        for parameter in module.parameters(recurse=False)
    )
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
            offset += -(-data.nbytes // ALIGN) * ALIGN
        made.append(parts)
    return made


def _size(parts: Sequence[_Part]) -> int:
    return max((part.offset + -(-part.bytes // ALIGN) * ALIGN for part in parts), default=0)


def _view(part: _Part, memory: Any) -> Any:
    return (
        memory[part.offset : part.offset + part.bytes]
        .view(part.dtype)
        .as_strided(part.shape, part.stride, int(memory.storage_offset() + part.offset) // part.dtype.itemsize)
    )
