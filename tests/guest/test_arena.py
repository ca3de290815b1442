"""The arena against plain lists: random histories of writing, sharing, hiding, bringing elsewhere, ending."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gpuckpt_guest.kv.arena import Arena, Block, OutOfBlocksError, Table, blocks_of
from gpuckpt_guest.kv.layout import Track, tracks
from gpuckpt_guest.kv.memory import HostMemory
from hypothesis import given, settings
from hypothesis import strategies as st

FORMS = {
    0: {"keys": (2, 24, torch.float32), "values": (2, 24, torch.float32)},
    1: {"keys": (1, 40, torch.float32), "values": (1, 8, torch.bfloat16)},  # not as large, and of two types
    3: {"keys": (2, 24, torch.float32), "values": (2, 24, torch.float32)},
}
LIMIT = 3000


def layout(window: int | None = None, granule: int = 4096) -> tuple[list[Track], int]:
    return tracks(FORMS, {0: None, 1: None, 2: None, 3: window}, granule)


# ---------------------------------------------------------------------- where things lie


@pytest.mark.parametrize("granule", [4096, 2 << 20])
def test_planes_do_not_overlap_and_blocks_are_large(granule: int) -> None:
    made, block = layout(7, granule)
    assert [track.window for track in made] == [None, 7] and {layer for layer, _ in made[0].planes} == {0, 1}
    for track in made:
        assert track.slab % granule == 0 and 1 << 20 <= track.streams * track.slab <= block
        places = sorted((plane.stream, plane.offset, plane.offset + plane.bytes) for plane in track.planes.values())
        for one, other in itertools.pairwise(places):
            assert one[0] != other[0] or one[2] <= other[1]
        assert all(end <= track.record and begin % 16 == 0 for _, begin, end in places)


def test_many_layers_share_streams_where_pieces_are_large() -> None:
    forms = {layer: {"keys": (40, 128, torch.bfloat16), "values": (40, 128, torch.bfloat16)} for layer in range(40)}
    (track,), block = tracks(forms, dict.fromkeys(range(40)), 2 << 20)
    assert track.streams == 32 and block == 64 << 20 and track.record == 2 * 20480
    assert {plane.stream for plane in track.planes.values()} == set(range(32))


def test_blocks_of_tokens() -> None:
    (track,), _ = layout()
    for tokens in (1, 100, 1365, 2730, 2731):
        assert track.first(tokens - 1) <= track.end(tokens) - 1
        assert (track.end(tokens) - 1) * track.slab < tokens * track.record <= track.end(tokens) * track.slab


# ---------------------------------------------------------------------- random histories


@dataclass
class Session:
    """A table as it should be: the number that was written for each token; what a window has passed may be gone."""

    table: Table
    numbers: list[int] = field(default_factory=list)
    forgotten: int = 0


def write(one: Session, new: list[int]) -> None:
    first, end = len(one.numbers), len(one.numbers) + len(new)
    one.table.room(first, end)
    for (layer, name), plane in one.table.track.planes.items():
        # 8 bits are exact in all types; each plane has its own numbers.
        wanted = torch.tensor([(number * 7 + layer + len(name)) % 251 for number in new], dtype=plane.dtype)
        one.table.plane(layer, name)[..., first:end, :] = wanted[None, None, :, None]
    one.numbers += new


def check(one: Session) -> None:
    low, high = one.forgotten, len(one.numbers)
    for (layer, name), plane in one.table.track.planes.items():
        found = one.table.plane(layer, name)[..., low:high, :]
        assert found.shape == (1, plane.heads, high - low, plane.size)
        wanted = [(number * 7 + layer + len(name)) % 251 for number in one.numbers[low:]]
        assert (found == torch.tensor(wanted, dtype=plane.dtype)[None, None, :, None]).all()


class Elsewhere:
    """Where blocks are that lie in no place: copies of their bytes."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.held: dict[Block, Any] = {}

    def bring(self, blocks: list[Block]) -> None:
        for block in blocks:
            self.held[block] = self._arena.memory.block(block.place).clone()
            self._arena.memory.block(block.place).fill_(255)  # whoever still reads there is found out
            self._arena.give(block.place)
            block.place = -1

    def back(self, table: Table) -> bool:
        missing = [block for block in table.blocks.values() if block.place < 0]
        if len(missing) > self._arena.free:
            return False
        for block in missing:
            block.place = self._arena.take()
            self._arena.memory.block(block.place).copy_(self.held.pop(block))
        table.show()
        return True


STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "fork", "forget", "hide", "show", "close"]), st.integers(0, 7),
              st.sampled_from([1, 1, 2, 30, 400, 1500])),
    max_size=40,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_random_histories(steps: list[tuple[str, int, int]]) -> None:
    (track,), size = layout()
    arena = Arena(HostMemory(9, size), [track], LIMIT)
    elsewhere = Elsewhere(arena)
    sessions = [Session(Table(arena, track))]
    number = 0
    for what, which, count in steps:
        one = sessions[which % len(sessions)]
        if what == "write" and one.table.shown and len(one.numbers) + count <= LIMIT:
            end = len(one.numbers) + count
            if one.table.lacking(len(one.numbers), end) > arena.free:
                with pytest.raises(OutOfBlocksError):
                    one.table.room(len(one.numbers), end)
            else:
                before = arena.free - one.table.lacking(len(one.numbers), end)
                write(one, list(range(number, number + count)))
                assert arena.free >= before
                number += count
        elif what == "fork" and len(sessions) < 6:
            sessions.append(Session(one.table.fork(), list(one.numbers), one.forgotten))
        elif what == "forget":
            one.forgotten = max(one.forgotten, min(len(one.numbers), count))
            one.table.forget(one.forgotten)
        elif what == "hide":
            one.table.hide()
            elsewhere.bring([block for block in one.table.blocks.values() if not block.seen and block.place >= 0])
        elif what == "show" and not one.table.shown:
            elsewhere.back(one.table)
        elif what == "close" and len(sessions) > 1:
            sessions.remove(one)
            one.table.close()
        for each in sessions:
            if each.table.shown:
                check(each)
        blocks = list(blocks_of(each.table for each in sessions))
        assert arena.free + sum(block.place >= 0 for block in blocks) == 9
        assert len({block.place for block in blocks if block.place >= 0}) == sum(block.place >= 0 for block in blocks)
        for block in blocks:
            having = [each.table for each in sessions if block in each.table.blocks.values()]
            assert (block.tables, block.seen) == (len(having), sum(table.shown for table in having))


# ---------------------------------------------------------------------- costs and ends


def test_a_token_costs_the_same_however_many_there_are() -> None:
    (track,), size = layout()
    arena = Arena(HostMemory(12, size), [track], LIMIT)
    shown: list[int] = []

    class Watched(Table):
        def _show(self, blocks: Mapping[int, Block]) -> None:
            shown.extend(blocks)
            super()._show(blocks)

    one = Session(Watched(arena, track))
    for token in range(2800):
        write(one, [token])
    assert shown == list(range(track.end(2800)))  # each block once, and nothing is copied
    check(one)


def test_a_branch_copies_one_block_and_shares_the_rest() -> None:
    (track,), size = layout()
    arena = Arena(HostMemory(12, size), [track], LIMIT)
    parent = Session(Table(arena, track))
    write(parent, list(range(2800)))
    before = arena.free
    child = Session(parent.table.fork(), list(parent.numbers))
    assert arena.free == before
    write(child, [9])
    write(parent, [8])  # the last one that has it need not copy it
    assert arena.free == before - 1
    check(child)
    check(parent)
    child.table.close()
    parent.table.close()
    assert arena.free == 12


def test_addresses_go_with_the_last_view() -> None:
    def there(address: int) -> bool:
        """Whether that is an address of a range: a piece of a block, or room for one. It may be others' by now."""
        with open("/proc/self/maps") as file:
            for line in file:
                first, end = (int(part, 16) for part in line.split()[0].split("-"))
                if first <= address < end:
                    return "gpuckpt-kv" in line or line.split()[1].startswith("---")
        return False

    (track,), size = layout()
    memory = HostMemory(4, size)
    arena = Arena(memory, [track], LIMIT)
    table = Table(arena, track)
    table.room(0, 100)
    view = table.plane(0, "keys")[..., :10, :]
    view.fill_(3)
    shown = view.data_ptr()
    room = shown + (LIMIT - 1) * track.record  # of a token that is not there yet
    del table
    gc.collect()
    assert (view == 3).all() and there(shown) and there(room)
    del view
    gc.collect()
    assert not there(shown) and not there(room)


def test_a_block_must_be_of_pages() -> None:
    with pytest.raises(ValueError, match="no multiple of a page"):
        HostMemory(1, 1000)
