"""What a model gives that nobody stops: transformers' plain forward, on transformers' own cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hooks.gpuckpt_guest.engine.probe import decoder_layers
from hooks.gpuckpt_guest.engine.steering import Edit, Layout, apply

from .catalogue import VOCABULARY, Architecture

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Read a prompt (shorter than the window, or longer), write three tokens, which leads past the window, read three more
# (the second turn of a conversation), write one.
SHORT, LONG = 6, 13
_GREEDY = 1
WRITTEN = 4  # tokens that are chosen before the second turn
_PLAN: tuple[int, ...] = (_GREEDY, _GREEDY, _GREEDY, 3, _GREEDY)


def text(length: int, seed: int) -> list[int]:
    """Random tokens, none of the special ones."""
    random = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, VOCABULARY, (length,), generator=random)]


@dataclass
class Answer:
    """What a run gave: the tokens that each pass read, the logits of its last one, the cache at the end."""

    read: list[list[int]] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)
    cache: Any = None

    def next(self, prompt: Sequence[int]) -> list[int] | None:
        """What the next pass reads; None when the plan is done."""
        step = len(self.logits)
        if step == 0:
            return list(prompt)
        if step > len(_PLAN):
            return None
        if _PLAN[step - 1] == _GREEDY:
            return [int(self.logits[-1][0, -1].argmax())]
        return text(_PLAN[step - 1], seed=step)

    def take(self, read: list[int], logits: Any) -> None:
        """A pass is over."""
        self.read.append(read)
        self.logits.append(logits)


@dataclass
class Plain:
    """transformers' own forward, of a model that the engine has never seen."""

    model: Any

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._takes_positions = "position_ids" in parameters
        self.layers = list(decoder_layers(self.model))

    def forward(self, ids: Any, cache: Any, **inputs: Any) -> Any:
        """Logits of the last token [rows, 1, vocabulary]."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs, **self._keep)
        return out.logits[:, -1:].clone()

    def answer(self, prompt: Sequence[int], edit: Edit | None = None, layout: Layout | None = None) -> Answer:
        """Run the plan, with ``edit`` made by a hook if there is one."""
        made = Answer(cache=DynamicCache(config=self.model.config))
        position = 0
        hook = None
        if edit is not None and layout is not None:
            hook = self._hook(edit, lambda hidden: apply(edit, hidden, layout, position))
        while (read := made.next(prompt)) is not None:
            # As generate() does; without them Bamba begins to count at 0 in each pass.
            places = torch.arange(position, position + len(read))[None]
            inputs = {"position_ids": places} if self._takes_positions else {}
            made.take(read, self.forward(torch.tensor([read]), made.cache, **inputs))
            position += len(read)
        if hook:
            hook.remove()
        return made

    def _hook(self, edit: Edit, changed: Callable[[Any], Any]) -> Any:
        if edit.layer:

            def behind(_: Any, __: Any, returned: Any) -> Any:
                if isinstance(returned, tuple):
                    return (changed(returned[0]), *returned[1:])
                return changed(returned)

            return self.layers[edit.layer - 1].register_forward_hook(behind)

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (changed(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

        return self.layers[0].register_forward_pre_hook(before, with_kwargs=True)


def tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    """All that a cache layer of transformers' keeps."""
    for name, value in vars(layer).items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for key, tensor in items:
            if isinstance(tensor, torch.Tensor) and tensor.numel() and name != "_sliding_window_tensor":
                yield f"{name}.{key}" if isinstance(value, dict) else name, tensor


def held(layer: Any, name: str) -> Any:
    """What a layer of ours keeps under a name that :func:`tensors` gave; None if it has none."""
    name, _, key = name.partition(".")
    value = getattr(layer, name, None)
    if isinstance(value, dict):
        return next((item for found, item in value.items() if str(found) == key), None)
    return value


def cache_difference(ours: Any, theirs: Any) -> str:
    """Which tensor of the two caches differs; empty if none does."""
    compared = 0
    for index, layer in enumerate(theirs.layers):
        for name, wanted in tensors(layer):
            compared += 1
            if why := difference(held(ours.layers[index], name), wanted):
                return f"{name} of layer {index} in the cache: {why}"
    return "" if compared else "the reference's cache is empty"


def difference(got: Any, wanted: Any) -> str:
    """How two tensors differ; empty if they are equal to the last bit."""
    if got is None:
        return "missing"
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{tuple(got.shape)} {got.dtype} instead of {tuple(wanted.shape)} {wanted.dtype}"
    if not torch.equal(got, wanted):
        return f"by {float((got.float() - wanted.float()).abs().max()):.3g}"
    return ""


def build(architecture: Architecture, dtype: str = "float32") -> Any:
    """The model, with the same random weights each time."""
    config = AutoConfig.for_model(architecture.model_type, **architecture.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype]).eval()
