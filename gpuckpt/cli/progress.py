"""Progress of long operations on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gpuckpt.cli.render import size


class Progress:
    """A :class:`gpuckpt.golden.tools.Reporter` for people; ``quiet`` says nothing but notes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Any = None
        self._name = ""
        self._began = time.monotonic()
        self._shown = 0.0

    def start(self) -> None:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._live = Console(stderr=True).status("")
            self._live.start()

    def stop(self) -> None:
        self._finish()
        if self._live:
            self._live.stop()

    def _finish(self) -> None:
        if self._name and not self._quiet:
            took = time.monotonic() - self._began
            self._print(f"  {self._name:<16} {took:8.2f} s")
        self._name = ""

    def _print(self, line: str) -> None:
        if self._live:
            self._live.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def stage(self, name: str) -> None:
        self._finish()
        self._name, self._began = name, time.monotonic()
        if self._live:
            self._live.update(f"{name} …")

    def bytes(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._live or now - self._shown < 0.1:
            return
        self._shown = now
        rate = done / max(now - self._began, 1e-3)
        of = f" of about {size(total)}" if total else ""
        self._live.update(f"{self._name} … {size(done)}{of}, {size(rate)}/s")

    def note(self, text: str) -> None:
        self._print(f"  {text}")


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress display for the length of a ``with``."""
    shown = Progress(quiet=quiet)
    shown.start()
    try:
        yield shown
    finally:
        shown.stop()
