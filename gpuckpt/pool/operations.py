"""What the loop has decided, done: each operation is a task, whose end is a change that is settled again.

An operation puts a replica or a golden into the phase of its doing at once, and into another one when it ends, however
it ends; what fails is told, counted, and tried again by what the policy decides then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypeVar

from gpuckpt.errors import (
    BusyError,
    GpuckptError,
    GpuFullError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
    VerificationError,
)
from gpuckpt.manifest import Held as OnGpu
from gpuckpt.pool import policy
from gpuckpt.pool.book import Event, Held, Of, RefusedError
from gpuckpt.pool.hands import Hands, Made
from gpuckpt.pool.state import Action, Freeze, Golden, Move, Phase, Prepare, Restore, Start, Stop, Wake

_Result = TypeVar("_Result")
_log = logging.getLogger("gpuckpt.pool")
_GIVEN_UP = 3  # failures in a row after which those who wait are told
_DOUBLINGS = 5
_UNASKED_DOUBLINGS = 11  # of the pause where nobody waits: making a golden takes all cores
_LONGEST_END = 60.0  # seconds


def _why(error: GpuckptError) -> str:
    return f"{error.message}: {error.cause}" if error.cause else error.message


async def _done(work: Awaitable[_Result]) -> _Result:
    """What the hands do. A fault in it that nobody has foreseen is a failure like the others, and the log has it."""
    try:
        return await work
    except GpuckptError:
        raise
    except Exception as error:
        _log.exception("an operation of the pool failed unexpectedly")
        raise GpuckptError("a fault in gpuckpt", cause=f"{type(error).__name__}: {error}") from error


class Operations:
    """The operations of one loop. ``settle`` is called when one has ended; ``retry``: seconds, see the configuration.

    ``ending``: the service goes down, what fails is not tried again.
    """

    def __init__(
        self,
        hands: Hands,
        models: Mapping[str, Of],
        *,
        retry: float,
        tell: Callable[[Event], None],
        clock: Callable[[], float],
        settle: Callable[[], None],
    ) -> None:
        self._hands = hands
        self._models = models
        self.retry = retry
        self._tell = tell
        self._clock = clock
        self._settle = settle
        self._tasks: set[asyncio.Task[None]] = set()
        self.ending = False

    def begin(self, model: Of, action: Action) -> None:
        """Begin what was decided for the model."""
        match action:
            case Restore(_, standby, gpus):
                tier = str(model.golden)
                held = self._new(model, Phase.RESTORING, gpus)
                work = self._hands.restore(model.name, held.name, gpus)
                self._run(self._bring_up(model, held, work, "restored", tier, standby=standby))
            case Start(_, gpus):
                bad = model.golden is Golden.QUARANTINED
                held = self._new(model, Phase.STARTING, gpus)
                self._run(self._start(model, held, replace=bad))
            case Wake(_, name, gpus):
                held = model.replicas[name]
                held.phase, held.gpus = Phase.WAKING, gpus or held.gpus
                wake = partial(self._hands.wake, gpus=gpus)
                self._run(self._change(model, held, wake, Phase.HOT, "woken"))
            case Freeze(_, name):
                held = model.replicas[name]
                held.phase = Phase.FREEZING
                self._run(self._change(model, held, self._hands.freeze, Phase.STANDBY, "frozen"))
            case Stop(_, name, reason):
                self.stop(model, model.replicas[name], reason)
            case Prepare():
                model.preparing = model.name_to_prepare()
                self._run(self._prepare(model, model.preparing))
            case Move(_, to, reason):
                before, model.golden = model.golden, Golden.MOVING
                self._run(self._move(model, before, to, reason))

    def _new(self, model: Of, phase: Phase, gpus: tuple[OnGpu, ...]) -> Held:
        name = model.next_name()
        model.prepared.discard(name)
        held = Held(name, model.name, phase, self._clock(), golden=model.goldens, gpus=gpus)
        model.replicas[name] = held
        return held

    async def _start(self, model: Of, held: Held, *, replace: bool) -> None:
        began = self._clock()
        try:
            await _done(self._hands.make(model.name, replace=replace))
            seen = await _done(self._hands.look(model.name))
        except GpuckptError as error:
            del model.replicas[held.name]
            await self._failed(model, held, error, "cold")
            return
        model.prepared.clear()
        model.found(seen)
        self.say("made", model.name, seconds=self._clock() - began)
        model.cramped, held.golden = 0, model.goldens
        # A replica of it is restored like any other: it takes a moment more, and one kind of replica is enough.
        held.phase, held.gpus = Phase.RESTORING, model.gpus  # which its server has just left
        if policy.wanted_hot(model.seen()) == 0:
            del model.replicas[held.name]
            model.failures, model.retry_at, model.trouble = 0, 0.0, ""
            return
        work = self._hands.restore(model.name, held.name, held.gpus)
        await self._bring_up(model, held, work, "started", "cold", standby=False, began=began)

    async def _bring_up(
        self,
        model: Of,
        held: Held,
        work: Coroutine[Any, Any, Made],
        kind: str,
        tier: str,
        *,
        standby: bool,
        began: float | None = None,
    ) -> None:
        began = self._clock() if began is None else began
        try:
            made = await _done(work)
        except GpuckptError as error:
            del model.replicas[held.name]
            await self._failed(model, held, error, tier)
            return
        self.answers(model, held, made)
        held.phase, held.since = Phase.HOT, self._clock()
        model.failures, model.retry_at, model.trouble = 0, 0.0, ""
        self.say(kind, model.name, held.name, tier=tier, seconds=self._clock() - began, phases=made.phases)
        if held.golden != model.goldens:
            self.stop(model, held, "quarantined")
            return
        hot = sum(one.phase is Phase.HOT for one in model.replicas.values())
        if standby and hot > policy.wanted_hot(model.seen()):
            held.phase = Phase.FREEZING
            await self._change(model, held, self._hands.freeze, Phase.STANDBY, "frozen")

    def answers(self, model: Of, held: Held, made: Made) -> None:
        """The replica is there."""
        held.made(made)
        model.weighs(held, made.memory)
        model.gpus = model.gpus or made.gpus

    async def _prepare(self, model: Of, name: str) -> None:
        try:
            await _done(self._hands.prepare(model.name, name))
            model.prepared.add(name)
        except BusyError as error:  # what was there before is still being removed
            model.prepare_at = self._clock() + self.retry
            _log.debug("%s could not be prepared: %s", name, _why(error))
        except GpuckptError as error:
            # Nobody waits for it, and a restore makes its container itself.
            model.prepare_at = self._clock() + self.retry * 2**_DOUBLINGS
            _log.warning("%s could not be prepared: %s", name, _why(error))
        finally:
            model.preparing = None

    async def _change(
        self,
        model: Of,
        held: Held,
        work: Callable[[str, str], Coroutine[Any, Any, tuple[OnGpu, ...]]],
        phase: Phase,
        kind: str,
    ) -> None:
        began = self._clock()
        tier = "standby" if phase is Phase.HOT else ""
        try:
            gpus = await _done(work(model.name, held.name))
        except GpuckptError as error:
            self.say("failed", model.name, held.name, _why(error), tier)
            if isinstance(error, GpuFullError) and held.phase is Phase.WAKING:
                # It is a standby as before: somebody else has the GPU, and will let go of it.
                held.phase, model.retry_at = Phase.STANDBY, self._clock() + self.retry
            elif held.phase is not Phase.STOPPING:
                self.stop(model, held, f"not {kind}")
            return
        if held.phase is Phase.STOPPING:  # it was lost meanwhile
            return
        if held.golden != model.goldens:
            self.stop(model, held, "quarantined")
            return
        held.phase, held.since, held.gpus = phase, self._clock(), gpus or held.gpus
        self.say(kind, model.name, held.name, tier=tier, seconds=self._clock() - began)

    def stop(self, model: Of, held: Held, reason: str, failures: int = 0) -> None:
        """Have the replica removed; again and again, if that fails."""
        if held.phase is Phase.STANDBY:  # what it gave up it will not hold again
            held.memory, held.gpus, held.carried = held.on_host, (), 0
        held.phase = Phase.STOPPING
        self._run(self._stop(model, held, reason, failures))

    async def _stop(self, model: Of, held: Held, reason: str, failures: int) -> None:
        began = self._clock()
        try:
            await _done(self._hands.stop(model.name, held.name))
        except GpuckptError as error:
            # It stays in the account until it is really gone: its memory is not free.
            if isinstance(error, BusyError):  # somebody else stops it
                _log.debug("%s could not be stopped yet: %s", held.name, _why(error))
            else:
                self.say("failed", model.name, held.name, _why(error))
            pause = self.retry * 2 ** min(failures, _DOUBLINGS)
            asyncio.get_running_loop().call_later(pause, self._stop_again, model, held, reason, failures + 1)
            return
        del model.replicas[held.name]
        self.say("stopped", model.name, held.name, reason, seconds=self._clock() - began)

    def _stop_again(self, model: Of, held: Held, reason: str, failures: int) -> None:
        if not self.ending:  # the end has a try of its own, and what it leaves, the next service finds
            self.stop(model, held, reason, failures)

    async def _move(self, model: Of, before: Golden, to: Golden, reason: str) -> None:
        began = self._clock()
        try:
            await _done(self._hands.move(model.name, to))
        except GpuckptError as error:
            if model.golden is Golden.MOVING:
                model.golden = before
            if isinstance(error, VerificationError):
                self.quarantine(model, _why(error))
            else:
                # Replicas can be restored from where it is; only the move waits.
                pause = self.retry if isinstance(error, BusyError) else self.retry * 2**_DOUBLINGS
                model.move_at = self._clock() + pause
                self.say("failed", model.name, reason=f"move to {to}: {_why(error)}")
            return
        if model.golden is Golden.MOVING:  # else a replica has shown meanwhile that it is damaged
            model.golden = to
        if to is Golden.DISK:
            for other in self._models.values():
                other.cramped = max(0, other.cramped - model.golden_bytes)
        model.prepared.clear()  # they were for where it lay before
        self.say("moved", model.name, reason=f"{to}: {reason}", seconds=self._clock() - began)

    async def _failed(self, model: Of, held: Held, error: GpuckptError, tier: str) -> None:
        if not isinstance(error, BusyError):  # somebody else is at it, and will end: that says nothing of the model
            model.failures += 1
        model.retry_at = self._clock() + self.retry * 2 ** min(max(0, model.failures - 1), _DOUBLINGS)
        model.make_at = self._clock() + self.retry * 2 ** min(max(0, model.failures - 1), _UNASKED_DOUBLINGS)
        model.trouble = _why(error)
        # Where nobody knows how much, one golden goes after the other.
        cramped = isinstance(error, OutOfSpaceError) and not isinstance(error, GpuFullError)
        model.cramped = max(1, getattr(error, "lacking", 0)) if cramped else 0
        self.say("failed", model.name, held.name, _why(error), tier)
        if isinstance(error, VerificationError):
            # From now on it starts cold, at once: what failed will not fail again.
            self.quarantine(model, _why(error))
        if model.failures >= _GIVEN_UP and not model.has(Phase.HOT):
            model.refuse(RefusedError(f"{model.name} cannot be brought up: {_why(error)}", retry_after=30))
        if isinstance(error, NotFoundError | IncompatibleError):  # somebody may have removed it, or made it anew
            with contextlib.suppress(GpuckptError):
                seen = await _done(self._hands.look(model.name))
                if model.golden in (Golden.TMPFS, Golden.DISK):
                    model.found(seen)

    def quarantine(self, model: Of, reason: str) -> None:
        """The model's golden is damaged: it is not used any more, the model starts cold, and makes another."""
        if model.golden is Golden.QUARANTINED:
            return  # another replica of it has said so already
        model.golden = Golden.QUARANTINED
        # Another is made at once; but if that is no better, it is the model, or the machine.
        before = model.damaged
        model.damaged += 1
        model.retry_at = self._clock() + (self.retry * 2 ** min(before - 1, _DOUBLINGS) if before else 0.0)
        model.make_at = self._clock() + (self.retry * 2 ** min(before - 1, _UNASKED_DOUBLINGS) if before else 0.0)
        self.say("quarantined", model.name, reason=reason)
        model.goldens += 1
        for held in list(model.replicas.values()):
            if held.phase is Phase.HOT and held.requests:
                held.phase = Phase.DRAINING
            elif held.phase in (Phase.HOT, Phase.STANDBY):
                self.stop(model, held, "quarantined")
        for prepared in model.prepared:
            self.discard(model, prepared)
        model.prepared.clear()
        self._run(self._distrust(model))
        self._settle()

    async def _distrust(self, model: Of) -> None:
        try:
            await _done(self._hands.distrust(model.name))
        except GpuckptError as error:
            _log.warning("the golden of %s could not be marked: %s", model.name, _why(error))

    def discard(self, model: Of, name: str) -> None:
        """Have a prepared container removed."""
        self._run(self._discard(model, name))

    async def _discard(self, model: Of, name: str) -> None:
        with contextlib.suppress(GpuckptError):  # the next service finds it, and uses or removes it
            await _done(self._hands.stop(model.name, name))
        if model.preparing == name:
            model.preparing = None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        async def whole() -> None:
            try:
                await work
            except Exception:  # a fault of ours: the loop goes on, and the log has it
                _log.exception("an operation of the pool failed unexpectedly")
            finally:
                self._settle()

        task = asyncio.get_running_loop().create_task(whole())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def say(
        self,
        kind: str,
        model: str,
        replica: str = "",
        reason: str = "",
        tier: str = "",
        seconds: float | None = None,
        phases: dict[str, float] | None = None,
    ) -> None:
        """Tell of something that has happened."""
        self._tell(Event(time.time(), kind, model, replica, reason, tier, seconds, phases or {}))

    async def ended(self) -> None:
        """Wait for what is being done; a last tick follows what it begins. Not for ever: the next service sweeps."""
        until = self._clock() + _LONGEST_END
        while self._tasks and self._clock() < until:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            _log.warning("still being done at the end: %s", task.get_coro())
