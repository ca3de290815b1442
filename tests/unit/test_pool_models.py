"""Models that come and go while the loop runs, and the room that there is for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import BusyError, GpuFullError
from gpuckpt.manifest import Held
from gpuckpt.pool.book import LateError, RefusedError
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Budget, Golden, Pin
from tests.pool_world import HOT, RESTORING, RULES, STANDBY, FakeHands, World, one, run

# ---------------------------------------------------------------------- models come and go


def test_a_model_that_is_removed_goes_with_its_last_request_its_last_container_and_its_move() -> None:
    async def work() -> None:
        left = Found("a", Golden.DISK, 4, 1, None, (), ("a.5", "a.6"))
        async with World({"a": RULES}, FakeHands(a=left)) as world:
            world.hands.gates["move"] = asyncio.Event()
            lease = await world.owner.acquire("a", 5)
            assert lease.replica.name == "a.5"  # what is prepared comes first
            world.owner.remove("a")
            assert world.owner.models["a"].golden is Golden.MOVING
            world.owner.release(lease.replica)
            await world.until_phases()
            await asyncio.sleep(0.02)
            assert "a" in world.owner.models and "stop a.6" not in world.hands.done
            world.hands.fails["move"] = [BusyError("held")]  # done, it has removed what was prepared
            world.hands.gates["move"].set()
            world.hands.gates["stop"] = asyncio.Event()
            await world.until(lambda: world.owner.models["a"].preparing == "a.6")
            await asyncio.sleep(0.02)
            assert "a" in world.owner.models
            world.hands.gates["stop"].set()
            # Forgotten only when all is gone: who adds it again finds nothing that is still to be removed.
            await world.until(lambda: not world.owner.models)
            assert world.hands.done[-1] == "stop a.6"
            with pytest.raises(RefusedError):
                await world.owner.acquire("a", 5)
            await world.owner.adopt({"a": RULES})
            assert (await world.owner.acquire("a", 5)).replica.phase is HOT

    run(work())


@pytest.mark.parametrize("golden", [Golden.TMPFS, Golden.NONE])
def test_a_model_that_is_removed_while_it_is_brought_up_goes_when_that_is_done(golden: Golden) -> None:
    async def work() -> None:
        async with one(RULES, golden) as world:
            gate = world.hands.gates["make"] = world.hands.gates["restore"] = asyncio.Event()
            waiting = asyncio.ensure_future(world.owner.acquire("a", 5))
            await world.until(lambda: world.phases("a"))
            world.owner.remove("a")
            with pytest.raises(RefusedError):
                await waiting
            with pytest.raises(RefusedError):
                await world.owner.wake("a", 5)  # no wake holds it back
            gate.set()
            await world.until(lambda: not world.owner.models)

    run(work())


def test_a_model_that_is_removed_while_a_container_is_prepared_leaves_no_container() -> None:
    async def work() -> None:
        async with one(replace(RULES, prepare=1)) as world:
            world.hands.gates["prepare"] = asyncio.Event()
            await world.until(lambda: world.owner.models["a"].preparing)
            world.owner.remove("a")
            world.hands.gates["prepare"].set()
            await world.until(lambda: not world.owner.models)
            assert world.hands.prepared == ["a.1"] and world.hands.done == ["stop a.1"]

    run(work())


def test_a_request_that_outlives_its_model_is_given_back_to_nobody() -> None:
    async def work() -> None:
        async with one() as world:
            lease = await world.owner.acquire("a", 5)
            world.owner.lost(lease.replica, "dead")
            world.owner.remove("a")
            await world.until(lambda: not world.owner.models)
            world.owner.release(lease.replica)
            world.owner.note_memory(lease.replica, 5)
            world.owner.proved(lease.replica)
            world.owner.lost(lease.replica, "dead")
            assert lease.replica.requests == 0

    run(work())


def test_what_is_warm_is_kept_and_then_sinks() -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_release=0.02)) as world:
            world.owner.set_warm(["a", "unknown"])
            await world.until_phases(STANDBY)
            await asyncio.sleep(0.05)
            assert world.phases("a") == [STANDBY]
            world.owner.set_warm([])
            await world.until_phases()

    run(work())


# ---------------------------------------------------------------------- room


def test_what_never_fits_is_refused_at_once_and_says_why() -> None:
    async def work() -> None:
        async with one(replace(RULES, memory=5 << 30), budget=Budget(memory=4 << 30)) as world:
            with pytest.raises(RefusedError, match=r"needs 5\.4 GB of memory") as refused:
                await world.owner.acquire("a", 10)
            assert not isinstance(refused.value, LateError) and world.hands.done == []

    run(work())


def test_who_waits_too_long_is_told_for_what() -> None:
    async def work() -> None:
        async with one(replace(RULES, max_replicas=1, concurrency=1)) as world:
            world.hands.gates["restore"] = asyncio.Event()
            with pytest.raises(LateError, match=r"a was not ready within 0\.05 s: it is being restored, for 0 s now"):
                await world.owner.acquire("a", 0.05)
            world.hands.gates["restore"].set()
            await world.hot()
            await world.owner.acquire("a", 5)
            with pytest.raises(LateError, match="all its replicas are at work"):
                await world.owner.acquire("a", 0.05)

    run(work())


def test_to_what_a_replica_has_grown_is_no_reason_against_the_next_one_for_ever() -> None:
    async def work() -> None:
        async with one(budget=Budget(memory=100)) as world:
            held = await world.hot()
            world.owner.note_memory(held, 150)
            assert world.owner.models["a"].expected == 150
            world.owner.lost(held, "dead")
            await world.until_phases()
            with pytest.raises(RefusedError, match="needs"):
                await world.owner.acquire("a", 5)
            assert (await world.owner.acquire("a", 5)).replica.phase is HOT

    run(work())


def test_replicas_come_to_the_gpus_that_have_room_and_are_told_which() -> None:
    async def work() -> None:
        size = 40 << 30
        first, second = Held("GPU-0", "H100", size), Held("GPU-1", "H100", size)
        seen = Found("a", Golden.TMPFS, 4, gpus=(first,))
        devices = tuple(Gpu(one.uuid, "H100", size + (1 << 30), size + (1 << 30)) for one in (first, second))
        hands = FakeHands(a=seen, b=replace(seen, prefix="b"), c=replace(seen, prefix="c"))
        async with World(dict.fromkeys("abc", RULES), hands, budget=Budget(gpus=devices)) as world:
            await world.hot("a")
            await world.hot("b")
            assert hands.ordered == [("a.1", (first,)), ("b.1", (second,))]
            assert world.owner.on_gpus() == ({"GPU-0": size, "GPU-1": size},) * 2
            # Who has been idle for the longest freezes, and comes back where there is room then.
            await world.hot("c")
            assert hands.done[-2:] == ["freeze a.1", "restore c.1"] and hands.ordered[-1] == ("c.1", (first,))
            await world.hot("a")
            assert hands.done[-2:] == ["freeze b.1", "wake a.1"] and hands.ordered[-1] == ("a.1", (second,))
            # One that is removed while it is frozen holds nothing again.
            gone = world.owner.models["b"].replicas["b.1"]
            hands.gates["stop"] = asyncio.Event()
            world.owner.operations.stop(world.owner.models["b"], gone, "asked")
            assert (gone.on_host, gone.on_gpus) == (1, {})
            hands.gates.pop("stop").set()
            await world.until(lambda: not world.phases("b"))
            world.owner.models["b"].replicas["b.1"] = gone
            gone.phase, gone.gpus = STANDBY, (second,)
            # One that could not come is a standby as before, and counts nowhere.
            hands.fails["wake"] = [GpuFullError("somebody else")]
            await world.hot("b")
            assert hands.done[-3:] == ["freeze c.1", "wake b.1", "wake b.1"]
            assert world.owner.on_gpus() == ({"GPU-0": size, "GPU-1": size},) * 2

    run(work())


def test_a_golden_that_was_just_made_comes_to_where_it_was_made() -> None:
    async def work() -> None:
        hands = FakeHands(a=Found("a", Golden.NONE))
        held = Held("GPU-1", "H100", 40 << 30)
        hands.makes = (held,)
        async with World({"a": RULES}, hands) as world:
            hands.gates["restore"] = asyncio.Event()
            asking = asyncio.create_task(world.hot())
            await world.until_phases(RESTORING)
            (seen,) = world.owner.view().models[0].replicas
            assert seen.gpus == (held,) and world.owner.on_gpus() == ({}, {"GPU-1": 40 << 30})
            hands.gates["restore"].set()
            await asking
            assert hands.ordered == [("a.1", (held,))] and world.owner.on_gpus()[0] == {"GPU-1": 40 << 30}

    run(work())


def test_a_replica_s_memory_is_what_was_last_noted_and_the_next_is_expected_to_hold_the_most() -> None:
    async def work() -> None:
        there = Held("GPU-0", "H100", 20)
        left = Found(
            "a", Golden.TMPFS, 4, 50, None, ((Made("a.3", "at a.3", memory=7, gpus=(there,), carried=15), STANDBY),)
        )
        async with World({"a": RULES}, FakeHands(a=left)) as world:
            model = world.owner.models["a"]
            held = model.replicas["a.3"]
            # Adopted it counts, and shows what another will need, on the GPU too.
            assert (held.memory, model.expected, model.gpus) == (7, 7, (there,))
            # Frozen, what it had there and does not give up is the host's to hold.
            assert [(seen.memory, seen.gpus) for seen in model.seen().replicas] == [(22, (there,))]
            assert (held.on_host, held.on_gpus, world.owner.on_gpus()) == (22, {}, ({}, {}))
            await world.hot()
            assert [(seen.memory, seen.gpus) for seen in model.seen().replicas] == [(7, (there,))]
            assert (held.on_host, held.on_gpus, world.owner.on_gpus()) == (7, {"GPU-0": 20}, ({"GPU-0": 20},) * 2)
            world.owner.note_memory(held, 30)
            world.owner.note_memory(held, 10)
            assert (held.memory, model.expected) == (10, 30)
            world.owner.set_rules({"a": replace(RULES, memory=40)})
            assert model.expected == 40

    run(work())


def test_a_model_without_a_queue_serves_what_it_can_at_once() -> None:
    async def work() -> None:
        async with one(replace(RULES, pin=Pin.HOT, max_replicas=1), queue=0) as world:
            await world.until_phases(HOT)
            leases = [await world.owner.acquire("a", 5) for _ in range(2)]
            with pytest.raises(RefusedError, match="wait") as refused:
                await world.owner.acquire("a", 5)
            assert refused.value.retry_after and not world.owner.models["a"].waiters
            for lease in leases:
                world.owner.release(lease.replica)

    run(work())
