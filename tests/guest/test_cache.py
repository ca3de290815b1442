"""Caches against plain lists: random histories of reading, forking, flying together, giving up, leaving, ending."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pytest
import torch
from gpuckpt_guest.kv.arena import Arena
from gpuckpt_guest.kv.cache import Blueprint, SessionCache
from gpuckpt_guest.kv.lanes import Lanes
from gpuckpt_guest.kv.pager import Pager
from gpuckpt_guest.kv.snapshot import Snapshot
from gpuckpt_guest.kv.store import HostMemoryPool
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache

WINDOW = 6
HEADS, SIZE = 2, 3


class Plan:
    """Caches of a tiny model with a window and without, in an arena with a pager."""

    def __init__(self, limit: int = 4096) -> None:
        config = AutoConfig.for_model(
            "gemma2",
            num_hidden_layers=2,
            hidden_size=8,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=SIZE,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
        self.blueprint = Blueprint(config)
        seen = DynamicCache(config=config)
        for layer in range(2):
            seen.update(columns([1]), columns([1]), layer)
        self.blueprint.learn(seen)
        self.arena = Arena.small(self.blueprint.forms, self.blueprint.windows, device="cpu", tables=16, limit=limit)
        self.wakes = Event()
        pool = HostMemoryPool(self.arena.memory.size * 32, self.arena.memory.size, pinned=False)
        self.pager = Pager(self.arena, pool, None, self.wakes.set)

    def session(self) -> SessionCache:
        return self.blueprint.session(self.arena)

    def leave(self, cache: SessionCache) -> None:
        self.pager.leave(cache)
        self.until(lambda: self.pager.left(cache))

    def bring(self, cache: SessionCache) -> None:
        self.pager.bring(cache, "cpu")
        self.until(lambda: not self.pager.arriving(cache))

    def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert self.wakes.wait(60)
            self.wakes.clear()
            self.pager.poll()


@dataclass
class Model:
    """A session as it should be: for each layer the column numbers that were written, in order."""

    cache: SessionCache
    columns: list[int] = field(default_factory=list)


def columns(numbers: list[int]) -> Any:
    """Keys whose values tell which token they belong to."""
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(1, HEADS, len(numbers), SIZE).clone()


def write(cache: Any, layer: int, new: list[list[int]], before: list[list[int]]) -> None:
    """One layer of a pass: write ``new``, and see that what comes back is what was there and is new."""
    keys = torch.cat([columns(row) for row in new])
    found, values = cache.update(keys, -keys, layer)
    window = WINDOW if layer == 0 else None
    longest = max(len(row) for row in before)
    seen = min(longest, window - 1) if window else longest
    length, offset = cache.get_mask_sizes(len(new[0]), layer)
    assert found.shape[-2] == length == seen + len(new[0]) and offset == longest - seen
    assert torch.equal(values, -found)
    for row, (fresh, old) in enumerate(zip(new, before, strict=True)):
        kept = old[len(old) - min(len(old), seen) :]
        padding = [0] * (seen - len(kept))
        assert found[row, 0, :, 0].tolist() == [*padding, *kept, *fresh]


class Numbers:
    """Each token of the test has a number of its own."""

    def __init__(self) -> None:
        self.last = 0

    def take(self, count: int) -> list[int]:
        self.last += count
        return list(range(self.last - count + 1, self.last + 1))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "fork", "fly", "give up", "split", "leave", "end"]),
        st.integers(0, 7),
        st.integers(1, 9),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_random_histories(steps: list[tuple[str, int, int]]) -> None:
    plan, numbers = Plan(), Numbers()
    sessions = [Model(plan.session())]
    for what, which, count in steps:
        one = sessions[which % len(sessions)]
        if what == "read":
            new = numbers.take(count)
            for layer in range(2):
                write(one.cache, layer, [new], [one.columns])
            one.cache.commit(count)
            one.columns += new
        elif what == "give up":  # a pass that is abandoned behind its first layer leaves nothing
            write(one.cache, 0, [numbers.take(count)], [one.columns])
            one.cache.abandon()
        elif what == "fork" and len(sessions) < 6:
            sessions.append(Model(one.cache.fork(), list(one.columns)))
        elif what == "leave":
            plan.leave(one.cache)
            plan.bring(one.cache)
        elif what == "end" and len(sessions) > 1:
            sessions.remove(one)
            one.cache.close()
        elif what in ("fly", "split"):
            rows = sessions[: 1 + count % len(sessions)]
            rows = [row for row in rows if row.columns]
            if not rows:
                continue
            lanes = Lanes([row.cache for row in rows])
            for _ in range(count):
                new_rows = [numbers.take(1) for _ in rows]
                for layer in range(2):
                    write(lanes, layer, new_rows, [row.columns for row in rows])
                lanes.commit(1)
                for row, new in zip(rows, new_rows, strict=True):
                    row.columns += new
            if what == "split":  # one leaves behind the first layer, with what it has written there; all finish alone
                new_rows = [numbers.take(1) for _ in rows]
                write(lanes, 0, new_rows, [row.columns for row in rows])
                lanes.release()
                for row, new in zip(rows, new_rows, strict=True):
                    child = row.cache.fork()
                    for cache in (row.cache, child):
                        write(cache, 1, [new], [row.columns])
                        cache.commit(1)
                    row.columns += new
                    write(child, 0, [[0]], [row.columns])
                    child.close()
            else:
                lanes.release()
    for one in sessions:
        assert one.cache.length == len(one.columns)
        for layer in range(2):
            write(one.cache, layer, [[7777]], [one.columns])
        one.cache.close()
    assert plan.arena.free == plan.arena.memory.places and plan.pager.host.free == 32
    plan.pager.close()


@settings(max_examples=60, deadline=None)
@given(reads=st.lists(st.integers(1, 9), min_size=1, max_size=6), pending=st.integers(0, 3))
def test_saved_and_loaded(reads: list[int], pending: int) -> None:
    plan, numbers = Plan(), Numbers()
    one = Model(plan.session())
    for count in reads:
        new = numbers.take(count)
        for layer in range(2):
            write(one.cache, layer, [new], [one.columns])
        one.cache.commit(count)
        one.columns += new
    half = numbers.take(pending)
    if half:
        write(one.cache, 0, [half], [one.columns])
    other = plan.session()
    snapshot = Snapshot(plan.pager, one.cache)
    tensors = dict(snapshot.tensors())
    snapshot.release()
    for name, tensor in one.cache.tensors():
        assert torch.equal(tensors[name], tensor)
    plan.pager.adopt(other, other.load(one.cache.length, one.cache.facts(), tensors, "cpu", (1, pending)))
    plan.bring(other)
    if half:
        write(other, 1, [half], [one.columns])
        other.commit(pending)
        one.columns += half
    for layer in range(2):
        write(other, layer, [[7777]], [one.columns])


def test_what_does_not_fit_is_not_loaded() -> None:
    plan = Plan()
    one = plan.session()
    for layer in range(2):
        write(one, layer, [[1, 2, 3]], [[]])
    one.commit(3)
    tensors, facts = dict(one.tensors()), one.facts()
    for length, wrong_facts, wrong in (
        (4, facts, tensors),
        (3, facts[:1], tensors),
        (3, facts, {**tensors, "1.keys": tensors["1.keys"][..., :2, :]}),
        (3, facts, {**tensors, "1.keys": tensors["1.keys"][0]}),
    ):
        with pytest.raises((ValueError, KeyError)):
            plan.session().load(length, wrong_facts, wrong, "cpu")


def test_a_window_does_not_keep_what_it_will_never_read() -> None:
    plan = Plan(limit=1 << 17)
    cache = plan.session()
    per_block = max(table.track.slab // table.track.record for table in cache.tables)
    for _ in range(3):
        for layer in range(2):
            keys = columns(list(range(per_block)))
            cache.update(keys, keys, layer)
        cache.commit(per_block)
        cache.room(1)
    windowed, whole = sorted(cache.tables, key=lambda table: len(table.blocks))
    assert len(windowed.blocks) <= 2 and len(whole.blocks) >= 3
