"""More sessions than memory: each is answered, with the tokens that it would have had to itself."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpuckpt_guest import transfer
from gpuckpt_guest.durable import Durable
from gpuckpt_guest.engine.engine import Variant
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.memory import Budgets, machine_memory
from gpuckpt_guest.engine.residency import Residency
from gpuckpt_guest.engine.session import Session, State
from gpuckpt_guest.engine.steering import Edit
from gpuckpt_guest.kv.policy import Costs

from tests.guest.driving import WAIT, Driver, loaded, until

# Keys and values of a token and layer: 16 KiB, so that a block of 1 MiB (4 layers) holds 16 tokens.
LARGE: dict[str, Any] = {"head_dim": 512, "num_key_value_heads": 4}
MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded(**LARGE)


@pytest.fixture
def made(model: Any) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(device: int, host: int = 64, **options: Any) -> Driver:
        budgets = Budgets(device * MIB, host * MIB, options.pop("disk", 0) * MIB, options.pop("folder", None))
        drivers.append(Driver(model, budgets=budgets, **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.engine.stop()


def prompt(seed: int, length: int = 30) -> list[int]:
    return torch.randint(1, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def cheap_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who leaves is copied: on a loaded machine copies have taken longer than to compute again would take."""

    def costs(self: Residency) -> Costs:
        return Costs(1e12, 1e12, self._pass_s, self._token_s)

    monkeypatch.setattr(Residency, "costs", property(costs))


def where(driver: Driver, session: Session) -> dict[str, Any]:
    found: dict[str, Any] = driver.do(driver.engine.memory.where, session)
    return found


def away(driver: Driver, session: Session) -> None:
    """Suspend, and wait until all of it has left."""
    driver.do(driver.engine.suspend, session)
    until(driver, lambda: where_now(driver, session) == "away")


def where_now(driver: Driver, session: Session) -> str:
    state: str = driver.engine.memory.where(session)["state"]
    return state


def undisturbed(made: Callable[..., Driver], prompts: list[list[int]], turns: int, tokens: int) -> list[list[int]]:
    """What each session writes alone, with memory for all."""
    driver = made(256, max_batch=1)
    wanted = []
    for read in prompts:
        session = driver.new()
        for turn in range(turns):
            driver.begin(session, read if turn == 0 else [7], tokens).wait("done")
        wanted.append(session.tokens)
    return wanted


@pytest.mark.usefixtures("cheap_copies")
@pytest.mark.parametrize("device", [4, 9])
@pytest.mark.parametrize("filed", [False, True])
def test_more_sessions_than_memory(made: Callable[..., Driver], tmp_path: Path, device: int, filed: bool) -> None:
    prompts = [prompt(seed, 20 + seed) for seed in range(10)]
    wanted = undisturbed(made, prompts, 3, 8)
    elsewhere = {"host": 10, "folder": tmp_path, "disk": 64} if filed else {"host": 64}
    driver = made(device, max_batch=1, **elsewhere)
    sessions = [driver.new() for _ in prompts]
    for turn in range(3):
        running = [
            driver.begin(session, read if turn == 0 else [7], 8)
            for session, read in zip(sessions, prompts, strict=True)
        ]
        for one in running:
            assert one.wait("done").reason == "length"
    assert [session.tokens for session in sessions] == wanted
    report = driver.do(driver.engine.memory.report)
    # 40 blocks were wanted at the least: everybody has been away.
    assert report["evicted"] >= 10 and report["out"]["blocks"] and report["in"]["blocks"]
    assert report["to_disk"]["blocks"] > 0 if filed else report["to_disk"]["blocks"] == 0
    for session in sessions:
        driver.do(driver.engine.delete, session)
    until(driver, lambda: driver.engine.memory.report()["host"]["free"] == report["host"]["budget"])
    assert driver.do(driver.engine.memory.report)["device"]["free"] == device * MIB


def test_batches_under_pressure_answer_all(made: Callable[..., Driver]) -> None:
    """Where there is no memory for lanes, sessions fly alone; nobody fails."""
    driver = made(12)
    running = [driver.begin(driver.new(), prompt(seed), 20) for seed in range(8)]
    for one in running:
        turn = one.wait("done")
        assert turn.reason == "length" and len(turn.generated) == 20


