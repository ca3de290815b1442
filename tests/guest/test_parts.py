"""Text, sampling, steering, checkpoints: each by itself."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from gpuckpt_guest.checkpoint import Checkpoint, Ring
from gpuckpt_guest.engine import sampling, tail
from gpuckpt_guest.engine.sampling import Sampling
from gpuckpt_guest.engine.steering import Edit, Layout, apply
from gpuckpt_guest.engine.text import TextStream
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest import driving

# ---------------------------------------------------------------------- text


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8: characters come in pieces."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), stops=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_comes_whole_and_ends_at_the_first_stop(text: str, stops: list[str]) -> None:
    stream, out = TextStream(Bytes(), stops), ""
    for token in text.encode():
        out += stream.add(token)
        if stream.stopped is not None:
            break
    out += stream.finish()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert out == stream.text
    if not ends:
        assert out == text and stream.stopped is None
    else:
        # The text ends before a stop string that was complete at the earliest possible token.
        assert stream.stopped in stops
        assert text.startswith(out + stream.stopped)
        assert len(out) + len(stream.stopped) <= min(ends) + 4


def test_a_copy_of_a_text_goes_on_by_itself() -> None:
    stream = TextStream(Bytes(), ["END"])
    for token in b"one EN":
        stream.add(token)
    other = stream.copy()
    assert stream.add(ord("D")) == "" and stream.stopped == "END"
    assert other.add(ord("!")) == "EN!" and other.stopped is None
    assert (stream.text, other.text) == ("one ", "one EN!")


# ---------------------------------------------------------------------- sampling


def test_greedy_and_scores() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert sampling.draw(logits, Sampling(), sampling.generator(1)) == 1
    scores = sampling.scores(logits, 2, 2)
    total = math.log(sum(math.exp(x) for x in logits.tolist()))
    assert scores.chosen == pytest.approx(1 - total, abs=1e-6)
    assert [token for token, _ in scores.top] == [1, 3] or [token for token, _ in scores.top] == [3, 1]
    assert sampling.entropy(torch.zeros(8)) == pytest.approx(math.log(8))


def test_draws_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    random = sampling.generator(3)
    counts = [0, 0, 0, 0]
    for _ in range(4000):
        counts[sampling.draw(logits, Sampling(temperature=1.0), random)] += 1
    for count, share in zip(counts, (0.5, 0.3, 0.15, 0.05), strict=True):
        assert abs(count / 4000 - share) < 5 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        (Sampling(temperature=1.0, top_p=0.5), {0}),
        (Sampling(temperature=1.0, top_p=0.51), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.8), {0, 1}),
        (Sampling(temperature=1.0, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.9), {0, 1, 2}),
        (Sampling(temperature=1e-3), {0}),
    ],
)
def test_what_is_cut_off_never_comes(how: Sampling, allowed: set[int]) -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    random = sampling.generator(4)
    assert {sampling.draw(logits, how, random) for _ in range(300)} <= allowed


# ---------------------------------------------------------------------- steering


def test_edits() -> None:
    layout = Layout(rows=0, tokens=1)
    hidden = torch.randn(1, 5, 4)
    kept = hidden.clone()
    vector = torch.tensor([1.0, 2.0, 0.0, -1.0])
    assert torch.equal(apply(Edit("scale", 1, 0.5), hidden, layout, 0), hidden * 0.5)
    assert torch.equal(apply(Edit("add", 1, 2.0, vector), hidden, layout, 0), hidden + 2 * vector)
    assert torch.equal(apply(Edit("set", 1, 3.0, vector), hidden, layout, 0), (3 * vector).expand(1, 5, 4))
    projected = apply(Edit("project", 1, 1.0, vector), hidden, layout, 0)
    assert (projected @ vector).abs().max() < 1e-5
    # Only the tokens that are meant: positions 12 and 13 of a pass that begins at 10.
    part = apply(Edit("scale", 1, 0.0, first=12, last=14), hidden, layout, 10)
    assert torch.equal(part[:, :2], hidden[:, :2]) and torch.equal(part[:, 4:], hidden[:, 4:])
    assert not part[:, 2:4].any()
    assert apply(Edit("scale", 1, 0.0, first=20), hidden, layout, 10) is hidden
    assert torch.equal(hidden, kept)


# ---------------------------------------------------------------------- checkpoints


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=40), drops=st.lists(st.integers(0, 60), max_size=40))
def test_a_ring_never_loses_a_bit(sizes: list[int], drops: list[int]) -> None:
    ring = Ring(4096, "cpu")
    held = []
    for index, size in enumerate(sizes):
        tensor = torch.full((size,), float(index)) + torch.arange(size)
        held.append((ring.save(tensor), tensor.clone()))
        if index < len(drops) and drops[index] < len(held):
            ring.drop(held.pop(drops[index])[0])
    for checkpoint, tensor in held:
        found, _ = ring.restore(checkpoint)
        assert torch.equal(found, tensor)
        assert checkpoint.complete_us is not None and checkpoint.complete_us > 0
    places = sorted(
        (checkpoint._place, checkpoint._place + checkpoint.bytes) for checkpoint, _ in held if checkpoint.pinned
    )
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(places))


def test_a_tensor_larger_than_the_ring_is_kept_all_the_same() -> None:
    ring = Ring(1024, "cpu")
    tensor = torch.randn(3, 1000, dtype=torch.float32).to(torch.bfloat16)
    checkpoint = ring.save(tensor)
    assert torch.equal(ring.restore(checkpoint)[0], tensor) and not checkpoint.pinned
    strided = torch.randn(8, 8).t()
    assert torch.equal(ring.restore(ring.save(strided))[0], strided)


def test_the_copy_is_made_elsewhere() -> None:
    """What the caller waits for is the dispatch: the copies before may take as long as they like."""
    ring = Ring(4 << 20, "cpu")
    gate = threading.Event()

    class Slow(Checkpoint):
        """One whose place in memory takes its time to come."""

        def home(self) -> Any:
            gate.wait(60)
            return Checkpoint.home(self)

    source = torch.zeros(100_000)
    ring._copier.start(Slow(source.shape, source.dtype, source.nbytes, _source=source))
    large = torch.arange(100_000.0)
    checkpoint = ring.save(large)
    assert not checkpoint.done and checkpoint.complete_us is None
    # A small one is not handed over: it is there before those that were begun earlier.
    small = ring.save(torch.arange(4.0))
    assert small.done and small.wait().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert small.copy_us is not None and small.complete_us is not None and small.complete_us >= small.copy_us
    gate.set()
    assert torch.equal(checkpoint.wait(), large) and checkpoint.done


def test_a_checkpoint_goes_with_its_last_user() -> None:
    """Branches share their parent's: the place in the ring is free again when the last of them is gone."""
    ring = Ring(1 << 16, "cpu")
    held = ring.save(torch.arange(4.0))
    held.users += 1
    ring.release(held)
    assert held.pinned and held.wait().tolist() == [0.0, 1.0, 2.0, 3.0]
    ring.release(held)
    assert not held.pinned


