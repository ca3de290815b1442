"""What several have or read at once: blocks of branches, caches on their way, exports, and bad luck in the midst."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from gpuckpt_guest import durable, transfer
from gpuckpt_guest.durable import Durable
from gpuckpt_guest.engine.engine import Variant
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.memory import Budgets
from gpuckpt_guest.engine.session import Session
from gpuckpt_guest.kv.memory import HostRange

from tests.guest.driving import WAIT, Driver, loaded, until
from tests.guest.test_memory import away, cheap_copies, kept, made, model, prompt, where_now

__all__ = ["cheap_copies", "made", "model"]  # fixtures
Made = Callable[..., Driver]


def alone(made: Made, tokens: int, *, turns: int = 2) -> list[int]:
    """What a session writes alone."""
    driver = made(256, max_batch=1)
    session = driver.new()
    for turn in range(turns):
        driver.begin(session, prompt(1, tokens) if turn == 0 else [7], 2 if turn == 0 else 8).wait("done")
    return session.tokens


def parent(driver: Driver, tokens: int) -> Session:
    session = driver.new()
    driver.begin(session, prompt(1, tokens), 2).wait("done")
    return session


def branch(driver: Driver, of: Session) -> Session:
    (child,) = driver.do(driver.engine.branch, of, [Variant()], resume=False)
    made: Session = child
    return made


def out(driver: Driver, *sessions: Session) -> None:
    """Evicted, as if others had needed the memory, whose numbers lie there now."""
    memory = driver.engine.memory
    for session in sessions:
        driver.do(memory.residency.leave, session)
    until(driver, lambda: all(where_now(driver, session) == "away" for session in sessions))
    driver.do(lambda: [memory.arena.memory.block(place).fill_(0) for place in memory.arena._free])


def slow(driver: Driver, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    memory = driver.engine.memory.arena.memory
    real = memory.write

    def write(pairs: Any, ready: Any) -> None:
        time.sleep(seconds)
        real(pairs, ready)

    monkeypatch.setattr(memory, "write", write)


def told(events: list[Any], kind: str) -> None:
    """Without asking the engine anything: it must tell by itself."""
    ends = time.monotonic() + WAIT
    while not any(event["type"] == kind for event in events):
        assert time.monotonic() < ends, f"nobody told {kind!r}: {events}"
        time.sleep(0.01)


# ---------------------------------------------------------------------- bits


def test_a_block_that_is_copied_on_write_has_arrived_before(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(made, 40)
    driver = made(64, max_batch=1)
    first = parent(driver, 40)
    children = [branch(driver, first) for _ in range(2)]
    driver.do(driver.engine.delete, first)
    out(driver, *children)
    slow(driver, monkeypatch, 0.05)
    for child in children:
        driver.begin(child, [7], 8).wait("done")
        assert child.tokens == wanted


def test_a_branch_of_what_is_arriving_waits_for_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(made, 47)
    driver = made(64, max_batch=1)
    first = parent(driver, 47)
    assert first.cache.length == 48  # whole blocks: the branch writes into one of its own
    out(driver, first)
    slow(driver, monkeypatch, 0.2)

    def both() -> Session:
        driver.engine.wake(first)
        found: Session = driver.engine.branch(first, [Variant()], resume=False)[0]
        return found

    child = driver.do(both)
    driver.begin(child, [7], 8).wait("done")
    assert child.tokens == wanted


@pytest.mark.parametrize("again", [True, False])
def test_what_was_lost_for_one_is_lost_for_its_branch(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    wanted = alone(made, 60)
    driver = made(64, max_batch=1)
    first = parent(driver, 60)
    child = branch(driver, first)
    out(driver, first, child)
    memory = driver.engine.memory.arena.memory
    real = memory.write

    def fails(pairs: Any, ready: Any) -> None:
        raise OSError("the bus is gone")

    if not again:
        first.reads = child.reads = None
    monkeypatch.setattr(memory, "write", fails)
    driver.do(driver.engine.wake, first)
    until(driver, lambda: bool(first.failed or first.replay))
    if again:
        child.reads = None  # it has read in a batch, say
    monkeypatch.setattr(memory, "write", real)
    turn = driver.begin(child, [7], 8).wait("done")
    if turn.reason == "error":
        assert "the bus is gone" in turn.error
    else:  # its own copy was brought once more
        assert child.tokens == wanted
    assert bool(first.failed) != again


def test_an_export_is_of_the_moment_it_was_asked_for(made: Made) -> None:
    driver = made(64, max_batch=1)
    session = driver.new()
    driver.begin(session, prompt(3, 3), 1).wait("done")
    driver.do(driver.engine.stop_at, session, layer=2, once=True)
    driver.begin(session, prompt(1, 20), 4).wait("paused")
    wanted = {name: tensor.clone() for name, tensor in driver.do(lambda: dict(session.cache.tensors())).items()}
    _, _, snapshot = driver.do(transfer.export, driver.engine, session)
    driver.do(driver.engine.cancel, session)  # the pass is given up, and another writes in its place
    driver.do(lambda: session.tokens.__delitem__(slice(session.cache.length, None)))
    driver.begin(session, prompt(7, 20), 1).wait("done")
    found = dict(snapshot.tensors())
    driver.do(snapshot.release)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


# ---------------------------------------------------------------------- room


@pytest.mark.parametrize("how", ["deleted", "written on"])
def test_what_the_last_one_who_saw_it_leaves_behind_goes_out(made: Made, how: str) -> None:
    driver = made(6, max_batch=1)
    first = parent(driver, 62)  # 4 of 6 blocks
    child = branch(driver, first)
    away(driver, child)
    if how == "deleted":
        driver.do(driver.engine.delete, first)
        until(driver, lambda: driver.engine.memory.arena.free == 6)
    else:
        driver.begin(first, [7], 2).wait("done")
    other = driver.new()
    assert driver.begin(other, prompt(2, 50), 2).wait("done").reason == "length"
    assert where_now(driver, child) == "away"


def test_who_cannot_have_room_while_others_are_pinned_does_not_keep_it(made: Made) -> None:
    driver = made(12, max_batch=1)
    big = driver.new()
    driver.begin(big, prompt(1, 90), 1).wait("done")
    away(driver, big)  # 6 blocks
    for _ in range(4):
        session = driver.new()
        driver.begin(session, prompt(2, 30), 1).wait("done")
        driver.do(driver.engine.pin, session, 3600.0)  # 8 of 12 blocks
    driver.do(driver.engine.wake, big)
    other = driver.new()
    assert driver.begin(other, prompt(3, 20), 10).wait("done").reason == "length"
    for session in list(driver.engine.sessions.values()):
        driver.do(driver.engine.pin, session, 0.0)
    until(driver, lambda: where_now(driver, big) == "device")


@pytest.mark.usefixtures("cheap_copies")
def test_who_was_brought_back_in_time_is_not_the_first_to_go(made: Made) -> None:
    driver = made(8, max_batch=1)
    announced, other = driver.new(), driver.new()
    driver.begin(announced, prompt(1, 40), 1).wait("done")
    time.sleep(0.3)
    driver.begin(other, prompt(2, 40), 1).wait("done")
    out(driver, announced, other)
    driver.do(driver.engine.wake, other)  # both can leave without being copied
    until(driver, lambda: where_now(driver, other) == "device")
    time.sleep(0.3)  # the other one, who said nothing, has not been at work for so long
    driver.do(driver.engine.expect, announced, 0.01)
    until(driver, lambda: where_now(driver, announced) == "device")
    driver.begin(driver.new(), prompt(3, 40), 1).wait("done")
    assert driver.do(lambda: [where_now(driver, one) for one in (announced, other)]) == ["device", "away"]


def test_an_evicted_state_is_charged_to_nobody() -> None:
    made = loaded("lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"])
    driver = Driver(made, budgets=Budgets(64 << 20, 64 << 20))
    first = driver.new()
    driver.begin(first, list(range(1, 20)), 1).wait("done")
    arena = driver.engine.memory.arena
    assert arena.charged
    away(driver, first)
    first.suspended = False
    driver.do(driver.engine.branch, first, [Variant() for _ in range(5)], resume=False)
    assert not arena.charged
    driver.close()


# ---------------------------------------------------------------------- being told


def test_a_branch_is_kept_while_its_parent_is_on_the_device(made: Made, tmp_path: Path) -> None:
    wanted = alone(made, 40)
    driver = made(64, max_batch=1, folder=tmp_path, disk=64)
    Durable(driver.engine)
    first = parent(driver, 40)
    child = branch(driver, first)
    events: list[Any] = []
    child.listeners.append(events.append)
    driver.do(lambda: driver.engine.suspend(child, durable=True))
    told(events, "suspended")
    assert child.durable and where_now(driver, first) == "device"
    name = child.id
    driver.engine.stop()
    again = made(64, max_batch=1, folder=tmp_path, disk=64)
    assert again.do(lambda: Durable(again.engine).find()) == (1, 0)
    child = again.engine.sessions[name]
    again.do(again.engine.wake, child)
    again.begin(child, [7], 8).wait("done")
    assert child.tokens == wanted


def test_two_orders_to_keep_write_once(made: Made, tmp_path: Path) -> None:
    driver = made(64, max_batch=1, folder=tmp_path, disk=64)
    Durable(driver.engine)
    first = parent(driver, 60)
    child = branch(driver, first)
    events: list[Any] = []
    for session in (first, child):
        session.listeners.append(events.append)

    def order() -> None:
        for session in (first, child, first):
            driver.engine.suspend(session, durable=True)

    driver.do(order)
    until(driver, lambda: first.durable and child.durable)
    files = driver.engine.memory.files
    assert files is not None
    assert len(list(files.found())) == files.written == len(list(first.cache.blocks()))
    for session in (first, child):
        driver.do(driver.engine.delete, session)
    until(driver, lambda: not list(files.found()) and files.written == 0)


def test_a_suspend_beside_an_export_is_told_when_that_ends(made: Made) -> None:
    driver = made(64, max_batch=1)
    session = parent(driver, 60)
    _, _, snapshot = driver.do(transfer.export, driver.engine, session)
    events: list[Any] = []
    session.listeners.append(events.append)
    driver.do(driver.engine.suspend, session)
    driver.do(snapshot.release)
    told(events, "suspended")


def test_a_disk_that_was_full_is_tried_again(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt_guest.kv.store._PAUSE", 0.3)
    driver = made(64, host=4, max_batch=1, folder=tmp_path, disk=64)
    away(driver, parent(driver, 60))
    session = parent(driver, 60)
    files = driver.engine.memory.files
    assert files is not None
    real, tries = files.write, itertools.count()

    def write(content: Any) -> Any:
        if next(tries) < 2:
            raise OSError(28, "No space left on device")
        return real(content)

    monkeypatch.setattr(files, "write", write)
    events: list[Any] = []
    session.listeners.append(events.append)
    driver.do(driver.engine.suspend, session)
    told(events, "suspended")


def test_what_is_kept_is_the_session_that_was_meant(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is deleted, or goes on, while it is written."""
    driver = made(64, max_batch=1, folder=tmp_path, disk=64)
    keeper = Durable(driver.engine)
    keeper.find()
    real = durable.publish
    begun, go = [Event(), Event()], [Event(), Event()]
    writes = itertools.count()

    def publish(target: Path, content: bytes) -> None:
        if (number := next(writes)) < 2:
            begun[number].set()
            assert go[number].wait(WAIT)
        real(target, content)

    monkeypatch.setattr(durable, "publish", publish)
    gone = driver.new("name")
    driver.begin(gone, prompt(1, 20), 1).wait("done")
    driver.do(lambda: driver.engine.suspend(gone, durable=True))
    assert begun[0].wait(WAIT)
    driver.do(driver.engine.delete, gone)
    session = driver.new("name")
    driver.begin(session, prompt(9, 25), 1).wait("done")
    driver.do(lambda: driver.engine.suspend(session, durable=True))
    go[0].set()
    assert begun[1].wait(WAIT)
    driver.do(driver.engine.wake, session)
    driver.begin(session, [3], 6).wait("done")
    away(driver, session)
    go[1].set()
    until(driver, lambda: not keeper._publishing)
    assert not session.durable  # what was written then is old
    kept(driver, session)
    tokens = list(session.tokens)
    driver.engine.stop()
    again = made(64, max_batch=1, folder=tmp_path, disk=64)
    assert again.do(lambda: Durable(again.engine).find()) == (1, 0)
    assert again.engine.sessions["name"].tokens == tokens