@pytest.mark.usefixtures("cheap_copies")
def test_one_that_grows_makes_others_leave(made: Callable[..., Driver]) -> None:
    driver = made(6, max_batch=1)
    idle = [driver.new() for _ in range(3)]
    for seed, session in enumerate(idle):
        driver.begin(session, prompt(seed, 20), 2).wait("done")
    assert [where(driver, session)["state"] for session in idle] == ["device"] * 3
    driver.begin(driver.new(), prompt(9, 20), 60).wait("done")
    until(driver, lambda: "away" in [where_now(driver, session) for session in idle])
    for session in idle:
        driver.begin(session, [3], 2).wait("done")


def test_what_can_never_fit_is_refused(made: Callable[..., Driver]) -> None:
    driver = made(2)
    longest = driver.do(driver.engine.memory.report)["longest"]
    assert longest == 32
    with pytest.raises(EngineError, match=f"the {longest} that a session can have") as caught:
        driver.begin(driver.new(), prompt(1, 40))
    assert caught.value.code == "too_long"
    # One that comes to the end of the memory ends as at the end of the model's own limit.
    turn = driver.begin(driver.new(), prompt(1, 20), 100).wait("done")
    assert turn.reason == "length" and len(turn.generated) == 12


def test_a_device_that_holds_no_session_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="hold no session of this model; it takes 1"):
        Driver(model, budgets=Budgets(1000, MIB))


# ---------------------------------------------------------------------- orders


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_stopped_session_leaves_and_goes_on(made: Callable[..., Driver], layer: int) -> None:
    driver = made(32)
    wanted = driver.write(prompt(1), 6)
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=layer, step=2, once=True)
    running = driver.begin(session, prompt(1), 6)
    running.wait("paused")
    away(driver, session)
    assert session.state is State.SUSPENDED
    assert where(driver, session)["bytes"]["device"] == 0
    driver.resume(session)
    assert running.wait("done").generated == wanted


def test_suspended_ones_stay_away_and_idle_ones_come_back_by_themselves(made: Callable[..., Driver]) -> None:
    driver = made(32)
    session = driver.new()
    driver.begin(session, prompt(1), 3).wait("done")
    away(driver, session)
    with pytest.raises(EngineError, match="is suspended"):
        driver.begin(session, [1])
    driver.do(driver.engine.wake, session)
    until(driver, lambda: where_now(driver, session) == "device")
    assert session.state is State.IDLE
    driver.do(driver.engine.memory.residency.leave, session)  # as it happens to any idle one
    until(driver, lambda: where_now(driver, session) == "away")
    assert session.state is State.IDLE
    driver.begin(session, [1], 2).wait("done")


@pytest.mark.usefixtures("cheap_copies")
def test_a_pinned_session_stays(made: Callable[..., Driver]) -> None:
    driver = made(8, max_batch=1)
    pinned, other = driver.new(), driver.new()
    driver.begin(pinned, prompt(1, 40), 2).wait("done")
    driver.begin(other, prompt(2, 40), 2).wait("done")
    driver.do(driver.engine.pin, pinned, 3600.0)
    assert 3000 < where(driver, pinned)["pinned"] <= 3600
    driver.begin(driver.new(), prompt(3, 60), 2).wait("done")
    assert where(driver, pinned)["state"] == "device"
    until(driver, lambda: where_now(driver, other) == "away")  # its last block may still be on its way
    # It comes back to be pinned; and too many cannot be.
    driver.do(driver.engine.pin, pinned, 0)
    driver.do(driver.engine.pin, other, 3600.0)
    until(driver, lambda: where_now(driver, other) == "device")
    for _ in range(2):
        more = driver.new()
        driver.begin(more, prompt(4, 20), 2).wait("done")
        driver.do(driver.engine.pin, more, 3600.0) if _ == 0 else None
    with pytest.raises(EngineError, match="three quarters"):
        driver.do(driver.engine.pin, more, 3600.0)


