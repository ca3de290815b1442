"""From tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Unicode's replacement character: what a tokenizer writes for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of tokens that come one by one.

    A token's text depends on those before it (leading spaces, characters of several tokens), so a piece is what a
    window of tokens decodes to beyond what the window without the new ones did. What might be the begin of a stop
    string is held back until it is clear; the stop string itself is not part of the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = 0  # where the window begins
        self._read = 0  # tokens whose text is out
        self._held = ""
        self.text = ""
        self.stopped: str | None = None

    def add(self, token: int) -> str:
        """The text that is certain now; ``stopped`` is set when a stop string has appeared."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if after.endswith(_INCOMPLETE) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._out(after[len(before) :])

    def finish(self) -> str:
        """What was held back."""
        if self.stopped is not None:
            return ""
        before = self._decode(self._ids[self._start : self._read])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        self._start = self._read = len(self._ids)
        piece = self._out(rest)
        if self.stopped is None:
            self.text += self._held
            piece, self._held = piece + self._held, ""
        return piece

    def copy(self) -> TextStream:
        """One that goes on from here by itself."""
        made = TextStream(self._tokenizer, self.stops)
        made._ids, made._start, made._read = list(self._ids), self._start, self._read
        made._held, made.text, made.stopped = self._held, self.text, self.stopped
        return made

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _out(self, piece: str) -> str:
        held = self._held + piece
        found = min((at for stop in self.stops if (at := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped = next(stop for stop in self.stops if held.startswith(stop, found))
            self._held = ""
            self.text += held[:found]
            return held[:found]
        starts = ((stop, size) for stop in self.stops for size in range(1, min(len(stop), len(held) + 1)))
        keep = max((size for stop, size in starts if held.endswith(stop[:size])), default=0)
        sure = held[: len(held) - keep]
        self._held = held[len(held) - keep :]
        self.text += sure
        return sure
