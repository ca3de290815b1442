"""A model whose layers' weights are on the device in turns only: the same bits as if all were there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpuckpt_guest.engine.model import prepare
from gpuckpt_guest.engine.probe import decoder_layers
from gpuckpt_guest.weights import PagedWeights

from tests.guest import driving
from tests.guest.driving import LAYERS, Driver, Letters

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
        assert weights.slots == slots and weights.bytes > weights.largest * (LAYERS - 1)
        wanted = [whole.write([*PROMPT, seed], 10) for seed in range(3)]
        running = [some.begin(some.new(), [*PROMPT, seed], 10) for seed in range(3)]  # they take turns, or fly together
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
    weights = PagedWeights(layers, "cpu", 1 << 20)
    assert layers[0].weight.numel() == 64 * 64 and layers[2].weight.numel() == 0
    weights.need(2)
    assert layers[2].weight.shape == (64, 64)
    weights.close()
