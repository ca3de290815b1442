"""The engine asleep: its weights are given back, its sessions stay, and what is asked of it waits.

Sessions and their caches are state, not weights. A pass that is on its way stays between the two layers where it is,
and runs its next layer, on the same weights at the same addresses, when the engine wakes up. What only looks and
changes is answered as ever; what would compute is held (:class:`Asleep`).

It may be told to give back only what caches. Its caches take memory when they are used and give it back when they are
not, so what is left is what nobody uses at the moment; the rest is sessions.

Also the orders that come by the control socket (control.py), for the guest's only process that has weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch

from ..control import ControlError, Handler, caches_only, files_for, files_to_wake, same_sleep
from ..flat import FlatError
from ..outside import OutsideWeights
from .errors import EngineError

if TYPE_CHECKING:
    from .engine import Engine

RANKS = 1


class Asleep(Exception):
    """Raised on the engine's thread by what needs the weights: it is called again when they are there."""


class Sleep:
    """Sleep and wake. For use by the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._outside = engine.loaded.outside
        self._resting = False  # asleep with its weights
        self.held: list[tuple[Callable[[], Any], Future[Any]]] = []  # until it wakes up

    @property
    def asleep(self) -> bool:
        """Whether what would compute has to wait."""
        return self._resting or (self._outside is not None and self._outside.asleep)

    @property
    def _weights(self) -> OutsideWeights:
        if self._outside is None:
            raise ControlError("the weights stay where they are", "the server was started without --weights-outside")
        return self._outside

    def awake(self) -> None:
        """Raise Asleep, so that what is being called is held, if the engine is asleep."""
        if self.asleep:
            raise Asleep

    def save(self, file: int) -> int:
        """Write the weights into a file; returns its size. Raises ControlError, OSError."""
        if self.asleep:
            raise ControlError("the weights cannot be saved", "the server is asleep")
        return self._weights.save(file)

    def sleep(self, caches: bool = False) -> int:
        """Give the weights back, and what caches do not use; returns the bytes. Raises OSError.

        ``caches``: the weights stay.
        """
        if self.asleep:
            same_sleep("the server cannot sleep", self._resting, caches)
            return 0
        memory, scheduler = self._engine.memory, self._engine.scheduler
        before = memory.arena.memory.held
        if scheduler.done:
            scheduler.rest()
        memory.arena.trim()
        released = 0 if caches else self._weights.sleep()
        released += max(0, before - memory.arena.memory.held)
        self._resting = caches
        if self._engine.loaded.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later would be in the dump
        return released

    def wake(self, file: int, carried: int | None = None) -> dict[str, Any]:
        """Take the weights again; returns bytes and phases. Raises FlatError or OSError, and stays asleep.

        ``carried``: the handle of memory of the device that holds the file's bytes.
        """
        if self.asleep:
            same_sleep("the server cannot wake up", self._resting, False)
        woken = self._weights.wake(file, carried)
        self._go_on()
        answer = {"bytes": woken.bytes, "phases": woken.phases | {"kv": 0.0}}  # memory for caches comes when it is used
        return answer | ({"told": woken.told} if woken.told else {})

    def wake_rested(self) -> dict[str, Any]:
        """Go on after a sleep in which the weights stayed."""
        if self.asleep:
            same_sleep("the server cannot wake up", self._resting, True)
            self._resting = False
            self._go_on()
        return {"bytes": 0, "phases": {"map": 0.0, "stream": 0.0, "kv": 0.0}}

    def _go_on(self) -> None:
        held, self.held = self.held, []
        for each in held:
            self._engine.call(*each)


def handlers(engine: Engine) -> Mapping[str, Handler]:
    """The orders, for :class:`~gpuckpt_guest.control.Control`; of an engine whose weights can be outside."""
    sleep = engine.sleep

    def do(what: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return engine.do(function, *args).result()
        except (FlatError, OSError, EngineError) as error:
            raise ControlError(what, str(error)) from error

    def save(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        (file,) = files_for(files, RANKS)
        return {"bytes": [do("the weights cannot be saved", sleep.save, file)]}

    def rest(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        caches = caches_only(request, files)
        what = "the caches cannot be given back" if caches else "the weights cannot be given back"
        return {"released": do(what, sleep.sleep, caches)}

    def wake(request: dict[str, Any], files: Sequence[int]) -> Any:
        if caches_only(request, files):
            return do("the server cannot wake up", sleep.wake_rested)
        (file,), carried = files_to_wake(request, files, RANKS)
        return do("the weights cannot be taken from this file", sleep.wake, file, carried)

    return {
        "ranks": lambda request, files: {"ranks": RANKS},
        "save": save,
        "sleep": rest,
        "wake": wake,
        "state": lambda request, files: {"asleep": do("the engine does not answer", lambda: sleep.asleep)},
    }
