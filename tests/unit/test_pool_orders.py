"""What the loop does with orders, with models that come and go, and with bad luck."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpuckpt.errors import BusyError, GpuckptError, RestoreError, VerificationError
from gpuckpt.pool.book import LateError, Of, RefusedError
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Budget, Golden, Phase, Pin, Rules
from tests.pool_world import RULES, FakeHands, World, gone, one, run

HOT, STANDBY, RESTORING, STOPPING = Phase.HOT, Phase.STANDBY, Phase.RESTORING, Phase.STOPPING
NOT_EXPECTED = "failed unexpectedly"


# ---------------------------------------------------------------------- orders


def test_a_wake_counts_as_asked_and_gives_its_lease_back() -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_freeze=0.05)) as world:
            model = world.owner.models["a"]
            begun = model.asked
            assert not model.requested
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


def test_a_replica_s_memory_is_what_was_last_noted_and_the_next_is_expected_to_hold_the_most() -> None:
    async def work() -> None:
        left = Found("a", Golden.TMPFS, 4, 50, None, ((Made("a.3", "at a.3", memory=7, gpu=20), STANDBY),))
        async with World({"a": RULES}, FakeHands(a=left)) as world:
            model = world.owner.models["a"]
            held = model.replicas["a.3"]
            # Adopted it counts, and shows what another will need, on the GPU too.
            assert (held.memory, model.expected, model.gpu) == (7, 7, 20)
            # Frozen, what it had there is the host's to hold.
            assert [(seen.memory, seen.gpu) for seen in model.seen().replicas] == [(27, 0)]
            await world.hot()
            assert [(seen.memory, seen.gpu) for seen in model.seen().replicas] == [(7, 20)]
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


# ---------------------------------------------------------------------- bad luck


def test_a_fault_of_ours_in_any_operation_leaves_nothing_half_done(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with one(replace(RULES, idle_freeze=0.01, idle_release=0.01), Golden.NONE) as world:
            for word in ("make", "restore", "freeze", "wake", "stop"):
                world.hands.fails[word] = [OSError(f"no {word}")]
            # The cold start goes wrong, then the restore; the third try holds.
            lease = await world.owner.acquire("a", 10)
            assert "OSError: no restore" in world.events[2].reason
            world.owner.release(lease.replica)
            # Not frozen, it is stopped, in the second try.
            await world.until_phases()
            assert world.hands.done.count("stop a.1") == 2
            held = await world.hot()
            await world.until_phases(STANDBY)
            await world.hot()  # the one that does not wake is replaced
            await world.until(lambda: held.name not in world.owner.models["a"].replicas or not held.pid)
            assert not any(world.hands.fails.values())

    run(work())
    assert NOT_EXPECTED in caplog.text


def test_a_golden_that_cannot_be_looked_at_when_it_is_made_fails_the_start() -> None:
    async def work() -> None:
        async with one(RULES, Golden.NONE) as world:
            world.hands.fails["look"] = [GpuckptError("no manifest")]
            lease = await world.owner.acquire("a", 5)
            assert lease.replica.phase is HOT and world.kinds() == ["failed", "made", "started"]

    run(work())


def test_a_golden_that_somebody_has_removed_is_made_again() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.models["a"] = Found("a", Golden.NONE)
            world.hands.fails |= {"restore": [gone("golden a"), gone("golden a")], "look": [GpuckptError("not now")]}
            lease = await world.owner.acquire("a", 5)
            assert world.hands.done == ["restore a.1", "restore a.1", "make a", "restore a.1"]
            assert lease.replica.phase is HOT

    run(work())


def test_a_golden_found_damaged_twice_is_not_made_again_and_again_at_once() -> None:
    async def work() -> None:
        async with one(retry=30.0) as world:
            world.hands.fails["restore"] = [VerificationError("bad"), VerificationError("bad again")]
            with pytest.raises(LateError, match="bad again"):
                await world.owner.acquire("a", 0.5)
            assert world.hands.done == ["restore a.1", "make anew a", "restore a.1"]
            model = world.owner.models["a"]
            assert model.damaged == 2 and model.golden is Golden.QUARANTINED
            for at in (model.retry_at, model.make_at):
                assert at - world.owner.clock() > 25

    run(work())


def test_who_waits_for_a_model_whose_goldens_are_all_damaged_is_told() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.fails["restore"] = [VerificationError(f"bad {n}") for n in range(3)]
            with pytest.raises(RefusedError, match="bad 2"):
                await world.owner.acquire("a", 10)

    run(work())


def test_a_canary_that_holds_makes_up_for_the_goldens_before() -> None:
    async def work() -> None:
        async with one() as world:
            held = await world.hot()
            world.owner.models["a"].damaged = 3
            world.owner.proved(held)
            assert held.proved and world.owner.models["a"].damaged == 0

    run(work())


def test_a_golden_is_put_aside_once_whoever_says_that_it_is_damaged() -> None:
    async def work() -> None:
        async with one() as world:
            await world.hot()
            world.owner.quarantine("a", "differs")
            world.owner.quarantine("a", "differs")
            # What was restored of it goes, and the next golden is made.
            assert world.kinds().count("quarantined") == 1 and HOT not in world.phases("a")
            await world.until(lambda: "make anew a" in world.hands.done)
            assert world.hands.distrusted == ["a"]
            await world.until(lambda: world.owner.models["a"].golden is Golden.TMPFS)

    run(work())


def test_a_golden_found_damaged_while_it_moves_stays_put_aside() -> None:
    async def work() -> None:
        async with one(RULES, Golden.DISK) as world:
            world.hands.gates["move"] = asyncio.Event()
            await world.hot()
            assert world.owner.view().models[0].golden is Golden.MOVING
            world.owner.quarantine("a", "differs")
            world.hands.gates["move"].set()
            await world.until(lambda: "move a tmpfs" in world.hands.done)
            await world.until(lambda: "make anew a" in world.hands.done)

    run(work())


@pytest.mark.parametrize(
    ("error", "pause"), [(BusyError("held"), 10), (GpuckptError("no"), 320), (OSError("full"), 320)]
)
def test_a_golden_that_cannot_be_moved_is_used_where_it_is(error: Exception, pause: float) -> None:
    async def work() -> None:
        async with one(RULES, Golden.DISK, retry=10.0) as world:
            world.hands.fails["move"] = [error]
            await world.hot()
            await world.until(lambda: "failed" in world.kinds())
            model = world.owner.models["a"]
            assert model.golden is Golden.DISK
            assert pause - 5 < model.move_at - world.owner.clock() <= pause
            world.owner.lost(next(iter(model.replicas.values())), "dead")
            assert (await world.owner.acquire("a", 5)).tier == "disk"

    run(work())


def test_a_golden_found_damaged_by_its_move_is_put_aside() -> None:
    async def work() -> None:
        async with one(RULES, Golden.DISK) as world:
            world.hands.fails["move"] = [VerificationError("other bytes")]
            await world.hot()
            await world.until(lambda: "quarantined" in world.kinds())
            await world.until(lambda: "make anew a" in world.hands.done)

    run(work())


def test_containers_are_prepared_for_later_and_are_used() -> None:
    async def work() -> None:
        async with one(replace(RULES, prepare=2)) as world:
            model = world.owner.models["a"]
            await world.until(lambda: model.prepared == {"a.1", "a.2"})
            lease = await world.owner.acquire("a", 5)
            assert lease.replica.name == "a.1"
            assert model.prepared == {"a.2"}
            world.owner.release(lease.replica)
        # None of them outlives the service.
        assert sorted(world.hands.done[1:]) == ["stop a.1", "stop a.2"]

    run(work())


def test_a_container_that_cannot_be_prepared_is_tried_again_much_later() -> None:
    async def work() -> None:
        async with one(replace(RULES, prepare=1)) as world:
            world.hands.fails["prepare"] = [OSError("no room"), RestoreError("no"), RestoreError("no")]
            await world.until(lambda: world.owner.models["a"].prepare_at)
            assert 0.25 < world.owner.models["a"].prepare_at - world.owner.clock() <= 0.32
            assert len(world.hands.fails["prepare"]) == 2 and world.owner.models["a"].preparing is None
            lease = await world.owner.acquire("a", 5)  # nobody waits for it
            world.owner.release(lease.replica)

    run(work())


def test_a_golden_is_made_although_nobody_waits_and_nothing_is_restored_of_it() -> None:
    async def work() -> None:
        async with one(RULES, Golden.NONE) as world:
            await world.until(lambda: world.kinds() == ["made"])
            await asyncio.sleep(0.02)
            assert world.hands.done == ["make a"] and world.phases("a") == []

    run(work())


def test_what_does_not_stop_does_not_keep_the_service_from_its_end() -> None:
    async def work() -> None:
        world = one()
        async with asyncio.timeout(10):
            await world.owner.adopt({"a": RULES})
            held = await world.hot()
            world.hands.fails["stop"] = [BusyError("held")] * 100
            world.owner.lost(held, "dead")
            await world.until(lambda: len(world.hands.fails["stop"]) < 98)
            assert world.phases("a") == [STOPPING]  # its memory is not free
            await world.owner.drain(0.1)
        tries = len(world.hands.fails["stop"])
        await asyncio.sleep(0.1)
        assert len(world.hands.fails["stop"]) == tries

    run(work())


def test_the_end_waits_for_nobody_who_waits() -> None:
    async def work() -> None:
        async with one() as world:
            world.hands.gate = asyncio.Event()
            waiting = asyncio.ensure_future(world.owner.acquire("a", 30))
            await world.until_phases(RESTORING)
            drained = asyncio.ensure_future(world.owner.drain(5))
            with pytest.raises(RefusedError, match="going down"):
                await waiting
            world.hands.gate.set()
            await drained
            assert world.hands.done == ["restore a.1", "stop a.1"]

    run(work())


def test_the_loop_survives_what_its_decisions_may_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with one() as world:
            with monkeypatch.context() as patched:
                patched.setattr("gpuckpt.pool.policy.decide", lambda state: 1 / 0)
                await world.until(lambda: caplog.text.count("ZeroDivisionError") > 1)
            assert (await world.owner.acquire("a", 5)).replica.phase is HOT

    run(work())
    assert f"settle {NOT_EXPECTED}" in caplog.text


def test_leases_given_and_taken_back_in_any_order_add_up() -> None:
    async def work() -> None:
        async with one(replace(RULES, max_replicas=2, idle_freeze=0.005, idle_release=0.005)) as world:

            async def client(number: int) -> int:
                try:
                    lease = await world.owner.acquire("a", 0.002 * (number % 9) + 0.001)
                except RefusedError:
                    return 0
                assert lease.replica.requests <= 2
                await asyncio.sleep(0.001 * (number % 4))
                if number % 11 == 0:
                    world.owner.lost(lease.replica, "dead")
                world.owner.release(lease.replica)
                return 1

            tasks = []
            for number in range(300):
                tasks.append(asyncio.ensure_future(client(number)))
                if number % 7 == 0:
                    tasks[number // 2].cancel()
                if number % 5 == 0:
                    await asyncio.sleep(0.002)
            served = await asyncio.gather(*tasks, return_exceptions=True)
            assert not [one for one in served if isinstance(one, Exception)]
            assert sum(one for one in served if isinstance(one, int)) > 10
            assert not world.owner.models["a"].waiters
            held = list(world.owner.models["a"].replicas.values())
            assert [one.requests for one in held] == [0] * len(held)
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