def test_a_cache_that_cannot_be_mapped_waits(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(made, 60)
    driver = made(64, max_batch=1)
    session = parent(driver, 60)
    out(driver, session)
    pieces = driver.engine.memory.arena.pieces
    real, fails = HostRange.show, [True]

    def show(self: HostRange, pieces: Any, size: int) -> None:
        found = list(pieces)
        if fails:
            real(self, found[: len(found) // 2], size)
            raise OSError(12, "Cannot allocate memory")
        real(self, found, size)

    monkeypatch.setattr(HostRange, "show", show)
    events = driver.begin(session, [7], 8)
    until(driver, lambda: driver.engine.memory.residency.waits(session))
    assert not session.cache.shown and driver.engine.memory.arena.pieces == pieces and not driver.engine.fault
    fails.clear()
    driver.do(lambda: None)  # anything that changes has it look again
    events.wait("done")
    assert session.tokens == wanted
    with pytest.raises(EngineError, match="no session"):
        driver.do(driver.engine.session, "x")


def test_an_engine_that_has_stopped_is_told_of_no_restore(made: Made) -> None:
    from gpuckpt_guest import lifecycle

    before = len(lifecycle._process._listeners)
    driver = made(64)
    assert len(lifecycle._process._listeners) > before
    driver.engine.stop()
    assert len(lifecycle._process._listeners) == before


# ---------------------------------------------------------------------- too little of everything


def test_those_who_are_dropped_take_turns_too(made: Made) -> None:
    """Nothing can be copied out: who leaves is computed again, and gets to go on in between."""
    driver = made(6, host=0, max_batch=1)
    running = [driver.begin(driver.new(), prompt(seed, 50), 30) for seed in range(4)]
    for one in running:
        assert one.wait("done").reason == "length"
    evicted = driver.engine.memory.residency.counters.evicted
    assert evicted < 60, evicted


def test_where_nobody_can_leave_who_comes_waits_and_it_is_said(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    driver = made(6, host=0, max_batch=1)
    idle = driver.new()
    driver.begin(idle, prompt(1, 60), 1).wait("done")
    idle.reads = None  # it cannot be computed again, and there is nowhere to put it
    waiter = driver.new()
    running = driver.begin(waiter, prompt(2, 60), 8)
    until(driver, lambda: driver.engine.memory.residency.waits(waiter))
    until(driver, lambda: f"session {waiter.id} waits for memory that nobody can leave" in caplog.text)
    driver.do(driver.engine.delete, idle)
    assert running.wait("done").reason == "length" and caplog.text.count("nobody can leave") == 1


def test_files_need_no_host_memory_of_the_users(made: Made, tmp_path: Path) -> None:
    wanted = alone(made, 60)
    driver = made(6, host=0, max_batch=1, folder=tmp_path, disk=64)
    session = parent(driver, 60)
    session.reads = None
    away(driver, session)
    other = driver.new()
    assert driver.begin(other, prompt(2, 60), 8).wait("done").reason == "length"
    other.reads = None
    driver.do(driver.engine.wake, session)
    driver.begin(session, [7], 8).wait("done")
    assert session.tokens == wanted


def test_files_hold_no_more_than_they_may(made: Made, tmp_path: Path) -> None:
    driver = made(64, max_batch=1, folder=tmp_path, disk=9)
    Durable(driver.engine)
    sessions = [parent(driver, 45 + number) for number in range(6)]
    events: list[Any] = []
    for session in sessions:
        session.listeners.append(events.append)
    driver.do(lambda: [driver.engine.suspend(session, durable=True) for session in sessions])
    ends = time.monotonic() + WAIT
    while sum(event["type"] in ("suspended", "not_kept") for event in events) < 6:
        assert time.monotonic() < ends, events
        time.sleep(0.01)
    files = driver.engine.memory.files
    assert files is not None and 0 < files.written <= 9 and len(list(files.found())) <= 9
    assert sum(session.durable for session in sessions) == sum(event["type"] == "suspended" for event in events)


def test_pinned_sessions_that_grow_do_not_keep_everything(made: Made) -> None:
    driver = made(8, max_batch=1)
    pinned = driver.new()
    driver.begin(pinned, prompt(1, 10), 1).wait("done")
    driver.do(driver.engine.pin, pinned, 3600.0)
    driver.begin(pinned, prompt(2, 105), 1).wait("done")  # all but one block
    assert driver.begin(driver.new(), prompt(3, 40), 4).wait("done").reason == "length"


def test_a_server_with_less_room_leaves_what_is_kept_alone(made: Made, tmp_path: Path) -> None:
    driver = made(64, max_batch=1, folder=tmp_path, disk=64)
    Durable(driver.engine).find()
    tokens = {}
    for number in range(3):
        session = driver.new(f"s{number}")
        driver.begin(session, prompt(number, 60), 2).wait("done")
        kept(driver, session)
        tokens[session.id] = list(session.tokens)
    driver.engine.stop()
    fewer = made(64, max_batch=1, folder=tmp_path, disk=64, max_sessions=1)
    assert fewer.do(lambda: Durable(fewer.engine).find()) == (1, 2)
    fewer.engine.stop()
    less = made(3, max_batch=1, folder=tmp_path, disk=64)
    assert less.do(lambda: Durable(less.engine).find()) == (0, 3)
    less.engine.stop()
    again = made(64, max_batch=1, folder=tmp_path, disk=64)
    assert again.do(lambda: Durable(again.engine).find()) == (3, 0)
    for name, wanted in tokens.items():
        session = again.engine.sessions[name]
        again.do(again.engine.wake, session)
        until(again, lambda session=session: where_now(again, session) == "device")  # type: ignore[misc]
        assert session.tokens == wanted


def test_waking_what_must_be_computed_again_is_told(made: Made, tmp_path: Path) -> None:
    driver = made(64, max_batch=1, folder=tmp_path, disk=64)
    Durable(driver.engine).find()
    session = driver.new("s")
    driver.begin(session, prompt(1, 60), 2).wait("done")
    kept(driver, session)
    driver.engine.stop()
    (block, *_) = next(tmp_path.iterdir()).glob("*.block")
    content = bytearray(block.read_bytes())
    content[100] ^= 1
    block.write_bytes(content)
    again = made(64, max_batch=1, folder=tmp_path, disk=64)
    again.do(lambda: Durable(again.engine).find())
    session = again.engine.sessions["s"]
    events: list[Any] = []
    session.listeners.append(events.append)
    again.do(again.engine.wake, session)
    told(events, "woken")
    assert session.replay and not session.failed
