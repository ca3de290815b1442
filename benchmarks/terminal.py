"""What a benchmark tells the person who runs it: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

_BEAT = 20.0  # seconds between two lines that say “still at it” where nothing can be rewritten


class Terminal:
    """Writes to ``stream``; colours and rewritten lines only on a terminal, colours not with NO_COLOR."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self.live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self.live and not os.environ.get("NO_COLOR")

    def say(self, text: str = "") -> None:
        self._write(text + "\n")

    def title(self, text: str) -> None:
        self.say()
        self.say(self.bold(text))

    def bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._colour else text

    def green(self, text: str) -> str:
        return f"\x1b[32m{text}\x1b[0m" if self._colour else text

    def red(self, text: str) -> str:
        return f"\x1b[31m{text}\x1b[0m" if self._colour else text

    @contextlib.contextmanager
    def waiting(self, what: Callable[[], str]) -> Iterator[Callable[[], None]]:
        """Show ``what()`` and the seconds passed; the body calls the yielded function now and then."""
        began = time.monotonic()
        next_beat = began + _BEAT

        def tick() -> None:
            nonlocal next_beat
            now = time.monotonic()
            if self.live:
                self._write(f"\r\x1b[K  {now - began:5.0f} s  {what()}")
            elif now >= next_beat:
                next_beat = now + _BEAT
                self.say(f"  {now - began:5.0f} s  {what()}")

        try:
            yield tick
        finally:
            if self.live:
                self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        # The terminal may be gone (SIGHUP) while we still have to clean up.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
