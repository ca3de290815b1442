"""Find out, when a model is loaded, whether it can be stopped between its layers, by doing it.

Two sessions run layer by layer in turn, so that each is stopped at every cut with another's layer in between, through a
prompt and two more tokens, on the engine's own caches. Logits and caches must be equal, bit for bit, to those of the
model's plain forward on transformers' own cache. What fails is refused; nothing is worked around at run time.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..kv.arena import Arena
from ..kv.cache import Blueprint, SessionCache
from ..kv.lanes import Lanes
from . import tail
from .steering import Layout
from .stepper import Forward, Stepper, UnsupportedModelError

# Sizes that tell the dimensions of a hidden state apart.
_ROWS, _TOKENS = 3, 11
# A batch changes the order of sums: what may differ, in units of the data type's precision times the largest logit.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verdict:
    """What the probe found. ``batching`` is whether sessions may share a batch; ``alone`` says why not."""

    architecture: str
    layers: int
    layout: Layout
    batching: bool
    alone: str
    recurrent: bool
    carries: bool
    direct_head: bool  # logits come from the norm and head alone, which give the model's own bits
    cuts: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For publication."""
        return asdict(self)


def decoder_layers(model: Any) -> Sequence[Any]:
    """The model's decoder layers: the outermost list of as many modules as its configuration counts layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    roots = [model.get_decoder()] if hasattr(model, "get_decoder") else []
    for root in (*roots, model):
        lists = [
            (name.count("."), module)
            for name, module in (root.named_modules() if root is not None else ())
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        ]
        if lists:
            return list(min(lists, key=lambda found: found[0])[1])
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def probe(stepper: Stepper, blueprint: Blueprint) -> Verdict:
    """Try the model. Raises UnsupportedModelError with the reason if it cannot be driven layer by layer."""
    began = time.perf_counter()
    _check_configuration(stepper.model.config)
    if "past_key_values" not in inspect.signature(stepper.model.forward).parameters:
        raise UnsupportedModelError("its forward takes no past_key_values: what it remembers is not in a cache")
    prompts = _prompts(stepper.model)
    before = _module_state(stepper.model)
    # The very first multiplications of a process may be divided among threads in another way than all later ones, and
    # then have other bits (seen with MKL, in one process of four): they are nobody's reference.
    for prompt in prompts:
        _plain(stepper, prompt)
    # The model as it is comes first: its layers have then shown whether they return a tensor or a tuple.
    plain = [_plain(stepper, prompt) for prompt in prompts]
    blueprint.learn(plain[0][1])
    caches = _Caches(blueprint, stepper.model.device)
    layout = _layout(stepper, caches.new())
    runs = [_Run(stepper, caches.new(), prompt) for prompt in prompts]
    carries = False
    cuts = 0
    shorter, random = None, torch.Generator().manual_seed(1)
    for step in range(_STEPS):
        for run in runs:
            run.begin(step)
        for _ in stepper.layers:
            for run in runs:
                run.again()
                stepper.step(run.forward)
            cuts += 1
        carries = any(run.changed() for run in runs) or carries
        if step == 0:
            shorter = tail.find(stepper, runs[0].forward)
        # One that reads a prompt, and one that reads a token; they may be computed in different ways.
        if step < 2 and shorter is not None and not tail.agrees(shorter, stepper, runs[0].forward, random):
            shorter = None
        for index, run in enumerate(runs):
            run.end()
            if not torch.equal(run.logits, plain[index][0][step]):
                raise UnsupportedModelError(_why(stepper.model, before, f"its logits differ after step {step}"))
    for run, (_, cached) in zip(runs, plain, strict=True):
        if difference := _compare(run.cache, cached):
            raise UnsupportedModelError(_why(stepper.model, before, f"its cache differs: {difference}"))
    if shorter is not None and tail.agrees(shorter, stepper, _several(stepper, caches.new()), random):
        stepper.tail = shorter
    alone = _alone(stepper, blueprint, caches, carries, plain, prompts)
    caches.close()
    return Verdict(
        architecture=type(stepper.model).__name__,
        layers=len(stepper.layers),
        layout=layout,
        batching=not alone,
        alone=alone,
        recurrent=blueprint.recurrent,
        carries=carries,
        direct_head=stepper.tail is not None,
        cuts=cuts,
        seconds=round(time.perf_counter() - began, 3),
    )


_STEPS = 3
# The probe's caches: so many, each of a few tokens.
_CACHES, _LIMIT = 12, 64


class _Caches:
    """The engine's own caches, in an arena of the probe's."""

    def __init__(self, blueprint: Blueprint, device: Any) -> None:
        self._blueprint = blueprint
        self._arena = Arena.small(blueprint.forms, blueprint.windows, device=device, tables=_CACHES, limit=_LIMIT)
        self._made: list[SessionCache] = []

    def new(self) -> SessionCache:
        self._made.append(self._blueprint.session(self._arena))
        return self._made[-1]

    def close(self) -> None:
        for cache in self._made:
            cache.close()


def _check_configuration(config: Any) -> None:
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {value.get("rope_type") for value in (rope, *rope.values()) if isinstance(value, dict)}
    if "dynamic" in kinds:
        raise UnsupportedModelError(
            "its rotary frequencies (rope_type dynamic) depend on the longest sequence that any session has read"
        )


def _several(stepper: Stepper, cache: SessionCache) -> Forward:
    """The begin of a pass of several rows of several tokens."""
    ids = torch.ones(_ROWS, _TOKENS, dtype=torch.long, device=stepper.model.device)
    return stepper.begin(stepper.inputs(ids, past=[0] * _ROWS), cache)


def _layout(stepper: Stepper, cache: SessionCache) -> Layout:
    empty = {name: tensor.shape for name, tensor in cache.tensors()}
    hidden = _several(stepper, cache).hidden
    shape = tuple(hidden.shape)
    if {name: tensor.shape for name, tensor in cache.tensors()} != empty:
        raise UnsupportedModelError("its prologue writes to the cache")
    if shape.count(_ROWS) != 1 or shape.count(_TOKENS) != 1:
        raise UnsupportedModelError(f"its hidden state has the shape {shape} for {_ROWS} rows of {_TOKENS} tokens")
    return Layout(shape.index(_ROWS), shape.index(_TOKENS))


def _prompts(model: Any) -> list[Any]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    random = torch.Generator().manual_seed(0)
    # One is longer than the other, both than any convolution of a recurrent layer.
    lengths = (9, 14)
    return [
        torch.randint(min(8, vocabulary // 2), vocabulary, (1, length), generator=random).to(model.device)
        for length in lengths
    ]


def _plain(stepper: Stepper, prompt: Any) -> tuple[list[Any], Any]:
    model = stepper.model
    cache = DynamicCache(config=model.config)
    ids, past, logits = prompt, 0, []
    for _ in range(_STEPS):
        out = model(**stepper.inputs(ids, past=[past]), past_key_values=cache, use_cache=True, **stepper.keep)
        logits.append(out.logits[:, -1:].clone())
        past += ids.shape[1]
        ids = logits[-1].argmax(-1)
    return logits, cache


class _Run:
    """One session of the probe."""

    def __init__(self, stepper: Stepper, cache: SessionCache, prompt: Any) -> None:
        self._stepper = stepper
        self.cache = cache
        self.ids = prompt
        self.forward: Forward
        self.logits: Any = None
        self._handed: list[int] = []

    def begin(self, step: int) -> None:
        if step:
            self.ids = self.logits.argmax(-1)
        self.forward = self._stepper.begin(self._stepper.inputs(self.ids, past=[self.cache.length]), self.cache)
        self._handed = [len(held) for _, held in carried(self.forward)]

    def again(self) -> None:
        """Go on as a session does that has stopped here: of the pass, only what a stopped session keeps is kept."""
        before = self.forward
        self.forward = self._stepper.begin(before.inputs, self.cache)
        self.forward.layer, self.forward.hidden = before.layer, before.hidden.clone()
        self.forward.executed = before.executed
        given = {name: dict(held) for name, held in carried(before)}
        for name, held in carried(self.forward):
            held.update(given.get(name, {}))

    def changed(self) -> bool:
        return [len(held) for _, held in carried(self.forward)] != self._handed

    def end(self) -> None:
        if self.forward.executed != len(self._stepper.layers):
            raise UnsupportedModelError(f"{self.forward.executed} layers ran")
        self.logits = self._stepper.head(self.forward).clone()
        self.cache.commit(self.forward.tokens)


def carried(forward: Forward) -> Iterator[tuple[str, Any]]:
    """The containers that the model gives its layers to hand something on in (Gemma 3n's shared keys and values)."""
    seen: set[int] = set()
    for call in forward.calls:
        for name, value in call.kwargs.items():
            if hasattr(value, "__setitem__") and hasattr(value, "keys") and id(value) not in seen:
                seen.add(id(value))
                yield name, value


def _compare(ours: SessionCache, theirs: Any) -> str:
    for index, layer in enumerate(theirs.layers):
        for name, tensor in _tensors(layer):
            mine = getattr(ours.layers[index], name.partition(".")[0])
            if "." in name:
                mine = mine[int(name.partition(".")[2])]
            if not torch.equal(mine[..., -tensor.shape[-2] :, :] if name in ("keys", "values") else mine, tensor):
                return f"layer {index}, {name}"
    return ""


def _tensors(layer: Any) -> Iterator[tuple[str, Any]]:
    for name in ("keys", "values"):
        if isinstance(value := getattr(layer, name, None), torch.Tensor) and value.numel():
            yield name, value
    for name in ("conv_states", "recurrent_states"):
        for index, value in (getattr(layer, name, None) or {}).items():
            if value is not None:
                yield f"{name}.{index}", value


def _alone(
    stepper: Stepper,
    blueprint: Blueprint,
    made: _Caches,
    carries: bool,
    plain: Sequence[tuple[list[Any], Any]],
    prompts: Sequence[Any],
) -> str:
    """Why sessions of this model cannot share a batch; empty if they can."""
    if blueprint.unknown:
        return f"its cache has layers of the kind {', '.join(blueprint.unknown)}"
    if carries:
        return "its layers hand keys and values on to others within a pass"
    if "attention_mask" not in stepper.takes:
        return "it takes no attention mask"
    caches = []
    for prompt in prompts:
        cache = made.new()
        forward = stepper.begin(stepper.inputs(prompt, past=[0]), cache)
        for _ in stepper.layers:
            stepper.step(forward)
        cache.commit(forward.tokens)
        caches.append(cache)
    shorter, longer = prompts
    alike = torch.cat([longer[:, : shorter.shape[1]], shorter])
    trials = [
        (
            "padded rows",
            caches,
            torch.cat([logits[0].argmax(-1) for logits, _ in plain]),
            [logits[1] for logits, _ in plain],
        ),
    ]
    if not blueprint.recurrent:  # their prompts are read one by one
        trials.append(("prompts", [made.new() for _ in prompts], alike, [plain[0][0][0]]))
    for what, members, ids, logits in trials:
        wanted = torch.cat(logits)
        try:
            got = _together(stepper, members, ids)[-len(wanted) :]
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, NotImplementedError) as error:
            return f"a batch of {what} failed: {str(error).splitlines()[0] if str(error) else error!r}"
        scale = float(wanted.abs().max())
        difference = float((got - wanted).abs().max())
        if not difference <= _TOLERANCE.get(wanted.dtype, 2e-3) * scale:
            return f"a batch of {what} gives other logits (by {difference:.2g} of {scale:.2g})"
    return ""


