"""What the loop does with orders: wake, sleep, scale, drain."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpuckpt.pool.book import Of, RefusedError
from gpuckpt.pool.state import Golden, Phase, Pin, Rules
from tests.pool_world import HOT, RESTORING, RULES, STANDBY, one, run

# ---------------------------------------------------------------------- orders


def test_a_wake_counts_as_asked_and_gives_its_lease_back() -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_freeze=0.05)) as world:
            model = world.owner.models["a"]
            begun = model.asked
            assert not model.requested
            await asyncio.sleep(0.01)
            lease = await world.owner.wake("a", 5)
            assert lease.tier == "tmpfs" and lease.replica.requests == 0
            assert model.asked > begun and model.requested
            # Its idle time begins now; then it sinks like any other, and is woken once more.
            await world.until_phases(STANDBY)
            assert world.owner.clock() - begun >= 0.05
            again = await world.owner.wake("a", 5)
            assert again.replica is lease.replica and again.tier == "standby"
            assert world.kinds() == ["restored", "frozen", "woken"]

    run(work())


def test_a_wake_ends_a_drain() -> None:
    async def work() -> None:
        async with one() as world:
            await world.hot()
            assert world.owner.drain_model("a") == ["a.1"]
            await world.until_phases()
            with pytest.raises(RefusedError, match="drained") as refused:
                await world.owner.acquire("a", 5)
            assert refused.value.retry_after
            assert (await world.owner.wake("a", 5)).replica.phase is HOT

    run(work())


def test_who_waits_for_a_model_that_is_drained_is_told_and_who_is_served_is_not_disturbed() -> None:
    async def work() -> None:
        async with one(replace(RULES, max_replicas=1, concurrency=1)) as world:
            lease = await world.owner.acquire("a", 5)
            waiting = asyncio.ensure_future(world.owner.acquire("a", 5))
            await asyncio.sleep(0.01)
            world.owner.drain_model("a")
            with pytest.raises(RefusedError, match="drained"):
                await waiting
            await asyncio.sleep(0.02)
            assert world.phases("a") == [HOT]
            world.owner.release(lease.replica)
            await world.until_phases()
            assert [event.reason for event in world.events if event.kind == "stopped"] == ["drained"]

    run(work())


@pytest.mark.parametrize("rules", [RULES, replace(RULES, pin=Pin.HOT), replace(RULES, min_standby=1)])
def test_a_model_that_is_drained_while_its_golden_is_made_keeps_the_golden_and_restores_nothing(rules: Rules) -> None:
    async def work() -> None:
        async with one(rules, Golden.NONE) as world:
            world.hands.gates["make"] = asyncio.Event()
            await world.until_phases(Phase.STARTING)
            world.owner.drain_model("a")
            world.hands.gates["make"].set()
            await world.until_phases()
            await asyncio.sleep(0.02)
            assert world.hands.done == ["make a"] and world.owner.models["a"].golden is Golden.TMPFS

    run(work())


def test_a_model_that_is_drained_while_it_is_restored_gives_the_replica_up() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.gate = asyncio.Event()
            waiting = asyncio.ensure_future(world.owner.acquire("a", 5))
            await world.until_phases(RESTORING)
            assert world.owner.drain_model("a") == ["a.1"]
            with pytest.raises(RefusedError):
                await waiting
            world.hands.gate.set()
            await world.until_phases()
            assert world.hands.done == ["restore a.1", "stop a.1"]

    run(work())


def test_sleep_freezes_what_is_idle_and_not_what_is_pinned_or_scaled() -> None:
    async def work() -> None:
        async with one() as world:
            leases = [await world.owner.acquire("a", 5) for _ in range(5)]
            assert world.phases("a") == [HOT] * 3
            for lease in leases[:-1]:
                world.owner.release(lease.replica)
            busy = leases[-1].replica.name
            frozen = world.owner.sleep("a", release=False)
            assert len(frozen) == 2 and busy not in frozen
            await world.until_phases(HOT, STANDBY, STANDBY)
            world.owner.release(leases[-1].replica)
            world.owner.scale("a", 1)
            assert world.owner.sleep("a", release=False) == []
            await world.until_phases(HOT)  # those beyond the order are gone
            world.owner.scale("a", None)
            world.owner.set_rules({"a": replace(RULES, pin=Pin.HOT)})
            assert world.owner.sleep("a", release=False) == []
            world.owner.set_rules({"a": RULES})
            assert world.owner.sleep("a", release=False) == [busy]
            await world.until_phases(STANDBY)
            assert world.owner.sleep("a", release=False) == []

    run(work())


def test_sleep_with_release_removes_all_but_the_minimum_standbys_first() -> None:
    async def work() -> None:
        async with one(replace(RULES, min_standby=1)) as world:
            await world.until_phases(STANDBY)
            leases = [await world.owner.acquire("a", 5) for _ in range(4)]
            for lease in leases:
                world.owner.release(lease.replica)
            assert world.phases("a") == [HOT, HOT]
            assert len(world.owner.sleep("a", release=True)) == 1
            await world.until_phases(HOT)
            assert world.owner.sleep("a", release=True) == []
            world.owner.set_rules({"a": RULES})
            assert len(world.owner.sleep("a", release=True)) == 1
            await world.until_phases()
            assert [event.reason for event in world.events if event.kind == "stopped"] == ["asked", "asked"]

    run(work())


def test_a_scale_is_kept_through_losses_until_it_is_said_otherwise() -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_freeze=0.02, idle_release=0.02)) as world:
            world.owner.scale("a", 2)
            await world.until_phases(HOT, HOT)
            await asyncio.sleep(0.05)
            assert world.phases("a") == [HOT, HOT]
            world.owner.lost(next(iter(world.owner.models["a"].replicas.values())), "dead")
            await world.until(lambda: world.hands.done.count("stop a.1") == 1)
            await world.until_phases(HOT, HOT)
            world.owner.scale("a", None)
            await world.until_phases()

    run(work())


def test_a_scale_is_no_more_than_a_reload_allows() -> None:
    async def work() -> None:
        async with one() as world:
            world.owner.scale("a", 3)
            await world.until_phases(HOT, HOT, HOT)
            world.owner.set_rules({"a": replace(RULES, max_replicas=1, idle_freeze=0.01, idle_release=0.01)})
            await world.until_phases(HOT)
            done = len(world.hands.done)
            await asyncio.sleep(0.05)
            assert len(world.hands.done) == done and world.phases("a") == [HOT]

    run(work())


def test_a_scale_of_nothing_serves_who_asks_and_keeps_nothing() -> None:
    async def work() -> None:
        async with one(replace(RULES, pin=Pin.HOT)) as world:
            await world.until_phases(HOT)
            world.owner.scale("a", 0)
            await world.until_phases()
            lease = await world.owner.acquire("a", 5)
            await asyncio.sleep(0.02)
            assert world.phases("a") == [HOT]
            world.owner.release(lease.replica)
            await world.until_phases()

    run(work())


# ---------------------------------------------------------------------- names


def test_names_are_the_first_that_are_free_and_those_of_prepared_containers_come_first() -> None:
    model = Of("a", RULES, "g" * 40)
    long = "g" * 34
    assert model.next_name() == model.name_to_prepare() == f"{long}.1"
    model = Of("a", RULES, "a", prepared={"a.3"})
    assert model.next_name() == "a.3" and model.name_to_prepare() == "a.1"
    model.preparing = "a.1"
    model.prepared = set()
    assert model.next_name() == "a.2"


def test_a_model_s_tier_is_the_fastest_that_a_request_finds() -> None:
    model = Of("a", RULES, "a")
    assert [(model.golden, model.tier())] == [(Golden.NONE, "cold")]
    for golden, tier in (
        (Golden.TMPFS, "tmpfs"),
        (Golden.DISK, "disk"),
        (Golden.MOVING, "disk"),
        (Golden.QUARANTINED, "cold"),
    ):
        model.golden = golden
        assert model.tier() == tier
