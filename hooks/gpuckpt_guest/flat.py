"""Weights in a flat file: regions of memory, one behind the other, as they lie on the device.

A server writes its weights once, and any number of its clones read them again at the same addresses. So a file has no
names of tensors and no types: it has the regions, in their order, and an index by which a file that is another model's
is found out before a byte is touched::

    magic, version, bytes of the index │ the index, JSON │ region │ region │ …

The first region begins at a multiple of 2 MiB, the others at multiples of 4096 bytes: a page is never in two of them,
and large pages of a tmpfs file are not either. The begin of the file is written last: what was cut short has no magic.

Several threads each take chunks of regions from one list, so that a large region is split. On a CPU they read right
into the memory. A device's memory is reached by a ring of two slots for each thread: while one slot is on its way to
the device, the other one is read into.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAGIC = b"gpuckpt weights\n"
VERSION = 1
FIRST, ALIGN = 2 << 20, 4096  # bytes: where the first region begins, and the others
CHUNK = 8 << 20  # bytes: a slot of a ring; copies of less do not fill the bus
_THREADS = 8  # one copies 5 to 10 GB/s out of the page cache
_SLOTS = 2
_HEAD = struct.Struct("<16sIQ")


class FlatError(Exception):
    """The file is none of these weights, or it is not whole; the message says what differs."""


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of the device: ``bytes`` from ``address`` on. ``label`` tells it from another model's of the same size."""

    label: str
    address: int
    bytes: int


class Lane(Protocol):
    """One thread's way between the file and the memory."""

    def read(self, file: int, offset: int, address: int, size: int) -> None:
        """Bring bytes of the file to the device; they are there after :meth:`finish`."""
        ...

    def write(self, file: int, offset: int, address: int, size: int) -> None:
        """Bring bytes of the device into the file; they are there after :meth:`finish`."""
        ...

    def finish(self) -> None:
        """Wait for all that is under way."""
        ...

    def close(self) -> None:
        """Give the lane's own memory back, once nothing is under way there."""
        ...


class Copier(Protocol):
    """Copies between a ring's slots and the device, asynchronously and in order. For use by one thread."""

    def slots(self, count: int, size: int) -> Sequence[memoryview]:
        """Host memory that the device copies from and to by itself."""
        ...

    def to_device(self, slot: int, address: int, size: int) -> None:
        """Begin to copy the first bytes of a slot to the device."""
        ...

    def to_host(self, slot: int, address: int, size: int) -> None:
        """Begin to copy bytes of the device into a slot."""
        ...

    def wait(self, slot: int) -> None:
        """Wait for the last copy from or to the slot, if there was one."""
        ...

    def close(self) -> None:
        """Wait for all copies, and give the slots back."""
        ...


# Makes a thread's lane, in that thread.
Lanes = Callable[[], Lane]


def write(file: int, regions: Sequence[Region], lanes: Lanes | None = None, *, threads: int = 0) -> int:
    """Write the regions into the file ``file``, which is truncated first; returns the file's size.

    ``lanes``: ways to the regions' device, by default to the memory of this process. Raises OSError.
    """
    offsets, end = _places(regions)
    os.ftruncate(file, 0)
    _run(file, regions, offsets, lanes or HostLane, Lane.write.__name__, threads)
    os.ftruncate(file, end)
    _write_all(file, memoryview(_index(regions, offsets)), 0)
    return end


def head(regions: Sequence[Region]) -> bytes:
    """What a file of these regions begins with: header and index."""
    return _index(regions, _places(regions)[0])


def check(file: int, regions: Sequence[Region]) -> list[int]:
    """Where in the file the regions begin. Raises FlatError if it is not theirs, or not whole."""
    begin = os.pread(file, _HEAD.size, 0)
    if len(begin) < _HEAD.size:
        raise FlatError("it is no file of weights, or one whose writer was interrupted: it has no header")
    magic, version, size = _HEAD.unpack(begin)
    if magic != MAGIC:
        raise FlatError("it is no file of weights, or one whose writer was interrupted: it has no header")
    if version != VERSION:
        raise FlatError(f"it is of version {version}, which this server does not read; it reads version {VERSION}")
    offsets, end = _places(regions)
    wanted = _index(regions, offsets)
    # As bytes: who wrote the same regions has written the same index.
    if size != len(wanted) - _HEAD.size or os.pread(file, size, _HEAD.size) != wanted[_HEAD.size :]:
        raise FlatError(_difference(os.pread(file, min(size, 64 << 20), _HEAD.size), regions))
    found = os.fstat(file).st_size
    if found < end:
        raise FlatError(f"it has been cut short: it has {found} bytes of {end}")
    return offsets


def stream(
    file: int, regions: Sequence[Region], lanes: Lanes | None = None, *, threads: int = 0, chunk: int = 0
) -> int:
    """Read the file into the regions; returns the bytes that were read.

    ``chunk``: bytes that a lane is given at most at a time, by default as many as a slot of a ring has.
    Raises FlatError before anything is touched if the file is not theirs, OSError if reading fails half-way.
    """
    _run(file, regions, check(file, regions), lanes or HostLane, Lane.read.__name__, threads, chunk)
    return sum(region.bytes for region in regions)


# ---------------------------------------------------------------------- the index


