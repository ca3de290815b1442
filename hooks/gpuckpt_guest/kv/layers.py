"""The layers of a session's cache: what a model calls to write a token's keys and values, and to read all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from .arena import Table


class Span:
    """How many tokens the completed passes of a session, or of a batch, have read."""

    __slots__ = ("length",)

    def __init__(self, length: int = 0) -> None:
        self.length = length


@dataclass(slots=True)
class Segment:
    """Columns of keys and values [rows, heads, columns, size] from position ``first`` on."""

    first: int
    keys: Any
    values: Any

    @property
    def end(self) -> int:
        """The position behind its last column."""
        return self.first + int(self.keys.shape[-2])

    def cut(self, low: int, high: int) -> Segment:
        """The columns ``low`` to ``high``, as views."""
        columns = slice(low - self.first, high - self.first)
        return Segment(low, self.keys[..., columns, :], self.values[..., columns, :])

    def put(self, first: int, keys: Any, values: Any) -> None:
        """Write columns from ``first`` on."""
        columns = slice(first - self.first, first - self.first + keys.shape[-2])
        self.keys[..., columns, :] = keys
        self.values[..., columns, :] = values

    def row(self, index: int) -> Segment:
        """One row, as views."""
        return Segment(self.first, self.keys[index : index + 1], self.values[index : index + 1])

    @classmethod
    def room(cls, first: int, keys: Any, values: Any, width: int) -> Segment:
        """An empty one of ``width`` columns, else shaped like ``keys`` and ``values``."""

        def made(like: Any) -> Any:
            return torch.zeros(*like.shape[:-2], width, like.shape[-1], dtype=like.dtype, device=like.device)

        return cls(first, made(keys), made(values))


class Attention(DynamicLayer):
    """What a model sees of a layer of keys and values; ``window``: it attends to so many last tokens only."""

    def __init__(self, span: Span, window: int | None) -> None:
        # Not the base's: keys and values are no tensors of this object.
        self.span = span
        self.window = window
        self.is_sliding = window is not None
        # Tokens written by the pass at work; they count once it is complete.
        self.pending = 0

    def lowest(self, length: int | None = None) -> int:
        """The first position that a token behind ``length`` others (the span's) may attend to."""
        length = self.span.length if length is None else length
        return max(0, length - self.window + 1) if self.window else 0

    def get_seq_length(self) -> int:
        return self.span.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        lowest = self.lowest()
        return self.span.length - lowest + query_length, lowest

    def get_max_length(self) -> int:
        return self.window or -1


class SessionLayer(Attention):
    """Keys and values of one session, in its table of the arena; without one, a layer that never has any."""

    def __init__(self, span: Span, window: int | None, index: int, table: Table | None) -> None:
        super().__init__(span, window)
        self.index = index
        self.table = table

    @property
    def is_initialized(self) -> bool:
        return self.table is not None and self.span.length + self.pending > 0

    @property
    def keys(self) -> Any:
        return self.read(self.lowest(), self.span.length).keys if self.is_initialized else None

    @property
    def values(self) -> Any:
        return self.read(self.lowest(), self.span.length).values if self.is_initialized else None

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        first = self.span.length
        self.pending = key_states.shape[-2]
        self.write(first, key_states, value_states)
        found = self.read(self.lowest(), first + self.pending)
        return found.keys, found.values

    def write(self, first: int, keys: Any, values: Any) -> None:
        """Put columns from ``first`` on, over what an earlier try may have left there."""
        assert self.table is not None
        end = first + keys.shape[-2]
        self.table.room(first, end)
        self.table.plane(self.index, "keys")[..., first:end, :] = keys
        self.table.plane(self.index, "values")[..., first:end, :] = values

    def read(self, low: int, high: int) -> Segment:
        """Columns ``low`` to ``high``, as views."""
        assert self.table is not None
        keys, values = self.table.plane(self.index, "keys"), self.table.plane(self.index, "values")
        return Segment(low, keys[..., low:high, :], values[..., low:high, :])

    @property
    def stored(self) -> tuple[int, int]:
        """The columns that may still be read: from, to."""
        if self.table is None:
            return 0, 0
        return self.lowest(), self.span.length + self.pending


class SessionHybridLayer(LinearAttentionLayer, SessionLayer):
    """A layer with keys and values and a recurrent state."""

    is_compileable = False

    def __init__(self, span: Span, window: int | None, index: int, table: Table | None, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        SessionLayer.__init__(self, span, window, index, table)
