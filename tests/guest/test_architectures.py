"""A generation that is stopped between any two layers gives the bits that it would have given, whatever the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hooks.gpuckpt_guest.checkpoint import Checkpoint, Ring
from hooks.gpuckpt_guest.engine.stepper import UnsupportedModelError
from hooks.gpuckpt_guest.kv.layers import SessionLayer

from . import trials
from .catalogue import CATALOGUE, FEWEST_ACCEPTED, Architecture
from .reference import build
from .subject import Subject, accept

BY_NAME = {architecture.name: architecture for architecture in CATALOGUE}
ACCEPTED = [pytest.param(architecture, id=architecture.name) for architecture in CATALOGUE if not architecture.refused]
REFUSED = [pytest.param(architecture, id=architecture.name) for architecture in CATALOGUE if architecture.refused]


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_stopping_changes_nothing(architecture: Architecture) -> None:
    """Each cut of each pass, in two data types, steered and not; padded; in lanes; forked; by the engine itself."""
    found = dict(trials.trials(architecture))
    assert [f"{name}: {failure}" for name, outcome in found.items() for failure in outcome.failures] == []
    idle = {name for name, outcome in found.items() if outcome.cuts == 0}
    alone = {"padded, float32", "padded, bfloat16", "lanes, float32", "lanes, bfloat16", "together"}
    assert idle <= (alone if architecture.alone else {"together"})


@pytest.mark.parametrize("architecture", ACCEPTED)
def test_verdict(architecture: Architecture) -> None:
    verdict = accept(architecture, build(architecture)).verdict
    assert verdict.layers >= 4
    assert verdict.batching == (not architecture.alone), verdict.alone
    assert architecture.alone in verdict.alone


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_with_the_reason(architecture: Architecture) -> None:
    model = build(architecture)
    with pytest.raises(UnsupportedModelError, match=re.escape(architecture.refused)):
        accept(architecture, model)
    assert "forward" not in vars(next(iter(model.modules())))


def test_the_catalogue_is_wide() -> None:
    assert len(BY_NAME) == len(CATALOGUE)
    assert len({architecture.model_type for architecture in CATALOGUE}) >= 55
    assert len({architecture.model_type for architecture in CATALOGUE if not architecture.refused}) >= FEWEST_ACCEPTED


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_next"])
def test_a_changed_bit_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(BY_NAME[name], "float32")
    restore = Ring.restore

    def flipped(ring: Ring, checkpoint: Checkpoint) -> tuple[Any, float]:
        state, took = restore(ring, checkpoint)
        state.view(torch.int32).flatten()[-1] ^= 1 << 20
        return state, took

    monkeypatch.setattr(Ring, "restore", flipped)
    outcome = trials.cuts(subject, 13, steered=False)
    assert any("logits" in failure for failure in outcome.failures)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "qwen2"])
def test_a_lost_column_of_a_window_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(BY_NAME[name], "float32")
    read = SessionLayer.read

    def lossy(layer: SessionLayer, low: int, high: int) -> Any:
        part = read(layer, low, high)
        if layer.window and low > 0:
            part.keys[..., :1, :] = 0
        return part

    monkeypatch.setattr(SessionLayer, "read", lossy)
    assert trials.cuts(subject, 6, steered=False).failures


@pytest.mark.usefixtures("inference")
def test_a_layer_that_runs_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(BY_NAME["llama"], "float32")
    go_on = Subject.go_on

    def again(subject: Subject, stopped: Any, cache: Any, ids: Any, edit: Any = None) -> Any:
        forward = go_on(subject, stopped, cache, ids, edit)
        if stopped.layer == 2:
            subject.stepper.layers[0](forward.hidden, **forward.calls[0].kwargs)
        return forward

    monkeypatch.setattr(Subject, "go_on", again)
    outcome = trials.cuts(subject, 6, steered=False)
    assert any("layers ran [2, 1, 1, 1] times" in failure for failure in outcome.failures)
