"""Caches against plain lists: random histories of reading, forking, flying together, giving up, moving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from gpuckpt_guest.kv.cache import Blueprint, Lanes, SessionCache
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

WINDOW = 6
HEADS, SIZE = 2, 3


def blueprint() -> Blueprint:
    return Blueprint(
        AutoConfig.for_model(
            "gemma2",
            num_hidden_layers=2,
            hidden_size=8,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=SIZE,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


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
        st.sampled_from(["read", "fork", "fly", "give up", "split", "move"]), st.integers(0, 7), st.integers(1, 9)
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_random_histories(steps: list[tuple[str, int, int]]) -> None:
    plan, numbers = blueprint(), Numbers()
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
        elif what == "move":
            one.cache.move("cpu")
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
                    child.abandon()
            else:
                lanes.release()
    for one in sessions:
        assert one.cache.length == len(one.columns)
        for layer in range(2):
            write(one.cache, layer, [[7777]], [one.columns])


@settings(max_examples=60, deadline=None)
@given(reads=st.lists(st.integers(1, 9), min_size=1, max_size=6), pending=st.integers(0, 3))
def test_saved_and_loaded(reads: list[int], pending: int) -> None:
    plan, numbers = blueprint(), Numbers()
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
    plan.learn(one.cache)
    tensors = {name: tensor.clone() for name, tensor in one.cache.tensors()}
    other.load(one.cache.length, one.cache.facts(), tensors, "cpu", (1, pending))
    if half:
        write(other, 1, [half], [one.columns])
        other.commit(pending)
        one.columns += half
    for layer in range(2):
        write(other, layer, [[7777]], [one.columns])


def test_what_does_not_fit_is_not_loaded() -> None:
    plan = blueprint()
    one = plan.session()
    for layer in range(2):
        write(one, layer, [[1, 2, 3]], [[]])
    one.commit(3)
    plan.learn(one)
    tensors, facts = dict(one.tensors()), one.facts()
    for length, wrong_facts, wrong in (
        (4, facts, tensors),
        (3, facts[:1], tensors),
        (3, facts, {**tensors, "1.keys": tensors["1.keys"][..., :2, :]}),
        (3, facts, {**tensors, "1.keys": tensors["1.keys"][0]}),
    ):
        with pytest.raises((ValueError, KeyError)):
            plan.session().load(length, wrong_facts, wrong, "cpu")


def test_appending_copies_nothing_but_now_and_then() -> None:
    """A token costs its own bytes: the buffers move a number of times that grows with the logarithm of the length."""
    cache = blueprint().session()
    places = set()
    for number in range(2000):
        for layer in range(2):
            keys = columns([number])
            cache.update(keys, keys, layer)
        cache.commit(1)
        places.add(cache.layers[1].segments[-1].keys.data_ptr())
    assert len(places) <= 10
    # And the window's layer does not keep what it will never read.
    assert cache.layers[0].segments[-1].keys.shape[-2] < 200