@pytest.mark.usefixtures("cheap_copies")
def test_a_pin_that_ends_lets_others_in(made: Callable[..., Driver]) -> None:
    driver = made(6, max_batch=1)
    pinned = driver.new()
    driver.begin(pinned, prompt(1, 40), 2).wait("done")
    began = time.monotonic()
    driver.do(driver.engine.pin, pinned, 0.5)
    driver.begin(driver.new(), prompt(2, 70), 2).wait("done")
    assert time.monotonic() - began >= 0.5
    until(driver, lambda: where_now(driver, pinned) == "away")


@pytest.mark.usefixtures("cheap_copies")
def test_one_that_is_expected_is_there_in_time(made: Callable[..., Driver]) -> None:
    driver = made(16)
    session = driver.new()
    driver.begin(session, prompt(1, 60), 2).wait("done")
    driver.do(driver.engine.memory.residency.leave, session)
    until(driver, lambda: where_now(driver, session) == "away")

    def expect() -> dict[str, Any]:
        driver.engine.expect(session, 0.3)
        return driver.engine.memory.where(session)

    began = time.monotonic()
    told = driver.do(expect)
    assert told["state"] == "away" and 0 <= told["expected"] <= 0.3
    until(driver, lambda: where_now(driver, session) == "device")  # nobody has asked for it
    assert time.monotonic() - began > 0.29


def test_host_memory_that_is_full_is_told(made: Callable[..., Driver]) -> None:
    driver = made(16, host=2)
    session = driver.new()
    driver.begin(session, prompt(1, 60), 2).wait("done")
    with pytest.raises(EngineError, match="--kv-host-mib") as caught:
        driver.do(driver.engine.suspend, session)
    assert caught.value.status == 507 and session.state is State.IDLE
    driver.begin(session, [1], 2).wait("done")


def test_those_who_find_no_room_wait_until_others_end(made: Callable[..., Driver]) -> None:
    driver = made(6, host=0, max_batch=1)
    holder = driver.new()
    driver.do(driver.engine.stop_at, holder, layer=1, step=1, once=True)
    driver.begin(holder, prompt(1, 60), 5).wait("paused")
    waiter = driver.new()
    running = driver.begin(waiter, prompt(2, 60), 3)
    until(driver, lambda: driver.engine.memory.where(waiter)["waiting"])
    assert waiter.state is State.RUNNING and not running.turn.generated
    assert driver.do(lambda: driver.engine.memory.residency.waiting) == 1
    driver.do(driver.engine.delete, holder)
    assert len(running.wait("done").generated) == 3


@pytest.mark.usefixtures("cheap_copies")
def test_what_leaves_without_a_copy_makes_room_at_once(made: Callable[..., Driver]) -> None:
    driver = made(6, max_batch=1)
    clean = [driver.new() for _ in range(2)]
    for seed, session in enumerate(clean):
        driver.begin(session, prompt(seed, 20), 2).wait("done")
        away(driver, session)
        driver.do(driver.engine.wake, session)
    until(driver, lambda: all(where_now(driver, session) == "device" for session in clean))
    copied = driver.do(driver.engine.memory.report)["out"]["blocks"]
    driver.begin(driver.new(), prompt(9, 75), 2).wait("done")  # nothing else is at work that could tell of the room
    assert driver.do(driver.engine.memory.report)["out"]["blocks"] == copied
    waker, holder = clean[0], driver.new()
    driver.begin(holder, prompt(8, 60), 2).wait("done")
    driver.do(driver.engine.wake, waker)
    until(driver, lambda: where_now(driver, waker) == "device")


def test_one_that_waits_can_be_cancelled_or_deleted(made: Callable[..., Driver]) -> None:
    driver = made(6, host=0, max_batch=1)
    holder = driver.new()
    driver.do(driver.engine.stop_at, holder, layer=1, step=1, once=True)
    driver.begin(holder, prompt(1, 60), 5).wait("paused")
    first, second = driver.new(), driver.new()
    running = driver.begin(first, prompt(2, 60), 3)
    driver.begin(second, prompt(3, 60), 3)
    driver.do(driver.engine.cancel, first)
    assert running.wait("done").reason == "cancelled"
    driver.do(driver.engine.delete, second)
    assert driver.do(lambda: driver.engine.memory.residency.waiting) == 0


