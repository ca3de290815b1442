"""A model as the engine takes it, beside an untouched copy, and what the scheduler does with a pass, step by step."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hooks.gpuckpt_guest.checkpoint import Ring
from hooks.gpuckpt_guest.engine.model import Loaded, prepare
from hooks.gpuckpt_guest.engine.probe import batch_inputs, carried, decoder_layers
from hooks.gpuckpt_guest.engine.steering import Edit, apply
from hooks.gpuckpt_guest.engine.stepper import Forward
from hooks.gpuckpt_guest.kv.arena import Arena
from hooks.gpuckpt_guest.kv.cache import SessionCache
from hooks.gpuckpt_guest.kv.lanes import Lanes

from .catalogue import FEATURES, Architecture
from .reference import Plain, build


class Subject:
    """One architecture in one data type: the engine's copy, with its layers' calls counted, and the untouched one."""

    def __init__(self, architecture: Architecture, dtype: str) -> None:
        model = build(architecture, dtype)
        self.plain = Plain(copy.deepcopy(model))
        self.ran: Counter[int] = Counter()
        for index, layer in enumerate(decoder_layers(model)):
            layer.forward = _counted(layer.forward, self.ran, index)
        self.loaded = accept(architecture, model)
        self.stepper = self.loaded.stepper
        self.layout = self.loaded.verdict.layout
        self.layers = self.loaded.verdict.layers
        self.ring = Ring(1 << 16, "cpu")
        plan = self.loaded.blueprint
        self._arena = Arena.small(plan.forms, plan.windows, device="cpu", tables=64, limit=512)

    def cache(self) -> SessionCache:
        """An empty one."""
        return self.loaded.blueprint.session(self._arena)

    def begin(self, cache: SessionCache | Lanes, ids: Any) -> Forward:
        """The prologue of a pass, as the scheduler makes it."""
        if isinstance(cache, Lanes):
            return self.stepper.begin(batch_inputs(self.stepper, ids, cache), cache)
        return self.stepper.begin(self.stepper.inputs(ids, past=[cache.length]), cache)

    def run(self, forward: Forward, to: int) -> Forward:
        """Run the layers up to ``to``."""
        while forward.layer < to:
            self.stepper.step(forward)
        return forward

    def stop(self, forward: Forward) -> Stopped:
        """What a paused session keeps of a pass; all else is forgotten."""
        given = {name: dict(container) for name, container in carried(forward)}
        return Stopped(forward.layer, forward.executed, self.ring.save(forward.hidden), given)

    def go_on(self, stopped: Stopped, cache: SessionCache | Lanes, ids: Any, edit: Edit | None = None) -> Forward:
        """Go on from it: the prologue again, then the hidden state in its place."""
        forward = self.begin(cache, ids)
        state, _ = self.ring.restore(stopped.checkpoint)
        if edit is not None:
            state = apply(edit, state, self.layout, cache.length)
        forward.layer, forward.executed, forward.hidden = stopped.layer, stopped.executed, state
        for name, container in carried(forward):
            container.update(stopped.given.get(name, {}))
        return forward

    def land(self, forward: Forward, cache: SessionCache | Lanes) -> Any:
        """Run the rest, and the head."""
        self.run(forward, self.layers)
        if forward.executed != self.layers:
            raise AssertionError(f"{forward.executed} of {self.layers} layers ran")
        logits = self.stepper.head(forward).clone()
        cache.commit(forward.tokens)
        return logits

    def whole(self, cache: SessionCache, ids: Any) -> Any:
        """A pass without a stop."""
        return self.land(self.begin(cache, ids), cache)

    def edit(self, cut: int) -> Edit:
        """One kind of edit for each cut: of all tokens, or of some."""
        vector = torch.randn(FEATURES, generator=torch.Generator().manual_seed(cut)).to(self.loaded.dtype)
        return (
            Edit("scale", cut, 1.5),
            Edit("add", cut, 0.5, vector, first=2),
            Edit("project", cut, 1.0, vector),
            Edit("set", cut, 1.0, vector, first=3, last=5),
        )[cut % 4]


@dataclass
class Stopped:
    """A pass between two layers, as data."""

    layer: int
    executed: int
    checkpoint: Any
    given: dict[str, dict[Any, Any]]


def _counted(forward: Callable[..., Any], ran: Counter[int], index: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        ran[index] += 1
        return forward(*args, **kwargs)

    return call


def accept(architecture: Architecture, model: Any) -> Loaded:
    """What the engine makes of the model. Raises UnsupportedModelError if it refuses it."""
    return prepare(model, _Letters(), name=architecture.name, identity=architecture.name)


class _Letters:
    """Stands for a tokenizer: each token is a letter."""

    eos_token_id = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)
