"""Weights in a flat file: the bytes that went in come out, whatever the regions, or nothing is touched."""

from __future__ import annotations

import ctypes
import os
import queue
import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from gpuckpt_guest import flat
from gpuckpt_guest.flat import FlatError, HostLane, Region, RingLane

CHUNK = 1 << 16  # instead of 8 MiB


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "CHUNK", CHUNK)


@pytest.fixture
def file() -> Iterator[int]:
    made = os.memfd_create("weights")
    yield made
    os.close(made)


class Memory:
    """Regions in this process, the bytes between them guarded."""

    def __init__(self, sizes: Sequence[int], seed: int | None = 1, label: str = "w") -> None:
        held: Any = ctypes.create_string_buffer(sum(sizes) + 64 * (len(sizes) + 1))
        if seed is not None:
            held[:] = random.Random(seed).randbytes(len(held))
        self._held = held
        self.regions: list[Region] = []
        at = ctypes.addressof(self._held) + 64
        for number, size in enumerate(sizes):
            self.regions.append(Region(f"{label}{number}", at, size))
            at += size + 64
        self._at_first = bytes(self._held)

    def bytes(self) -> list[bytes]:
        return [bytes(flat.memory(region.address, region.bytes)) for region in self.regions]

    def untouched(self) -> bool:
        return bytes(self._held) == self._at_first

    def guarded(self) -> bool:
        """Whether nothing beside the regions has changed."""
        begin = ctypes.addressof(self._held)
        held = bytearray(self._held)
        for region in self.regions:
            at = region.address - begin
            held[at : at + region.bytes] = self._at_first[at : at + region.bytes]
        return bytes(held) == self._at_first


class Late:
    """A device whose copies begin when they like, one after the other: who does not wait for them finds other bytes."""

    alive = 0

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[threading.Event, memoryview, memoryview] | None] = queue.SimpleQueue()
        self._last: dict[int, threading.Event] = {}
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()
        Late.alive += 1

    def slots(self, count: int, size: int) -> Sequence[memoryview]:
        self._slots = [memoryview(bytearray(size)) for _ in range(count)]
        return self._slots

    def to_device(self, slot: int, address: int, size: int) -> None:
        self._begin(slot, flat.memory(address, size), self._slots[slot][:size])

    def to_host(self, slot: int, address: int, size: int) -> None:
        self._begin(slot, self._slots[slot][:size], flat.memory(address, size))

    def _begin(self, slot: int, target: memoryview, source: memoryview) -> None:
        self._last[slot] = threading.Event()
        self._work.put((self._last[slot], target, source))

    def _copy(self) -> None:
        while (item := self._work.get()) is not None:
            landed, target, source = item
            time.sleep(random.random() * 0.002)
            target[:] = source
            landed.set()

    def wait(self, slot: int) -> None:
        if slot in self._last:
            assert self._last[slot].wait(10)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        Late.alive -= 1


def late() -> RingLane:
    return RingLane(Late())


LANES = [pytest.param(HostLane, id="host"), pytest.param(late, id="ring")]
SIZES = [
    [1],
    [CHUNK],
    [CHUNK - 1, CHUNK + 1, 5 * CHUNK + 17],
    [3, 0, 4096, 4097],
    [],
]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_goes_in_comes_out(lanes: flat.Lanes, threads: int, sizes: list[int], file: int) -> None:
    source, target = Memory(sizes), Memory(sizes, None)
    os.write(file, b"of before" * 1000)
    end = flat.write(file, source.regions, lanes, threads=threads)
    assert os.fstat(file).st_size == end
    assert flat.stream(file, target.regions, lanes, threads=threads) == sum(sizes)
    assert target.bytes() == source.bytes()
    assert source.untouched() and target.guarded()
    assert Late.alive == 0


def test_random_regions(file: int) -> None:
    dice = random.Random(7)
    for _ in range(40):
        sizes = [dice.choice((dice.randrange(1, 300), dice.randrange(1, 4 * CHUNK))) for _ in range(dice.randrange(9))]
        lanes = dice.choice((HostLane, late))
        source, target = Memory(sizes, dice.randrange(1 << 30)), Memory(sizes, None)
        flat.write(file, source.regions, dice.choice((HostLane, late)), threads=dice.randrange(1, 5))
        flat.stream(file, target.regions, lanes, threads=dice.randrange(1, 5))
        assert target.bytes() == source.bytes() and target.guarded()


