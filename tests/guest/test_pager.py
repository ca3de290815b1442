"""The pager against plain lists: random histories of leaving and coming back, with little memory, and bad luck."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from gpuckpt_guest.kv.arena import Arena, OutOfBlocksError
from gpuckpt_guest.kv.cache import Blueprint, SessionCache
from gpuckpt_guest.kv.pager import Pager
from gpuckpt_guest.kv.snapshot import Snapshot
from gpuckpt_guest.kv.store import BlockFiles, File, HostMemoryPool, LostError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache

LAYERS, HEADS, SIZE = 4, 4, 512
DEVICE, HOST = 10, 6  # blocks
WAIT = 60.0  # seconds: bounds what hangs, and nothing else


@dataclass(eq=False)
class Session:
    """A cache, and the number that was written for each token, in each layer."""

    cache: SessionCache
    numbers: list[int] = field(default_factory=list)


class World:
    """A device's memory, host memory and a folder, all small."""

    def __init__(self, folder: Path | None, *, host: int = HOST, disk: int = 100) -> None:
        config = AutoConfig.for_model(
            "llama",
            num_hidden_layers=LAYERS,
            hidden_size=HEADS * SIZE,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=SIZE,
        )
        self.blueprint = Blueprint(config)
        seen = DynamicCache(config=config)
        for layer in range(LAYERS):
            seen.update(columns([1]), columns([1]), layer)
        self.blueprint.learn(seen)
        whole = Arena.small(self.blueprint.forms, self.blueprint.windows, device="cpu", tables=1, limit=1)
        size = whole.memory.size
        self.arena = Arena.build(
            self.blueprint.forms, self.blueprint.windows, device="cpu", budget=DEVICE * size, limit=1000, piece=0
        )
        self.files = BlockFiles(folder, disk * size, size) if folder else None
        self.pool = HostMemoryPool(host * size, size, pinned=False)
        self.wakes = Event()
        self.pager = Pager(self.arena, self.pool, self.files, self.wakes.set)
        self.sessions: list[Session] = []
        self.number = 0

    def new(self, tokens: int = 0) -> Session:
        made = Session(self.blueprint.session(self.arena))
        self.sessions.append(made)
        if tokens:
            self.write(made, tokens)
        return made

    def write(self, one: Session, tokens: int) -> None:
        one.cache.room(tokens)
        new = list(range(self.number, self.number + tokens))
        self.number += tokens
        for layer in range(LAYERS):
            one.cache.update(columns(new) + layer, -columns(new) - layer, layer)
        one.cache.commit(tokens)
        one.numbers += new

    def end(self, one: Session) -> None:
        self.sessions.remove(one)
        one.cache.close()

    def leave(self, one: Session) -> None:
        self.pager.leave(one.cache)
        self.until(lambda: self.pager.left(one.cache))

    def bring(self, one: Session, first: int = 0) -> None:
        self.pager.bring(one.cache, "cpu", first)
        self.until(lambda: not self.pager.arriving(one.cache))

    def until(self, reached: Callable[[], bool], seconds: float = WAIT) -> None:
        ends = time.monotonic() + seconds
        self.pager.poll()
        while not reached():
            assert self.wakes.wait(max(0.0, ends - time.monotonic())), "nothing happens any more"
            self.wakes.clear()
            self.pager.poll()

    def settled(self) -> None:
        """Wait until no copy is under way."""
        self.until(lambda: not any(block.moving for one in self.sessions for block in one.cache.blocks()))

    def close(self) -> None:
        self.pager.close()


def several(world: World) -> list[Session]:
    """Sessions that have left, of which host memory cannot hold all."""
    made = []
    for _ in range(3):
        made.append(world.new(60))
        world.leave(made[-1])
    return made


def columns(numbers: list[int]) -> Any:
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(1, HEADS, len(numbers), SIZE).clone()


def check(one: Session, tensors: dict[str, Any] | None = None) -> None:
    found = dict(one.cache.tensors()) if tensors is None else tensors
    wanted = columns(one.numbers)
    for layer in range(LAYERS if one.numbers else 0):
        assert torch.equal(found[f"{layer}.keys"], wanted + layer)
        assert torch.equal(found[f"{layer}.values"], -wanted - layer)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["new", "write", "write", "fork", "leave", "leave", "bring", "bring", "export", "end", "wait"]),
        st.integers(0, 7),
        st.sampled_from([1, 1, 2, 9, 30, 60]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, filed=st.booleans())
