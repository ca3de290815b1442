"""The loop that owns the pool's state, with hands that only pretend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from gpuckpt.errors import GpuckptError, RestoreError, VerificationError
from gpuckpt.pool.book import Event, RefusedError
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.owner import Owner
from gpuckpt.pool.state import Golden, Phase, Rules

RULES = Rules(max_replicas=3, concurrency=2, idle_freeze=1000.0, idle_release=1000.0, prepare=0)


class FakeHands:
    """Does nothing, after a short while; what it was asked is in ``done``, and what fails is said beforehand."""

    def __init__(self, **models: Found) -> None:
        self.models = models
        self.done: list[str] = []
        self.fails: dict[str, list[GpuckptError]] = {}
        self.gate: asyncio.Event | None = None
        self.prepared: list[str] = []

    async def _do(self, what: str, *names: str) -> None:
        await asyncio.sleep(0.005)
        if self.gate:
            await self.gate.wait()
        self.done.append(" ".join((what, *names)))
        if self.fails.get(what):
            raise self.fails[what].pop(0)

    async def look(self, model: str) -> Found:
        return replace(self.models[model], replicas=())

    async def adopt(self, model: str) -> Found:
        return self.models[model]

    async def restore(self, model: str, replica: str) -> Made:
        await self._do("restore", replica)
        return Made(replica, f"at {replica}", memory=1)

    async def make(self, model: str, *, replace: bool) -> None:
        await self._do("make anew" if replace else "make", model)
        self.models[model] = Found(model, Golden.TMPFS, golden_bytes=4)

    async def prepare(self, model: str, replica: str) -> None:
        await asyncio.sleep(0.001)
        self.prepared.append(replica)

    async def wake(self, model: str, replica: str) -> None:
        await self._do("wake", replica)

    async def freeze(self, model: str, replica: str) -> None:
        await self._do("freeze", replica)

    async def stop(self, model: str, replica: str) -> None:
        await self._do("stop", replica)

    async def move(self, model: str, to: Golden) -> None:
        await self._do("move", model, str(to))

    async def healthy(self, model: str, replica: str, timeout: float) -> bool:
        return True

    async def doomed(self, model: str, replica: str) -> bool:
        return False

    async def canary(self, model: str, replica: str) -> tuple[str, ...]:
        return ()

    async def memory(self, model: str, replica: str) -> int:
        return 1


class World:
    """An owner, its hands, and what it told."""

    def __init__(self, rules: dict[str, Rules], hands: FakeHands, **options: Any) -> None:
        self.hands = hands
        self.events: list[Event] = []
        self.owner = Owner(hands, tell=self.events.append, retry=0.01, **options)
        self._rules = rules

    async def __aenter__(self) -> World:
        await self.owner.adopt(self._rules)
        self._watch = asyncio.ensure_future(self.owner.watch(0.005))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watch.cancel()
        if self.hands.gate:
            self.hands.gate.set()
        await self.owner.drain(0.1)
        assert not self.phases("a")

    def phases(self, model: str) -> list[Phase]:
        found = next(one for one in self.owner.view().models if one.name == model)
        return [one.phase for one in found.replicas]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not holds():
                await asyncio.sleep(0.002)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def one(rules: Rules = RULES, golden: Golden = Golden.TMPFS, **options: Any) -> World:
    return World({"a": rules}, FakeHands(a=Found("a", golden, 4, 1)), **options)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_requests_that_come_at_once_share_one_wake() -> None:
    async def work() -> None:
        async with one() as world:
            leases = await asyncio.gather(*(world.owner.acquire("a", 5) for _ in range(2)))
            assert world.hands.done == ["restore a.1"]
            assert {lease.replica.endpoint for lease in leases} == {"at a.1"} and leases[0].tier == "tmpfs"
            more = await asyncio.gather(*(world.owner.acquire("a", 5) for _ in range(4)))
            assert sorted(world.hands.done) == ["restore a.1", "restore a.2", "restore a.3"]
            for lease in (*leases, *more):
                world.owner.release(lease.replica)
            assert (await world.owner.acquire("a", 5)).tier == "hot"

    run(work())


def test_who_stops_waiting_cancels_nothing_for_others() -> None:
    async def work() -> None:
        async with one(replace(RULES, max_replicas=1)) as world:
            world.hands.gate = asyncio.Event()
            first = asyncio.ensure_future(world.owner.acquire("a", 5))
            second = asyncio.ensure_future(world.owner.acquire("a", 5))
            await asyncio.sleep(0.02)
            first.cancel()
            await asyncio.sleep(0.01)
            world.hands.gate.set()
            lease = await second
            assert lease.replica.requests == 1 and world.hands.done == ["restore a.1"]
            # One that gives up in the very moment in which it is given a replica leaves it free.
            other = await world.owner.acquire("a", 5)
            waiting = asyncio.ensure_future(world.owner.acquire("a", 5))
            await asyncio.sleep(0.01)
            assert lease.replica.requests == 2 and not waiting.done()
            world.owner.release(other.replica)
            assert lease.replica.requests == 2
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert lease.replica.requests == 1
            world.owner.release(lease.replica)

    run(work())


def test_a_full_queue_and_a_passed_deadline_are_refused() -> None:
    async def work() -> None:
        async with one(queue=1) as world:
            world.hands.gate = asyncio.Event()
            waiting = asyncio.ensure_future(world.owner.acquire("a", 0.05))
            await asyncio.sleep(0.01)
            with pytest.raises(RefusedError) as full:
                await world.owner.acquire("a", 5)
            assert full.value.status == 503 and full.value.retry_after
            with pytest.raises(RefusedError, match="within"):
                await waiting

    run(work())


def test_what_fails_is_tried_again_and_given_up_after_a_while() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.fails["restore"] = [RestoreError("one"), RestoreError("two")]
            lease = await world.owner.acquire("a", 5)
            assert len(world.hands.done) == 3 and lease.replica.name == "a.1"
            assert world.kinds() == ["failed", "failed", "restored"]
            world.owner.lost(lease.replica, "crashed")
            world.hands.fails["restore"] = [RestoreError(f"again {n}") for n in range(3)]
            with pytest.raises(RefusedError, match="again 2"):
                await world.owner.acquire("a", 5)

    run(work())


def test_a_damaged_golden_is_put_aside_and_the_model_starts_cold() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.fails["restore"] = [VerificationError("other bytes")]
            lease = await world.owner.acquire("a", 5)
            assert (
                world.hands.done == ["restore a.1", "make anew a", "restore a.1"] and lease.replica.endpoint == "at a.1"
            )
            assert world.kinds() == ["failed", "quarantined", "made", "started"]
            assert world.owner.view().models[0].golden is Golden.TMPFS

    run(work())


def test_a_lost_replica_is_replaced() -> None:
    async def work() -> None:
        async with one() as world:
            lease = await world.owner.acquire("a", 5)
            world.owner.lost(lease.replica, "hangs")
            world.owner.lost(lease.replica, "hangs")  # said twice, done once
            again = await world.owner.acquire("a", 5)
            assert again.replica is not lease.replica
            await world.until(lambda: "stop a.1" in world.hands.done)
            assert world.hands.done.count("stop a.1") == 1
            world.owner.release(lease.replica)

    run(work())


def test_idle_it_freezes_and_goes_and_what_does_not_stop_is_tried_again() -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_freeze=0.02, idle_release=0.03)) as world:
            world.hands.fails["stop"] = [GpuckptError("busy")]
            lease = await world.owner.acquire("a", 5)
            world.owner.release(lease.replica)
            await world.until(lambda: world.phases("a") == [])
            assert world.hands.done == ["restore a.1", "freeze a.1", "stop a.1", "stop a.1"]
            assert world.kinds() == ["restored", "frozen", "failed", "stopped"]

    run(work())


def test_a_standby_wakes_and_one_that_does_not_is_replaced() -> None:
    async def work() -> None:
        async with one(replace(RULES, min_standby=1)) as world:
            await world.until(lambda: world.phases("a") == [Phase.STANDBY])
            assert world.hands.done == ["restore a.1", "freeze a.1"]
            world.hands.fails["wake"] = [GpuckptError("gone")]
            lease = await world.owner.acquire("a", 5)
            assert lease.tier == "standby" and lease.replica.name != "a.1"
            await world.until(lambda: "stop a.1" in world.hands.done)

    run(work())


def test_what_an_earlier_service_left_is_adopted() -> None:
    async def work() -> None:
        left = Found(
            "a",
            Golden.TMPFS,
            4,
            1,
            None,
            ((Made("a.7", "at a.7", 1), Phase.HOT), (Made("x", "at x", 1), Phase.STANDBY)),
        )
        async with World({"a": RULES}, FakeHands(a=left)) as world:
            lease = await world.owner.acquire("a", 5)
            assert lease.replica.name == "a.7" and world.hands.done == []
            assert world.kinds() == ["adopted", "adopted"]
            world.owner.release(lease.replica)
        assert sorted(world.hands.done) == ["stop a.7", "stop x"]

    run(work())


def test_draining_waits_for_requests_and_takes_no_new_ones() -> None:
    async def work() -> None:
        async with one() as world:
            lease = await world.owner.acquire("a", 5)
            drained = asyncio.ensure_future(world.owner.drain(5))
            await asyncio.sleep(0.02)
            with pytest.raises(RefusedError, match="going down"):
                await world.owner.acquire("a", 5)
            assert "stop a.1" not in world.hands.done
            world.owner.release(lease.replica)
            await drained
            assert world.hands.done[-1] == "stop a.1"

    run(work())