def test_where_regions_begin(file: int) -> None:
    memory = Memory([5, 4096, 7])
    flat.write(file, memory.regions)
    first, second, third = flat.check(file, memory.regions)
    assert (first, second, third) == (2 << 20, (2 << 20) + 4096, (2 << 20) + 8192)
    assert os.pread(file, 7, third) == memory.bytes()[2]


def test_an_index_of_any_length_lies_before_the_first_region(file: int) -> None:
    memory = Memory([1] * 40_000, label="x" * 60)
    flat.write(file, memory.regions, threads=1)
    assert flat.check(file, memory.regions)[0] == 6 << 20
    target = Memory([1] * 40_000, None, label="x" * 60)
    flat.stream(file, target.regions, threads=1)
    assert target.bytes() == memory.bytes()


@pytest.mark.parametrize(
    ("sizes", "label", "said"),
    [
        ([10, 20], "w", "3 regions, this server 2"),
        ([10, 21, 30], "w", "region 1 is 'w1' of 20 bytes, this server's is 'w1' of 21 bytes"),
        ([10, 20, 30], "v", "region 0 is 'w0' of 10 bytes, this server's is 'v0'"),
    ],
)
def test_a_file_of_other_weights(sizes: list[int], label: str, said: str, file: int) -> None:
    flat.write(file, Memory([10, 20, 30]).regions)
    other = Memory(sizes, label=label)
    with pytest.raises(FlatError, match="of other weights") as caught:
        flat.stream(file, other.regions)
    assert said in str(caught.value)
    assert other.untouched()


@pytest.mark.parametrize("length", [0, 10, 100, 4096, (2 << 20) + 5, -1])
def test_a_file_that_was_cut_short(length: int, file: int) -> None:
    memory = Memory([3 * CHUNK])
    end = flat.write(file, memory.regions)
    os.ftruncate(file, length if length >= 0 else end - 1)
    with pytest.raises(FlatError):
        flat.stream(file, memory.regions)
    assert memory.untouched()


@pytest.mark.parametrize(
    ("at", "bytes_", "said"),
    [
        (0, b"G", "no header"),
        (16, struct.pack("<I", 2), "version 2"),
        (20, struct.pack("<Q", 1 << 40), "damaged"),
        (28, b"[", "damaged"),
    ],
)
def test_a_damaged_header(at: int, bytes_: bytes, said: str, file: int) -> None:
    memory = Memory([100])
    flat.write(file, memory.regions)
    os.pwrite(file, bytes_, at)
    with pytest.raises(FlatError, match=said):
        flat.stream(file, memory.regions)
    assert memory.untouched()


@pytest.mark.parametrize("lanes", [HostLane, late])
@pytest.mark.parametrize("what", ["read", "write"])
def test_an_error_of_one_thread_ends_the_others(lanes: Any, what: str, file: int) -> None:
    memory = Memory([200 * CHUNK])
    flat.write(file, memory.regions)
    made: list[threading.Thread] = []
    moved: list[int] = []

    def failing() -> Any:
        lane = lanes()
        move, bad = getattr(lane, what), not made
        made.append(threading.current_thread())

        def some(*chunk: int) -> None:
            if bad and len(moved) > 2:
                raise OSError(5, "of the machine")
            moved.append(chunk[1])
            if not bad and len(moved) > 20:
                made[0].join(60)  # it has failed then: the machine may be long in letting it
            move(*chunk)

        setattr(lane, what, some)
        return lane

    call = flat.stream if what == "read" else flat.write
    with pytest.raises(OSError, match="of the machine"):
        call(file, memory.regions, failing, threads=3)
    assert len(moved) < 150
    assert Late.alive == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpuckpt-flat")]
    if what == "write":  # nobody takes half a file for a whole one
        with pytest.raises(FlatError, match="interrupted"):
            flat.check(file, memory.regions)


def test_a_lane_that_cannot_be_made(file: int) -> None:
    memory = Memory([CHUNK])
    flat.write(file, memory.regions)

    def none() -> Any:
        raise RuntimeError("no memory can be pinned")

    with pytest.raises(RuntimeError, match="pinned"):
        flat.stream(file, memory.regions, none)
