"""Bad luck in the loop: operations that fail, goldens that are damaged, and an end that waits for nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gpuckpt.errors import BusyError, GpuckptError, IncompatibleError, RestoreError, VerificationError
from gpuckpt.manifest import Held
from gpuckpt.pool.book import LateError, RefusedError
from gpuckpt.pool.hands import Found
from gpuckpt.pool.state import Golden
from tests.pool_world import HOT, NOT_EXPECTED, RESTORING, RULES, STANDBY, STOPPING, gone, one, run


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


def test_a_golden_that_somebody_has_made_anew_is_looked_at_again() -> None:
    async def work() -> None:
        async with one() as world:
            model = world.owner.models["a"]
            model.gpus, model.fixed = (Held("GPU-0", "H100", 1),), True
            there = Found("a", Golden.TMPFS, gpus=(Held("GPU-1", "H100", 2),), carried=1)
            world.hands.models["a"] = there
            world.hands.fails["restore"] = [IncompatibleError("there is no GPU for it")]
            assert (await world.owner.acquire("a", 5)).replica.phase is HOT
            assert (model.gpus, model.fixed, model.carried) == (there.gpus, False, 1)
            model.found(Found("a", Golden.NONE))  # another one will be like it
            assert model.gpus == there.gpus
            model.found(Found("a", Golden.DISK))
            assert not model.gpus and not model.carried

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
                try:  # it may be cancelled here, too
                    await asyncio.sleep(0.001 * (number % 4))
                    if number % 11 == 0:
                        world.owner.lost(lease.replica, "dead")
                finally:
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