# ---------------------------------------------------------------------- the way to the logits


@pytest.mark.parametrize(
    ("kind", "more", "direct"),
    [
        ("llama", {}, True),
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
        ("granite", {"logits_scaling": 3.0}, False),
    ],
)
def test_a_norm_and_a_head_are_called_directly_where_nothing_else_follows(
    kind: str, more: dict[str, Any], direct: bool
) -> None:
    made = driving.loaded(kind, **more)
    try:
        assert made.verdict.direct_head is direct
        with torch.inference_mode():
            cache = driving.cache(made)
            forward = made.stepper.begin(made.stepper.inputs(torch.tensor([[3, 1, 4, 1, 5]]), past=[0]), cache)
            for _ in made.stepper.layers:
                made.stepper.step(forward)
            own = made.stepper.epilogue(forward, forward.hidden)
            assert torch.equal(made.stepper.head(forward), own)
            found = tail.find(made.stepper, forward)
            assert found is not None
            assert tail.agrees(found, made.stepper, forward, torch.Generator().manual_seed(0)) is direct
    finally:
        made.stepper.close()


@pytest.mark.parametrize("kind", ["llama", "modernbert-decoder"])
def test_the_last_token_is_cut_out_where_the_model_does_it(kind: str) -> None:
    """Behind the norm, before what multiplies matrices: those of one row and of many add up in another order."""
    made = driving.loaded(kind, bos_token_id=1, eos_token_id=2)
    try:
        assert isinstance(made.stepper.tail, tail.Tail) and made.stepper.tail.cut == 1
    finally:
        made.stepper.close()
