"""What is found out about replicas: dead, hanging, wrong; and that looking disturbs nobody and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from gpuckpt.errors import GpuckptError
from gpuckpt.pool import health as module
from gpuckpt.pool.book import Held
from gpuckpt.pool.config import Health as HealthRules
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.health import Health
from gpuckpt.pool.state import Golden, Phase, Rules
from tests.opened import left_open, opened
from tests.pool_world import NOT_EXPECTED, RULES, FakeHands, World, run

LOOKS = HealthRules(interval=0.01, timeout=0.5, failures=3, stalled=1000.0, canary=1000.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK", 0.003)
    monkeypatch.setattr(module, "_SETTLED", 0.01)


@pytest.fixture
def processes() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Makes processes that live until they are killed."""
    with ExitStack() as stack:

        def make() -> subprocess.Popen[bytes]:
            made = stack.enter_context(subprocess.Popen(["sleep", "600"]))
            stack.callback(made.kill)
            return made

        yield make


def kill(*processes: subprocess.Popen[bytes]) -> None:
    """Kill them, and wait until they are dead: the world's own time does not wait for the kernel."""
    for one in processes:
        one.kill()
    for one in processes:
        one.wait()


class Watched(World):
    """A world with the model “a” whose health is looked after; ``outcomes`` are those of canaries."""

    def __init__(self, looks: HealthRules = LOOKS, rules: Rules = RULES, **options: Any) -> None:
        super().__init__({"a": rules}, options.pop("hands", None) or FakeHands(a=Found("a", Golden.TMPFS, 4, 1)))
        self.outcomes: list[tuple[str, str]] = []
        self.health = Health(self.owner, self.hands, looks, lambda *told: self.outcomes.append(told))

    async def __aenter__(self) -> Watched:
        self._files = opened()
        await super().__aenter__()
        self._looking = asyncio.ensure_future(self.health.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert not self._looking.done()
        self._looking.cancel()
        await asyncio.wait([self._looking])
        assert not self.health._known() and not self.health._suspected
        checks = [one.checks for model in self.owner.models.values() for one in model.replicas.values()]
        assert not any(checks)
        await super().__aexit__(*error)
        await asyncio.sleep(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [one for one in others if "Health" in repr(one)]
        assert not left_open(self._files, 0)

    def looked(self, what: str) -> int:
        """How often that was done."""
        return self.hands.looks.count(what)

    def lost(self) -> list[str]:
        """Why replicas were given up."""
        return [event.reason for event in self.events if event.kind == "lost"]


def watched(work: Callable[[Watched], Awaitable[None]], *arguments: Any, **options: Any) -> None:
    async def whole() -> None:
        async with Watched(*arguments, **options) as world:
            await work(world)

    run(whole())


# ---------------------------------------------------------------------- dead


@pytest.mark.parametrize("phase", [Phase.HOT, Phase.STANDBY])
def test_the_kernel_says_when_a_process_ends(processes: Callable[[], subprocess.Popen[bytes]], phase: Phase) -> None:
    async def work(world: Watched) -> None:
        process = processes()
        world.hands.pids["a.1"] = process.pid
        await world.hot()
        if phase is Phase.STANDBY:
            await world.until(lambda: world.owner.sleep("a", release=False))  # as soon as it is not looked at
        await world.until_phases(phase)
        await world.until(lambda: world.health._processes)
        kill(process)
        await world.until(lambda: world.lost() == ["dead"])
        await world.until_phases()

    watched(work, structs.replace(LOOKS, interval=100.0))


def test_one_that_is_dead_already_when_it_is_first_looked_at(processes: Callable[[], subprocess.Popen[bytes]]) -> None:
    async def work(world: Watched) -> None:
        process = processes()
        kill(process)
        world.hands.pids["a.1"] = process.pid
        await world.hot()  # that one, or the next if it was found out at once
        await world.until(lambda: world.lost() == ["dead"])
        world.hands.pids.clear()
        assert (await world.hot()).name != "a.1"

    watched(work)


def test_many_that_die_at_once_are_given_up_each_once(processes: Callable[[], subprocess.Popen[bytes]]) -> None:
    async def work(world: Watched) -> None:
        made = [processes() for _ in range(3)]
        world.hands.pids |= {f"a.{number}": one.pid for number, one in enumerate(made, 1)}
        leases = [await world.owner.acquire("a", 5) for _ in range(6)]
        await world.until(lambda: len(world.health._processes) == 3)
        world.hands.pids.clear()
        kill(*made)
        await world.until(lambda: len(world.lost()) == 3)
        for lease in leases:
            world.owner.release(lease.replica)
        await world.until(lambda: len([one for one in world.hands.done if one.startswith("stop")]) == 3)
        assert world.lost() == ["dead"] * 3

    watched(work)


def test_without_a_descriptor_the_others_are_looked_at_and_it_is_tried_again(
    processes: Callable[[], subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: Watched) -> None:
        def refuse(pid: int) -> int:
            raise OSError(24, "Too many open files")

        process = processes()
        world.hands.pids["a.1"] = process.pid
        with monkeypatch.context() as patched:
            patched.setattr(os, "pidfd_open", refuse)
            await world.hot()
            await world.until(lambda: world.looked("healthy a.1") > 1)
        await world.until(lambda: world.health._processes)
        kill(process)
        await world.until(lambda: world.lost() == ["dead"])

    watched(work)


def test_a_killed_standby_is_replaced_although_it_does_not_know_it_yet() -> None:
    async def work(world: Watched) -> None:
        await world.until_phases(Phase.STANDBY)
        await world.until(lambda: world.looked("doomed a.1") > 1)
        assert world.lost() == []
        world.hands.fails["doomed"] = [GpuckptError("gone"), OSError("no such group")]  # looks that say nothing
        await world.until(lambda: not world.hands.fails["doomed"])
        assert world.lost() == []
        world.hands.doomed_ones.add("a.1")
        await world.until(lambda: world.lost() == ["dead"])
        world.hands.doomed_ones.clear()
        await world.until(lambda: world.phases("a") == [Phase.STANDBY])

    watched(work, rules=replace(RULES, min_standby=1))


# ---------------------------------------------------------------------- ill


def test_after_so_many_failures_in_a_row_it_is_given_up() -> None:
    async def work(world: Watched) -> None:
        await world.hot()
        # Two failures and an answer: it begins anew.
        world.hands.fails["healthy"] = [GpuckptError("one"), GpuckptError("two")]
        await world.until(lambda: not world.hands.fails["healthy"])
        await world.until(lambda: not any(world.health._failures.values()))
        assert world.lost() == []
        world.hands.ill.add("a.1")
        before = world.looked("healthy a.1")
        await world.until(lambda: world.lost() == ["unhealthy"])
        assert world.looked("healthy a.1") - before in (3, 4)  # one may have been under way

    watched(work)


def test_a_suspected_one_is_looked_at_at_once_and_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Health, "_look", lambda self: None)  # unasked nothing is looked at

    async def work(world: Watched) -> None:
        held = await world.hot()
        await world.health.suspect(held)
        assert held.phase is Phase.HOT and world.looked("healthy a.1") == 1
        world.hands.ill.add("a.1")
        world.hands.gates["healthy"] = asyncio.Event()
        several = [asyncio.ensure_future(world.health.suspect(held)) for _ in range(50)]
        await world.until(lambda: world.looked("healthy a.1") == 2)
        several[0].cancel()  # its client has gone: the others are told all the same
        await asyncio.sleep(0.01)
        world.hands.gates["healthy"].set()
        await asyncio.gather(*several[1:])
        assert several[0].cancelled() and world.looked("healthy a.1") == 2
        assert world.phases("a") == [Phase.STOPPING] and world.lost() == ["unhealthy"]
        await world.health.suspect(held)
        assert world.looked("healthy a.1") == 2

    watched(work)


def test_a_suspicion_that_cannot_be_looked_into_fails_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def work(world: Watched) -> None:
        held = await world.hot()
        world.hands.fails["healthy"] = [OSError("a fault of ours")]
        await world.health.suspect(held)
        await world.until(lambda: not world.hands.fails["healthy"])
        assert world.lost() == []
        world.hands.fails["healthy"] = [GpuckptError("its golden is gone")]
        await world.health.suspect(held)
        await world.until(lambda: world.lost() in (["unhealthy"], []))

    watched(work)
    assert NOT_EXPECTED in caplog.text


def test_looks_go_on_whatever_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(world: Watched) -> None:
        await world.hot()
        with monkeypatch.context() as patched:
            patched.setattr(world.health, "_known", lambda: 1 / 0)
            await world.until(lambda: "_look failed unexpectedly" in caplog.text)
        world.hands.fails |= {"healthy": [OSError("x")], "memory": [OSError("y")], "canary": [OSError("z")]}
        await world.until(lambda: not any(world.hands.fails.values()))
        await world.until(lambda: world.outcomes == [("a", "ok")])
        assert world.lost() == []

    watched(work)
    assert caplog.text.count("a look at the health of a.1 failed unexpectedly") == 3


# ---------------------------------------------------------------------- stalled


def test_one_at_work_that_sends_nothing_is_given_up_if_it_answers_nothing_else() -> None:
    async def work(world: Watched) -> None:
        lease = await world.owner.acquire("a", 5)
        world.hands.gates["canary"] = asyncio.Event()
        await world.until(lambda: world.lost() == ["stalled"])
        assert world.looked("canary a.1") == 1
        world.owner.release(lease.replica)

    watched(work, structs.replace(LOOKS, stalled=0.04, timeout=0.02))


def test_one_at_work_that_still_computes_is_left_in_peace() -> None:
    async def work(world: Watched) -> None:
        lease = await world.owner.acquire("a", 5)
        began = lease.replica.heard
        await world.until(lambda: world.looked("canary a.1") == 2)
        assert world.lost() == [] and lease.replica.heard > began
        assert world.outcomes == []  # beside requests it proves nothing
        world.owner.release(lease.replica)

    watched(work, structs.replace(LOOKS, stalled=0.03))


def test_one_that_sends_something_while_it_is_asked_is_not_stalled() -> None:
    async def work(world: Watched) -> None:
        lease = await world.owner.acquire("a", 5)
        world.hands.gates["canary"] = asyncio.Event()
        await world.until(lambda: world.looked("canary a.1") == 1)
        lease.replica.heard = world.owner.clock() + 1000
        before = world.looked("healthy a.1")
        await world.until(lambda: world.looked("healthy a.1") > before)  # the look is over: this is the next one
        assert world.lost() == []
        world.owner.release(lease.replica)

    watched(work, structs.replace(LOOKS, stalled=0.1, timeout=0.1))


# ---------------------------------------------------------------------- the canary


def test_the_first_canary_comes_soon_and_the_next_ones_by_their_interval() -> None:
    async def work(world: Watched) -> None:
        held = await world.hot()
        await world.until(lambda: world.outcomes == [("a", "ok")])
        assert held.proved
        await asyncio.sleep(0.05)
        assert world.looked("canary a.1") == 1
        # Another replica of the same golden waits for its turn.
        world.owner.scale("a", 2)
        await world.until_phases(Phase.HOT, Phase.HOT)
        await world.until(lambda: world.looked("healthy a.2") > 3)
        assert world.looked("canary a.2") == 0
        world.health.rules = structs.replace(LOOKS, canary=0.02)
        await world.until(lambda: world.looked("canary a.2") > 1 and world.looked("canary a.1") > 2)
        # A golden that is new is to prove itself soon, too.
        world.health.rules = LOOKS
        looks = world.looked("healthy a.1")
        await world.until(lambda: world.looked("healthy a.1") > looks + 1)
        before = world.looked("canary a.1")
        world.health.forget("a")
        await world.until(lambda: world.looked("canary a.1") > before)

    watched(work)


def test_a_canary_that_requests_came_beside_proves_nothing() -> None:
    async def work(world: Watched) -> None:
        await world.hot()
        world.hands.differences["a.1"] = ("other words",)
        world.hands.gates["canary"] = asyncio.Event()
        await world.until(lambda: world.looked("canary a.1") == 1)
        await world.hot()  # over before the canary is
        world.hands.differences.clear()
        world.hands.gates["canary"].set()
        await world.until(lambda: world.outcomes == [("a", "ok")])  # the next one's
        assert world.lost() == []

    watched(work)


def test_a_canary_that_differs_once_and_not_again_costs_nothing() -> None:
    """Requests that do not come through the service cannot be seen, and run beside the canary."""

    async def work(world: Watched) -> None:
        world.hands.differences["a.1"] = ("logprob 5 is -9.6768, -9.6769 was recorded",)
        world.hands.gates["canary"] = asyncio.Event()
        await world.hot()
        await world.until(lambda: world.looked("canary a.1") == 1)
        world.hands.differences.clear()
        world.hands.gates["canary"].set()
        await world.until(lambda: world.looked("canary a.1") == 2)
        await world.until(lambda: world.outcomes == [("a", "ok")])
        assert world.lost() == [] and "quarantined" not in world.kinds()

    watched(work)


def test_a_canary_that_differs_costs_the_replica_and_the_golden_that_was_never_right() -> None:
    async def work(world: Watched) -> None:
        world.hands.differences["a.1"] = ("“b” instead of “a”",)
        await world.hot()
        await world.until(lambda: "quarantined" in world.kinds())
        assert world.outcomes == [("a", "differs")] and world.lost() == ["canary"]
        told = next(event for event in world.events if event.kind == "quarantined")
        assert "“b” instead of “a”" in told.reason
        world.hands.differences.clear()
        await world.until(lambda: "make anew a" in world.hands.done)

    watched(work)


def test_a_canary_that_differs_costs_only_the_replica_where_others_were_right() -> None:
    async def work(world: Watched) -> None:
        # Both are asked at the same time; the one that is right answers first.
        world.hands.differences["a.2"] = ("other words",)
        world.hands.gates |= {"canary a.1": asyncio.Event(), "canary a.2": asyncio.Event()}
        world.owner.scale("a", 2)
        await world.until_phases(Phase.HOT, Phase.HOT)
        await world.until(lambda: world.looked("canary a.1") == world.looked("canary a.2") == 1)
        world.hands.gates["canary a.1"].set()
        await world.until(lambda: world.outcomes == [("a", "ok")])
        world.hands.gates["canary a.2"].set()
        await world.until(lambda: world.lost() == ["canary"])
        assert world.outcomes == [("a", "ok"), ("a", "differs")]
        await world.until_phases(Phase.HOT, Phase.HOT)
        assert "quarantined" not in world.kinds()

    watched(work)


def test_a_canary_that_fails_costs_the_replica() -> None:
    async def work(world: Watched) -> None:
        world.hands.fails["canary"] = [GpuckptError("the server answered 500")]
        await world.hot()
        await world.until(lambda: world.lost() == ["canary: the server answered 500"])
        assert world.outcomes == [("a", "failed")] and "quarantined" not in world.kinds()

    watched(work)


# ---------------------------------------------------------------------- beside what else happens


def test_one_that_is_being_looked_at_neither_freezes_nor_goes_until_that_is_over() -> None:
    async def work(world: Watched) -> None:
        world.hands.gates["canary"] = asyncio.Event()
        await world.hot()
        await world.until(lambda: world.looked("canary a.1") == 1)
        world.owner.set_rules({"a": replace(RULES, idle_freeze=0.02)})
        assert world.owner.sleep("a", release=False) == [] and world.owner.sleep("a", release=True) == []
        await asyncio.sleep(0.03)
        assert world.phases("a") == [Phase.HOT]
        await world.owner.looked_at("a", 0.03)  # so long and no longer
        waits = asyncio.create_task(world.owner.looked_at("a", 10))
        await asyncio.sleep(0.03)
        assert not waits.done()
        world.hands.gates["canary"].set()
        await waits
        await world.until_phases(Phase.STANDBY)
        assert world.outcomes == [("a", "ok")] and world.lost() == []

    watched(work)


@pytest.mark.parametrize("what", ["healthy", "canary"])
def test_one_that_dies_while_it_is_looked_at_is_lost_once(
    processes: Callable[[], subprocess.Popen[bytes]], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(world: Watched) -> None:
        process = processes()
        world.hands.pids["a.1"] = process.pid
        world.hands.gates[what] = asyncio.Event()
        world.hands.differences["a.1"] = ("other words",)
        await world.hot()
        await world.until(lambda: world.looked(f"{what} a.1") == 1)
        kill(process)
        await world.until(lambda: world.lost() == ["dead"])
        world.hands.fails[what] = [GpuckptError("the connection broke")]
        world.hands.gates[what].set()
        await world.until_phases()
        await world.until(lambda: not world.health._tasks)
        assert world.lost() == ["dead"] and world.outcomes == [] and "quarantined" not in world.kinds()

    watched(work)
    assert NOT_EXPECTED not in caplog.text


def test_looks_that_are_under_way_end_with_the_service() -> None:
    async def work(world: Watched) -> None:
        held = await world.hot()
        world.hands.gates["healthy"] = asyncio.Event()
        await world.until(lambda: held.checks)
        suspecting = asyncio.ensure_future(world.health.suspect(held))
        await world.until(lambda: held.checks == 2)
        world._looking.cancel()
        await asyncio.wait([world._looking, suspecting])
        assert not held.checks and not world.health._tasks
        world._looking = asyncio.ensure_future(world.health.run())

    watched(work)


def test_memory_is_noted() -> None:
    async def work(world: Watched) -> None:
        held = await world.hot()
        world.hands.memories["a.1"] = 77
        await world.until(lambda: held.memory == 77)
        world.hands.fails["memory"] = [GpuckptError("gone")]
        await world.until(lambda: not world.hands.fails["memory"])
        assert world.owner.models["a"].most == 77

    watched(work)


def test_adopted_ones_are_looked_after_like_others(processes: Callable[[], subprocess.Popen[bytes]]) -> None:
    process = processes()
    left = (Made("a.1", "at a.1", 1, pid=process.pid), Phase.STANDBY)

    async def work(world: Watched) -> None:
        held: Held = world.owner.models["a"].replicas["a.1"]
        await world.until(lambda: held in world.health._processes and world.looked("doomed a.1"))
        kill(process)
        await world.until(lambda: world.lost() == ["dead"])

    watched(work, hands=FakeHands(a=Found("a", Golden.TMPFS, 4, 1, None, (left,))))
