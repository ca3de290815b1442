"""The one loop that owns the pool's state.

Everything happens on one asyncio loop, between two awaits: there are no locks. Whoever changes something calls
:meth:`Owner.settle`, which hands out replicas to those who wait, asks the policy what to do, and begins it; what was
begun is a task, whose end changes something again. So wakes coalesce by themselves: a second request finds the state
in which the first one's replica is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.errors import GpuckptError, VerificationError
from gpuckpt.pool import policy
from gpuckpt.pool.hands import Found, Hands, Made
from gpuckpt.pool.state import (
    Action,
    Budget,
    Freeze,
    Golden,
    Model,
    Move,
    Phase,
    Replica,
    Restore,
    Rules,
    Start,
    State,
    Stop,
    Wake,
)

_log = logging.getLogger("gpuckpt.pool")
_GIVEN_UP = 3  # failures in a row after which those who wait are told
_DOUBLINGS = 5
_UNLIMITED = Budget()
_LONGEST_PREFIX = 34  # so that a number still fits into a replica's name


class RefusedError(Exception):
    """A request that gets no replica: ``status`` is the HTTP status that says so, ``retry_after`` in seconds."""

    def __init__(self, message: str, *, status: int = 503, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True)
class Event:
    """Something that happened: to a model, mostly to a replica of it."""

    time: float  # of the day, seconds since 1970
    kind: str  # restored, started, woken, frozen, stopped, moved, failed, lost, quarantined, adopted
    model: str
    replica: str = ""
    reason: str = ""
    seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Held:
    """A replica and what the loop keeps of it."""

    name: str
    model: str
    phase: Phase
    since: float
    endpoint: Any = None
    requests: int = 0
    memory: int = 0
    gpu: int = 0


@dataclass(slots=True, eq=False)
class _Of:
    """A model and what the loop keeps of it."""

    name: str
    rules: Rules
    prefix: str
    golden: Golden = Golden.NONE
    golden_bytes: int = 0
    memory: int = 0
    gpu: int = 0
    replicas: dict[str, Held] = field(default_factory=dict)
    waiters: deque[asyncio.Future[Held]] = field(default_factory=deque)
    asked: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    trouble: str = ""
    warm: bool = False


@dataclass(frozen=True)
class Lease:
    """The right to send one request to a replica. ``tier`` is the one that it was in when the request came."""

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
        self._queue = queue
        self._retry = retry
        self._tell = tell
        self._clock = clock
        self._models: dict[str, _Of] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False

    # ------------------------------------------------------------------ what there is

    async def adopt(self, rules: dict[str, Rules]) -> None:
        """Take the models over, with what an earlier service has left of them.

        Raises what looking at them raises.
        """
        found = await asyncio.gather(*(self._hands.look(name) for name in rules))
        for name, seen in zip(rules, found, strict=True):
            self._models[name] = self._adopted(name, rules[name], seen)
        self.settle()

    def _adopted(self, name: str, rules: Rules, seen: Found) -> _Of:
        now = self._clock()
        made = _Of(name, rules, seen.prefix, seen.golden, seen.golden_bytes, seen.memory, seen.gpu, asked=now)
        for one, phase in seen.replicas:
            made.replicas[one.name] = Held(one.name, name, phase, now, one.endpoint, 0, one.memory, one.gpu)
            self._say("adopted", name, one.name)
        return made

    def set_rules(self, rules: dict[str, Rules]) -> None:
        """Other rules for the models that stay; see :meth:`adopt` for those that come."""
        for name, one in rules.items():
            self._models[name].rules = one
        self.settle()

    def set_warm(self, names: Iterable[str]) -> None:
        """The models that are kept ready now, and no others."""
        wanted = set(names)
        for name, model in self._models.items():
            model.warm = name in wanted
        self.settle()

    def view(self) -> State:
        """Everything at this moment."""
        return State(self._clock(), tuple(map(self._seen, self._models.values())), self.budget, self.draining)

    def _seen(self, model: _Of) -> Model:
        replicas = (
            Replica(one.name, one.phase, one.since, one.requests, one.memory, one.gpu)
            for one in model.replicas.values()
        )
        return Model(
            name=model.name,
            rules=model.rules,
            golden=model.golden,
            golden_bytes=model.golden_bytes,
            memory=model.memory,
            gpu=model.gpu,
            replicas=tuple(replicas),
            waiting=len(model.waiters),
            asked=model.asked,
            retry_at=model.retry_at,
            warm=model.warm,
        )

    # ------------------------------------------------------------------ requests

    async def acquire(self, name: str, deadline: float) -> Lease:
        """A replica of the model for one request; waits for one, ``deadline`` seconds at most.

        Raises RefusedError. Who stops waiting cancels nothing: the replica that was on its way comes all the same.
        """
        model = self._models[name]
        if self.draining:
            raise RefusedError("the service is going down", retry_after=5)
        if len(model.waiters) >= self._queue:
            raise RefusedError(f"{len(model.waiters)} requests wait for {name} already", retry_after=1)
        began = self._clock()
        tier = self._tier(model)
        waiter: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        held: Held | None = None
        model.waiters.append(waiter)
        model.asked = began
        self.settle()
        try:
            async with asyncio.timeout(deadline):
                held = await waiter
        except TimeoutError:
            why = f": {model.trouble}" if model.trouble else ""
            raise RefusedError(f"no replica of {name} was free within {deadline:g} s{why}", retry_after=5) from None
        finally:
            with contextlib.suppress(ValueError):
                model.waiters.remove(waiter)
            if held is None and waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())  # it was given in the moment in which the waiting ended
        return Lease(held, tier, self._clock() - began)

    def release(self, held: Held) -> None:
        """The request is over."""
        held.requests -= 1
        held.since = self._clock()
        self.settle()

    def lost(self, held: Held, reason: str) -> None:
        """The replica is dead, or hangs: it gets no more requests, and another one takes its place."""
        if held.phase in (Phase.STOPPING, Phase.DRAINING):
            return
        self._say("lost", held.model, held.name, reason)
        self._begin_stop(held, reason)
        self.settle()

    def _tier(self, model: _Of) -> str:
        """The tier that a request finds: the fastest one that something is in, or is coming from."""
        phases = {one.phase for one in model.replicas.values()}
        if Phase.HOT in phases:
            return "hot"
        if phases & {Phase.STANDBY, Phase.WAKING, Phase.FREEZING}:
            return "standby"
        place = Golden.DISK if model.golden is Golden.MOVING else model.golden
        return str(place) if place in (Golden.TMPFS, Golden.DISK) else "cold"

    # ------------------------------------------------------------------ the loop

    async def watch(self, interval: float = 0.25) -> None:
        """Settle again and again, for what only time changes: idle times, pauses after failures."""
        while True:
            await asyncio.sleep(interval)
            self.settle()

    def settle(self) -> None:
        """Something has changed: hand out, decide, begin."""
        for model in self._models.values():
            self._hand_out(model)
        for action in policy.decide(self.view()):
            self._begin(action)

    def _hand_out(self, model: _Of) -> None:
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
            waiter.set_result(best)

    def _begin(self, action: Action) -> None:
        model = self._models[action.model]
        match action:
            case Restore(_, standby):
                held = self._new(model, Phase.RESTORING)
                self._run(self._bring_up(model, held, self._hands.restore, "restored", standby=standby))
            case Start():
                held = self._new(model, Phase.STARTING)
                self._run(self._bring_up(model, held, self._hands.start, "started", standby=False))
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
            case Move(_, to, reason):
                before, model.golden = model.golden, Golden.MOVING
                self._run(self._move(model, before, to, reason))

    def _new(self, model: _Of, phase: Phase) -> Held:
        prefix = model.prefix[:_LONGEST_PREFIX]
        numbers = range(1, len(model.replicas) + 2)
        name = next(found for number in numbers if (found := f"{prefix}.{number}") not in model.replicas)
        held = model.replicas[name] = Held(name, model.name, phase, self._clock())
        return held

    async def _bring_up(
        self,
        model: _Of,
        held: Held,
        work: Callable[[str, str], Coroutine[Any, Any, Made]],
        kind: str,
        *,
        standby: bool,
    ) -> None:
        began = self._clock()
        try:
            made = await work(model.name, held.name)
        except GpuckptError as error:
            del model.replicas[held.name]
            self._failed(model, held, error)
            return
        held.endpoint, held.memory, held.gpu = made.endpoint, made.memory, made.gpu
        model.memory, model.gpu = max(model.memory, made.memory), max(model.gpu, made.gpu)
        held.phase, held.since = Phase.HOT, self._clock()
        model.failures, model.retry_at, model.trouble = 0, 0.0, ""
        if kind == "started":
            seen = await self._hands.look(model.name)
            model.golden, model.golden_bytes = seen.golden, seen.golden_bytes
        self._say(kind, model.name, held.name, seconds=self._clock() - began, phases=made.phases)
        if standby and not model.waiters:
            held.phase = Phase.FREEZING
            await self._change(model, held, self._hands.freeze, Phase.STANDBY, "frozen")

    async def _change(
        self, model: _Of, held: Held, work: Callable[[str, str], Coroutine[Any, Any, None]], phase: Phase, kind: str
    ) -> None:
        began = self._clock()
        try:
            await work(model.name, held.name)
        except GpuckptError as error:
            self._say("failed", model.name, held.name, error.message)
            self._begin_stop(held, f"not {kind}")
            return
        held.phase, held.since = phase, self._clock()
        self._say(kind, model.name, held.name, seconds=self._clock() - began)

    def _begin_stop(self, held: Held, reason: str) -> None:
        held.phase = Phase.STOPPING
        self._run(self._stop(self._models[held.model], held, reason))

    async def _stop(self, model: _Of, held: Held, reason: str) -> None:
        began = self._clock()
        try:
            await self._hands.stop(model.name, held.name)
        except GpuckptError as error:
            # It stays in the account until it is really gone: its memory is not free.
            self._say("failed", model.name, held.name, error.message)
            await asyncio.sleep(self._retry)
            self._begin_stop(held, reason)
            return
        del model.replicas[held.name]
        self._say("stopped", model.name, held.name, reason, seconds=self._clock() - began)

    async def _move(self, model: _Of, before: Golden, to: Golden, reason: str) -> None:
        began = self._clock()
        try:
            await self._hands.move(model.name, to)
        except GpuckptError as error:
            model.golden = Golden.QUARANTINED if isinstance(error, VerificationError) else before
            self._failed(model, None, error)
            return
        model.golden = to
        self._say("moved", model.name, reason=f"{to}: {reason}", seconds=self._clock() - began)

    def _failed(self, model: _Of, held: Held | None, error: GpuckptError) -> None:
        model.failures += 1
        model.retry_at = self._clock() + self._retry * 2 ** min(model.failures - 1, _DOUBLINGS)
        model.trouble = error.message
        self._say("failed", model.name, held.name if held else "", error.message)
        if isinstance(error, VerificationError):
            # From now on it starts cold, at once: what failed will not fail again.
            model.golden, model.retry_at = Golden.QUARANTINED, 0.0
            self._say("quarantined", model.name, reason=error.message)
        elif model.failures >= _GIVEN_UP and not any(one.phase is Phase.HOT for one in model.replicas.values()):
            refused = RefusedError(f"{model.name} cannot be brought up: {error.message}", retry_after=30)
            while model.waiters:
                waiter = model.waiters.popleft()
                if not waiter.done():
                    waiter.set_exception(refused)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        async def whole() -> None:
            try:
                await work
            except Exception:  # a fault of ours: the loop goes on, and the log has it
                _log.exception("an operation of the pool failed unexpectedly")
            finally:
                if not asyncio.current_task() or not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    asyncio.get_running_loop().call_soon(self.settle)

        task = asyncio.get_running_loop().create_task(whole())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(
        self,
        kind: str,
        model: str,
        replica: str = "",
        reason: str = "",
        seconds: float | None = None,
        phases: dict[str, float] | None = None,
    ) -> None:
        self._tell(Event(time.time(), kind, model, replica, reason, seconds, phases or {}))

    # ------------------------------------------------------------------ the end

    async def drain(self, patience: float) -> None:
        """Take no new requests; wait until those at work are done, ``patience`` seconds at most; stop the replicas."""
        self.draining = True
        until = self._clock() + patience
        while any(one.requests for model in self._models.values() for one in model.replicas.values()):
            if self._clock() >= until:
                break
            await asyncio.sleep(0.05)
        while self._tasks:
            await asyncio.wait(self._tasks)
        held = [one for model in self._models.values() for one in model.replicas.values()]
        for one in held:
            self._begin_stop(one, "shutdown")
        while self._tasks:
            await asyncio.wait(self._tasks)
