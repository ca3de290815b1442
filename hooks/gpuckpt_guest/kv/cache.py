"""Caches of keys and values: one per session, and lanes in which several sessions run side by side.

A :class:`SessionCache` takes the place of transformers' ``DynamicCache``. It differs in three ways:

* Tokens are written behind those that *completed* passes have read (:class:`Span`), into buffers with room to spare:
  nothing is concatenated, a pass that is stopped between two layers looks to the model's prologue as it did at its
  begin, and one that is given up, or run again, leaves nothing that must be undone.
* :meth:`SessionCache.fork` shares what has been read; each branch writes on in buffers of its own.
* :class:`Lanes` puts several sessions into one batch, padded on the left, as a batch of unequal prompts would be. New
  tokens stay there until :meth:`Lanes.release` hands them back.

Layers with a recurrent state (Mamba, linear attention, short convolutions) keep transformers' own layer class, which
writes in place: such a pass cannot be given up, only run to its end. Kinds of layers that are unknown here keep
transformers' own class, too, and run alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# Buffers grow by half, and at least by this many tokens.
_ROOM = 64


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

    def bytes(self) -> int:
        """Its size in memory, as far as it is not a view of more."""
        return int(self.keys.nbytes + self.values.nbytes)

    @classmethod
    def room(cls, first: int, keys: Any, values: Any, width: int) -> Segment:
        """An empty one of ``width`` columns, else shaped like ``keys`` and ``values``."""

        def made(like: Any) -> Any:
            return torch.zeros(*like.shape[:-2], width, like.shape[-1], dtype=like.dtype, device=like.device)

        return cls(first, made(keys), made(values))

    def grown(self, low: int, filled: int, end: int) -> Segment:
        """A copy of the columns ``low`` to ``filled`` with room up to ``end`` and more."""
        width = end - low
        made = Segment.room(low, self.keys, self.values, max(width + _ROOM, width * 3 // 2))
        kept = self.cut(low, filled)
        made.put(low, kept.keys, kept.values)
        return made


class _Attention(DynamicLayer):
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


class SessionLayer(_Attention):
    """Keys and values of one session: shared segments that are only read, then a tail of its own with room."""

    def __init__(self, span: Span, window: int | None) -> None:
        super().__init__(span, window)
        self._shared: list[Segment] = []
        self._tail: Segment | None = None

    @property
    def is_initialized(self) -> bool:
        return self._tail is not None or bool(self._shared)

    @property
    def keys(self) -> Any:
        return self.read(self.lowest(), self.span.length).keys if self.is_initialized else None

    @property
    def values(self) -> Any:
        return self.read(self.lowest(), self.span.length).values if self.is_initialized else None

    @property
    def whole(self) -> bool:
        """Whether a pass can read everything in place."""
        return not self._shared or (self._tail is not None and self._tail.first <= self.lowest())

    @property
    def segments(self) -> list[Segment]:
        """All that is stored, in order."""
        return self._shared if self._tail is None else [*self._shared, self._tail]

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        first = self.span.length
        self.pending = key_states.shape[-2]
        self.write(first, key_states, value_states)
        found = self.read(self.lowest(), first + self.pending)
        return found.keys, found.values

    def write(self, first: int, keys: Any, values: Any) -> None:
        """Put columns from ``first`` on, over what an earlier try may have left there."""
        end = first + keys.shape[-2]
        lowest = self.lowest(first)
        if self._tail is None or self._tail.first > first:
            self._shared = [part.cut(part.first, min(part.end, first)) for part in self._shared if part.first < first]
            self._tail = Segment.room(first, keys, values, keys.shape[-2] + _ROOM)
        elif self._tail.end < end:
            self._tail = self._tail.grown(max(self._tail.first, lowest), first, end)
        # What a window has passed is never read again.
        if self._shared and self._shared[0].end <= lowest:
            self._shared = [part for part in self._shared if part.end > lowest]
        self._tail.put(first, keys, values)

    def read(self, low: int, high: int) -> Segment:
        """Columns ``low`` to ``high``: views where they lie in one piece, else put together."""
        if self._tail is not None and self._tail.first <= low:
            return self._tail.cut(low, high)
        parts = [
            part.cut(max(low, part.first), min(high, part.end))
            for part in self.segments
            if part.end > low and part.first < high
        ]
        if len(parts) == 1:
            return parts[0]
        keys, values = torch.cat([part.keys for part in parts], -2), torch.cat([part.values for part in parts], -2)
        return Segment(low, keys, values)

    def share(self, other: SessionLayer) -> None:
        """Let ``other``, an empty layer, have what is here so far; from now on both only read that."""
        if self._tail is not None:
            self._shared = [*self._shared, self._tail.cut(self._tail.first, self.span.length + self.pending)]
            self._tail = None
        other._shared = self._shared
        other.pending = self.pending

    def fill(self, segment: Segment, pending: int) -> None:
        """Take over stored columns, of which the last ``pending`` belong to a pass at work."""
        self._shared, self._tail, self.pending = [], segment, pending

    def bytes(self) -> int:
        """The size of what is stored, the room to spare left out."""
        filled = self.span.length + self.pending
        return sum(part.cut(part.first, min(part.end, filled)).bytes() for part in self.segments)

    def stored(self) -> Segment | None:
        """Everything that may still be read, in one piece; None if it is empty."""
        filled = self.span.length + self.pending
        low = self.segments[0].first if self.segments else 0
        return self.read(max(low, self.lowest()), filled) if self.is_initialized and filled > low else None

    def move(self, device: Any) -> None:
        """Bring everything to ``device``, without the room to spare."""
        if (stored := self.stored()) is not None:
            keys, values = stored.keys.to(device, copy=True), stored.values.to(device, copy=True)
            self.fill(Segment(stored.first, keys, values), self.pending)


class SessionHybridLayer(LinearAttentionLayer, SessionLayer):
    """A layer with keys and values and a recurrent state."""

    is_compileable = False

    def __init__(self, span: Span, window: int | None, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        SessionLayer.__init__(self, span, window)


class SessionCache(Cache):
    """The cache of one session, given to the model as ``past_key_values``."""

    def __init__(self, layers: Sequence[Any], span: Span, blueprint: Blueprint) -> None:
        super().__init__(layers=list(layers))
        self.span = span
        self._blueprint = blueprint
        # What the prologue of the pass at work was told about layers of unknown kinds. Their own answers change once
        # they have run, and a pass that goes on from a stop makes its prologue again.
        self._sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.span.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        key = (query_length, layer_idx)
        if key not in self._sizes:
            self._sizes[key] = super().get_mask_sizes(query_length, layer_idx)
        return self._sizes[key]

    @property
    def length(self) -> int:
        """How many tokens its completed passes have read."""
        return self.span.length

    @property
    def whole(self) -> bool:
        """Whether a pass can read it in place; a branch's lies in pieces."""
        return all(layer.whole for layer in self.layers if isinstance(layer, SessionLayer))

    def commit(self, tokens: int) -> None:
        """The pass is complete: its ``tokens`` count."""
        self.span.length += tokens
        self.abandon()

    def uncommit(self, tokens: int) -> None:
        """The last ``tokens`` do not count after all; not for layers with a recurrent state."""
        self.span.length -= tokens
        self.abandon()

    def abandon(self) -> None:
        """Forget what the pass at work has written."""
        self._sizes.clear()
        for layer in self.layers:
            if isinstance(layer, SessionLayer):
                layer.pending = 0

    def fork(self) -> SessionCache:
        """The cache of a branch: what was read so far is shared, also by a pass that is stopped between layers."""
        made = self._blueprint.session()
        made.span.length = self.span.length
        made._sizes = dict(self._sizes)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SessionLayer):
                layer.share(made.layers[index])
                if isinstance(layer, SessionHybridLayer):
                    _copy_states(layer, made.layers[index])
            else:
                made.layers[index] = copy.deepcopy(layer)
        return made

    def bytes(self) -> int:
        """Memory that it holds; what branches share counts for each."""
        held = 0
        for layer in self.layers:
            if isinstance(layer, SessionLayer):
                held += layer.bytes()
            held += sum(tensor.nbytes for _, tensor in _own_tensors(layer))
        return held

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """All tensors with names that tell where they are: ``LAYER.keys``, ``LAYER.recurrent_states.0`` …"""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SessionLayer) and (stored := layer.stored()) is not None:
                yield f"{index}.keys", stored.keys
                yield f"{index}.values", stored.values
            for name, tensor in _own_tensors(layer):
                yield f"{index}.{name}", tensor

    def facts(self) -> list[dict[str, Any]]:
        """What one must know beside :meth:`tensors` to make it again, for each layer, as JSON."""
        made: list[dict[str, Any]] = []
        for layer in self.layers:
            fact: dict[str, Any] = {"first": None, "pending": 0, "previous": [], "kernel": [], "states": []}
            if isinstance(layer, SessionLayer) and (stored := layer.stored()) is not None:
                fact |= {"first": stored.first, "pending": layer.pending}
            if isinstance(layer, LinearAttentionLayer):
                fact["previous"] = [bool(layer.has_previous_state[index]) for index in layer.has_previous_state]
                fact["kernel"] = [layer.conv_kernel_size[index] for index in layer.conv_kernel_size]
                fact["states"] = [
                    [name, index]
                    for name in _STATES
                    for index, state in getattr(layer, name).items()
                    if state is not None
                ]
            made.append(fact)
        return made

    def load(
        self,
        length: int,
        facts: Sequence[dict[str, Any]],
        tensors: dict[str, Any],
        device: Any,
        stopped: tuple[int, int] = (0, 0),
    ) -> None:
        """Fill an empty cache with what :meth:`tensors` and :meth:`facts` said.

        ``stopped``: the layers that a pass at work has run, and how many tokens it reads. Raises ValueError or KeyError
        if they do not fit together, or are not what this model's caches are like.
        """
        if self._blueprint.unknown or len(facts) != len(self.layers):
            raise ValueError(f"{len(facts)} layers of cache, {len(self.layers)} were expected")
        self.span.length = length
        for index, (layer, fact) in enumerate(zip(self.layers, facts, strict=True)):
            form = self._blueprint.forms.get(index, {})
            if isinstance(layer, SessionLayer):
                pending = stopped[1] if index < stopped[0] else 0
                if "keys" in form and length + pending:
                    self._load_columns(index, layer, fact, tensors, device, pending)
                elif fact["first"] is not None:
                    raise ValueError(f"layer {index} of the cache has columns, but there is nothing that it has read")
            if isinstance(layer, LinearAttentionLayer):
                _load_states(layer, index, fact, tensors, device, form)

    def _load_columns(
        self, index: int, layer: SessionLayer, fact: dict[str, Any], tensors: dict[str, Any], device: Any, pending: int
    ) -> None:
        keys, values = tensors[f"{index}.keys"].to(device), tensors[f"{index}.values"].to(device)
        for name, tensor in (("keys", keys), ("values", values)):
            heads, size, dtype = self._blueprint.forms[index][name]
            columns = self.span.length + pending - (fact["first"] or 0)
            if tuple(tensor.shape) != (1, heads, columns, size) or tensor.dtype != dtype:
                raise ValueError(f"layer {index} of the cache has {name} of {tensor.dtype} {list(tensor.shape)}")
        if fact["first"] is None or fact["first"] > layer.lowest() or fact["pending"] != pending:
            raise ValueError(f"layer {index} of the cache holds other tokens than the session has read")
        layer.fill(Segment(fact["first"], keys, values), pending)

    def move(self, device: Any) -> None:
        """Bring it to ``device`` ("cpu" to free the device's memory)."""
        for layer in self.layers:
            if isinstance(layer, SessionLayer):
                layer.move(device)
            for holder, key, tensor in _places(layer):
                holder[key] = tensor.to(device)


