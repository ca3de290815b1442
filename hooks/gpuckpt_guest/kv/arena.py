"""The arena: a device's cache memory in blocks, within a fixed budget, and the tables of those who use them.

A :class:`Table` is what one session has of one track: blocks in the order of its tokens, seen as one tensor for each
plane. Tokens are only ever written behind those that were read, so a block that is full does not change any more, and
tables share it until one of them writes into it. What a block holds stays the same thing wherever it lies: in a place
of the arena, or elsewhere for as long as it has been taken out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .layout import Forms, Plane, Track, least, tracks
from .memory import Memory, Range, grain, memory


class OutOfBlocksError(Exception):
    """There is no free block. Who asks is to see to it beforehand that there is one."""


class Block:
    """A range of tokens of all layers of a track.

    ``tables``: how many have it; ``seen``: in how many it is to be seen, and must lie in the arena; ``place``: where
    there, or -1; ``home``: its copy elsewhere, the same as what lies in the arena unless ``dirty``; ``moving``: how
    many copies of it are under way, and it keeps its place and home until they are made; ``arrival``: what brings it
    back; ``lost``: why what lies in its place is not what it was, if bringing it back has failed.
    """

    __slots__ = ("arrival", "dirty", "home", "lost", "moving", "place", "seen", "tables")

    def __init__(self, place: int, home: Any = None) -> None:
        self.place = place
        self.tables = 1
        self.seen = int(place >= 0)
        self.dirty = home is None
        self.home = home
        self.moving = 0
        self.arrival: Any = None
        self.lost = ""


class Arena:
    """Blocks of a device's memory. For use by one thread."""

    def __init__(self, memory: Memory, tracks: Sequence[Track], limit: int, *, pieces: int = 1 << 62) -> None:
        """``limit``: the most tokens of a session; ``pieces``: the most that the memory can show at once."""
        self.memory = memory
        self.tracks = tuple(tracks)
        self.limit = limit
        self.pieces = pieces  # that can still be shown
        self.released: Callable[[Block], None] = lambda block: None  # told of blocks that nobody has any more
        self.unseen: Callable[[Block], None] = lambda block: None  # and of those that no table sees any more
        self._free = list(range(memory.places))  # a heap: neighbours are taken together
        self._charged = 0

    @classmethod
    def build(
        cls,
        forms: Forms,
        windows: Mapping[int, int | None],
        *,
        device: Any,
        budget: int,
        limit: int,
        piece: int | None = None,
    ) -> Arena:
        """An arena of ``budget`` bytes for a model's caches.

        ``piece``: bytes of the smallest piece; by default what suits the budget. Raises ValueError if the budget does
        not hold a single block for each track.
        """
        rules = grain(device)
        piece = least(forms, windows, budget, rules.pieces) if piece is None else piece
        made, size = tracks(forms, windows, rules.granule, piece)
        places = budget // size
        if places < max(1, len(made)):
            least_mib = -((-size * max(1, len(made))) >> 20)
            raise ValueError(f"{budget >> 20} MiB for caches hold no session of this model; it takes {least_mib}")
        return cls(memory(device, places, size), made, _longest(made, places, limit), pieces=rules.pieces)

    @classmethod
    def small(cls, forms: Forms, windows: Mapping[int, int | None], *, device: Any, tables: int, limit: int) -> Arena:
        """An arena for so many sessions of at most ``limit`` tokens each."""
        rules = grain(device)
        made, size = tracks(forms, windows, rules.granule)
        places = tables * sum(track.end(limit) for track in made)
        return cls(memory(device, max(1, places), size), made, limit, pieces=rules.pieces)

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return max(0, len(self._free) + self._charged // -self.memory.size)

    @property
    def charged(self) -> int:
        """Bytes of the budget that are used outside of the blocks."""
        return self._charged

    def charge(self, bytes: int) -> None:
        """So many bytes of the device's memory are used, or not any more, by what does not lie in blocks."""
        self._charged += bytes
        if bytes > 0:
            self.memory.fit(self.memory.places * self.memory.size - self._charged, self._free)

    def trim(self) -> None:
        """Give the pages of free places back to the machine, where it can use them."""
        self.memory.trim(self._free)

    def take(self) -> int:
        """A place. Raises OutOfBlocksError."""
        if not self.free:
            raise OutOfBlocksError(f"all {self.memory.places} blocks are in use")
        return heapq.heappop(self._free)

    def give(self, place: int) -> None:
        """Nobody uses the place any more."""
        heapq.heappush(self._free, place)

    def drop(self, block: Block, *, seen: bool = False) -> None:
        """A table does not have the block any more; ``seen``: it has seen it until now."""
        block.tables -= 1
        block.seen -= seen
        if block.tables:
            if seen and not block.seen:
                self.unseen(block)
        elif not block.moving:
            self.end(block)

    def hide(self, blocks: Iterable[Block]) -> None:
        """A table does not see these blocks any more."""
        for block in blocks:
            block.seen -= 1
            if not block.seen:
                self.unseen(block)

    def end(self, block: Block) -> None:
        """Nobody has the block any more."""
        if block.place >= 0:
            self.give(block.place)
            block.place = -1
        self.released(block)


def _longest(made: Sequence[Track], places: int, limit: int) -> int:
    """The most tokens, at most ``limit``, that an arena can hold if they are read in one pass."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if sum(track.end(middle) for track in made) <= places:
            low = middle
        else:
            high = middle - 1
    return low


class Table:
    """The tokens that a session, or a branch, has in one track."""

    def __init__(self, arena: Arena, track: Track) -> None:
        self.arena = arena
        self.track = track
        self.blocks: dict[int, Block] = {}  # by number; those that a window has passed are gone
        self.shown = True  # the blocks lie in the arena and can be seen
        self._stride = track.end(arena.limit) * track.slab  # of a stream in the range
        self._range: Range = arena.memory.reserve(track.streams * self._stride)
        self._views: dict[tuple[int, str], Any] = {}
        self._room = (0, 0)  # tokens that may be written without a look

    # ------------------------------------------------------------------ reading and writing

    def plane(self, layer: int, name: str) -> Any:
        """A layer's keys or values as a tensor [1, heads, tokens, size], of which what was written may be touched."""
        if (found := self._views.get((layer, name))) is None:
            found = self._views[layer, name] = self._view(self.track.planes[layer, name])
        return found

    def _view(self, plane: Plane) -> Any:
        return self.track.shaped(
            plane, self._range.bytes, self._stride // self.track.record, plane.stream * self._stride
        )

    def room(self, first: int, end: int) -> None:
        """See to it that the tokens ``first`` to ``end`` can be written, and that nobody else sees it.

        Raises OutOfBlocksError; :meth:`lacking` tells beforehand.
        """
        if self._room[0] <= first and end <= self._room[1]:
            return
        if end > self.arena.limit:
            raise ValueError(f"{end} tokens are more than the {self.arena.limit} that a session can have")
        for number in self._numbers(first, end):
            block = self.blocks.get(number)
            if block is None:
                self._put(number, Block(self.arena.take()))
            elif block.tables > 1:
                memory, place = self.arena.memory, self.arena.take()
                memory.block(place).copy_(memory.block(block.place))
                self._put(number, Block(place))
                self.arena.pieces += self.track.streams  # it is seen where the other one was
                self.arena.drop(block, seen=True)
            else:
                block.dirty = True
        numbers = self._numbers(first, end)
        self._room = (first, numbers.stop * self.track.slab // self.track.record)

    def lacking(self, first: int, end: int) -> int:
        """How many blocks :meth:`room` would take."""
        found = (self.blocks.get(number) for number in self._numbers(first, end))
        return sum(block is None or block.tables > 1 for block in found)

    def copied(self, first: int, end: int) -> list[Block]:
        """The blocks that :meth:`room` would copy, because others have them too."""
        found = (self.blocks.get(number) for number in self._numbers(first, end))
        return [block for block in found if block is not None and block.tables > 1]

    def _numbers(self, first: int, end: int) -> range:
        return range(self.track.first(first), self.track.end(end))

    def _put(self, number: int, block: Block) -> None:
        try:
            self._show({number: block})
        except BaseException:
            self.arena.drop(block, seen=True)
            raise
        self.blocks[number] = block

    def forget(self, tokens: int) -> None:
        """The first ``tokens`` are not needed any more: blocks that hold nothing else go."""
        gone = tokens * self.track.record // self.track.slab
        while self.blocks and (number := next(iter(self.blocks))) < gone:
            self._drop(number)

    def trim(self, tokens: int) -> None:
        """Nothing behind the first ``tokens`` is needed: blocks that hold nothing else go."""
        end = self.track.end(tokens)
        while self.blocks and (number := next(reversed(self.blocks))) >= end:
            self._drop(number)
            self._room = (0, 0)

    def adopt(self, blocks: Mapping[int, Block]) -> None:
        """Have these blocks, which lie elsewhere. The table is empty and becomes hidden."""
        assert not self.blocks
        self.shown = False
        self.blocks = dict(blocks)

    # ------------------------------------------------------------------ sharing, hiding, ending

    def fork(self) -> Table:
        """Another table with the same blocks; either of them copies what it writes into."""
        made = Table(self.arena, self.track)
        made.shown = False
        for number, block in self.blocks.items():
            block.tables += 1
            made.blocks[number] = block
        if self.shown and made.pieces <= self.arena.pieces:  # else it is shown when there is room for that
            made.show()
        self._room = (0, 0)
        return made

    def hide(self) -> None:
        """Let go of the places, as far as this table is concerned."""
        if not self.shown:
            return
        self._range.clear()
        self.arena.pieces += self.pieces
        self.shown, self._room = False, (0, 0)
        self.arena.hide(self.blocks.values())

    def show(self) -> None:
        """See all blocks again, which must lie in the arena. Raises OSError; none of them is seen then."""
        if self.shown:
            return
        self.shown = True
        for block in self.blocks.values():
            block.seen += 1
        try:
            self._show(self.blocks)
        except BaseException:
            self.arena.pieces -= self.pieces  # hide() gives them back
            self.hide()
            raise

    @property
    def pieces(self) -> int:
        """What showing all blocks takes of what the memory can show at once."""
        return self.track.streams * len(self.blocks)

    def close(self) -> None:
        """The session has ended."""
        seen, self.shown = self.shown, False
        if seen:
            self._range.clear()
            self.arena.pieces += self.pieces
        while self.blocks:
            self.arena.drop(self.blocks.popitem()[1], seen=seen)

    def _drop(self, number: int) -> None:
        block = self.blocks.pop(number)
        if self.shown:
            self._conceal(number)
        self.arena.drop(block, seen=self.shown)

    def _show(self, blocks: Mapping[int, Block]) -> None:
        slab, stride = self.track.slab, self._stride
        streams = [(stream * stride, stream * slab) for stream in range(self.track.streams)]
        self._range.show(
            (
                (begin + number * slab, block.place, offset)
                for number, block in blocks.items()
                for begin, offset in streams
            ),
            slab,
        )
        self.arena.pieces -= self.track.streams * len(blocks)

    def _conceal(self, number: int) -> None:
        self.arena.pieces += self.track.streams
        for stream in range(self.track.streams):
            self._range.hide(self._at(stream, number), self.track.slab)

    def _at(self, stream: int, number: int) -> int:
        return stream * self._stride + number * self.track.slab


def blocks_of(tables: Iterable[Table]) -> Iterator[Block]:
    """The blocks of several tables, each once."""
    seen: set[int] = set()
    for table in tables:
        for block in table.blocks.values():
            if id(block) not in seen:
                seen.add(id(block))
                yield block