def test_random_histories(steps: list[tuple[str, int, int]], filed: bool, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("blocks") if filed else None
    world = World(folder, disk=8)
    pager, arena = world.pager, world.arena
    world.new()
    for what, which, count in steps:
        one = world.sessions[which % len(world.sessions)]
        pager.poll()
        if what == "new" and len(world.sessions) < 8:
            world.new()
        elif what == "write" and one.cache.shown and not pager.arriving(one.cache):
            if one.cache.lacking(count) <= arena.free and one.cache.length + count < 300:
                world.write(one, count)
        elif what == "fork" and len(world.sessions) < 8:
            world.sessions.append(Session(one.cache.fork(), list(one.numbers)))
        elif what == "leave":
            if sum(block.dirty for block in one.cache.blocks()) <= pager.space:
                pager.leave(one.cache)
        elif what == "bring" and not one.cache.shown and pager.absent(one.cache) <= arena.free:
            pager.bring(one.cache, "cpu", which % LAYERS)
        elif what == "export" and not pager.arriving(one.cache):
            snapshot = Snapshot(pager, one.cache)
            check(one, dict(snapshot.tensors()))
            snapshot.release()
        elif what == "end" and len(world.sessions) > 1:
            world.end(one)
        elif what == "wait":
            world.settled()
        for each in world.sessions:
            if each.cache.shown and not pager.arriving(each.cache):
                check(each)
            elif each.cache.shown:
                for layer in range(LAYERS if each.numbers else 0):  # what is said to be there is there
                    if pager.ready(each.cache, layer):
                        found = each.cache.layers[layer]
                        assert torch.equal(found.keys, columns(each.numbers) + layer)
    world.settled()
    for one in world.sessions:
        snapshot = Snapshot(pager, one.cache)
        check(one, dict(snapshot.tensors()))
        snapshot.release()
    for one in list(world.sessions):
        world.end(one)
    world.until(lambda: arena.free == DEVICE and world.pool.free == HOST)
    if world.files:
        world.until(lambda: not list(world.files.found()))  # type: ignore[union-attr]
        assert world.files.written == 0
    world.close()


# ---------------------------------------------------------------------- what is copied, and in what order


def test_only_what_was_written_since_is_copied_again(world: World) -> None:
    one = world.new(100)
    blocks = len(list(one.cache.blocks()))
    world.leave(one)
    assert world.pager.out.blocks == blocks >= 4
    for _ in range(5):
        world.bring(one)
        world.write(one, 1)
        world.leave(one)
    # One block each time: the last. A token costs the same whatever was there before.
    assert blocks + 5 <= world.pager.out.blocks <= blocks + 7
    assert world.pager.out.spared >= 5 * (blocks - 1)
    world.bring(one)
    check(one)


def test_what_was_only_read_leaves_without_a_copy(world: World) -> None:
    one = world.new(50)
    world.leave(one)
    copied = world.pager.out.bytes
    world.bring(one)
    world.leave(one)
    assert world.pager.out.bytes == copied and world.arena.free == DEVICE


def test_layers_that_are_needed_first_come_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.new(60)
    world.leave(one)
    monkeypatch.setattr("gpuckpt_guest.kv.pager._WORK", 1)
    order: list[int] = []

    class Noted(set[tuple[int, int]]):
        def update(self, *marks: Any) -> None:
            super().update(*marks)
            order.extend(stream for each in marks for _, stream in each)

    real, go = world.arena.memory.write, Event()

    def write(*given: Any) -> None:
        assert go.wait(WAIT)
        real(*given)

    monkeypatch.setattr(world.arena.memory, "write", write)  # nothing comes before it is looked at
    world.pager.bring(one.cache, "cpu", 2)
    (arrival,) = one.cache.arrivals
    arrival.landed = Noted()
    assert not any(world.pager.ready(one.cache, layer) for layer in range(LAYERS))
    go.set()
    world.until(lambda: not world.pager.arriving(one.cache))
    assert order == [2, 3, 0, 1]
    check(one)


def test_one_that_is_wanted_again_stays(world: World) -> None:
    one = world.new(100)
    world.pager.leave(one.cache)
    world.pager.bring(one.cache, "cpu")  # at once, while it is on its way
    world.until(lambda: not world.pager.arriving(one.cache))
    check(one)
    world.write(one, 3)  # also into what is being copied at this moment
    world.settled()
    world.leave(one)
    world.bring(one)
    check(one)


def test_one_that_waits_twice_leaves_once(tmp_path: Path) -> None:
    """It has begun to leave, was wanted again, and left again, while there was no slot for it."""
    world = World(None, host=5)
    fillers = [world.new(10) for _ in range(5)]
    for filler in fillers:
        world.leave(filler)
    one = world.new(60)
    world.pager.leave(one.cache)  # no slot is free: all of it waits
    world.pager.bring(one.cache, "cpu")
    world.pager.leave(one.cache)
    assert len(world.pager._waiting) > len(list(one.cache.blocks()))
    for filler in fillers:  # slots become free one by one
        world.end(filler)
        world.pager.poll()
        world.settled()
    world.until(lambda: world.pager.left(one.cache))
    world.bring(one)
    check(one)
    world.close()


def test_branches_share_what_has_left(world: World) -> None:
    parent = world.new(60)
    child = Session(parent.cache.fork(), list(parent.numbers))
    world.sessions.append(child)
    blocks = len(list(parent.cache.blocks()))
    world.pager.leave(parent.cache)
    assert world.arena.free == DEVICE - blocks  # the child still sees them
    check(child)
    world.leave(child)
    assert world.arena.free == DEVICE and world.pager.out.blocks == blocks
    world.bring(child)
    world.bring(parent)
    assert world.arena.free == DEVICE - blocks
    check(parent)
    world.write(child, 1)
    check(parent)
    check(child)


# ---------------------------------------------------------------------- too little memory


def test_host_memory_that_is_full_makes_wait(tmp_path: Path) -> None:
    world = World(None, host=4)
    first, second = world.new(30), world.new(60)
    assert len(list(first.cache.blocks())) == 2 and len(list(second.cache.blocks())) == 4
    world.leave(first)
    assert world.pager.space == 2
    world.pager.leave(second.cache)
    world.settled()
    assert not world.pager.left(second.cache)  # a part of it is still there, and nothing is lost
    world.end(first)
    world.until(lambda: world.pager.left(second.cache))
    world.bring(second)
    check(second)
    world.close()


def test_files_take_what_host_memory_cannot(world: World) -> None:
    sessions = several(world)
    assert len(list(sessions[0].cache.blocks())) * 3 > HOST
    assert world.pager.spilled.blocks and world.files is not None and list(world.files.found())
    for one in sessions:
        world.bring(one)
        check(one)
        world.end(one)
    world.until(lambda: world.pool.free == HOST)
    assert not list(world.files.found()) and world.files.written == 0


def test_a_disk_that_is_full_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.files is not None

    def full(_: Any) -> File:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(world.files, "write", full)
    monkeypatch.setattr("gpuckpt_guest.kv.store._PAUSE", 3600.0)
    sessions = [world.new(60)]
    world.leave(sessions[0])
    sessions.append(world.new(60))
    world.pager.leave(sessions[1].cache)
    world.until(lambda: bool(world.files and world.files.error))
    assert "No space left" in world.files.error and not list(world.files.found())
    assert world.files.free == 0 and world.files.written == 0
    for one in sessions:
        if not one.cache.shown:
            world.bring(one)
        check(one)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = BlockFiles(tmp_path, 1 << 20, 8192)

    def fails(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pwrite", fails)
    with pytest.raises(OSError, match="Input/output"):
        files.write(torch.zeros(8192, dtype=torch.uint8))
    assert not list(files.found())


# ---------------------------------------------------------------------- bad luck


@pytest.mark.parametrize("how", ["cut short", "changed", "gone"])
def test_a_block_that_was_damaged_on_the_disk_is_told(world: World, how: str) -> None:
    sessions = several(world)
    assert world.files is not None
    for path in world.files.found():
        if how == "cut short":
            path.write_bytes(path.read_bytes()[: world.files.size // 2])
        elif how == "changed":
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
        else:
            path.unlink()
    told = []
    for one in sessions:
        world.pager.bring(one.cache, "cpu")
        arrivals = one.cache.arrivals
        world.until(lambda arrivals=arrivals: all(arrival.done for arrival in arrivals))  # type: ignore[misc]
        errors = [arrival.error for arrival in one.cache.arrivals if arrival.error]
        if errors:
            told += errors
            assert not world.pager.ready(one.cache, 0)
        else:
            check(one)
        world.end(one)
    assert told and all("a block of its keys and values" in error for error in told)


def test_a_session_that_ends_while_it_moves_leaves_nothing(world: World) -> None:
    for direction in ("out", "in", "disk"):
        one, other = world.new(60), world.new(60)
        if direction == "in":
            world.leave(one)
            world.pager.bring(one.cache, "cpu")
        elif direction == "out":
            world.pager.leave(one.cache)
        else:
            world.leave(one)
            world.pager.leave(other.cache)
        world.end(one)
        world.end(other)
        world.until(lambda: world.arena.free == DEVICE and world.pool.free == HOST)
        assert world.files is not None
        world.until(lambda: world.files is None or not list(world.files.found()))


def test_what_is_adopted_without_room_takes_nothing(world: World) -> None:
    one = world.new(110)
    snapshot = Snapshot(world.pager, one.cache)
    tensors = dict(snapshot.tensors())
    snapshot.release()
    facts = one.cache.facts()
    other = world.blueprint.session(world.arena)
    with pytest.raises(OutOfBlocksError, match="used up"):
        world.pager.adopt(other, other.load(110, facts, tensors, "cpu"))
    assert world.pool.free == HOST
    other.close()


def test_one_folder_is_one_servers(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 1 << 20, 4096)
    with pytest.raises(BlockingIOError):
        BlockFiles(tmp_path, 1 << 20, 4096)
    files.close()
    BlockFiles(tmp_path, 1 << 20, 4096).close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_block_comes_back_as_it_was(tmp_path: Path, direct: bool) -> None:
    files = BlockFiles(tmp_path, 1 << 20, 12288, direct=direct)
    content = files.bounce().random_(0, 256, generator=torch.Generator().manual_seed(1))
    file, back = files.write(content), files.bounce()
    files.read(file, back)
    assert torch.equal(content, back)
    file.digest = "0" * 32
    with pytest.raises(LostError, match="damaged on the disk"):
        files.read(file, back)
    file.drop()
    assert not list(files.found())