class Lane(_Attention):
    """One layer's keys and values of several sessions as one batch, padded on the left with zeros.

    The buffers are filled from the sessions when a pass first comes to the layer, and kept from pass to pass.
    """

    def __init__(self, span: Span, members: Sequence[SessionLayer]) -> None:
        super().__init__(span, members[0].window)
        self._members = members
        self._held: Segment | None = None
        self._joined = 0  # columns from here on are not in the sessions yet

    @property
    def is_initialized(self) -> bool:
        return self._held is not None

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        first = self.span.length
        self.pending = key_states.shape[-2]
        end = first + self.pending
        if self._held is None:
            self._held = self._gathered(key_states, value_states, end)
            self._joined = first
        elif self._held.end < end:
            low = max(self._held.first, self.lowest())
            if self._joined < low:  # a window moves on: what falls out of it goes home first
                self._home(self._joined, first)
                self._joined = first
            self._held = self._held.grown(low, first, end)
        self._held.put(first, key_states, value_states)
        found = self._held.cut(self.lowest(), end)
        return found.keys, found.values

    def _gathered(self, keys: Any, values: Any, end: int) -> Segment:
        lowest = self.lowest()
        made = Segment.room(lowest, keys, values, end - lowest + _ROOM)
        for row, member in enumerate(self._members):
            length = member.span.length
            if have := min(length, self.span.length - lowest):
                part = member.read(length - have, length)
                made.row(row).put(self.span.length - have, part.keys, part.values)
        return made

    def _home(self, low: int, high: int) -> None:
        assert self._held is not None
        part = self._held.cut(low, high)
        for row, member in enumerate(self._members):
            # The lane's last column is the last token of every session.
            first = member.span.length - (self.span.length - low)
            mine = part.row(row)
            member.write(first, mine.keys, mine.values)

    def release(self) -> None:
        """Give the sessions what they have read here."""
        if self._held is None:
            return
        high = self.span.length + self.pending
        if high > self._joined:
            self._home(self._joined, high)
        for member in self._members:
            member.pending = self.pending
        self._held = None

    def bytes(self) -> int:
        """Memory that it holds beside the sessions'."""
        return self._held.bytes() if self._held else 0


