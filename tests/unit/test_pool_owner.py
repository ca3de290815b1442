"""The loop that owns the pool's state, with hands that only pretend."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpuckpt.errors import GpuckptError, RestoreError, VerificationError
from gpuckpt.pool.book import RefusedError
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Golden, Phase
from tests.pool_world import RULES, FakeHands, World, one, run


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
