"""Drive a transformers model one decoder layer at a time, without knowing the model: *prologue capture*.

A forward pass of a decoder is a prologue (embeddings, masks, rotary tables), the layers in a row, and an epilogue (last
norm, head). What a layer is called with differs from family to family, so nothing here builds it: the model's own
forward runs once with each layer replaced by a stub that notes its arguments and hands the hidden state on. Then the
real layers are called one by one with what was noted, as fast or as slowly as one likes, and a second run of the
model's forward, whose last stub returns the final hidden state, makes the logits as the model itself would.

The stubs sit in the layers' ``forward`` attribute, where the model's own loop finds them, and call the real forward
whenever nothing is being noted: outside of :meth:`Stepper.begin` and :meth:`Stepper.head` the model is as it was.
Where the epilogue is a norm and a head and nothing else, these two are called instead of the second run (tail.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..weights import PagedWeights

Inputs = dict[str, Any]


class UnsupportedModelError(Exception):
    """The model cannot be driven layer by layer; the message says why."""


# The name that the hidden state has where a model passes it by name.
_NAME = "hidden_states"


@dataclass(slots=True)
class Call:
    """The arguments of one layer in one pass, the hidden state left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def make(self, layer: Any, hidden: Any) -> Any:
        """Call the layer; returns the hidden state behind it."""
        args = self.args if self.by_name else (hidden, *self.args)
        returned = layer(*args, **self.kwargs, **({_NAME: hidden} if self.by_name else {}))
        return returned[0] if isinstance(returned, (tuple, list)) else returned


@dataclass(slots=True, eq=False)
class Forward:
    """One forward pass, stopped between two layers.

    ``hidden`` is the state after ``layer`` layers: after the embeddings where that is 0, before the last norm where it
    is the number of layers. ``executed`` counts the layers that really ran.
    """

    inputs: Inputs
    cache: Any
    calls: list[Call]
    hidden: Any
    layer: int = 0
    executed: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens each row of the pass reads."""
        return int(self.inputs["input_ids"].shape[1])


class Stepper:
    """A model whose layers are called one by one. Not for use by two threads at once."""

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        self.model = model
        self.layers = list(layers)
        self._tape: Callable[[int, tuple[Any, ...], dict[str, Any]], Any] | None = None
        # How many values a layer returns: 0 for a plain tensor, else the length of the tuple that begins with it.
        self._arity = [0] * len(self.layers)
        for index, layer in enumerate(self.layers):
            layer.forward = _Gate(self, index, layer.forward)
        parameters = inspect.signature(model.forward).parameters
        self.takes = {name for name in ("position_ids", "attention_mask", "logits_to_keep") if name in parameters}
        # Logits of the last token only, where the model can: the head over a long prompt is the dearest layer of all.
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        # Brings a layer's weights, where not all are on the device.
        self.weights: PagedWeights | None = None
        # The shorter way to the logits, if the probe has found that there is one.
        self.tail: Callable[[Any], Any] | None = None

    def close(self) -> None:
        """Give the layers their own forward back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)

    def inputs(self, ids: Any, *, past: Sequence[int], attention_mask: Any = None) -> Inputs:
        """The model's inputs for ``ids`` [rows, tokens], of rows that have read ``past`` tokens each before.

        ``attention_mask`` [rows, longest past + tokens] is needed where rows are padded (on the left), and only there.
        """
        made: Inputs = {"input_ids": ids}
        if "position_ids" in self.takes:
            steps = torch.arange(ids.shape[1], device=ids.device)
            made["position_ids"] = torch.tensor(list(past), device=ids.device)[:, None] + steps[None]
        if attention_mask is not None:
            made["attention_mask"] = attention_mask
        return made

    def begin(self, inputs: Inputs, cache: Any) -> Forward:
        """Run the prologue: the embeddings, and the arguments of every layer.

        Raises UnsupportedModelError if the model does anything between its layers.
        """
        forward = Forward(inputs, cache, [], None)
        with self._taping(_Prologue(self, forward)), _stopped():
            self.model(**inputs, past_key_values=cache, use_cache=True, **self.keep)
        if len(forward.calls) != len(self.layers):
            raise UnsupportedModelError(f"the model called {len(forward.calls)} of its {len(self.layers)} layers")
        return forward

    def step(self, forward: Forward) -> None:
        """Run the next layer."""
        forward.hidden = forward.calls[forward.layer].make(self.layers[forward.layer], forward.hidden)
        forward.layer += 1
        forward.executed += 1

    def head(self, forward: Forward, hidden: Any = None) -> Any:
        """The model's own epilogue on ``hidden`` (the pass' by default): logits [rows, 1, vocabulary], last token only.

        Of a hidden state after fewer than all layers this is what is known as the logit lens. The cache is not touched.
        """
        state = forward.hidden if hidden is None else hidden
        return self.epilogue(forward, state) if self.tail is None else self.tail(state)

    def epilogue(self, forward: Forward, hidden: Any, reached: Callable[[], object] = lambda: None) -> Any:
        """What :meth:`head` returns, by a second run of the model's forward; ``reached``: called behind its layers."""
        with self._taping(_Epilogue(self, hidden, reached)):
            out = self.model(**forward.inputs, past_key_values=forward.cache, use_cache=True, **self.keep)
        return out.logits[:, -1:]

    @contextmanager
    def _taping(self, tape: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        self._tape = tape
        try:
            yield
        finally:
            self._tape = None

    def shaped(self, index: int, hidden: Any) -> Any:
        """``hidden`` in the form in which layer ``index`` returns it."""
        arity = self._arity[index]
        return (hidden, *(None,) * (arity - 1)) if arity else hidden


@dataclass(slots=True, eq=False)
class _Gate:
    """In the place of a layer's forward: the real one, or the stub while something is being noted."""

    stepper: Stepper
    index: int
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tape = self.stepper._tape
        if tape is not None:
            return tape(self.index, args, kwargs)
        if self.stepper.weights is not None:
            self.stepper.weights.need(self.index)
        returned = self.forward(*args, **kwargs)
        self.stepper._arity[self.index] = len(returned) if isinstance(returned, (tuple, list)) else 0
        return returned


@dataclass(slots=True)
class _Prologue:
    stepper: Stepper
    forward: Forward
    _passed: Any = field(default=None)

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self.forward.calls
        if index != len(calls):
            raise UnsupportedModelError(f"the model called layer {index} where layer {len(calls)} was expected")
        by_name = not args
        hidden = kwargs.pop(_NAME, None) if by_name else args[0]
        if not isinstance(hidden, torch.Tensor):
            raise UnsupportedModelError(f"layer {index} is not called with a hidden state")
        if index == 0:
            self.forward.hidden = hidden
        elif hidden is not self._passed:
            raise UnsupportedModelError(f"the model changes the hidden state between layers {index - 1} and {index}")
        self._passed = hidden
        calls.append(Call(args[1:], kwargs, by_name))
        if index + 1 == len(self.stepper.layers):
            raise _Stop
        return self.stepper.shaped(index, hidden)


@dataclass(slots=True)
class _Epilogue:
    stepper: Stepper
    hidden: Any
    reached: Callable[[], object]

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        last = index + 1 == len(self.stepper.layers)
        if last:
            self.reached()
        return self.stepper.shaped(index, self.hidden if last else (args[0] if args else kwargs[_NAME]))


class _Stop(Exception):
    """Ends the model's forward behind its last layer: the head would be wasted on a prologue."""


@contextmanager
def _stopped() -> Iterator[None]:
    with suppress(_Stop):
        yield
