"""A model whose layers' weights are on the device in turns only: the same bits as if all were there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpuckpt_guest.engine.model import prepare
from gpuckpt_guest.engine.probe import decoder_layers
from gpuckpt_guest.weights import PagedWeights, room

from tests.guest import driving
from tests.guest.driving import LAYERS, Driver, Letters, Running

PROMPT = [5, 9, 2, 7, 7, 1]


def paged(model: Any, slots: int) -> tuple[Any, PagedWeights]:
    layers = decoder_layers(model)
    each = max(sum(-(-it.nbytes // 256) * 256 for it in layer.parameters()) for layer in layers)
    weights = PagedWeights(layers, "cpu", each * slots)
    return prepare(model, Letters(), name="tiny", identity="tiny", weights=weights), weights


@pytest.fixture(params=["llama", "mixtral", "gpt2"])
def twins(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Two of the same model."""
    options = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4} if request.param == "gpt2" else {}
    made = driving.model(request.param, **options)
    return made, copy.deepcopy(made)


@pytest.mark.parametrize("slots", [2, 3, LAYERS])
def test_the_same_tokens(twins: tuple[Any, Any], slots: int) -> None:
    whole = Driver(prepare(twins[0], Letters(), name="tiny", identity="tiny"))
    loaded, weights = paged(twins[1], slots)
    some = Driver(loaded)
    try:
        assert len(weights.turns) == (
            LAYERS - slots + 2 if slots < LAYERS else 0
        ) and weights.bytes > weights.largest * (LAYERS - 1)
        wanted = [whole.write([*PROMPT, seed], 10) for seed in range(3)]
        several = [some.new() for _ in range(3)]
        running = some.do(lambda: [some.launch(one, [*PROMPT, seed], 10) for seed, one in enumerate(several)])
        assert [one.wait("done").generated for one in running] == wanted
        # Stopped between layers, with others in between.
        session = some.new()
        some.do(some.engine.stop_at, session, layer=2, step=1, once=True)
        stopped = some.begin(session, [*PROMPT, 0], 10)
        stopped.wait("paused")
        assert some.write([*PROMPT, 1], 10) == wanted[1]
        some.resume(session)
        assert stopped.wait("done").generated == wanted[0]
        loads = weights.loaded
        some.write([*PROMPT, 1], 4)
        assert weights.loaded > loads if slots < LAYERS else weights.loaded == loads
    finally:
        for driver in (whole, some):
            driver.close()
        weights.close()


def test_those_that_compute_at_a_time_share_what_comes(twins: tuple[Any, Any]) -> None:
    loaded, weights = paged(twins[1], 2)
    driver = Driver(loaded, max_batch=1)
    try:
        before = weights.loaded
        driver.write(PROMPT, 10)
        alone = weights.loaded - before
        assert alone >= 9 * LAYERS
        sessions = [driver.new() for _ in range(4)]
        before = weights.loaded
        running: list[Running] = []

        def begin(seed: int) -> None:
            """They do not begin at the same time, nor are they at the same layer then."""
            then = (1, lambda: begin(seed + 1)) if seed + 1 < len(sessions) else None
            running.append(driver.launch(sessions[seed], [*PROMPT, seed], 10, at=then))

        driver.do(begin, 0)
        for one in running:
            one.wait("done")
        assert len(running) == 4
        assert weights.loaded - before < 2 * alone
    finally:
        driver.close()
        weights.close()


def test_the_fewer_come_in_turns_the_more_there_is_room() -> None:
    layers = [torch.nn.Linear(64, 64) for _ in range(12)]
    each = 64 * 64 * 4 + 256
    for fit in range(2, 13):
        weights = PagedWeights([torch.nn.Linear(64, 64) for _ in layers], "cpu", fit * each)
        assert len(weights.turns) == (12 - fit + 2 if fit < 12 else 0)
        for _ in range(3):
            for layer in range(12):
                weights.need(layer)
                gaps = [weights.ahead(turn) for turn in weights._next(layer)]
                assert gaps == sorted(gaps)
        weights.close()
        assert weights.loaded <= 3 * len(weights.turns) + 2


def test_less_than_two_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="less than two layers"):
        PagedWeights(decoder_layers(driving.model()), "cpu", 1000)


def test_a_copy_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, weights = paged(driving.model(), 2)
    driver = Driver(loaded)

    def fails(*_: Any) -> None:
        raise RuntimeError("the bus is gone")

    wanted = driver.write(PROMPT, 5)
    with monkeypatch.context() as broken:
        broken.setattr(weights, "_copy", fails)
        turn = driver.begin(driver.new(), PROMPT, 5).wait("done")
    assert turn.reason == "error" and "the bus is gone" in turn.error
    for _ in range(2):  # what failed ahead of being needed may still be told once
        turn = driver.begin(driver.new(), PROMPT, 5).wait("done")
    assert turn.generated == wanted
    driver.close()
    weights.close()


def test_what_layers_share_stays() -> None:
    layers = [torch.nn.Linear(64, 64) for _ in range(3)]
    layers[1].weight = layers[0].weight
    weights = PagedWeights(layers, "cpu", 2 * (64 * 64 * 4 + 256))
    assert layers[0].weight.numel() == 64 * 64 and layers[2].weight.numel() == 0
    weights.need(2)
    assert layers[2].weight.shape == (64, 64)
    weights.close()


@pytest.mark.parametrize(("free", "wanted"), [(1000, None), (800, 590), (400, 270)])
def test_on_a_gpu_that_is_too_small_some_come_in_turns(
    monkeypatch: pytest.MonkeyPatch, free: int, wanted: int | None
) -> None:
    """Free memory, and what of it layers get: without asking a GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))
    assert room(700, 50, "cuda") == wanted
    assert room(700, 50, "cpu") is None
