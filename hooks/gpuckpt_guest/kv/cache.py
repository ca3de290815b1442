"""The cache of one session, in the place of transformers' ``DynamicCache``.

It differs in three ways:

* Tokens are written behind those that *completed* passes have read (:class:`Span`), into blocks of an arena: nothing is
  concatenated, a pass that is stopped between two layers looks to the model's prologue as it did at its begin, and one
  that is given up, or run again, leaves nothing that must be undone.
* :meth:`SessionCache.fork` shares the blocks of what has been read; a branch copies the one that it writes on in.
* What it holds can be taken out of the arena and brought back (pager.py).

Layers with a recurrent state (Mamba, linear attention, short convolutions) keep transformers' own layer class, which
writes in place: such a pass cannot be given up, only run to its end. Kinds of layers that are unknown here keep
transformers' own class, too, and run alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from . import states
from .arena import Arena, Block, Table, blocks_of
from .layers import SessionHybridLayer, SessionLayer, Span


class SessionCache(Cache):
    """The cache of one session, given to the model as ``past_key_values``."""

    def __init__(self, blueprint: Blueprint, arena: Arena, tables: Sequence[Table] | None = None) -> None:
        self.arena = arena
        self.tables = [Table(arena, track) for track in arena.tracks] if tables is None else list(tables)
        self.span = Span()
        self._blueprint = blueprint
        super().__init__(layers=blueprint.layers(self.span, self.tables))
        # Bytes that it holds on the device outside of the arena.
        self.outside = 0
        # What of it is still on the way into the arena; the pager's.
        self.arrivals: list[Any] = []
        # What the prologue of the pass at work was told about layers of unknown kinds. Their own answers change once
        # they have run, and a pass that goes on from a stop makes its prologue again.
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    # ------------------------------------------------------------------ what the model asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.span.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        key = (query_length, layer_idx)
        if key not in self._sizes:
            self._sizes[key] = super().get_mask_sizes(query_length, layer_idx)
        return self._sizes[key]

    # ------------------------------------------------------------------ passes

    @property
    def length(self) -> int:
        """How many tokens its completed passes have read."""
        return self.span.length

    def room(self, tokens: int) -> None:
        """Take the blocks that a pass of so many tokens writes into, and let go of those that windows have passed.

        Raises OutOfBlocksError; :meth:`lacking` tells beforehand.
        """
        self.forget()
        for table in self.tables:
            table.room(self.length, self.length + tokens)

    def forget(self) -> None:
        """Let go of the blocks that windows have passed."""
        for table in self.tables:
            if lowest := table.track.lowest(self.length):
                table.forget(lowest)

    def lacking(self, tokens: int) -> int:
        """How many blocks :meth:`room` would take."""
        return sum(table.lacking(self.length, self.length + tokens) for table in self.tables)

    def commit(self, tokens: int) -> None:
        """The pass is complete: its ``tokens`` count."""
        self.span.length += tokens
        self.abandon()
        self._charge()

    def uncommit(self, tokens: int) -> None:
        """The last ``tokens`` do not count after all; not for layers with a recurrent state, nor after another pass."""
        self.span.length -= tokens
        self.abandon()

    def abandon(self) -> None:
        """Forget what the pass at work has written."""
        self._sizes.clear()
        for layer in self._attention():
            layer.pending = 0
        for table in self.tables:
            table.trim(self.length)

    def fork(self) -> SessionCache:
        """The cache of a branch: what was read so far is shared, also by a pass that is stopped between layers."""
        made = SessionCache(self._blueprint, self.arena, [table.fork() for table in self.tables])
        made.arrivals = list(self.arrivals)
        made.span.length = self.span.length
        made._sizes = dict(self._sizes)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SessionLayer):
                made.layers[index].pending = layer.pending
                if isinstance(layer, SessionHybridLayer):
                    states.duplicate(layer, made.layers[index])
            else:
                made.layers[index] = copy.deepcopy(layer)
        if self.shown:  # else it is off the device as a whole
            made._charge()
        return made

    def close(self) -> None:
        """The session has ended: what nobody shares is free."""
        for table in self.tables:
            table.close()
        self.arena.charge(-self.outside)
        self.outside = 0
        self.layers: list[Any] = []

    # ------------------------------------------------------------------ where it lies

    def blocks(self) -> Iterator[Block]:
        """All of its blocks."""
        return blocks_of(self.tables)

    @property
    def pieces(self) -> int:
        """What showing all of it takes of what the memory can show at once."""
        return sum(table.pieces for table in self.tables)

    @property
    def shown(self) -> bool:
        """Whether it can be read: everything lies in the arena and is to be seen."""
        return all(table.shown for table in self.tables)

    def hide(self) -> None:
        """It is not to be read for now."""
        for table in self.tables:
            table.hide()

    def show(self) -> None:
        """It is to be read again: the blocks have places, even if their bytes are still on the way. Raises OSError."""
        try:
            for table in self.tables:
                table.show()
        except BaseException:
            self.hide()
            raise

    def move(self, device: Any) -> int:
        """Bring what lies outside of the arena to ``device``; returns its bytes."""
        moved = 0
        for layer in self.layers:
            for holder, key, tensor in states.places(layer):
                holder[key] = tensor.to(device)
                moved += tensor.nbytes
        return moved

    def leave(self) -> None:
        """What lies outside of the arena is off the device: it does not count in the budget any more."""
        self.arena.charge(-self.outside)
        self.outside = 0

    def enter(self) -> None:
        """And it is there again."""
        self._charge()

    def held_outside(self) -> int:
        """Bytes of what does not lie in blocks, wherever it is."""
        return sum(int(tensor.nbytes) for layer in self.layers for _, _, tensor in states.places(layer))

    def _charge(self) -> None:
        held = self.held_outside()
        self.arena.charge(held - self.outside)
        self.outside = held

    def empty(self) -> SessionCache:
        """A new one, that has read nothing."""
        return self._blueprint.session(self.arena)

    # ------------------------------------------------------------------ as tensors

    def bytes(self) -> int:
        """The size of what may still be read; what branches share counts for each."""
        held = sum(tensor.nbytes for layer in self.layers for _, tensor in states.tensors(layer))
        for layer in self._attention():
            low, high = layer.stored
            held += (high - low) * self._width(layer)
        return held

    def _width(self, layer: SessionLayer) -> int:
        assert layer.table is not None
        return sum(layer.table.track.planes[layer.index, name].bytes for name in ("keys", "values"))

    def planes(self) -> Iterator[tuple[str, Table, int, str, int, int]]:
        """What there is of keys and values: name of the tensor, table, layer, plane, from which column to which."""
        for layer in self._attention():
            low, high = layer.stored
            if layer.table is not None and high > low:
                for name in ("keys", "values"):
                    yield f"{layer.index}.{name}", layer.table, layer.index, name, low, high

    def numbers(self, table: Table) -> range:
        """The blocks that one of its tables has, from what it has read."""
        stored = [layer.stored for layer in self._attention() if layer.table is table]
        low, high = min((low for low, _ in stored), default=0), max((high for _, high in stored), default=0)
        return range(table.track.first(low), table.track.end(high)) if high > low else range(0)

    def states(self) -> Iterator[tuple[str, Any]]:
        """All else that it holds, as tensors: ``LAYER.recurrent_states.0`` …"""
        for index, layer in enumerate(self.layers):
            for name, tensor in states.tensors(layer):
                yield f"{index}.{name}", tensor

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """All of it, in place: it must be shown. ``LAYER.keys`` and so on."""
        for where, table, layer, name, low, high in self.planes():
            yield where, table.plane(layer, name)[..., low:high, :]
        yield from self.states()

    def facts(self) -> list[dict[str, Any]]:
        """What one must know beside :meth:`tensors` to make it again, for each layer, as JSON."""
        made: list[dict[str, Any]] = []
        for layer in self.layers:
            fact: dict[str, Any] = {"first": None, "pending": 0, **states.facts(layer)}
            if isinstance(layer, SessionLayer):
                low, high = layer.stored
                if high > low:
                    fact |= {"first": low, "pending": layer.pending}
            made.append(fact)
        return made

    def load(
        self,
        length: int,
        facts: Sequence[dict[str, Any]],
        tensors: dict[str, Any],
        device: Any,
        stopped: tuple[int, int] = (0, 0),
        *,
        without: bool = False,
    ) -> dict[Table, dict[tuple[int, str], Any]]:
        """Begin to fill an empty cache with what :meth:`tensors` and :meth:`facts` said.

        ``stopped``: the layers that a pass at work has run, and how many tokens it reads. Returns the columns, from the
        lowest that is read, for the pager to put into blocks; none ``without`` them. Raises ValueError or KeyError if
        they do not fit together, or are not what this model's caches are like.
        """
        if self._blueprint.unknown or len(facts) != len(self.layers):
            raise ValueError(f"{len(facts)} layers of cache, {len(self.layers)} were expected")
        self.span.length = length
        columns: dict[Table, dict[tuple[int, str], Any]] = {}
        for index, (layer, fact) in enumerate(zip(self.layers, facts, strict=True)):
            if isinstance(layer, SessionLayer):
                layer.pending = stopped[1] if index < stopped[0] else 0
                if layer.table is not None and length + layer.pending:
                    if not without:
                        columns.setdefault(layer.table, {}).update(_columns(layer, fact, tensors))
                elif fact["first"] is not None:
                    raise ValueError(f"layer {index} of the cache has columns, but there is nothing that it has read")
            if isinstance(layer, LinearAttentionLayer):
                states.load(layer, index, fact, tensors, device, self._blueprint.states.get(index, {}))
        self._charge()
        return columns

    def _attention(self) -> Iterator[SessionLayer]:
        return (layer for layer in self.layers if isinstance(layer, SessionLayer))


def _columns(layer: SessionLayer, fact: dict[str, Any], tensors: dict[str, Any]) -> dict[tuple[int, str], Any]:
    assert layer.table is not None
    found = {}
    index, length = layer.index, layer.span.length
    for name in ("keys", "values"):
        tensor, plane = tensors[f"{index}.{name}"], layer.table.track.planes[index, name]
        count = length + layer.pending - (fact["first"] or 0)
        if tuple(tensor.shape) != (1, plane.heads, count, plane.size) or tensor.dtype != plane.dtype:
            raise ValueError(f"layer {index} of the cache has {name} of {tensor.dtype} {list(tensor.shape)}")
        found[index, name] = tensor
    if fact["first"] is None or fact["first"] > layer.lowest() or fact["pending"] != layer.pending:
        raise ValueError(f"layer {index} of the cache holds other tokens than the session has read")
    return {where: tensor[..., layer.lowest() - fact["first"] :, :] for where, tensor in found.items()}


class Blueprint:
    """What the caches of one model are like, from the layers that its ``DynamicCache`` would have."""

    def __init__(self, config: Any) -> None:
        self._config = config
        kinds = DynamicCache(config=config).layers
        self._makers = [_maker(layer) for layer in kinds]
        # Kinds of layers that keep transformers' own class.
        self.unknown = sorted(
            {type(layer).__name__ for layer, make in zip(kinds, self._makers, strict=True) if make is None}
        )
        self.windows = {
            index: int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None
            for index, layer in enumerate(kinds)
        }
        # Of each layer with keys and values, by name: heads, size, type; and of each with states: shape, type. Both are
        # known once a cache of the model's own has been in use.
        self.forms: dict[int, dict[str, tuple[int, int, Any]]] = {}
        self.states: dict[int, dict[str, tuple[Any, Any]]] = {}
        # Whether a pass, once begun, must be run to its end.
        self.recurrent = bool(self.unknown) or any(isinstance(layer, LinearAttentionLayer) for layer in kinds)

    def learn(self, cache: DynamicCache) -> None:
        """See from transformers' own cache, in use, what the layers hold."""
        for index, layer in enumerate(cache.layers):
            if self._makers[index] is None:
                continue
            held = {name: tensor for name, tensor in states.tensors(layer) if tensor.numel()}
            columns = {name: held[name] for name in ("keys", "values") if name in held}
            if columns:
                self.forms[index] = {name: (it.shape[1], it.shape[3], it.dtype) for name, it in columns.items()}
            kept = {name: it for name, it in held.items() if name.partition(".")[0] in states.STATES}
            if kept:
                self.states[index] = {name: (tuple(it.shape), it.dtype) for name, it in kept.items()}

    def layers(self, span: Span, tables: Sequence[Table]) -> list[Any]:
        """The layers of an empty cache."""
        native = DynamicCache(config=self._config).layers if self.unknown else ()
        of_layer = {index: table for table in tables for index, _ in table.track.planes}
        return [
            make(span, self.windows[index], index, of_layer.get(index)) if make else native[index]
            for index, make in enumerate(self._makers)
        ]

    def session(self, arena: Arena) -> SessionCache:
        """An empty cache."""
        return SessionCache(self, arena)


_Maker = Callable[[Span, int | None, int, Table | None], Any]


def _maker(layer: Any) -> _Maker | None:
    kind = type(layer)
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return SessionLayer
    if kind is LinearAttentionLayer:
        return lambda *_: LinearAttentionLayer(number_of_states=layer.number_of_states)
    if kind in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return lambda span, window, index, table: SessionHybridLayer(span, window, index, table, layer.number_of_states)
    return None
