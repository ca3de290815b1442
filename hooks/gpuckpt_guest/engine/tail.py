"""From the last hidden state to the logits without a second run of the model's forward.

Behind their layers most models have a norm and a head, and nothing else. Which modules these are is seen by letting the
model run; whether they are all that there is, by comparing what they give with the model's own logits, bit for bit, on
states small and large: a soft cap, a scale or an addition between them would show. A model with more to it (Gemma 2,
Cohere) keeps the second run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .stepper import Forward, Stepper

# Standard deviations of the random states: logits near 0, as they mostly are, and where a cap would bend them.
_SIZES = (0.01, 1.0, 300.0)


@dataclass(frozen=True)
class Tail:
    """Modules that are called one after the other.

    ``cut``: which of them is the first that the model calls for the last token only. It must be the same here: a sum
    over one row and the same sum over many are not computed in the same order.
    """

    modules: tuple[Any, ...]
    cut: int

    def __call__(self, hidden: Any) -> Any:
        """Logits [rows, 1, vocabulary] of the last token of ``hidden`` [rows, tokens, features]."""
        for index, module in enumerate(self.modules):
            hidden = module(hidden[:, -1:] if index == self.cut else hidden)
        return hidden[:, -1:]


def find(stepper: Stepper, forward: Forward) -> Tail | None:
    """The modules without parts of their own that the model calls behind its last layer; None if they are no tail.

    ``forward`` has run its layers, on several tokens: where they become one, the model cuts.
    """
    inside = {id(part) for layer in stepper.layers for part in layer.modules()}
    called: list[tuple[Any, Any]] = []
    hooks = [
        part.register_forward_pre_hook(lambda part, given: called.append((part, given)))
        for part in stepper.model.modules()
        if id(part) not in inside and not any(part.children())
    ]
    try:
        stepper.epilogue(forward, forward.hidden, reached=called.clear)
    finally:
        for hook in hooks:
            hook.remove()
    shapes: list[Any] = [given[0].shape if given and isinstance(given[0], torch.Tensor) else () for _, given in called]
    if not called or any(len(shape) != 3 for shape in (forward.hidden.shape, *shapes)):
        return None
    cut = next((index for index, shape in enumerate(shapes) if shape[1] == 1), len(shapes))
    return Tail(tuple(part for part, _ in called), cut)


def agrees(tail: Tail, stepper: Stepper, forward: Forward, random: torch.Generator) -> bool:
    """Whether ``tail`` gives the model's own logits of the pass' hidden state, and of random ones of its shape."""
    state = forward.hidden
    drawn = (torch.randn(state.shape, generator=random) * size for size in _SIZES)
    for hidden in (state, *(values.to(device=state.device, dtype=state.dtype) for values in drawn)):
        own = stepper.epilogue(forward, hidden)
        try:
            mine = tail(hidden)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False  # they do not take each other's results
        if not isinstance(mine, torch.Tensor) or own.dtype != mine.dtype or not torch.equal(own, mine):
            return False
    return True