def _index(regions: Sequence[Region], offsets: Sequence[int]) -> bytes:
    listed = [
        {"label": region.label, "bytes": region.bytes, "offset": offset}
        for region, offset in zip(regions, offsets, strict=True)
    ]
    text = json.dumps({"regions": listed}, separators=(",", ":")).encode()
    return _HEAD.pack(MAGIC, VERSION, len(text)) + text


def _places(regions: Sequence[Region]) -> tuple[list[int], int]:
    """Where the regions begin, and where the last one ends."""
    # The index holds the offsets, which begin behind it: an index with the largest ones is as long as any.
    room = len(_index(regions, [1 << 62] * len(regions)))
    at = _up(room, FIRST)
    offsets = []
    end = at
    for region in regions:
        offsets.append(at)
        end = at + region.bytes
        at = _up(end, ALIGN)
    return offsets, end


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _difference(text: bytes, regions: Sequence[Region]) -> str:
    try:
        found = [(one["label"], one["bytes"]) for one in json.loads(text)["regions"]]
    except (ValueError, KeyError, TypeError):
        return "its index is damaged"
    mine = [(region.label, region.bytes) for region in regions]
    if len(found) != len(mine):
        return f"it is of other weights: it has {len(found)} regions, this server {len(mine)}"
    for number, (theirs, own) in enumerate(zip(found, mine, strict=True)):
        if theirs != own:
            there, here = (f"{label!r} of {size} bytes" for label, size in (theirs, own))
            return f"it is of other weights: region {number} is {there}, this server's is {here}"
    return "its index is damaged"


# ---------------------------------------------------------------------- threads


def _run(
    file: int,
    regions: Sequence[Region],
    offsets: Sequence[int],
    lanes: Lanes,
    what: str,
    threads: int,
    chunk: int = 0,
) -> None:
    """Have every chunk of the regions pass a lane. The first error of a thread ends the others, and is raised."""
    work = iter(_chunks(regions, offsets, chunk or CHUNK))
    count = threads or min(_THREADS, len(os.sched_getaffinity(0)))
    errors: list[BaseException] = []
    lock = threading.Lock()  # a generator must not be advanced by two threads at once

    def pass_chunks() -> None:
        try:
            lane = lanes()
            try:
                move = getattr(lane, what)
                while not errors:
                    with lock:
                        piece = next(work, None)
                    if piece is None:
                        break
                    move(file, *piece)
                lane.finish()
            finally:
                lane.close()
        except BaseException as error:  # for who called: in a thread nobody would see it
            errors.append(error)

    helpers = [threading.Thread(target=pass_chunks, name=f"gpuckpt-flat-{number}") for number in range(count)]
    for helper in helpers:
        helper.start()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def _chunks(regions: Sequence[Region], offsets: Sequence[int], most: int) -> Iterator[tuple[int, int, int]]:
    """(offset in the file, address, bytes)"""
    for region, offset in zip(regions, offsets, strict=True):
        for at in range(0, region.bytes, most):
            yield offset + at, region.address + at, min(most, region.bytes - at)


class HostLane:
    """To the memory of this process: the kernel copies right between it and the file."""

    def read(self, file: int, offset: int, address: int, size: int) -> None:
        _read_all(file, memory(address, size), offset)

    def write(self, file: int, offset: int, address: int, size: int) -> None:
        _write_all(file, memory(address, size), offset)

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """It has no memory of its own."""


class RingLane:
    """To a device's memory, by two slots of host memory that take turns."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._slots = copier.slots(_SLOTS, CHUNK)
        self._next = 0
        self._due: tuple[int, int, int, int] | None = None  # of what comes from the device: where it is to be written

    def read(self, file: int, offset: int, address: int, size: int) -> None:
        slot = self._turn()
        self._copier.wait(slot)
        _read_all(file, self._slots[slot][:size], offset)
        self._copier.to_device(slot, address, size)

    def write(self, file: int, offset: int, address: int, size: int) -> None:
        slot = self._turn()
        self._copier.to_host(slot, address, size)
        # The other slot is written into the file meanwhile.
        due, self._due = self._due, (slot, file, offset, size)
        self._settle(due)

    def finish(self) -> None:
        due, self._due = self._due, None
        self._settle(due)
        for slot in range(len(self._slots)):
            self._copier.wait(slot)

    def close(self) -> None:
        self._slots = ()
        self._copier.close()

    def _turn(self) -> int:
        self._next = (self._next + 1) % len(self._slots)
        return self._next

    def _settle(self, due: tuple[int, int, int, int] | None) -> None:
        if due is not None:
            slot, file, offset, size = due
            self._copier.wait(slot)
            _write_all(file, self._slots[slot][:size], offset)


# ---------------------------------------------------------------------- bytes


def memory(address: int, size: int) -> memoryview:
    """Memory of this process, by its address."""
    held: Any = (ctypes.c_char * size).from_address(address)
    return memoryview(held).cast("B")


def _read_all(file: int, target: memoryview, offset: int) -> None:
    while len(target):
        count = os.preadv(file, [target], offset)
        if not count:
            raise FlatError(f"it was cut short while it was read: it ends at {offset}")
        target, offset = target[count:], offset + count


def _write_all(file: int, source: memoryview, offset: int) -> None:
    while len(source):
        count = os.pwritev(file, [source], offset)
        source, offset = source[count:], offset + count