class _RecurrentLane(LinearAttentionLayer):
    """Recurrent states of several sessions in one batch."""

    def gather(self, members: Sequence[Any]) -> None:
        """Put the members' states together."""
        self._sources = members
        if any(member.has_previous_state != members[0].has_previous_state for member in members):
            raise ValueError("sessions that have a recurrent state cannot share a batch with one that has none")
        for name in _STATES:
            for index in getattr(self, name):
                states = [getattr(member, name)[index] for member in members]
                getattr(self, name)[index] = None if states[0] is None else torch.cat(states)
        for name in _FLAGS:
            setattr(self, name, copy.copy(getattr(members[0], name)))

    def scatter(self) -> None:
        """Give each member its own back."""
        for row, member in enumerate(self._sources):
            for name in _STATES:
                for index, state in getattr(self, name).items():
                    getattr(member, name)[index] = None if state is None else state[row : row + 1].clone()
            for name in _FLAGS:
                setattr(member, name, copy.copy(getattr(self, name)))


class _HybridLane(_RecurrentLane, Lane):
    is_compileable = False

    def __init__(self, span: Span, members: Sequence[Any], states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        Lane.__init__(self, span, members)


class Lanes(Cache):
    """Several sessions as one batch, whose rows all end with the same column."""

    def __init__(self, members: Sequence[SessionCache]) -> None:
        self.members = tuple(members)
        self.span = Span(max(member.length for member in members))
        super().__init__(layers=[self._lane(index) for index in range(len(members[0].layers))])

    def _lane(self, index: int) -> Any:
        layers = [member.layers[index] for member in self.members]
        first = layers[0]
        made: Any
        if isinstance(first, SessionHybridLayer):
            made = _HybridLane(self.span, layers, first.number_of_states)
        elif isinstance(first, SessionLayer):
            return Lane(self.span, layers)
        else:
            made = _RecurrentLane(number_of_states=first.number_of_states)
        made.gather(layers)
        return made

    @property
    def length(self) -> int:
        """How many columns the completed passes have filled, padding included."""
        return self.span.length

    @property
    def pads(self) -> list[int]:
        """How many columns of padding each row begins with."""
        return [self.span.length - member.length for member in self.members]

    def commit(self, tokens: int) -> None:
        """The pass is complete, for all rows."""
        self.span.length += tokens
        for member in self.members:
            member.commit(tokens)
        for layer in self.layers:
            if isinstance(layer, Lane):
                layer.pending = 0

    def release(self) -> None:
        """Hand everything back to the sessions, what a pass that is stopped between layers has written included."""
        for layer in self.layers:
            if isinstance(layer, Lane):
                layer.release()
            if isinstance(layer, _RecurrentLane):
                layer.scatter()

    def bytes(self) -> int:
        """Memory that it holds beside the sessions'."""
        return sum(layer.bytes() for layer in self.layers if isinstance(layer, Lane))


class Blueprint:
    """Makes the caches of one model, from the layers that its ``DynamicCache`` would have."""

    def __init__(self, config: Any) -> None:
        self._config = config
        kinds = DynamicCache(config=config).layers
        self._makers = [_maker(layer) for layer in kinds]
        # Kinds of layers that keep transformers' own class.
        self.unknown = sorted(
            {type(layer).__name__ for layer, make in zip(kinds, self._makers, strict=True) if make is None}
        )
        # What the layers hold, by name, once it has been seen.
        self.forms: dict[int, dict[str, Any]] = {}
        # Whether a pass, once begun, must be run to its end.
        self.recurrent = bool(self.unknown) or any(isinstance(layer, LinearAttentionLayer) for layer in kinds)

    def learn(self, cache: SessionCache) -> None:
        """See from a cache in use what its layers hold: heads, sizes, types."""
        for index, layer in enumerate(cache.layers):
            form: dict[str, Any] = {}
            if isinstance(layer, SessionLayer) and (stored := layer.stored()) is not None:
                for name, tensor in (("keys", stored.keys), ("values", stored.values)):
                    form[name] = (tensor.shape[1], tensor.shape[3], tensor.dtype)
            if isinstance(layer, LinearAttentionLayer):
                form |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _own_tensors(layer)}
            self.forms[index] = form

    def session(self) -> SessionCache:
        """An empty cache."""
        span = Span()
        native = DynamicCache(config=self._config).layers if self.unknown else ()
        layers = [make(span) if make else native[index] for index, make in enumerate(self._makers)]
        return SessionCache(layers, span, self)