def _together(stepper: Stepper, caches: Sequence[SessionCache], ids: Any) -> Any:
    lanes = Lanes(caches, ids.shape[1])
    forward = stepper.begin(batch_inputs(stepper, ids, lanes), lanes)
    for _ in stepper.layers:
        stepper.step(forward)
    logits = stepper.head(forward)
    lanes.commit(forward.tokens)
    lanes.release()
    return logits


def batch_inputs(stepper: Stepper, ids: Any, lanes: Lanes) -> dict[str, Any]:
    """The model's inputs for ``ids`` [rows, tokens] of the sessions in ``lanes``."""
    tokens = ids.shape[1]
    mask = None
    pads = lanes.pads
    if any(pads):
        columns = torch.arange(lanes.length + tokens)
        mask = (columns[None] >= torch.tensor(pads)[:, None]).long().to(ids.device)
    return stepper.inputs(ids, past=[member.length for member in lanes.members], attention_mask=mask)


def _module_state(model: Any) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if isinstance(value, torch.Tensor):
                found[f"{name}.{key}"] = (id(value), -1 if value.is_inference() else value._version)
    return found


def _why(model: Any, before: dict[str, tuple[int, int]], what: str) -> str:
    after = _module_state(model)
    changed = sorted(name for name, state in after.items() if before.get(name) != state)
    kept = f"; it keeps state in {', '.join(changed[:3])}" if changed else ""
    return f"stopped between layers, with another request in between, {what}{kept}"
