"""The service put together: its start, its reloads, what it keeps warm, its view, its end."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec import structs

from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, UsageError
from gpuckpt.manifest import Held
from gpuckpt.pool.book import RefusedError
from gpuckpt.pool.config import Front, Limits, Pool, parse_window
from gpuckpt.pool.config import Health as HealthRules
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Golden, Phase, Pin
from gpuckpt.service import service as module
from gpuckpt.service.service import Service
from tests.pool_service import MODEL, RICH, Running, hands_for, pool, running
from tests.service_world import run, until

ALWAYS = parse_window("00:00-24:00")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK", 0.005)


async def reloaded(made: Running, config: Pool) -> Any:
    for name in config.models:
        made.hands.models.setdefault(name, Found(name, Golden.TMPFS, 4, 1))
    return await made.service.reload(config)


# ---------------------------------------------------------------------- its start


def test_requests_that_come_before_it_is_ready_wait() -> None:
    async def work() -> None:
        async with running(opened=False) as made:
            waiting = asyncio.ensure_future(made.service.acquire("a", 10))
            with pytest.raises(RefusedError, match="not ready") as refused:
                await made.service.acquire("a", 0.01)
            assert refused.value.retry_after
            await made.service.open()
            lease = await waiting
            assert made.service.state == "ready" and lease.replica.phase is Phase.HOT
            made.service.release(lease.replica)

    run(work())


def test_what_cannot_be_opened_is_not_ready() -> None:
    async def work() -> None:
        async with running(opened=False) as made:
            made.hands.fails["open"] = [GpuckptError("no podman")]
            with pytest.raises(GpuckptError, match="no podman"):
                await made.service.open()
            assert made.service.state == "starting"

    run(work())


GB = 1 << 30


def test_budgets_are_the_configuration_s_or_the_machine_s() -> None:
    async def work() -> None:
        config = Pool(models={"a": MODEL}, budget=Limits(memory=100, gpu=7))
        async with running(config) as made:
            budget = made.service.owner.budget
            assert (budget.memory, budget.gpus, budget.store) == (100, None, 1 << 30)
            await reloaded(made, structs.replace(config, budget=Limits(store=50)))
            budget = made.service.owner.budget
            assert budget.memory and budget.memory > 1 << 28 and (budget.gpus, budget.store) == (None, 50)

    run(work())


def test_the_room_on_gpus_is_what_others_leave_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GPU_LOOK", 0.02)
    monkeypatch.setattr(module, "_GPU_LOOK_LONGEST", 0.04)

    async def work() -> None:
        first, second = Gpu("GPU-0", "H100", 80 * GB, 80 * GB), Gpu("GPU-1", "H100", 80 * GB, 79 * GB)
        hands = hands_for(pool(a=MODEL))
        config = Pool(models={"a": MODEL}, budget=Limits(gpu=60 * GB))
        async with running(config, hands=hands) as made:

            def room() -> list[float]:
                return [gpu.free / GB for gpu in made.service.owner.budget.gpus or ()]

            assert room() == []  # nobody can tell: it is asked again and again
            hands.devices = (first, second)
            await until(lambda: room() == [60.25, 60.25])  # a quarter of a GB is what the driver takes beside them
            assert made.service.view().gpu.limit == 120 * GB
            # Somebody else is on the first; what a replica holds on the second is the replicas'.
            held = await made.hot("a")
            hands.on["a.1"] = held.gpus = (Held("GPU-1", "H100", 30 * GB),)
            hands.devices = (structs.replace(first, free=25 * GB), structs.replace(second, free=49 * GB))
            await until(lambda: room() == [25, 60.25])
            view = made.service.view()
            assert [(gpu.uuid, gpu.name, gpu.used // GB, gpu.limit // GB) for gpu in view.gpus] == [
                ("GPU-0", "H100", 0, 25),
                ("GPU-1", "H100", 30, 60),
            ]
            assert (view.gpu.used, view.gpu.limit) == (30 * GB, 85 * GB)
            assert (view.models[0].replicas[0].gpu, view.models[0].replicas[0].gpus) == (30 * GB, {"GPU-1": 30 * GB})
            # It grows: that is nobody else's.
            hands.on["a.1"] = (Held("GPU-1", "H100", 60 * GB),)
            hands.devices = (hands.devices[0], structs.replace(second, free=19 * GB))
            await until(lambda: held.gpus == hands.on["a.1"])
            assert room() == [25, 60.25] and held.phase is Phase.HOT
            # While one freezes nobody can tell whose it is there; elsewhere everybody can.
            hands.gates["freeze"] = asyncio.Event()
            made.service.owner.sleep("a", release=False)
            hands.devices = (first, structs.replace(second, free=21 * GB))
            await until(lambda: room() == [60.25, 60.25])
            hands.devices = (first, structs.replace(second, free=2 * GB))
            await until(lambda: room() == [60.25, 60.25])
            hands.devices = (first, structs.replace(second, free=0))
            await until(lambda: room() == [60.25, 60])
            hands.devices = (first, second)
            hands.gates["freeze"].set()
            await until(lambda: room() == [60.25, 60.25])
            made.service.owner.models["a"].gpus = held.gpus
            await reloaded(made, structs.replace(config, budget=Limits()))
            assert room() == [80, 79]  # the driver keeps some for itself
            hands.fails["gpus"] = [ValueError("a fault")]
            hands.devices = (structs.replace(first, free=7 * GB), second)
            await until(lambda: room() == [7, 79])
            # Nobody uses a GPU any more: it is left alone.
            made.service.owner.models["a"].gpus = ()
            await asyncio.sleep(0)  # a look that has begun
            asked = hands.looks.count("gpus")
            await asyncio.sleep(5 * module._GPU_LOOK)
            assert hands.looks.count("gpus") <= asked + 1

    run(work())


def test_a_driver_that_does_not_answer_is_asked_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []

    async def work() -> None:
        hands = hands_for(pool(a=MODEL))
        async with running(Pool(models={"a": MODEL}, budget=Limits(gpu=GB)), hands=hands) as made:
            looks = made.service._watch_gpus()

            async def sleep(seconds: float) -> None:
                paused.append(seconds)
                hands.devices = (Gpu("GPU-0", "H100", GB, GB),) if len(paused) == 9 else None
                if len(paused) == 11:
                    raise TimeoutError

            with monkeypatch.context() as patched:
                patched.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
                with pytest.raises(TimeoutError):
                    await looks
            assert made.service.owner.budget.gpus  # what was known last holds

    run(work())
    assert paused == [1, 2, 4, 8, 16, 32, 60, 60, 60, 1, 2]


# ---------------------------------------------------------------------- reloads


def test_a_reload_adds_removes_and_changes_and_says_so() -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            await made.hot("rich")
            config = pool(a=structs.replace(MODEL, aliases=("first",), max_replicas=1), b=MODEL)
            changes = await reloaded(made, config)
            assert (changes.added, changes.removed, changes.changed, changes.notes) == (["b"], ["rich"], ["a"], [])
            owner = made.service.owner
            assert made.service.find("first") == "a" and owner.models["a"].rules.max_replicas == 1
            assert [one.name for one in made.service.view().models] == ["a", "b"]
            await made.hot("b")
            await until(lambda: "rich" not in owner.models)
            told = [event for event in made.service.history.last() if event.kind == "reloaded"]
            assert [event.reason for event in told] == ["added b; removed rich; changed a"]
            same = await reloaded(made, config)
            assert not (same.added or same.removed or same.changed or same.notes)
            assert made.service.history.last(1)[0].reason == "nothing has changed"
            # What was not touched went on.
            assert made.hands.done.count("restore a.1") == 1 and made.phases("a") == ["hot"]

    run(work())


def test_what_takes_effect_only_at_the_next_start_is_said() -> None:
    async def work() -> None:
        async with running() as made:
            config = structs.replace(
                made.config,
                front=Front(listen=("127.0.0.1:1",), queue=7, deadline=3.0, body_limit=99, keep_alive=2.0, drain=4.0),
                health=HealthRules(retry=9.0, interval=8.0),
            )
            changes = await reloaded(made, config)
            assert changes.notes == ["front.listen takes effect at the next start"]
            owner, limits = made.service.owner, made.service.front.limits
            assert (owner.queue, owner.operations.retry, limits.body, limits.deadline, limits.keep_alive) == (
                7,
                9.0,
                99,
                3.0,
                2.0,
            )
            assert made.service.health.rules.interval == 8.0
            made.service.owner.operations.retry = 0.01

    run(work())


def unchanged(made: Running) -> tuple[object, ...]:
    service = made.service
    return (
        service.config,
        sorted(service.owner.models),
        service.front.keys,
        made.hands.sources,
        service.owner.queue,
        [event.kind for event in service.history.last()],
    )


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (pool(a=structs.replace(MODEL, golden="other"), rich=RICH), UsageError, "another golden"),
        (pool(a=MODEL, rich=structs.replace(RICH, golden="richer")), UsageError, "another golden"),
        (structs.replace(pool(a=MODEL), front=Front(keys=Path("/nowhere/keys"))), NotFoundError, "keys"),
        (pool(a=MODEL, bad=MODEL), GpuckptError, "unreadable"),
        (pool(a=MODEL, bad=MODEL, rich=RICH), OSError, "unreadable"),
    ],
)
def test_a_reload_that_cannot_be_changes_nothing(config: Pool, error: type[Exception], words: str) -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            made.hands.fails["adopt"] = [error("its manifest is unreadable")]
            before = unchanged(made)
            with pytest.raises(error, match=words):
                await reloaded(made, config)
            assert unchanged(made) == before
            await made.hot("rich")
            made.hands.fails["adopt"] = []
            # In order, it is taken.
            changes = await reloaded(made, pool(a=MODEL, bad=MODEL))
            assert (changes.added, changes.removed) == (["bad"], ["rich"])
            await made.hot("bad")

    run(work())


def test_a_model_that_is_still_going_cannot_come_back_yet() -> None:
    async def work() -> None:
        async with running() as made:
            lease = await made.service.acquire("rich", 50)
            await reloaded(made, pool(a=MODEL))
            for _ in range(2):
                with pytest.raises(BusyError, match="still going, as asked: rich"):
                    await reloaded(made, made.config)
            # Another reload meanwhile does not forget where it came from: it is looked after until it has gone.
            await reloaded(made, pool(a=MODEL, b=MODEL))
            assert made.hands.sources is not None and set(made.hands.sources) == {"a", "b", "rich"}
            await made.service.suspect(lease.replica)
            made.service.release(lease.replica)
            await until(lambda: "rich" not in made.service.owner.models)
            assert (await reloaded(made, made.config)).added == ["rich"]
            await made.hot("rich")

    run(work())


def test_requests_for_a_model_that_is_being_added_find_it_only_when_it_is_there() -> None:
    async def work() -> None:
        async with running(pool(a=MODEL)) as made:
            made.hands.gates["adopt"] = asyncio.Event()
            made.hands.models["b"] = Found("b", Golden.TMPFS, 4, 1)
            reloading = asyncio.ensure_future(made.service.reload(pool(b=MODEL)))
            await asyncio.sleep(0.02)
            with pytest.raises(Exception, match="there is no model"):
                made.service.find("b")
            await made.hot("a")  # the old one is served as long
            made.hands.gates["adopt"].set()
            await reloading
            await made.hot(made.service.find("b"))

    run(work())


@pytest.mark.parametrize("golden", [Golden.TMPFS, Golden.NONE])
def test_a_model_that_is_removed_while_it_comes_up_goes_when_it_has(golden: Golden) -> None:
    async def work() -> None:
        config = pool(a=MODEL, b=MODEL)
        async with running(config, hands=hands_for(config, golden)) as made:
            gate = made.hands.gates["restore"] = made.hands.gates["make"] = asyncio.Event()
            waiting = asyncio.ensure_future(made.service.acquire("b", 10))
            await until(lambda: made.phases("b"))
            await reloaded(made, pool(a=MODEL))
            with pytest.raises(RefusedError):
                await waiting
            gate.set()
            await until(lambda: "b" not in made.service.owner.models)
            await reloaded(made, config)
            await made.hot("b")

    run(work())


def test_a_model_that_came_back_proves_its_golden_anew() -> None:
    async def work() -> None:
        async with running() as made:
            made.service.health._proved |= {"a", "rich"}
            await reloaded(made, pool(a=MODEL))
            await until(lambda: "rich" not in made.service.owner.models)
            await reloaded(made, pool(a=MODEL, rich=structs.replace(RICH, golden="new")))
            assert made.service.health._proved == {"a"}

    run(work())


def test_keys_come_and_go_with_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    headers = {b"authorization": b"Bearer two"}

    async def work() -> None:
        async with running(keys=file) as made:
            assert not made.service.front.keys.allow(headers)
            file.write_text("two\n")
            await reloaded(made, made.config)
            assert made.service.front.keys.allow(headers)
            other = tmp_path / "other"
            other.write_text("three\n")
            await reloaded(made, structs.replace(made.config, front=Front(keys=other)))
            assert not made.service.front.keys.allow(headers)
            file.write_text("# none\n")
            with pytest.raises(UsageError, match="no API key"):
                await reloaded(made, made.config)
            assert not made.service.front.keys.allow(headers)

    run(work())


# ---------------------------------------------------------------------- what is kept warm


def test_what_is_to_be_warm_at_the_start_comes_once_and_then_sinks_like_any_other() -> None:
    async def work() -> None:
        model = structs.replace(MODEL, prewarm=True, idle_release=0.02)
        async with running(pool(a=model, b=MODEL)) as made:
            await until(lambda: made.hands.done[:2] == ["restore a.1", "freeze a.1"])
            await until(lambda: made.phases("a") == [] and "stop a.1" in made.hands.done)
            await asyncio.sleep(0.02)
            assert made.hands.done.count("restore a.1") == 1 and made.phases("b") == []
            # One that a reload brings is warmed as well, one that it only changes is not.
            await reloaded(made, pool(a=structs.replace(model, priority=1), b=MODEL, c=model))
            await until(lambda: "freeze c.1" in made.hands.done)
            assert made.hands.done.count("restore a.1") == 1
            await reloaded(made, pool(a=model, b=MODEL))
            await until(lambda: not made.service._to_prewarm)

    run(work())


def test_a_schedule_keeps_one_ready_while_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.struct_time((2026, 1, 5, 8, 59, 0, 0, 5, 0))]  # a Monday
    monkeypatch.setattr(time, "localtime", lambda *at: now[0])

    async def work() -> None:
        model = structs.replace(MODEL, schedule=(parse_window("Mon-Fri 09:00-10:00"),), idle_release=0.01)
        async with running(pool(a=model)) as made:
            await asyncio.sleep(0.03)
            assert made.phases("a") == [] and not made.service.view().models[0].warm
            now[0] = time.struct_time((2026, 1, 5, 9, 0, 0, 0, 5, 0))
            await until(lambda: made.phases("a") == ["standby"])
            assert made.service.view().models[0].warm
            now[0] = time.struct_time((2026, 1, 5, 10, 0, 0, 0, 5, 0))
            await until(lambda: made.phases("a") == [])

    run(work())


def test_what_keeps_things_warm_survives_its_failures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with running(pool(a=structs.replace(MODEL, schedule=(ALWAYS,)))) as made:
            with monkeypatch.context() as patched:
                patched.setattr(made.service.owner, "set_warm", lambda names: 1 / 0)
                await until(lambda: caplog.text.count("_keep_warm failed unexpectedly") > 1)
            await until(lambda: made.phases("a") == ["standby"])

    run(work())


# ---------------------------------------------------------------------- what it tells


def test_the_view_says_what_is_and_what_went_wrong() -> None:
    async def work() -> None:
        frozen = Made("a.1", "at a.1", 3, (Held("GPU-0", "H100", 2),), carried=1, pid=77)
        left = Found("a", Golden.TMPFS, 40, 5, "served", ((frozen, Phase.STANDBY),))
        hands = hands_for(pool(a=MODEL, rich=RICH))
        hands.models["a"] = left
        hands.models["rich"] = Found("rich", Golden.DISK, 60, 9)
        async with running(hands=hands) as made:
            made.service.listening = ["127.0.0.1:8400"]
            view = made.service.view()
            assert (view.state, view.listen, view.memory.used, view.gpu.used) == ("ready", ["127.0.0.1:8400"], 4, 0)
            assert view.store.used == 40 and view.host_memory.limit and view.started <= view.now
            first, second = view.models
            replica = first.replicas[0]
            assert (replica.name, replica.phase, replica.memory, replica.pid) == ("a.1", "standby", 4, 77)
            assert abs(replica.since - time.time()) < 10
            assert (first.tier, first.expected_memory, second.tier, second.expected_memory) == ("standby", 3, "disk", 9)
            assert second.golden.name == "rich" and set(first.rules) >= {"max_replicas", "pin", "idle_disk"}
            made.service.owner.operations.retry = 30.0
            made.hands.fails["restore"] = [GpuckptError("no room", cause="full")]
            waiting = asyncio.ensure_future(made.service.acquire("rich", 50))
            await until(lambda: made.service.view().models[1].trouble)
            troubled = made.service.view().models[1]
            assert troubled.trouble == "no room: full" and troubled.waiting == 1
            assert troubled.retry_at and troubled.retry_at > time.time() + 20
            assert troubled.asked and abs(troubled.asked - time.time()) < 10
            waiting.cancel()
            assert msgspec.json.decode(msgspec.json.encode(view), type=type(view)) == view
            assert made.service.tier_of("a") == "standby" and made.service.tier_of("nobody") == "cold"

    run(work())


def test_what_happens_is_logged_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with running(pool(a=MODEL)) as made:
            held = await made.hot("a")
            made.service.owner.lost(held, "dead")
            await until(lambda: "stopped" in made.kinds())

    with caplog.at_level(logging.INFO, logger="gpuckpt.pool"):
        run(work())
    found = {one.fields["GPUCKPT_EVENT"]: one for one in caplog.records if hasattr(one, "fields")}
    assert found["restored"].levelno == logging.INFO and "restored a a.1 in 0." in found["restored"].getMessage()
    assert found["lost"].levelno == logging.WARNING and found["lost"].getMessage() == "lost a a.1 (dead)"
    fields: dict[str, str] = vars(found["restored"])["fields"]
    assert (fields["GPUCKPT_MODEL"], fields["GPUCKPT_REPLICA"], fields["GPUCKPT_TIER"]) == ("a", "a.1", "tmpfs")
    assert float(fields["GPUCKPT_SECONDS"]) > 0 and "GPUCKPT_REASON" not in fields


# ---------------------------------------------------------------------- its end


def test_its_end_gives_up_what_is_made_and_waits_for_what_is_at_work() -> None:
    async def work() -> None:
        config = pool(a=MODEL, b=MODEL)
        hands = hands_for(config)
        hands.models["b"] = Found("b", Golden.NONE)
        hands.gates["make"] = asyncio.Event()
        async with running(config, hands=hands) as made:
            lease = await made.service.acquire("a", 50)
            await until(lambda: made.phases("b") == ["starting"])
            closing = asyncio.ensure_future(made.service.close(10))
            await until(lambda: made.hands.interrupted and made.phases("b") == [])
            with pytest.raises(RefusedError, match="going down"):
                await made.service.acquire("a", 50)
            assert made.phases("a") == ["hot"] and not closing.done()
            made.service.release(lease.replica)
            await closing
            assert made.service.state == "closed" and "stop a.1" in made.hands.done

    run(work())


def test_its_patience_ends() -> None:
    async def work() -> None:
        async with running() as made:
            lease = await made.service.acquire("a", 50)
            await made.service.close(0.05)
            assert made.service.state == "closed" and made.phases("a") == []
            made.service.release(lease.replica)

    run(work())


def test_by_itself_it_has_real_hands(tmp_path: Path) -> None:
    from gpuckpt.config import Paths, Settings
    from gpuckpt.pool.workshop import Workshop

    async def work() -> None:
        made = Service(Settings(paths=Paths(state=tmp_path, run=tmp_path)), pool(a=structs.replace(MODEL, pin=Pin.HOT)))
        assert isinstance(made._workshop, Workshop) and made.state == "starting"
        assert made.view().models == []

    run(work())