# ---------------------------------------------------------------------- computing again


def test_dropped_ones_are_computed_again_with_the_same_bits(
    made: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = undisturbed(made, [prompt(seed) for seed in range(4)], 2, 6)
    # As if copies took for ever.
    monkeypatch.setattr(
        "gpuckpt_guest.engine.residency.Residency.costs", property(lambda _: Costs(1.0, 1.0, 1e-6, 1e-9))
    )
    driver = made(7, max_batch=1)
    sessions = [driver.new() for _ in range(4)]
    for turn in range(2):
        for session, seed in zip(sessions, range(4), strict=True):
            driver.begin(session, prompt(seed) if turn == 0 else [7], 6, keep_logits=True).wait("done")
    report = driver.do(driver.engine.memory.report)
    assert report["dropped"] >= 4 and report["out"]["blocks"] == 0
    assert [session.tokens for session in sessions] == wanted
    assert {where(driver, session)["state"] for session in sessions} >= {"device", "dropped"}
    # One that was edited cannot be computed again like that, and leaves as it is.
    edited = driver.new(edits=[Edit("scale", 1, 0.5)])
    driver.begin(edited, prompt(1), 3).wait("done")
    assert edited.reads is None


def test_a_dropped_session_moves_and_branches(made: Callable[..., Driver]) -> None:
    driver = made(32, max_batch=1)
    session, twin = driver.new(), driver.new()
    for one in (session, twin):
        driver.begin(one, prompt(1), 6).wait("done")
    driver.do(session.forget_cache)
    assert where(driver, session)["state"] == "dropped" and session.length == twin.length
    tensors, metadata, snapshot = driver.do(transfer.export, driver.engine, session)
    file = transfer.pack_session(tensors, metadata, snapshot)
    driver.do(snapshot.release)
    moved = driver.do(transfer.load, driver.engine, transfer.unpack(file), "moved")
    (child,) = driver.do(driver.engine.branch, session, [Variant()], resume=False)
    wanted = driver.begin(twin, [5], 6).wait("done").generated
    for one in (session, moved, child):
        assert driver.begin(one, [5], 6).wait("done").generated == wanted


def test_a_lost_block_is_computed_again_or_told(made: Callable[..., Driver], tmp_path: Path) -> None:
    wanted = undisturbed(made, [prompt(1)], 2, 6)[0]
    driver = made(32, host=2, folder=tmp_path, disk=64, max_batch=1)
    files = driver.engine.memory.files
    assert files is not None
    sessions = [driver.new(), driver.new(edits=[Edit("scale", 2, 0.9)])]
    for session in sessions:
        driver.begin(session, prompt(1), 6).wait("done")
        away(driver, session)
    paths = list(files.found())
    assert paths
    for path in paths:
        path.write_bytes(b"x")
    for session in sessions:
        driver.do(driver.engine.wake, session)
    until(driver, lambda: where_now(driver, sessions[0]) == "dropped" and bool(sessions[1].failed))
    assert "a block of its keys and values" in sessions[1].failed and sessions[1].state is State.FAILED
    driver.begin(sessions[0], [7], 6).wait("done")
    assert sessions[0].tokens == wanted
    with pytest.raises(EngineError, match="has failed"):
        driver.begin(sessions[1], [7])


@pytest.mark.parametrize("stopped", [False, True])
def test_a_block_that_is_lost_in_the_middle_of_a_pass(
    made: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """The layers that have their bytes have run when the others turn out to be lost."""
    wanted = undisturbed(made, [prompt(1)], 2, 6)[0]
    driver = made(32, host=32, max_batch=1)
    session = driver.new()
    driver.begin(session, prompt(1), 6).wait("done")
    if stopped:
        driver.do(driver.engine.stop_at, session, layer=1, once=True)
        driver.begin(session, [7], 6).wait("paused")
    away(driver, session)
    monkeypatch.setattr("gpuckpt_guest.kv.pager._WORK", 1)
    monkeypatch.setattr("gpuckpt_guest.kv.pager._STEPS", 1 << 40)
    memory = driver.engine.memory.arena.memory
    real, ran = memory.write, driver.engine.scheduler.layers_run
    pieces = itertools.count()

    def failing(pairs: Any, ready: Any) -> None:
        if next(pieces):
            limit = time.monotonic() + WAIT
            while driver.engine.scheduler.layers_run == ran:
                assert time.monotonic() < limit, "no layer begins before all have come"
                time.sleep(0.001)
            raise OSError("the bus is gone")
        real(pairs, ready)

    monkeypatch.setattr(memory, "write", failing)
    if stopped:  # half a pass cannot be read again
        driver.resume(session)
        until(driver, lambda: bool(session.failed))
        assert "the bus is gone" in session.failed
    else:
        driver.do(driver.engine.wake, session)
        events = driver.begin(session, [7], 6)
        events.wait("done")
        assert session.tokens == wanted and not session.failed


# ---------------------------------------------------------------------- outliving the server


def kept(driver: Driver, session: Session) -> None:
    driver.do(driver.engine.suspend, session, durable=True)
    until(driver, lambda: session.durable)


def test_durable_sessions_are_there_again(made: Callable[..., Driver], tmp_path: Path) -> None:
    wanted = undisturbed(made, [prompt(1), prompt(2)], 2, 6)
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    assert Durable(driver.engine).find() == (0, 0)
    idle, stopped, lost = driver.new("idle"), driver.new("stopped"), driver.new("lost")
    driver.begin(idle, prompt(1), 6).wait("done")
    driver.begin(stopped, prompt(2), 6).wait("done")
    driver.do(driver.engine.stop_at, stopped, layer=2, step=3, once=True)
    driver.begin(stopped, [7], 6).wait("paused")
    driver.begin(lost, prompt(3), 6).wait("done")
    kept(driver, idle)
    kept(driver, stopped)
    away(driver, lost)
    driver.engine.stop()  # as if killed: nothing is written any more

    again = made(24, host=16, folder=tmp_path, disk=64, max_batch=1)
    assert again.do(lambda: Durable(again.engine).find()) == (2, 0)
    assert set(again.engine.sessions) == {"idle", "stopped"}
    assert all(session.state is State.SUSPENDED and session.durable for session in again.engine.sessions.values())
    assert where(again, again.engine.sessions["idle"])["bytes"]["disk"] > 0
    for name in ("idle", "stopped"):
        session = again.engine.sessions[name]
        if name == "idle":
            again.do(again.engine.wake, session)
            again.begin(session, [7], 6).wait("done")
        else:
            again.resume(session).wait("done")
    assert [again.engine.sessions[name].tokens for name in ("idle", "stopped")] == wanted
    for name in ("idle", "stopped"):
        again.do(again.engine.delete, again.engine.sessions[name])
    files = again.engine.memory.files
    assert files is not None
    until(again, lambda: not list(files.found()) and not list((files.folder / "sessions").iterdir()))


def test_what_was_kept_stays_until_it_is_kept_again(made: Callable[..., Driver], tmp_path: Path) -> None:
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    Durable(driver.engine).find()
    session = driver.new("one")
    driver.begin(session, prompt(1), 3).wait("done")
    kept(driver, session)
    before = list(session.tokens)
    files = driver.engine.memory.files
    assert files is not None
    blocks = set(files.found())
    driver.do(driver.engine.wake, session)
    driver.begin(session, [7], 20).wait("done")
    away(driver, session)
    assert not session.durable and blocks <= set(files.found())
    driver.engine.stop()
    again = made(32, folder=tmp_path, disk=64, max_batch=1)
    assert again.do(lambda: Durable(again.engine).find()) == (1, 0)
    assert again.engine.sessions["one"].tokens == before
    kept_files = again.engine.memory.files
    assert kept_files is not None and set(kept_files.found()) == blocks  # the others were nobody's


def test_only_new_blocks_are_written_again(made: Callable[..., Driver], tmp_path: Path) -> None:
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    Durable(driver.engine).find()
    session = driver.new("one")
    driver.begin(session, prompt(1, 50), 3).wait("done")
    kept(driver, session)
    written = driver.do(driver.engine.memory.report)["to_disk"]["blocks"]
    driver.do(driver.engine.wake, session)
    driver.begin(session, [7], 2).wait("done")
    kept(driver, session)
    assert driver.do(driver.engine.memory.report)["to_disk"]["blocks"] - written == 1


@pytest.mark.parametrize("how", ["block", "session"])
def test_what_was_damaged_is_put_aside(made: Callable[..., Driver], tmp_path: Path, how: str) -> None:
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    Durable(driver.engine).find()
    for name in ("one", "two"):
        session = driver.new(name, edits=[Edit("scale", 2, 0.9)])  # read again it would have other bits
        driver.begin(session, prompt(1), 3).wait("done")
        kept(driver, session)
    files = driver.engine.memory.files
    assert files is not None
    folder = files.folder
    driver.engine.stop()
    target = folder / "sessions" / "one.safetensors"
    if how == "session":
        target.write_bytes(target.read_bytes()[:-7])
    else:
        facts = transfer.unpack(target.read_bytes())[1]["gpuckpt_session"]
        (folder / facts["blocks"][0]["file"]).unlink()
    (folder / "sessions" / "half.tmp").write_bytes(b"x")
    again = made(32, folder=tmp_path, disk=64, max_batch=1)
    assert again.do(lambda: Durable(again.engine).find()) == (1, 1)
    assert set(again.engine.sessions) == {"two"}
    assert {path.name for path in (folder / "sessions").iterdir()} == {"two.safetensors", "one.damaged"}


@pytest.mark.parametrize("how", ["gone", "cut short", "changed"])
def test_what_was_kept_without_a_block_is_computed_again(made: Callable[..., Driver], tmp_path: Path, how: str) -> None:
    wanted = undisturbed(made, [prompt(1)], 2, 6)[0]
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    Durable(driver.engine).find()
    session = driver.new("one")
    driver.begin(session, prompt(1), 6).wait("done")
    kept(driver, session)
    files = driver.engine.memory.files
    assert files is not None
    (block, *_) = files.found()
    driver.engine.stop()
    if how == "gone":
        block.unlink()
    else:
        content = block.read_bytes()
        block.write_bytes(content[:-4096] if how == "cut short" else b"x" + content[1:])
    again = made(32, folder=tmp_path, disk=64, max_batch=1)
    assert again.do(lambda: Durable(again.engine).find()) == (1, 0)
    session = again.engine.sessions["one"]
    again.do(again.engine.wake, session)
    again.begin(session, [7], 6).wait("done")
    assert session.tokens == wanted
    again.do(again.engine.delete, session)
    until(again, lambda: not list(files.found()) and not list((files.folder / "sessions").iterdir()))


def test_a_restored_process_finds_what_the_folder_has_now(made: Callable[..., Driver], tmp_path: Path) -> None:
    """As if one process had been frozen, another had had the folder, and the first one ran again."""
    wanted = undisturbed(made, [prompt(seed) for seed in range(4)], 3, 6)
    driver = made(32, host=32, folder=tmp_path / "one", disk=64, max_batch=1)
    frozen = Durable(driver.engine)
    frozen.find()
    for number, name in enumerate(("on", "gone", "awake", "plain")):
        session = driver.new(name)
        driver.begin(session, prompt(number), 6).wait("done")
        if name != "plain":
            kept(driver, session)
    driver.do(driver.engine.wake, driver.engine.sessions["awake"])
    until(driver, lambda: where_now(driver, driver.engine.sessions["awake"]) == "device")

    shutil.copytree(tmp_path / "one", tmp_path / "two")
    other = made(32, host=32, folder=tmp_path / "two", disk=64, max_batch=1)
    other.do(lambda: Durable(other.engine).find())
    session = other.engine.sessions["on"]
    other.do(other.engine.wake, session)
    other.begin(session, [7], 6).wait("done")
    kept(other, session)
    other.do(other.engine.delete, other.engine.sessions["gone"])
    session = other.new("new")
    other.begin(session, prompt(1), 6).wait("done")
    kept(other, session)
    other.engine.stop()
    (folder,) = (tmp_path / "one").iterdir()
    for path in [*folder.glob("*.block"), *(folder / "sessions").iterdir()]:
        path.unlink()
    for path in next((tmp_path / "two").iterdir()).rglob("*.*"):
        if path.suffix in (".block", ".safetensors"):
            shutil.copy(path, folder / path.relative_to(next((tmp_path / "two").iterdir())))

    driver.do(frozen.renew)
    assert set(driver.engine.sessions) == {"on", "new", "awake", "plain"}
    turns = {"on": (0, 3), "new": (1, 2), "awake": (2, 2), "plain": (3, 2)}
    for name, (number, turn) in turns.items():
        session = driver.engine.sessions[name]
        driver.do(driver.engine.wake, session)
        driver.begin(session, [7], 6).wait("done")
        assert session.tokens == wanted[number][: len(session.tokens)] and session.turns == turn, name
        driver.do(driver.engine.delete, session)
    until(driver, lambda: not list(folder.glob("*.block")) and not list((folder / "sessions").iterdir()))
    files = driver.engine.memory.files
    assert files is not None and files.written == 0


def test_branches_that_are_kept_share_files_after_a_restart(made: Callable[..., Driver], tmp_path: Path) -> None:
    wanted = undisturbed(made, [prompt(1, 60)], 2, 6)[0]
    driver = made(32, folder=tmp_path, disk=64, max_batch=1)
    Durable(driver.engine).find()
    parent = driver.new("parent")
    driver.begin(parent, prompt(1, 60), 6).wait("done")
    driver.do(driver.engine.branch, parent, [Variant("child")], resume=False)
    for session in (parent, driver.engine.sessions["child"]):
        kept(driver, session)
    files = driver.engine.memory.files
    assert files is not None
    blocks = len(list(files.found()))
    driver.engine.stop()
    again = made(32, folder=tmp_path, disk=64, max_batch=1)
    assert again.do(lambda: Durable(again.engine).find()) == (2, 0)
    assert again.engine.memory.files is not None and again.engine.memory.files.written == blocks
    again.do(again.engine.delete, again.engine.sessions["parent"])
    child = again.engine.sessions["child"]
    again.do(again.engine.wake, child)
    until(again, lambda: where_now(again, child) == "device")  # none of its blocks went with the parent
    again.begin(child, [7], 6).wait("done")
    assert child.tokens == wanted
    again.do(again.engine.delete, child)
    until(again, lambda: not list(files.found()))
    assert again.engine.memory.files.written == 0


def test_a_session_that_cannot_be_kept_says_so(
    made: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = made(32, folder=tmp_path, disk=64)
    Durable(driver.engine).find()
    session = driver.new()
    events: list[Any] = []
    session.listeners.append(events.append)
    driver.begin(session, prompt(1), 3).wait("done")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpuckpt_guest.durable.publish", full)
    driver.do(driver.engine.suspend, session, durable=True)
    until(driver, lambda: any(event["type"] == "not_kept" for event in events))
    assert not session.durable and session.state is State.SUSPENDED
    driver.do(driver.engine.wake, session)
    driver.begin(session, [7], 3).wait("done")


def test_without_a_folder_nothing_can_be_kept(made: Callable[..., Driver]) -> None:
    driver = made(32)
    session = driver.new()
    with pytest.raises(EngineError, match="--kv-dir"):
        driver.do(driver.engine.suspend, session, durable=True)


def test_a_folder_of_another_version_is_refused(made: Callable[..., Driver], tmp_path: Path, model: Any) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "layout.json").write_text('{"piece": 0, "kind": "other"}')
    with pytest.raises(ValueError, match="kept by another version"):
        Driver(model, budgets=Budgets(MIB * 8, MIB, MIB, tmp_path))


def test_the_machines_memory_is_a_number() -> None:
    assert 1 << 28 < machine_memory() < 1 << 46
