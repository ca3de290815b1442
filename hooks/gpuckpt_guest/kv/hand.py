"""Threads beside the engine's that copy: one piece of work after the other, on one core.

torch copies in parallel, with a pool of OpenMP's for each thread that asks. The threads of one pool wait for work by
spinning, where those of another would compute: with the engine's pool on the same cores, many small copies have taken
ten times as long as on one core. One core is enough for the bandwidth that the engine leaves.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

Then = Callable[[Any, Exception | None], None]


class Hand(threading.Thread):
    """A thread that does one piece of work after the other; ``landed`` is told what came of each, in that thread."""

    def __init__(self, name: str, landed: Callable[[Then, Any, Exception | None], None]) -> None:
        super().__init__(name=f"gpuckpt-{name}", daemon=True)
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Then] | None] = queue.SimpleQueue()
        self._landed = landed
        self._alone = threading.Event()
        # torch's setting is of the thread that makes it, and of all threads that have not computed yet.
        usual = torch.get_num_threads()
        self.start()
        self._alone.wait()
        torch.set_num_threads(usual)

    def do(self, work: Callable[[], Any], then: Then) -> None:
        """Have it call ``work``; :attr:`landed` is then told the result, or the exception, and ``then``."""
        self._work.put((work, then))

    def run(self) -> None:
        torch.get_num_threads()  # takes over the setting, which would else happen later
        torch.set_num_threads(1)
        self._alone.set()
        with torch.inference_mode():
            while (item := self._work.get()) is not None:
                work, then = item
                result, failure = None, None
                try:
                    result = work()
                except Exception as error:  # for who asked for it
                    failure = error
                self._landed(then, result, failure)
                del item, work, then, result, failure

    def end(self) -> None:
        """Wait until all that it was given is done."""
        self._work.put(None)
        self.join()
