"""What lies where in a block: the tokens of all layers side by side.

A *track* is the layers whose tokens live equally long: all that attend to everything, or all of one sliding window. In
a track each layer has a *stream*, one record of keys and values behind the other, a token each. A block holds the same
part of all streams of one track, a *slab* of each: one copy moves all layers of a range of tokens, and the first layers
of a session can be brought before the last ones.

Where pieces that are shown must be large (2 MiB on a GPU), several layers share a stream, their records side by side:
else a block would be as many pieces as there are layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LEAST = 1 << 20  # bytes of a block: below, a copy's fixed cost shows
_MOST = 64 << 20  # and above, half a block for each session that ends within one is much
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

    def first(self, token: int) -> int:
        """The block with the first byte of a token."""
        return token * self.record // self.slab

    def end(self, tokens: int) -> int:
        """How many blocks so many tokens reach into."""
        return -(-tokens * self.record // self.slab)

    def lowest(self, length: int) -> int:
        """The first token that one behind ``length`` others may attend to."""
        return max(0, length - self.window + 1) if self.window else 0


Forms = Mapping[int, Mapping[str, tuple[int, int, Any]]]


def tracks(forms: Forms, windows: Mapping[int, int | None], granule: int) -> tuple[list[Track], int]:
    """The tracks of a model and the size of a block, the same for all.

    ``forms``: of each layer with a cache, by ``keys`` and ``values``: heads, size, type. ``windows``: of each layer.
    """
    groups: dict[int | None, list[int]] = {}
    for layer in sorted(forms):
        groups.setdefault(windows[layer], []).append(layer)
    most = max(1, _MOST // granule)
    streams = {window: min(len(layers), most) for window, layers in groups.items()}
    block = max((-(-_LEAST // (count * granule)) * count * granule for count in streams.values()), default=_LEAST)
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