def _maker(layer: Any) -> Callable[[Span], Any] | None:
    kind = type(layer)
    if kind is DynamicLayer:
        return lambda span: SessionLayer(span, None)
    if kind is DynamicSlidingWindowLayer:
        return lambda span: SessionLayer(span, int(layer.sliding_window))
    if kind is LinearAttentionLayer:
        return lambda span: LinearAttentionLayer(number_of_states=layer.number_of_states)
    if kind is LinearAttentionAndFullAttentionLayer:
        return lambda span: SessionHybridLayer(span, None, layer.number_of_states)
    if kind is LinearAttentionAndSlidingWindowAttentionLayer:
        return lambda span: SessionHybridLayer(span, int(layer.sliding_window), layer.number_of_states)
    return None


def _load_states(
    layer: Any, index: int, fact: dict[str, Any], tensors: dict[str, Any], device: Any, form: dict[str, Any]
) -> None:
    if len(fact["previous"]) != layer.number_of_states or len(fact["kernel"]) != layer.number_of_states:
        raise ValueError(f"layer {index} of the cache has another number of states")
    for state, (previous, kernel) in enumerate(zip(fact["previous"], fact["kernel"], strict=True)):
        layer.has_previous_state[state], layer.conv_kernel_size[state] = previous, kernel
    for name, state in fact["states"]:
        tensor = tensors[f"{index}.{name}.{state}"].to(device)
        if (tuple(tensor.shape), tensor.dtype) != form.get(f"{name}.{state}"):
            raise ValueError(f"layer {index} of the cache has {name} of {tensor.dtype} {list(tensor.shape)}")
        getattr(layer, name)[state] = tensor.clone()
        getattr(layer, f"is_{name}_initialized")[state] = True
        layer.device, layer.dtype = tensor.device, tensor.dtype
    if any(fact["previous"]) and {f"{name}.{state}" for name, state in fact["states"]} != set(form) - {
        "keys",
        "values",
    }:
        raise ValueError(f"layer {index} of the cache lacks a state")


_STATES = ("conv_states", "recurrent_states")
_FLAGS = (
    "has_previous_state",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "conv_kernel_size",
    "device",
    "dtype",
)


def _copy_states(source: Any, target: Any) -> None:
    for name in (*_STATES, *_FLAGS):
        setattr(target, name, copy.deepcopy(getattr(source, name)))


def _places(layer: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The tensors that a layer of transformers' own keeps: (holder, key, tensor)."""
    own = vars(layer)
    for name, value in list(own.items()):
        if isinstance(value, torch.Tensor):
            yield own, name, value
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                if isinstance(item, torch.Tensor):
                    yield value, key, item


def _own_tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, torch.Tensor):
                    yield f"{name}.{key}", item
