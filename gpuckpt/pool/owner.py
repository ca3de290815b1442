"""The one loop that owns the pool's state.

Everything happens on one asyncio loop, between two awaits: there are no locks. Whoever changes something has the
change settled (:meth:`Owner.settle`): replicas are handed out to those who wait, the policy is asked what to do, and
that is begun; what was begun is a task, whose end changes something again. So wakes coalesce by themselves: a second
request finds the state in which the first one's replica is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, OutOfSpaceError, VerificationError
from gpuckpt.pool import policy
from gpuckpt.pool.book import Event, Held, LateError, Of, RefusedError
from gpuckpt.pool.hands import Hands, Made
from gpuckpt.pool.state import (
    Action,
    Budget,
    Freeze,
    Golden,
    Move,
    Phase,
    Pin,
    Prepare,
    Restore,
    Rules,
    Start,
    State,
    Stop,
    Wake,
)
from gpuckpt.pool.steady import again_and_again

_Result = TypeVar("_Result")
_log = logging.getLogger("gpuckpt.pool")
_GIVEN_UP = 3  # failures in a row after which those who wait are told
_DOUBLINGS = 5
_UNASKED_DOUBLINGS = 11  # of the pause where nobody waits: making a golden takes all cores
_LONGEST_END = 60.0  # seconds
_UNLIMITED = Budget()


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


@dataclass(frozen=True)
class Lease:
    """The right to send one request to a replica. ``tier`` is the one that the model was in when the request came."""

    replica: Held
    tier: str
    waited: float


class Owner:
    """The state, and what may be asked of it. For use on one event loop."""

    def __init__(
        self,
        hands: Hands,
        *,
        budget: Budget = _UNLIMITED,
        queue: int = 256,
        retry: float = 2.0,
        tell: Callable[[Event], None] = lambda event: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hands = hands
        self.budget = budget
        self.queue = queue
        self.retry = retry
        self._tell = tell
        self.clock = clock
        self.models: dict[str, Of] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling = False
        self.draining = False

    # ------------------------------------------------------------------ which models there are

    async def adopt(self, rules: Mapping[str, Rules]) -> None:
        """Take models over, with what an earlier service has left of them. Raises what looking at them raises."""
        found = await asyncio.gather(*(self._hands.adopt(name) for name in rules))
        for name, seen in zip(rules, found, strict=True):
            now = self.clock()
            model = self.models[name] = Of(name, rules[name], seen.prefix, asked=now)
            model.found(seen)
            model.prepared.update(seen.prepared)
            for made, phase in seen.replicas:
                held = model.replicas[made.name] = Held(made.name, name, phase, now, golden=model.goldens)
                self._answers(model, held, made)
                self._say("adopted", name, made.name, str(phase))
        self.settle()

    def set_rules(self, rules: Mapping[str, Rules]) -> None:
        """Other rules for models that there are; see :meth:`adopt` for those that come."""
        for name, one in rules.items():
            self.models[name].rules = one
        self.settle()

    def remove(self, name: str) -> None:
        """The model is no longer wanted: what is at work ends, then its replicas go, and it is forgotten."""
        self.models[name].leaving = True
        self.drain_model(name)

    def set_warm(self, names: Iterable[str]) -> None:
        """The models that are kept ready now, and no others."""
        wanted = set(names)
        for name, model in self.models.items():
            model.warm = name in wanted
        self.settle()

    def view(self) -> State:
        """Everything at this moment."""
        models = tuple(model.seen() for model in self.models.values())
        return State(self.clock(), models, self.budget, self.draining)

    # ------------------------------------------------------------------ requests

    async def acquire(self, name: str, deadline: float) -> Lease:
        """A replica of the model for one request; waits for one, ``deadline`` seconds at most.

        Raises RefusedError. Who stops waiting cancels nothing: the replica that was on its way comes all the same.
        """
        model = self.models.get(name)
        if self.draining:
            raise RefusedError("the service is going down", retry_after=5)
        if model is None or model.drained:
            raise RefusedError(f"{name} is drained: it takes no requests until it is woken", retry_after=30)
        began = model.asked = self.clock()
        model.requested = True
        tier = model.tier()
        waiter: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        held: Held | None = None
        model.waiters.append(waiter)
        self._hand_out(model)
        if waiter.done():  # nothing is to be done for it, and deciding costs more than relaying a request
            return Lease(waiter.result(), tier, 0.0)
        if len(model.waiters) > self.queue:
            model.waiters.remove(waiter)
            raise RefusedError(f"{len(model.waiters)} requests wait for {name} already", retry_after=1)
        self._settle_soon()
        try:
            async with asyncio.timeout(deadline):
                held = await waiter
        except TimeoutError:
            why = f": {model.trouble}" if model.trouble else ""
            raise LateError(f"no replica of {name} was free within {deadline:g} s{why}", retry_after=5) from None
        finally:
            with contextlib.suppress(ValueError):
                model.waiters.remove(waiter)
            if held is None and waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())  # it was given in the moment in which the waiting ended
        return Lease(held, tier, self.clock() - began)

    def release(self, held: Held) -> None:
        """The request is over."""
        held.requests -= 1
        held.since = self.clock()
        if held.phase is Phase.DRAINING and not held.requests:
            self._begin_stop(held, "quarantined")
        if model := self.models.get(held.model):
            self._hand_out(model)
        # What follows from idleness alone has time until the next look.
        if held.phase is not Phase.HOT or any(one.waiters for one in self.models.values()):
            self._settle_soon()

    def lost(self, held: Held, reason: str) -> None:
        """The replica is dead, or hangs: it gets no more requests, and another one takes its place."""
        if held.phase is Phase.STOPPING:
            return
        self._say("lost", held.model, held.name, reason)
        self._begin_stop(held, reason)
        self.settle()

    def quarantine(self, name: str, reason: str) -> None:
        """The model's golden is damaged: it is not used any more, the model starts cold, and makes another."""
        model = self.models[name]
        if model.golden is Golden.QUARANTINED:
            return  # another replica of it has said so already
        model.golden = Golden.QUARANTINED
        # Another is made at once; but if that is no better, it is the model, or the machine.
        before = model.damaged
        model.damaged += 1
        model.retry_at = self.clock() + (self.retry * 2 ** min(before - 1, _DOUBLINGS) if before else 0.0)
        model.make_at = self.clock() + (self.retry * 2 ** min(before - 1, _UNASKED_DOUBLINGS) if before else 0.0)
        self._say("quarantined", name, reason=reason)
        model.goldens += 1
        for held in list(model.replicas.values()):
            if held.phase is Phase.HOT and held.requests:
                held.phase = Phase.DRAINING
            elif held.phase in (Phase.HOT, Phase.STANDBY):
                self._begin_stop(held, "quarantined")
        for prepared in model.prepared:
            self._run(self._discard(model, prepared))
        model.prepared.clear()
        self._run(self._distrust(model))
        self.settle()

    def proved(self, held: Held) -> None:
        """The replica has answered its golden's canary as it was recorded."""
        held.proved = self.clock()
        if model := self.models.get(held.model):
            model.damaged = 0

    # ------------------------------------------------------------------ orders

    async def wake(self, name: str, deadline: float) -> Lease:
        """See to it that the model has a hot replica, drained or not; it may freeze again when it has been idle.

        The lease is given back already. Raises RefusedError.
        """
        model = self.models[name]
        if not model.leaving:
            model.drained = False
        lease = await self.acquire(name, deadline)
        self.release(lease.replica)
        return lease

    def sleep(self, name: str, *, release: bool) -> list[str]:
        """Freeze its idle hot replicas now, or remove what is idle beyond its minimum; returns their names."""
        model = self.models[name]
        idle = [one for one in model.replicas.values() if one.phase is Phase.HOT and one.seen().idle]
        if not release:
            kept = int(model.rules.pin is Pin.HOT) if model.scale is None else model.scale
            names = [one.name for one in idle[kept:]]
            for one in names:
                self._begin(Freeze(name, one))
            return names
        idle += [one for one in model.replicas.values() if one.phase is Phase.STANDBY and one.seen().idle]
        names = [one.name for one in idle[policy.floor_of(model.seen()) :]]
        for one in names:
            self._begin(Stop(name, one, "asked"))
        return names

    def scale(self, name: str, replicas: int | None) -> None:
        """Keep so many hot replicas, none at 0; None: as its rules say."""
        self.models[name].scale = replicas
        self.settle()

    def drain_model(self, name: str) -> list[str]:
        """It takes no more requests; its replicas go when those at work have ended. Returns their names."""
        model = self.models[name]
        model.drained = True
        model.refuse(RefusedError(f"{name} is drained: it takes no requests until it is woken", retry_after=30))
        names = [one.name for one in model.replicas.values() if one.phase is not Phase.STOPPING]
        self.settle()
        return names

    # ------------------------------------------------------------------ the loop

    async def watch(self, interval: float = 0.25) -> None:
        """Settle again and again, for what only time changes: idle times, pauses after failures."""
        await again_and_again(self.settle, interval)

    def _settle_soon(self) -> None:
        # A burst of requests is decided upon once.
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_soon(self.settle)

    def settle(self) -> None:
        """Something has changed: hand out, decide, begin."""
        self._settling = False
        for model in list(self.models.values()):
            self._hand_out(model)
            if model.leaving and not (model.replicas or model.preparing or model.golden is Golden.MOVING):
                self._clear_up(model)
        state = self.view()
        for action in policy.decide(state):
            self._begin(action)
        for seen in state.models:
            if seen.waiting and not seen.replicas and policy.never_fits(state, seen):
                self._refuse_for_ever(self.models[seen.name])

    def _clear_up(self, model: Of) -> None:
        """Forget it, with its last container: if it is configured again, what it left must not go then."""
        if model.prepared:
            model.preparing = model.prepared.pop()
            self._run(self._discard(model, model.preparing))
        else:
            del self.models[model.name]

    def _refuse_for_ever(self, model: Of) -> None:
        needs = [
            f"{size / 1e9:.1f} GB of {kind}"
            for size, kind in ((model.expected, "memory"), (model.gpu, "GPU memory"))
            if size
        ]
        model.refuse(
            RefusedError(f"{model.name} needs {' and '.join(needs)}, more than the budget leaves it", retry_after=60)
        )
        model.most = 0  # to what one has grown in a long life is no reason against another for ever

    def _hand_out(self, model: Of) -> None:
        while model.waiters:
            free = [
                one
                for one in model.replicas.values()
                if one.phase is Phase.HOT and one.requests < model.rules.concurrency
            ]
            if not free:
                return
            waiter = model.waiters.popleft()
            if waiter.done():
                continue
            best = min(free, key=lambda one: (one.requests, one.name))
            best.requests += 1
            best.served += 1
            best.heard = self.clock()
            waiter.set_result(best)

    def _begin(self, action: Action) -> None:
        model = self.models[action.model]
        match action:
            case Restore(_, standby):
                tier = str(model.golden)
                held = self._new(model, Phase.RESTORING)
                work = self._hands.restore(model.name, held.name)
                self._run(self._bring_up(model, held, work, "restored", tier, standby=standby))
            case Start():
                bad = model.golden is Golden.QUARANTINED
                held = self._new(model, Phase.STARTING)
                self._run(self._start(model, held, replace=bad))
            case Wake(_, name):
                held = model.replicas[name]
                held.phase = Phase.WAKING
                self._run(self._change(model, held, self._hands.wake, Phase.HOT, "woken"))
            case Freeze(_, name):
                held = model.replicas[name]
                held.phase = Phase.FREEZING
                self._run(self._change(model, held, self._hands.freeze, Phase.STANDBY, "frozen"))
            case Stop(_, name, reason):
                self._begin_stop(model.replicas[name], reason)
            case Prepare():
                model.preparing = model.name_to_prepare()
                self._run(self._prepare(model, model.preparing))
            case Move(_, to, reason):
                before, model.golden = model.golden, Golden.MOVING
                self._run(self._move(model, before, to, reason))

    def _new(self, model: Of, phase: Phase) -> Held:
        name = model.next_name()
        model.prepared.discard(name)
        held = model.replicas[name] = Held(name, model.name, phase, self.clock(), golden=model.goldens)
        return held

    async def _start(self, model: Of, held: Held, *, replace: bool) -> None:
        began = self.clock()
        try:
            await _done(self._hands.make(model.name, replace=replace))
            seen = await _done(self._hands.look(model.name))
        except GpuckptError as error:
            del model.replicas[held.name]
            await self._failed(model, held, error, "cold")
            return
        model.prepared.clear()
        model.found(seen)
        self._say("made", model.name, seconds=self.clock() - began)
        model.cramped, held.golden = False, model.goldens
        # A replica of it is restored like any other: it takes a moment more, and one kind of replica is enough.
        held.phase = Phase.RESTORING
        if policy.wanted_hot(model.seen()) == 0:
            del model.replicas[held.name]
            model.failures, model.retry_at, model.trouble = 0, 0.0, ""
            return
        work = self._hands.restore(model.name, held.name)
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
        began = self.clock() if began is None else began
        try:
            made = await _done(work)
        except GpuckptError as error:
            del model.replicas[held.name]
            await self._failed(model, held, error, tier)
            return
        self._answers(model, held, made)
        held.phase, held.since = Phase.HOT, self.clock()
        model.failures, model.retry_at, model.trouble = 0, 0.0, ""
        self._say(kind, model.name, held.name, tier=tier, seconds=self.clock() - began, phases=made.phases)
        if held.golden != model.goldens:
            self._begin_stop(held, "quarantined")
            return
        hot = sum(one.phase is Phase.HOT for one in model.replicas.values())
        if standby and hot > policy.wanted_hot(model.seen()):
            held.phase = Phase.FREEZING
            await self._change(model, held, self._hands.freeze, Phase.STANDBY, "frozen")

    def _answers(self, model: Of, held: Held, made: Made) -> None:
        held.made(made)
        self._note_memory(model, held, made.memory)
        model.gpu = max(model.gpu, made.gpu)

    async def _prepare(self, model: Of, name: str) -> None:
        try:
            await _done(self._hands.prepare(model.name, name))
            model.prepared.add(name)
        except GpuckptError as error:
            # Nobody waits for it, and a restore makes its container itself.
            model.prepare_at = self.clock() + self.retry * 2**_DOUBLINGS
            _log.warning("%s could not be prepared: %s", name, _why(error))
        finally:
            model.preparing = None

    async def _change(
        self, model: Of, held: Held, work: Callable[[str, str], Coroutine[Any, Any, None]], phase: Phase, kind: str
    ) -> None:
        began = self.clock()
        tier = "standby" if phase is Phase.HOT else ""
        try:
            await _done(work(model.name, held.name))
        except GpuckptError as error:
            self._say("failed", model.name, held.name, _why(error), tier)
            if held.phase is not Phase.STOPPING:
                self._begin_stop(held, f"not {kind}")
            return
        if held.phase is Phase.STOPPING:  # it was lost meanwhile
            return
        if held.golden != model.goldens:
            self._begin_stop(held, "quarantined")
            return
        held.phase, held.since = phase, self.clock()
        self._say(kind, model.name, held.name, tier=tier, seconds=self.clock() - began)

    def note_memory(self, held: Held, memory: int) -> None:
        """A replica holds so many bytes of its own now."""
        if model := self.models.get(held.model):
            self._note_memory(model, held, memory)

    def _note_memory(self, model: Of, held: Held, memory: int) -> None:
        held.memory = memory
        model.most = max(model.most, memory)

    def _begin_stop(self, held: Held, reason: str, failures: int = 0) -> None:
        held.phase = Phase.STOPPING
        self._run(self._stop(self.models[held.model], held, reason, failures))

    async def _stop(self, model: Of, held: Held, reason: str, failures: int) -> None:
        began = self.clock()
        try:
            await _done(self._hands.stop(model.name, held.name))
        except GpuckptError as error:
            # It stays in the account until it is really gone: its memory is not free.
            self._say("failed", model.name, held.name, _why(error))
            pause = self.retry * 2 ** min(failures, _DOUBLINGS)
            asyncio.get_running_loop().call_later(pause, self._stop_again, held, reason, failures + 1)
            return
        del model.replicas[held.name]
        self._say("stopped", model.name, held.name, reason, seconds=self.clock() - began)

    def _stop_again(self, held: Held, reason: str, failures: int) -> None:
        if not self.draining:  # the end has a try of its own, and what it leaves, the next service finds
            self._begin_stop(held, reason, failures)

    async def _move(self, model: Of, before: Golden, to: Golden, reason: str) -> None:
        began = self.clock()
        try:
            await _done(self._hands.move(model.name, to))
        except GpuckptError as error:
            if model.golden is Golden.MOVING:
                model.golden = before
            if isinstance(error, VerificationError):
                self.quarantine(model.name, _why(error))
            else:
                # Replicas can be restored from where it is; only the move waits.
                pause = self.retry if isinstance(error, BusyError) else self.retry * 2**_DOUBLINGS
                model.move_at = self.clock() + pause
                self._say("failed", model.name, reason=f"move to {to}: {_why(error)}")
            return
        if model.golden is Golden.MOVING:  # else a replica has shown meanwhile that it is damaged
            model.golden = to
        model.prepared.clear()  # they were for where it lay before
        self._say("moved", model.name, reason=f"{to}: {reason}", seconds=self.clock() - began)

    async def _failed(self, model: Of, held: Held, error: GpuckptError, tier: str) -> None:
        if not isinstance(error, BusyError):  # somebody else is at it, and will end: that says nothing of the model
            model.failures += 1
        model.retry_at = self.clock() + self.retry * 2 ** min(max(0, model.failures - 1), _DOUBLINGS)
        model.make_at = self.clock() + self.retry * 2 ** min(max(0, model.failures - 1), _UNASKED_DOUBLINGS)
        model.trouble = _why(error)
        model.cramped = isinstance(error, OutOfSpaceError)
        self._say("failed", model.name, held.name, _why(error), tier)
        if isinstance(error, VerificationError):
            # From now on it starts cold, at once: what failed will not fail again.
            self.quarantine(model.name, _why(error))
        if model.failures >= _GIVEN_UP and not model.has(Phase.HOT):
            model.refuse(RefusedError(f"{model.name} cannot be brought up: {_why(error)}", retry_after=30))
        if isinstance(error, NotFoundError):  # somebody may have removed it
            with contextlib.suppress(GpuckptError):
                seen = await _done(self._hands.look(model.name))
                if model.golden in (Golden.TMPFS, Golden.DISK):
                    model.found(seen)

    async def _distrust(self, model: Of) -> None:
        try:
            await _done(self._hands.distrust(model.name))
        except GpuckptError as error:
            _log.warning("the golden of %s could not be marked: %s", model.name, _why(error))

    async def _discard(self, model: Of, name: str) -> None:
        with contextlib.suppress(GpuckptError):  # the next service finds it, and uses or removes it
            await _done(self._hands.stop(model.name, name))
        model.preparing = None

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        async def whole() -> None:
            try:
                await work
            except Exception:  # a fault of ours: the loop goes on, and the log has it
                _log.exception("an operation of the pool failed unexpectedly")
            finally:
                self._settle_soon()

        task = asyncio.get_running_loop().create_task(whole())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(
        self,
        kind: str,
        model: str,
        replica: str = "",
        reason: str = "",
        tier: str = "",
        seconds: float | None = None,
        phases: dict[str, float] | None = None,
    ) -> None:
        self._tell(Event(time.time(), kind, model, replica, reason, tier, seconds, phases or {}))

    # ------------------------------------------------------------------ the end

    async def drain(self, patience: float) -> None:
        """Take no new requests; wait until those at work are done, ``patience`` seconds at most; stop the replicas."""
        self.draining = True
        for model in self.models.values():
            model.refuse(RefusedError("the service is going down", retry_after=5))
        until = self.clock() + patience
        while any(one.requests for model in self.models.values() for one in model.replicas.values()):
            if self.clock() >= until:
                break
            await asyncio.sleep(0.05)
        await self._ended()
        held = [one for model in self.models.values() for one in model.replicas.values()]
        for one in held:
            self._begin_stop(one, "shutdown")
        for model in self.models.values():
            for name in model.prepared:
                self._run(self._discard(model, name))
        await self._ended()

    async def _ended(self) -> None:
        """Wait for what is being done; a last tick follows what it begins. Not for ever: the next service sweeps."""
        until = self.clock() + _LONGEST_END
        while self._tasks and self.clock() < until:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            _log.warning("still being done at the end: %s", task.get_coro())
