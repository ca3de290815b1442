"""The pager: takes caches out of the arena and brings them back, while the device goes on with other work.

All decisions are made by the engine's thread; threads, one for each direction and one for the disk, only copy, and what
they have done is noted when the engine's thread calls :meth:`Pager.poll`. A block is in one of these states:

* in its place, seen by at least one table: it may be written, and is ``dirty`` from then on;
* in its place, seen by none: it is on its way out, or waits for a slot of host memory;
* in no place: its home has the only copy.

A block that is brought back keeps its home as long as nobody else needs the memory: unless it has been written to, it
goes out a second time without being copied. Tokens are only ever written at the end: that is all blocks but the last.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arena import Arena, Block, OutOfBlocksError, Table
from .cache import SessionCache
from .hand import Hand, Then
from .store import BlockFiles, File, Home, HostMemoryPool

_log = logging.getLogger("gpuckpt_guest")

# Bytes of one piece of work for a thread: enough to hide its own costs, little enough to hear from it often.
_WORK = 8 << 20
# Bytes in one piece, below which a copy's fixed cost shows.
_PIECE = 64 << 10
_STEPS = 8  # in which a large cache comes: with more, each step's fixed costs show; with fewer, the first layer waits
_SPILLS = 2  # files that are being written at a time


@dataclass
class Traffic:
    """What has been copied one way: bytes, and the seconds that it took."""

    bytes: int = 0
    seconds: float = 0.0
    blocks: int = 0
    spared: int = 0  # blocks that needed no copy


@dataclass(eq=False)
class Arrival:
    """Blocks on their way into the arena. ``landed``: the streams whose bytes are there, by track.

    A thread adds to ``landed`` as it copies, and tells of it if the arrival is ``awaited``: if somebody has looked for
    a stream that was not there.
    """

    blocks: list[Block]
    landed: set[tuple[int, int]] = field(default_factory=set)
    awaited: bool = False
    done: bool = False
    error: str = ""


@dataclass
class _Step:
    """Pieces of blocks that come together; ``landed``: the streams that are there then."""

    landed: list[tuple[int, int]]
    pairs: list[tuple[Any, Any]]


class Pager:
    """Moves blocks between an arena, host memory and files. For use by the engine's thread."""

    def __init__(
        self, arena: Arena, host: HostMemoryPool, files: BlockFiles | None, wake: Callable[[], object]
    ) -> None:
        """``wake`` is called by other threads when there is something for :meth:`poll`."""
        self.arena = arena
        self.host = host
        self.files = files
        self.out, self.into, self.spilled = Traffic(), Traffic(), Traffic()
        self._wake = wake
        self._done: deque[tuple[Then, Any, Exception | None]] = deque()
        self._hands = {name: Hand(f"kv-{name}", self._landed) for name in ("out", "in", "disk")}
        self._waiting: deque[Block] = deque()  # for a slot
        self._held: dict[int, Block] = {}  # the block in each slot, the longest there first
        self._outgoing = 0
        self._spilling = 0
        self._jobs = 0  # of others, for the disk's thread
        self._numbers = {id(track): number for number, track in enumerate(arena.tracks)}
        self._bounce = files.bounce() if files else None
        self._nudged = False  # somebody has been told that there is something for poll()
        self._copies: set[Block] = set()  # of those that wait: copies are wanted although they stay
        self._filing: dict[Block, list[Callable[[Block, Exception | None], None]]] = {}
        arena.released = self.release
        arena.unseen = self._unseen

    def close(self) -> None:
        """Wait for what is under way; nothing can be moved any more."""
        for hand in self._hands.values():
            hand.end()
        if self.files:
            self.files.close()

    # ------------------------------------------------------------------ the other threads

    def _landed(self, then: Then, result: Any, error: Exception | None) -> None:
        self._done.append((then, result, error))
        self._wake()

    def poll(self) -> None:
        """Take note of what has been copied."""
        self._nudged = False
        while self._done:
            then, result, error = self._done.popleft()
            then(result, error)
        self._pump()

    # ------------------------------------------------------------------ out

    @property
    def space(self) -> int:
        """How many blocks can still be taken out."""
        reusable = sum(map(_reusable, self._held.values()))
        disk = self.files.free if self.files else 0
        return self.host.free + reusable + disk - len(self._waiting)

    def leave(self, cache: SessionCache) -> None:
        """Begin to take a cache out; what nobody else sees leaves the arena as it is copied."""
        cache.move("cpu")
        cache.leave()
        cache.hide()
        self._pump()

    def copy(self, block: Block) -> None:
        """Have the block copied to host memory; it stays where others see it. :meth:`copied`: it is done."""
        if not self.copied(block) and not block.moving and block not in self._copies:
            self._copies.add(block)
            self._waiting.append(block)
            self._pump()

    @staticmethod
    def copied(block: Block) -> bool:
        """Whether there is a copy of what the block holds."""
        return block.home is not None and not block.dirty

    def next_time(self) -> float | None:
        """Seconds until a write that has failed is tried again, if anybody waits for it."""
        return self.files.pause if self.files and self._waiting and self.files.error else None

    @property
    def leaving(self) -> int:
        """How many blocks are on their way out."""
        return self._outgoing + len(self._waiting)

    def left(self, cache: SessionCache) -> bool:
        """Whether all of it that can leave has left."""
        return not cache.shown and all(block.place < 0 or block.seen for block in cache.blocks())

    def _unseen(self, block: Block) -> None:
        if block.place >= 0 and not block.moving:  # else it is looked at again when it has landed
            self._send(block)
            if self._waiting and not self._nudged:
                self._nudged = True
                self._wake()

    def _send(self, block: Block) -> None:
        if self.copied(block):
            self.out.spared += 1
            self._vacate(block)
        else:
            self._waiting.append(block)

    def _vacate(self, block: Block) -> None:
        self.arena.give(block.place)
        block.place = -1

    def _pump(self) -> None:
        """Hand slots to the blocks that wait for one, and see that there will be more."""
        batch: list[tuple[Block, Home]] = []
        while self._waiting:
            block = self._waiting[0]
            # It may have been needed again, have ended, or have been given slots and left since it began to wait.
            stays = block.seen > 0
            if (stays and block not in self._copies) or block.moving or not block.tables or block.place < 0:
                self._copies.discard(block)
                self._waiting.popleft()
                continue
            if self.copied(block):
                self._copies.discard(block)
                self._waiting.popleft()
                if not stays:
                    self._vacate(block)
                continue
            slot = self._slot()
            if slot < 0:
                break
            self._waiting.popleft()
            self._copies.discard(block)
            self.release(block)  # what it held before it was written to
            block.moving, block.dirty = block.moving + 1, False
            self._held[slot] = block
            self._outgoing += 1
            batch.append((block, Home(self.host, slot)))
            if len(batch) * self.host.size >= _WORK:
                self._copy_out(batch)
                batch = []
        if batch:
            self._copy_out(batch)
        self._spill()

    def _slot(self) -> int:
        if not self.host.free:
            # Copies of what lies in the arena as well, or in a file, can be done without.
            spare = next((slot for slot, block in self._held.items() if _reusable(block)), -1)
            if spare < 0:
                return -1
            self._forget_slot(self._held[spare])
        return self.host.take()

    def _forget_slot(self, block: Block) -> None:
        home = block.home
        del self._held[home.slot]
        home.vacate()
        if home.file is None:
            block.home, block.dirty = None, True

    def _copy_out(self, batch: Sequence[tuple[Block, Home]]) -> None:
        memory, pool = self.arena.memory, self.host
        pairs = [(memory.block(block.place), pool.bytes(home.slot)) for block, home in batch]
        ready = memory.written()

        def work() -> float:
            began = time.perf_counter()
            memory.read(pairs, ready)
            return time.perf_counter() - began

        def then(seconds: Any, error: Exception | None) -> None:
            if error is None:
                self.out.bytes += len(batch) * pool.size
                self.out.seconds += seconds
                self.out.blocks += len(batch)
            for block, home in batch:
                self._is_out(block, home, error)

        self._hands["out"].do(work, then)

    def _is_out(self, block: Block, home: Home, error: Exception | None) -> None:
        block.moving -= 1
        self._outgoing -= 1
        if error is not None:
            _log.error("a block could not be copied to host memory: %s", error)
            block.dirty = True
        if not block.tables or block.dirty:  # it is gone, or has been seen and written to again meanwhile
            del self._held[home.slot]
            home.release()
        else:
            block.home = home
            if not block.seen:
                self._vacate(block)
        if error is None or not block.tables:
            self.settle(block)

    def settle(self, block: Block) -> None:
        """What has landed may have been wanted elsewhere meanwhile."""
        if block.moving:
            return
        if not block.tables:
            self.arena.end(block)
        elif not block.seen:
            self._unseen(block)

    def unpin(self, blocks: Iterable[Block]) -> None:
        """Who has read these blocks is done with them."""
        for block in blocks:
            block.moving -= 1
            self.arena.drop(block)
            if block.tables:
                self.settle(block)
        self._pump()

    # ------------------------------------------------------------------ to files

    def _spill(self) -> None:
        """Write blocks that lie in host memory only into files, if others wait for their slots."""
        if self.files is None:
            return
        wanted = len(self._waiting)
        for block in list(self._held.values()):
            if self._spilling >= min(_SPILLS, wanted) or not self.files.free:
                return
            home = block.home
            if home is not None and home.file is None and block.place < 0 and not block.moving:
                self._spilling += 1
                self.persist(block, self._is_spilled)

    def _is_spilled(self, _: Block, error: Exception | None) -> None:
        self._spilling -= 1
        if error is None:
            self._pump()

    def persist(self, block: Block, then: Callable[[Block, Exception | None], None]) -> None:
        """Write a block that has a slot into a file; it keeps both. One that is being written is not written again."""
        files, home = self.files, block.home
        assert files is not None and home is not None
        if block in self._filing:
            self._filing[block].append(then)
            return
        if not files.free:
            what = files.error or "the files hold as many bytes as they may (--kv-disk-mib)"
            then(block, OSError(errno.ENOSPC, what))
            return
        self._filing[block] = [then]
        content = self.host.bytes(home.slot)
        block.moving += 1  # the slot stays until it is written
        files.written += 1

        def work() -> tuple[File, float]:
            began = time.perf_counter()
            return files.write(content), time.perf_counter() - began

        def noted(found: Any, error: Exception | None) -> None:
            block.moving -= 1
            if error is not None:
                files.written -= 1
                files.failed(error)
            else:
                file, seconds = found
                files.pending.discard(file.path)
                self.spilled.bytes += files.size
                self.spilled.seconds += seconds
                self.spilled.blocks += 1
                if block.tables and block.home is home and not block.dirty:
                    home.file = file
                else:
                    self.drop_file(file)
            self.settle(block)
            for each in self._filing.pop(block):
                each(block, error)

        self._hands["disk"].do(work, noted)

    def do(self, work: Callable[[], Any], then: Then) -> None:
        """Have the disk's thread do something, behind what it has been given."""
        self._jobs += 1

        def noted(result: Any, error: Exception | None) -> None:
            self._jobs -= 1
            then(result, error)

        self._hands["disk"].do(work, noted)

    @property
    def at_work(self) -> int:
        """How much of copying and writing is under way."""
        return self._outgoing + len(self._filing) + self._jobs

    def drop_file(self, file: File) -> None:
        """One of its users is done with the file."""
        file.drop()
        if not file.users and self.files:
            self.files.written -= 1
            self.files.error = ""  # there is room again

    # ------------------------------------------------------------------ in

    def bring(self, cache: SessionCache, device: Any, first: int = 0) -> None:
        """Begin to bring a cache back, the layers from ``first`` on before those in front of them.

        The arena must have as many free blocks as :meth:`absent` says. :meth:`ready` tells when a layer may run.
        """
        away = [(table, number, block) for table in cache.tables for number, block in table.blocks.items()]
        lost = next((block.lost for _, _, block in away if block.lost and block.place >= 0), "")
        away = [item for item in away if item[2].place < 0]
        for _, _, block in away:
            block.place, block.lost = self.arena.take(), ""
        if away:
            self._copy_in(away, first)
        else:
            self._wake()  # there is nothing to land, but somebody may wait to hear of it
        cache.show()  # meanwhile
        cache.move(device)
        cache.enter()
        found = {id(block.arrival): block.arrival for block in cache.blocks() if block.arrival is not None}
        cache.arrivals = list(found.values())
        if lost:  # others, who see it, have been told
            cache.arrivals.append(Arrival([], done=True, error=lost))

    def absent(self, cache: SessionCache) -> int:
        """How many blocks bringing it back takes."""
        return sum(block.place < 0 for block in cache.blocks())

    def ready(self, cache: SessionCache, layer: int) -> bool:
        """Whether all that a layer reads has arrived."""
        if not cache.arrivals:
            return True
        cache.arrivals = [arrival for arrival in cache.arrivals if not arrival.done or arrival.error]
        for arrival in cache.arrivals:
            arrival.awaited = True  # before it is looked at: what lands in this moment is told of
        for number, track in enumerate(self.arena.tracks):
            plane = track.planes.get((layer, "keys"))
            if plane is not None and any((number, plane.stream) not in arrival.landed for arrival in cache.arrivals):
                return False
        return True

    def arriving(self, cache: SessionCache) -> bool:
        """Whether anything of it is still on the way."""
        cache.arrivals = [arrival for arrival in cache.arrivals if not arrival.done or arrival.error]
        return bool(cache.arrivals)

    def _copy_in(self, away: Sequence[tuple[Table, int, Block]], first: int) -> None:
        arrival = Arrival([block for _, _, block in away])
        # Of tracks of which all is in its place, nothing is waited for.
        moving = {id(table.track) for table, _, _ in away}
        for number, track in enumerate(self.arena.tracks):
            if id(track) not in moving:
                arrival.landed.update((number, stream) for stream in range(track.streams))
        for block in arrival.blocks:
            block.moving, block.arrival = block.moving + 1, arrival
        filed = [
            (block.home.file, self.arena.memory.block(block.place)) for block in arrival.blocks if block.home.slot < 0
        ]
        steps = self._steps(away, first)
        ready = self.arena.memory.written()  # what still reads there what lay there before

        def work() -> float:
            began = time.perf_counter()
            # A digest is of a whole block: what comes from files is there for all layers before the first one is.
            self._read_files(filed, ready)
            for step in steps:
                self.arena.memory.write(step.pairs, ready)
                arrival.landed.update(step.landed)
                if arrival.awaited:
                    self._wake()
            return time.perf_counter() - began

        def then(seconds: Any, error: Exception | None) -> None:
            arrival.done = True
            if error is not None:
                arrival.error = str(error)
            else:
                self.into.seconds += seconds
                self.into.bytes += len(arrival.blocks) * self.host.size
                self.into.blocks += len(arrival.blocks)
            for block in arrival.blocks:
                block.moving, block.arrival, block.lost = block.moving - 1, None, arrival.error
                self.settle(block)
            self._pump()

        self._hands["in"].do(work, then)

    def _read_files(self, filed: Sequence[tuple[File, Any]], ready: Any) -> None:
        for file, target in filed:
            assert self.files is not None
            self.files.read(file, self._bounce)
            self.arena.memory.write([(self._bounce, target)], ready)

    def _steps(self, away: Sequence[tuple[Table, int, Block]], first: int) -> list[_Step]:
        """What comes together, in order."""
        made: list[tuple[int, _Step]] = []
        held: dict[int, list[Block]] = {}
        for table, _, block in away:
            mine = held.setdefault(self._numbers[id(table.track)], [])
            if block.home.slot >= 0:
                mine.append(block)
        for number, blocks in held.items():
            track = self.arena.tracks[number]
            whole = len(blocks) * track.slab
            width = max(1, -(-_PIECE // track.slab), -(-max(_WORK, whole * track.streams // _STEPS) // max(1, whole)))
            # Views of all pieces, made by few calls: by the thread, each would be a wait for the interpreter's lock.
            size, used = width * track.slab, track.streams * track.slab
            pieces = [
                (here.narrow(1, 0, used).split(size, 1), there.narrow(1, 0, used).split(size, 1))
                for here, there in self._runs(blocks)
            ]
            for index, begin in enumerate(range(0, track.streams, width)):
                streams = range(begin, min(begin + width, track.streams))
                last = track.layers[streams[-1]]
                pairs = [(here[index], there[index]) for here, there in pieces]
                made.append((last + (last < first) * (1 << 30), _Step([(number, stream) for stream in streams], pairs)))
        made.sort(key=lambda item: item[0])
        return [step for _, step in made]

    def _runs(self, blocks: Sequence[Block]) -> Iterator[tuple[Any, Any]]:
        """Where blocks lie in host memory, and where they come to [count, size]; neighbours in both go together."""
        host, memory = self.host, self.arena.memory
        where = sorted((block.place, block.home.slot) for block in blocks)
        begin = 0
        for end in range(1, len(where) + 1):
            (place, slot), count = where[begin], end - begin
            if end == len(where) or not memory.strided or where[end] != (place + count, slot + count):
                yield host.run(slot, count), memory.blocks(place, count)
                begin = end

    def release(self, block: Block) -> None:
        """Nobody needs the block's copies any more."""
        home = block.home
        if home is None:
            return
        if home.slot >= 0:
            del self._held[home.slot]
        file, home.file = home.file, None
        home.release()
        if file is not None:
            self.drop_file(file)
        block.home = None

    # ------------------------------------------------------------------ without the device

    def adopt(self, cache: SessionCache, columns: Mapping[Table, Mapping[tuple[int, str], Any]]) -> None:
        """Put columns into an empty cache, in host memory. Raises OutOfBlocksError if there is not enough of it."""
        packed = {table: table.track.blocks(held, table.track.lowest(cache.length)) for table, held in columns.items()}
        slots: list[int] = []
        for _ in range(sum(len(blocks) for blocks in packed.values())):
            if (slot := self._slot()) < 0:
                for taken in slots:
                    self.host.give(taken)
                raise OutOfBlocksError("host memory for caches is used up")
            slots.append(slot)
        cache.move("cpu")
        cache.leave()
        for table in cache.tables:
            made: dict[int, Block] = {}
            for number, content in packed.get(table, {}).items():
                slot = slots.pop()
                self.host.bytes(slot)[: content.numel()].copy_(content)
                made[number] = self._held[slot] = Block(-1, Home(self.host, slot))
            table.adopt(made)


def _reusable(block: Block) -> bool:
    """Whether its slot can be had: what it holds lies in the arena as well, or in a file."""
    return block.home is not None and not block.moving and (block.place >= 0 or block.home.file is not None)
