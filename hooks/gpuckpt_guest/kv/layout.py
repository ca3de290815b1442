"""What lies where in a block: the tokens of all layers side by side.

A *track* is the layers whose tokens live equally long: all that attend to everything, or all of one sliding window. In
a track each layer has a *stream*, one record of keys and values behind the other, a token each. A block holds the same
part of all streams of one track, a *slab* of each: one copy moves all layers of a range of tokens, and the first layers
of a session can be brought before the last ones.

Where pieces that are shown must be large (2 MiB on a GPU), several layers share a stream, their records side by side:
else a block would be as many pieces as there are layers.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

LAYOUT = 1  # the version of all that is said here: blocks on a disk are read by who reads this one
_LEAST = 1 << 20  # bytes of a block: below, a copy's fixed cost shows
_MOST = 64 << 20  # and above, half a block for each session that ends within one is much
# To show a piece elsewhere takes as long as to copy some 40 kB of it. Smaller than this are those that would hold more
# tokens than short sessions have, and where the budget is small, so that there would be few blocks.
_PIECE, _TOKENS, _BLOCKS = 256 << 10, 64, 256
_ALIGN = 16  # bytes; records of other types and odd sizes stay where vector instructions like them


@dataclass(frozen=True, slots=True)
class Plane:
    """Keys or values of one layer: ``heads`` times ``size`` numbers for each token, ``offset`` bytes into a record."""

    heads: int
    size: int
    dtype: Any
    stream: int
    offset: int

    @property
    def bytes(self) -> int:
        """Of one token."""
        return self.heads * self.size * int(self.dtype.itemsize)


@dataclass(frozen=True)
class Track:
    """Layers whose tokens live equally long.

    ``window``: a token may attend to so many last ones, itself included; None: to all. ``planes`` are by layer and
    name. ``record``: bytes of a token in each stream; ``slab``: bytes of a stream in a block.
    """

    window: int | None
    planes: Mapping[tuple[int, str], Plane]
    streams: int
    record: int
    slab: int

    @functools.cached_property
    def layers(self) -> list[int]:
        """The last layer that has a part in each stream."""
        found = [0] * self.streams
        for (layer, _), plane in self.planes.items():
            found[plane.stream] = max(layer, found[plane.stream])
        return found

    def first(self, token: int) -> int:
        """The block with the first byte of a token."""
        return token * self.record // self.slab

    def end(self, tokens: int) -> int:
        """How many blocks so many tokens reach into."""
        return -(-tokens * self.record // self.slab)

    def shaped(self, plane: Plane, bytes: Any, tokens: int, skip: int) -> Any:
        """A plane of so many tokens [1, heads, tokens, size]; its stream begins ``skip`` bytes into ``bytes``."""
        width = int(plane.dtype.itemsize)
        step = self.record // width
        whole = bytes.narrow(0, 0, bytes.numel() // width * width).view(plane.dtype)
        first = int(whole.storage_offset()) + (skip + plane.offset) // width
        return whole.as_strided((1, plane.heads, tokens, plane.size), (step, plane.size, step, 1), first)

    def columns(self, layer: int, name: str, low: int, high: int, content: Callable[[int], Any]) -> Any:
        """A copy, in host memory, of a layer's keys or values of the tokens ``low`` to ``high``.

        ``content``: the bytes of a block, wherever they lie.
        """
        plane = self.planes[layer, name]
        parts = [
            content(number).narrow(0, plane.stream * self.slab, self.slab).cpu()
            for number in range(self.first(low), self.end(high))
        ]
        return self.shaped(plane, torch.cat(parts), high - low, self._skip(low))

    def blocks(self, columns: Mapping[tuple[int, str], Any], low: int) -> dict[int, Any]:
        """The blocks that hold these columns, which begin with the token ``low``, as tensors of bytes by number."""
        high = low + max(int(tensor.shape[-2]) for tensor in columns.values())
        numbers = range(self.first(low), self.end(high))
        image = torch.zeros(self.streams, len(numbers) * self.slab, dtype=torch.uint8)
        for where, tensor in columns.items():
            plane = self.planes[where]
            self.shaped(plane, image[plane.stream], int(tensor.shape[-2]), self._skip(low)).copy_(tensor)
        whole = image.view(self.streams, len(numbers), self.slab).transpose(0, 1).reshape(len(numbers), -1)
        return dict(zip(numbers, whole, strict=True))

    def _skip(self, low: int) -> int:
        """Bytes from the begin of the block that holds the first byte of a token to that byte."""
        return low * self.record - self.first(low) * self.slab

    def lowest(self, length: int) -> int:
        """The first token that one behind ``length`` others may attend to."""
        return max(0, length - self.window + 1) if self.window else 0


Forms = Mapping[int, Mapping[str, tuple[int, int, Any]]]


def least(forms: Forms, windows: Mapping[int, int | None], budget: int, pieces: int) -> int:
    """Bytes of the smallest piece of blocks of ``budget`` bytes, of which ``pieces`` can be shown at once."""
    layers = max(Counter(windows[layer] for layer in forms).values(), default=1)
    record = max(
        (sum(math.prod(it[:2]) * it[2].itemsize for it in form.values()) for form in forms.values()), default=1
    )
    return max(budget // pieces, min(_PIECE, _TOKENS * record, budget // (_BLOCKS * layers)))


def tracks(forms: Forms, windows: Mapping[int, int | None], granule: int, least: int = 0) -> tuple[list[Track], int]:
    """The tracks of a model and the size of a block, the same for all.

    ``forms``: of each layer with a cache, by ``keys`` and ``values``: heads, size, type. ``windows``: of each layer.
    ``granule``: pieces that are shown are multiples of it, and of at least ``least`` bytes.
    """
    groups: dict[int | None, list[int]] = {}
    for layer in sorted(forms):
        groups.setdefault(windows[layer], []).append(layer)
    most = max(1, _MOST // granule)
    streams = {window: min(len(layers), most) for window, layers in groups.items()}
    pieces = [(count, -(-max(_LEAST // count, least, 1) // granule) * granule) for count in streams.values()]
    block = max((count * piece for count, piece in pieces), default=-(-_LEAST // granule) * granule)
    made = []
    for window, layers in groups.items():
        count = streams[window]
        planes: dict[tuple[int, str], Plane] = {}
        filled = [0] * count
        for number, layer in enumerate(layers):
            stream = number * count // len(layers)
            for name, (heads, size, dtype) in forms[layer].items():
                plane = planes[layer, name] = Plane(heads, size, dtype, stream, filled[stream])
                filled[stream] += -(-plane.bytes // _ALIGN) * _ALIGN
        slab = block // count // granule * granule
        made.append(Track(window, planes, count, max(filled), slab))
    return made, block
