"""The one loop that owns the pool's state.

Everything happens on one asyncio loop, between two awaits: there are no locks. Whoever changes something has the
change settled (:meth:`Owner.settle`): replicas are handed out to those who wait, the policy is asked what to do, and
that is begun; what was begun is a task, whose end changes something again. So wakes coalesce by themselves: a second
request finds the state in which the first one's replica is on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gpuckpt.pool import policy
from gpuckpt.pool.book import Event, Held, LateError, Of, RefusedError
from gpuckpt.pool.hands import Hands
from gpuckpt.pool.operations import Operations
from gpuckpt.pool.state import (
    Budget,
    Freeze,
    Golden,
    Phase,
    Pin,
    Rules,
    State,
    Stop,
)
from gpuckpt.pool.steady import again_and_again

_Result = TypeVar("_Result")
_STEP = 0.02  # seconds between two looks
_UNLIMITED = Budget()


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
        self.clock = clock
        self.models: dict[str, Of] = {}
        self.operations = Operations(hands, self.models, retry=retry, tell=tell, clock=clock, settle=self._settle_soon)
        self._settling = False
        self.draining = False

    # ------------------------------------------------------------------ which models there are

    async def adopt(self, rules: Mapping[str, Rules]) -> None:
        """Take models over, with what an earlier service has left of them. Raises what looking at them raises.

        Nothing is decided yet: the caller may know more than that, and settles.
        """
        found = await asyncio.gather(*(self._hands.adopt(name) for name in rules))
        for name, seen in zip(rules, found, strict=True):
            now = self.clock()
            model = self.models[name] = Of(name, rules[name], seen.prefix, asked=now)
            model.found(seen)
            model.prepared.update(seen.prepared)
            for made, phase in seen.replicas:
                held = model.replicas[made.name] = Held(made.name, name, phase, now, golden=model.goldens)
                self.operations.answers(model, held, made)
                self.operations.say("adopted", name, made.name, str(phase))

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
            why = f"{name} was not ready within {deadline:g} s: {model.trouble or self._why_late(model)}"
            raise LateError(why, retry_after=5) from None
        finally:
            with contextlib.suppress(ValueError):
                model.waiters.remove(waiter)
            if held is None and waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())  # it was given in the moment in which the waiting ended
        return Lease(held, tier, self.clock() - began)

    def _why_late(self, model: Of) -> str:
        phases = {one.phase: one.since for one in model.replicas.values()}
        for phase, what in ((Phase.STARTING, "its golden is being made"), (Phase.RESTORING, "it is being restored")):
            if phase in phases:
                return f"{what}, for {self.clock() - phases[phase]:.0f} s now"
        if Phase.HOT in phases:
            return "all its replicas are at work"
        return "what a replica of it needs is not free yet"

    def release(self, held: Held) -> None:
        """The request is over."""
        held.requests -= 1
        held.since = self.clock()
        if model := self.models.get(held.model):
            if held.phase is Phase.DRAINING and not held.requests:
                self.operations.stop(model, held, "quarantined")
            self._hand_out(model)
        # What follows from idleness alone has time until the next look.
        if held.phase is not Phase.HOT or any(one.waiters for one in self.models.values()):
            self._settle_soon()

    def lost(self, held: Held, reason: str) -> None:
        """The replica is dead, or hangs: it gets no more requests, and another one takes its place."""
        if held.phase is Phase.STOPPING:
            return
        self.operations.say("lost", held.model, held.name, reason)
        self.operations.stop(self.models[held.model], held, reason)
        self.settle()

    def quarantine(self, name: str, reason: str) -> None:
        """The model's golden is damaged: nothing of it is used any more, the model starts cold, and makes another."""
        self.operations.quarantine(self.models[name], reason)
        self.settle()

    def note_memory(self, held: Held, memory: int) -> None:
        """A replica holds so many bytes of its own now."""
        if model := self.models.get(held.model):
            model.weighs(held, memory)

    def hot_on_gpus(self) -> list[Held]:
        """The replicas that hold GPU memory and neither come nor go."""
        replicas = (one for model in self.models.values() for one in model.replicas.values())
        return [one for one in replicas if one.phase in (Phase.HOT, Phase.DRAINING) and one.gpus]

    def on_gpus(self) -> tuple[Counter[str], Counter[str]]:
        """Bytes that replicas hold on each GPU, at least and at most: of those that come or go nobody can tell."""
        least, most = Counter[str](), Counter[str]()
        for one in self.hot_on_gpus():
            least.update(one.on_gpus)
        for model in self.models.values():
            for one in model.replicas.values():
                most.update(one.on_gpus)
        return least, most

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

    async def looked_at(self, name: str, longest: float) -> None:
        """Wait while the health of idle replicas is being looked at, which keeps them as they are.

        At most ``longest`` seconds.
        """
        replicas, end = self.models[name].replicas, self.clock() + longest
        while self.clock() < end and any(
            one.phase is Phase.HOT and one.checks and not one.requests for one in replicas.values()
        ):
            await asyncio.sleep(_STEP)

    def sleep(self, name: str, *, release: bool) -> list[str]:
        """Freeze its idle hot replicas now, or remove what is idle beyond its minimum; returns their names."""
        model = self.models[name]
        idle = [one for one in model.replicas.values() if one.phase is Phase.HOT and one.seen().idle]
        if not release:
            kept = int(model.rules.pin is Pin.HOT) if model.scale is None else model.scale
            names = [one.name for one in idle[kept:]]
            for one in names:
                self.operations.begin(model, Freeze(name, one))
            return names
        idle += [one for one in model.replicas.values() if one.phase is Phase.STANDBY and one.seen().idle]
        names = [one.name for one in idle[policy.floor_of(model.seen()) :]]
        for one in names:
            self.operations.begin(model, Stop(name, one, "asked"))
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
            self.operations.begin(self.models[action.model], action)
        for seen in state.models:
            frozen = all(one.phase is Phase.STANDBY for one in seen.replicas)
            if seen.waiting and frozen and policy.never_fits(state, seen):
                self._refuse_for_ever(self.models[seen.name])

    def _clear_up(self, model: Of) -> None:
        """Forget it, with its last container: if it is configured again, what it left must not go then."""
        if model.prepared:
            model.preparing = model.prepared.pop()
            self.operations.discard(model, model.preparing)
        else:
            del self.models[model.name]

    def _refuse_for_ever(self, model: Of) -> None:
        of_gpus = "GPU memory" if len(model.gpus) < 2 else f"memory on {len(model.gpus)} GPUs"
        needs = [
            f"{size / 1e9:.1f} GB of {kind}"
            for size, kind in ((model.expected, "memory"), (sum(one.bytes for one in model.gpus), of_gpus))
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

    # ------------------------------------------------------------------ the end

    async def drain(self, patience: float) -> None:
        """Take no new requests; wait until those at work are done, ``patience`` seconds at most; stop the replicas."""
        self.draining = self.operations.ending = True
        for model in self.models.values():
            model.refuse(RefusedError("the service is going down", retry_after=5))
        until = self.clock() + patience
        while any(one.requests for model in self.models.values() for one in model.replicas.values()):
            if self.clock() >= until:
                break
            await asyncio.sleep(0.05)
        await self.operations.ended()
        held = [one for model in self.models.values() for one in model.replicas.values()]
        for one in held:
            self.operations.stop(self.models[one.model], one, "shutdown")
        for model in self.models.values():
            for name in model.prepared:
                self.operations.discard(model, name)
        await self.operations.ended()
