"""Lanes: several sessions side by side in one batch, padded on the left, as a batch of unequal prompts would be.

Attention over a batch wants its keys as one tensor, so they are copied, once, and kept from pass to pass. New tokens
stay in the lanes until :meth:`Lanes.release` hands them back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer

from . import states
from .layers import Attention, Segment, SessionHybridLayer, SessionLayer, Span

if TYPE_CHECKING:
    from .cache import SessionCache

# Columns to spare when lanes are made, and the share of the length where that is more: filling them again then costs
# each token eight columns' copies, where attending to the others reads them all.
_ROOM, _SHARE = 64, 8


class Lane(Attention):
    """One layer's keys and values of several sessions as one batch, padded on the left with zeros.

    It is filled from the sessions when a pass first comes to the layer, and kept up to column ``end``.
    """

    def __init__(self, span: Span, members: Sequence[SessionLayer], end: int) -> None:
        super().__init__(span, members[0].window)
        self._members = members
        self._end = end
        self._held: Segment | None = None
        self._joined = 0  # columns from here on are not in the sessions yet

    @property
    def is_initialized(self) -> bool:
        return self._held is not None

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        first = self.span.length
        self.pending = key_states.shape[-2]
        if self._held is None:
            self._held = self._gathered(key_states, value_states)
            self._joined = first
        self._held.put(first, key_states, value_states)
        found = self._held.cut(self.lowest(), first + self.pending)
        return found.keys, found.values

    def _gathered(self, keys: Any, values: Any) -> Segment:
        lowest = self.lowest()
        made = Segment.room(lowest, keys, values, self._end - lowest)
        for row, member in enumerate(self._members):
            length = member.span.length
            if have := min(length, self.span.length - lowest):
                part = member.read(length - have, length)
                made.row(row).put(self.span.length - have, part.keys, part.values)
        return made

    def release(self) -> None:
        """Give the sessions what they have read here."""
        if self._held is None:
            return
        high = self.span.length + self.pending
        for row, member in enumerate(self._members):
            # The lane's last column is the last token of every session; what a window has passed nobody reads again.
            back = self.span.length - member.span.length
            low = max(self._joined, member.lowest() + back)
            if high > low:
                mine = self._held.row(row).cut(low, high)
                member.write(low - back, mine.keys, mine.values)
            member.pending = self.pending
        self._held = None


class RecurrentLane(LinearAttentionLayer):
    """Recurrent states of several sessions in one batch."""

    def gather(self, members: Sequence[Any]) -> None:
        """Put the members' states together."""
        self._sources = members
        if any(member.has_previous_state != members[0].has_previous_state for member in members):
            raise ValueError("sessions that have a recurrent state cannot share a batch with one that has none")
        for name in states.STATES:
            for index in getattr(self, name):
                held = [getattr(member, name)[index] for member in members]
                getattr(self, name)[index] = None if held[0] is None else torch.cat(held)
        for name in states.FLAGS:
            setattr(self, name, copy.copy(getattr(members[0], name)))

    def scatter(self) -> None:
        """Give each member its own back."""
        for row, member in enumerate(self._sources):
            for name in states.STATES:
                for index, state in getattr(self, name).items():
                    getattr(member, name)[index] = None if state is None else state[row : row + 1].clone()
            for name in states.FLAGS:
                setattr(member, name, copy.copy(getattr(self, name)))


class HybridLane(RecurrentLane, Lane):
    """Both in one layer."""

    is_compileable = False

    def __init__(self, span: Span, members: Sequence[Any], end: int, number: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number)
        Lane.__init__(self, span, members, end)


class Lanes(Cache):
    """Several sessions as one batch, whose rows all end with the same column; for passes up to column ``end``."""

    def __init__(self, members: Sequence[SessionCache], tokens: int = 1) -> None:
        """``tokens``: that each reads in the first pass."""
        self.members = tuple(members)
        self.span = Span(max(member.length for member in members))
        self.end = _end(self.span.length + tokens)
        super().__init__(layers=[self._lane(index) for index in range(len(members[0].layers))])

    def _lane(self, index: int) -> Any:
        layers = [member.layers[index] for member in self.members]
        first = layers[0]
        made: Any
        if isinstance(first, SessionHybridLayer):
            made = HybridLane(self.span, layers, self.end, first.number_of_states)
        elif isinstance(first, SessionLayer):
            return Lane(self.span, layers, self.end)
        else:
            made = RecurrentLane(number_of_states=first.number_of_states)
        made.gather(layers)
        return made

    @staticmethod
    def cost(members: Sequence[SessionCache], tokens: int = 1) -> int:
        """The bytes that they would take."""
        longest = max(member.length for member in members)
        end = _end(longest + tokens)
        columns = 0
        for table in members[0].tables:
            width = end - table.track.lowest(longest)
            columns += width * sum(plane.bytes for plane in table.track.planes.values())
        return columns * len(members) + sum(member.outside for member in members)

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
            if isinstance(layer, RecurrentLane):
                layer.scatter()


def _end(length: int) -> int:
    return length + max(_ROOM, length // _SHARE)
