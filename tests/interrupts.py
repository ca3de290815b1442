"""An interrupt of the main thread in a moment that another thread chooses."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpuckpt.errors import InterruptedByUser


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """What a thread calls to interrupt the body of the ``with``, once; it returns when the main thread knows of it.

    Python does not notice a signal that comes just before it begins to wait for a lock, until that wait is over: so it
    is sent again.
    """
    known = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        if not known.is_set():
            known.set()
            raise InterruptedByUser("interrupted")

    def send() -> None:
        while not known.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            known.wait(0.05)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield send
    finally:
        signal.signal(signal.SIGUSR1, before)
