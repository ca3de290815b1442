"""How long a stopped pass takes until its token, by the layer after which it stopped, against the other ways to get it.

Ways, all measured in turn on the same model, each until it has the token:

``engine``     the engine's own `resume`, in its process
``http``       the same through `POST /v1/sessions/{id}/resume`, as a client in another process sees it
``offload``    a loop over the layers written by hand for this model: hidden state back from (pinned) host memory, the
               remaining layers, the head
``recompute``  the model's plain forward of the stopped pass from its begin, the cache of earlier passes kept
``nnsight``    a peer where it is installed (--nnsight PYTHON): the stopped pass with the layers before the stop skipped
``floor``      the remaining layers and the head of the hand-written loop alone: what no way of resuming can go below

In `prefill` the stopped pass reads the whole prompt, in `decode` one token behind it. `beyond_floor_ms` is what a way
takes more than the floor of the same round. `around_ms` is the same for the engine's own ways without the scatter of
two tails: what a resume takes beside its very own layers and the head of the same round; on a GPU, where a layer's call
only queues it, it is `beyond_floor_ms`. A way that gives another token ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Child, Rig, Watch, answer_lines, beyond, quantity, served
from benchmarks.suite import Unavailable, say

WAYS = ("engine", "http", "offload", "recompute", "nnsight")
_TOKENS_AHEAD = 10**6  # of the decoding session: it never ends by itself


class HandLoop:
    """The loop over the layers that one would write for GPT-2 or Qwen2, without hooks and without an engine."""

    def __init__(self, model: Any) -> None:
        import torch
        from transformers import DynamicCache

        kind = model.config.model_type
        if kind not in ("gpt2", "qwen2"):
            raise Unavailable(f"the hand-written loop knows GPT-2 and Qwen2, not {kind}")
        self._torch = torch
        self._model = model
        self._gpt2 = kind == "gpt2"
        body = model.transformer if self._gpt2 else model.model
        self._body = body
        self._layers = body.h if self._gpt2 else body.layers
        self._norm = body.ln_f if self._gpt2 else body.norm
        self.cache = DynamicCache(config=model.config)
        self._arguments: dict[str, Any] = {}

    @property
    def length(self) -> int:
        """Tokens that its cache has read."""
        return int(self.cache.get_seq_length())

    def begin(self, ids: Sequence[int]) -> Any:
        """The hidden state before the first layer of a pass that reads ``ids``."""
        from transformers.masking_utils import create_causal_mask

        torch, body, past = self._torch, self._body, self.length
        tensor = torch.tensor([ids], device=self._model.device)
        positions = torch.arange(past, past + len(ids), device=tensor.device)[None]
        hidden = body.wte(tensor) + body.wpe(positions) if self._gpt2 else body.embed_tokens(tensor)
        mask = create_causal_mask(
            config=self._model.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=self.cache,
            position_ids=positions,
        )
        self._arguments = {"mask": mask, "positions": positions}
        if not self._gpt2:
            self._arguments["rotary"] = body.rotary_emb(hidden, positions)
        return hidden

    def run(self, hidden: Any, first: int, last: int) -> Any:
        """The layers from ``first`` up to, but without, ``last``."""
        given = self._arguments
        for layer in self._layers[first:last]:
            if self._gpt2:
                hidden = layer(hidden, self.cache, given["mask"], None, use_cache=True, position_ids=given["positions"])
            else:
                hidden = layer(
                    hidden,
                    attention_mask=given["mask"],
                    position_embeddings=given["rotary"],
                    position_ids=given["positions"],
                    past_key_values=self.cache,
                    use_cache=True,
                )
        return hidden

    def head(self, hidden: Any, *, last: bool = True) -> Any:
        """Logits, of the last token only or of all."""
        return self._model.lm_head(self._norm(hidden[:, -1:] if last else hidden))

    def read(self, ids: Sequence[int]) -> None:
        """A whole pass, without the head."""
        self.run(self.begin(ids), 0, len(self._layers))

    def forget(self, length: int) -> None:
        """Take what is behind ``length`` tokens out of the cache."""
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


class Offload:
    """A pass of the hand-written loop, stopped after ``layer`` layers, with its hidden state in host memory."""

    def __init__(self, rig: Rig, loop: HandLoop, ids: Sequence[int], layer: int) -> None:
        self._rig, self._loop, self._layer = rig, loop, layer
        self._hidden = loop.run(loop.begin(ids), 0, layer)
        self._host = rig.torch.empty(self._hidden.shape, dtype=self._hidden.dtype, pin_memory=rig.device.type == "cuda")
        self._host.copy_(self._hidden)

    def rest(self) -> Any:
        """The remaining layers on the hidden state that is still on the device."""
        return self._loop.run(self._hidden, self._layer, self._rig.layers)

    def head(self, hidden: Any) -> Any:
        """The logits."""
        return self._loop.head(hidden)

    def resume(self) -> int:
        """The hidden state back from the host, the rest of the pass, the token."""
        cuda = self._rig.device.type == "cuda"
        hidden = self._host.to(self._rig.device, non_blocking=True) if cuda else self._host.clone()
        return int(self._loop.head(self._loop.run(hidden, self._layer, self._rig.layers))[0, -1].argmax().item())


class LayerClock:
    """Seconds that the engine's layers took on the CPU, each with the time at which it ended."""

    def __init__(self, rig: Rig) -> None:
        self._step = rig.loaded.stepper.step
        self._ran: list[tuple[float, float]] = []
        rig.loaded.stepper.step = self  # type: ignore[method-assign]

    def __call__(self, forward: Any) -> None:
        began = time.perf_counter()
        self._step(forward)
        ended = time.perf_counter()
        self._ran.append((ended, ended - began))

    def between(self, began: float, ended: float) -> float:
        """Seconds in layers in that time; what was before is forgotten."""
        self._ran = [(at, took) for at, took in self._ran if at > began]
        return sum(took for at, took in self._ran if at <= ended)


class Phase:
    """The measured milliseconds of one kind of pass."""

    def __init__(self, layers: Sequence[int], ways: Sequence[str], *, queued: bool = False) -> None:
        self._queued = queued  # the device runs layers behind the engine's back
        extra = ("floor", "head", "engine_layers", "http_layers")
        self.times: dict[int, dict[str, list[float]]] = {
            layer: {way: [] for way in (*ways, *extra)} for layer in layers
        }

    def add(self, layer: int, way: str, seconds: float) -> None:
        self.times[layer][way].append(seconds * 1000)

    def document(self) -> Document:
        """By layer: the floor, each way, and what it takes beyond the floor."""
        made = {}
        for layer, times in self.times.items():
            floor = times["floor"]
            made[str(layer)] = {
                "tail_floor_ms": quantity(floor),
                "ways_ms": {way: quantity(times[way]) for way in WAYS if times.get(way)},
                "beyond_floor_ms": {way: beyond(times[way], floor) for way in WAYS if times.get(way)},
                "around_ms": {way: self._around(times, way) for way in ("engine", "http") if times.get(way)},
            }
        return made

    def _around(self, times: dict[str, list[float]], way: str) -> Document:
        if self._queued:
            return beyond(times[way], times["floor"])
        own = [layers + head for layers, head in zip(times[f"{way}_layers"], times["head"], strict=True)]
        return beyond(times[way], own)


def cuts(layers: int) -> list[int]:
    """The layers after which to stop: the first, quarters, the last."""
    return sorted({1, *(layers * quarter // 4 for quarter in range(1, 5))} - {0})


def body(rig: Rig) -> Document:
    layers = rig.options.cuts or cuts(rig.layers)
    loop = rig.do(HandLoop, rig.model)
    clock = LayerClock(rig)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(served(rig))
        unavailable: dict[str, str] = {}
        peer = None
        if rig.options.nnsight:
            try:
                peer = stack.enter_context(nnsight(rig))
            except Unavailable as error:
                unavailable["nnsight"] = str(error)
                say(f"  nnsight is unavailable: {error}")
        prefill = prefills(rig, loop, clock, client, peer, layers)
        rig.do(loop.forget, 0)
        decode = decodes(rig, loop, clock, client, layers)
    return {"prefill": prefill.document(), "decode": decode.document(), "unavailable": unavailable}


def prefills(
    rig: Rig, loop: HandLoop, clock: LayerClock, client: Child, peer: Child | None, layers: Sequence[int]
) -> Phase:
    """Passes that read the prompt."""
    ways = [way for way in WAYS if way != "nnsight" or peer]
    found = Phase(layers, ways, queued=rig.device.type == "cuda")
    for index in rig.rounds(rig.options.n + 1, "prompts"):
        prompt = rig.prompt(rig.options.prompt)
        recomputed, token = rig.timed(plain, rig, prompt)
        for layer in rig.shuffled(layers):
            taken = {"recompute": recomputed}
            for way in rig.shuffled([way for way in ways if way != "recompute"] + ["floor"]):
                if way in ("engine", "http"):
                    by = client if way == "http" else None
                    taken[way], taken[f"{way}_layers"], got = resumed(rig, clock, by, prompt, layer)
                elif way == "nnsight":
                    assert peer is not None
                    answer = peer.ask({"ids": prompt, "layer": layer})
                    taken[way], got = answer["s"], answer["token"]
                else:
                    stopped = rig.do(Offload, rig, loop, prompt, layer)
                    got = rested(rig, stopped, way, taken)
                    rig.do(loop.forget, 0)
                if got != token:
                    raise RuntimeError(f"{way} stopped after layer {layer} gave token {got}, the plain forward {token}")
            if index:  # the first round warms up
                for way, seconds in taken.items():
                    found.add(layer, way, seconds)
    return found


def plain(rig: Rig, ids: Sequence[int], cache: Any = None) -> int:
    """The model's own forward over ``ids`` behind what is in the cache: the token."""
    from transformers import DynamicCache

    stepper = rig.loaded.stepper
    tensor = rig.torch.tensor([ids], device=rig.device)
    cache = cache or DynamicCache(config=rig.model.config)
    logits = rig.model(input_ids=tensor, past_key_values=cache, use_cache=True, **stepper.keep).logits
    return int(logits[0, -1].argmax().item())


def rested(rig: Rig, stopped: Offload, way: str, taken: dict[str, float]) -> int:
    """Run the rest of a pass of the hand-written loop, as `offload` or as `floor`; the token."""
    if way == "offload":
        taken[way], token = rig.timed(stopped.resume)
        return int(token)
    layers, hidden = rig.timed(stopped.rest)
    taken["head"], logits = rig.timed(stopped.head, hidden)
    taken["floor"] = layers + taken["head"]
    return int(logits[0, -1].argmax())


def resumed(
    rig: Rig, clock: LayerClock, client: Child | None, prompt: Sequence[int], layer: int
) -> tuple[float, float, int]:
    """Seconds from resuming a session, stopped after ``layer`` in its prompt, to its token; in layers; the token."""
    session = rig.session()
    rig.do(rig.engine.stop_at, session, layer=layer, once=True)
    _, watch = rig.begin(session, prompt, 1)
    watch.until("paused")
    rig.do(session.pause.checkpoint.wait)  # a stop is longer than a copy
    took, layers = _resume(rig, clock, session, client, watch)
    rig.do(rig.engine.delete, session)
    return took, layers, session.tokens[-1]


def _resume(rig: Rig, clock: LayerClock, session: Any, client: Child | None, watch: Watch) -> tuple[float, float]:
    began = time.perf_counter()
    if client is None:
        rig.engine.do(rig.engine.resume, session)
        ended, _ = watch.until("token")
        return ended - began, clock.between(began, ended)
    answer = client.ask({"method": "POST", "path": f"/v1/sessions/{session.id}/resume", "json": {"wait": "token"}})
    ended, _ = watch.until("token")
    return float(answer["ms"]) / 1000, clock.between(began, ended)


def decodes(rig: Rig, loop: HandLoop, clock: LayerClock, client: Child, layers: Sequence[int]) -> Phase:
    """Passes that read one token: one session goes on from stop to stop, the hand-written loop beside it."""
    ways = ("engine", "http", "offload", "recompute")
    found = Phase(layers, ways, queued=rig.device.type == "cuda")
    session = rig.session()
    room = rig.loaded.limit - rig.options.prompt - 2
    rounds = min(rig.options.n * 2, room // (2 * len(layers)) - 1)
    # Where the engine stops, pass by pass: the first round warms up.
    plan = [(index, layer) for index in range(rounds + 1) for layer in rig.shuffled(layers)]
    stops = [layer for _, layer in plan for _ in range(2)]
    stops.append(rig.layers)  # so that the engine rests while the others are measured, the last time too
    rig.do(rig.engine.stop_at, session, layer=stops[0], step=1, once=True)
    _, watch = rig.begin(session, rig.prompt(rig.options.prompt), min(_TOKENS_AHEAD, room))
    watch.until("paused")
    step = 1
    for index, layer in _within(rig, plan):
        taken: dict[str, float] = {}
        for way in rig.shuffled(("engine", "http")):
            step += 1
            rig.do(rig.engine.stop_at, session, layer=stops[step - 1], step=step, once=True)
            rig.do(session.pause.checkpoint.wait)
            by = client if way == "http" else None
            taken[way], taken[f"{way}_layers"] = _resume(rig, clock, session, by, watch)
            watch.until("paused")
        # The tokens that the engine has read, but the last one: that is the pass of the other ways.
        known = list(session.tokens)
        expected = known[-1]
        rig.do(loop.read, known[loop.length : -2])
        for way in rig.shuffled(("offload", "recompute", "floor")):
            if way == "recompute":
                taken[way], got = rig.timed(plain, rig, known[-2:-1], loop.cache)
                rig.do(loop.forget, len(known) - 2)
                _same(way, layer, got, expected)
                continue
            stopped = rig.do(Offload, rig, loop, known[-2:-1], layer)
            got = rested(rig, stopped, way, taken)
            rig.do(loop.forget, len(known) - 2)
            _same(way, layer, got, expected)
        if index:
            for way, seconds in taken.items():
                found.add(layer, way, seconds)
    rig.do(rig.engine.delete, session)
    return found


def _within(rig: Rig, plan: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The plan's whole rounds that the budget allows."""
    rounds = plan[-1][0] + 1
    size = len(plan) // rounds
    for index in rig.rounds(rounds, "steps"):
        yield from plan[index * size : (index + 1) * size]


def _same(way: str, layer: int, got: int, expected: int) -> None:
    if got != expected:
        raise RuntimeError(f"{way} stopped after layer {layer} gave token {got}, the engine {expected}")


@contextlib.contextmanager
def nnsight(rig: Rig) -> Iterator[Child]:
    """The peer, in its own environment; raises Unavailable if it does not work there."""
    options = rig.options
    argv = [options.nnsight, "-m", "benchmarks.sessions_resume", "--model", options.model, "--peer"]
    argv += ["--dtype", str(rig.loaded.dtype).removeprefix("torch."), "--device", str(rig.device), "--out", "-"]
    child = Child(argv, name="nnsight")
    try:
        child.ask({"ids": rig.prompt(16), "layer": 1})
        yield child
    finally:
        child.close()


def peer(options: argparse.Namespace) -> int:
    """Answer, for lines of {"ids", "layer"}, what a pass takes whose layers before ``layer`` nnsight skips.

    The hidden state comes from a pass that nnsight itself has traced and saved to the host. The model is loaded here.
    """
    import torch
    from nnsight import NNsight  # type: ignore[import-not-found]  # in an environment of its own
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = NNsight(plain.eval().to(options.device))
    layers = model.transformer.h if hasattr(plain, "transformer") else model.model.layers
    cuda = str(options.device).startswith("cuda")

    def answer(question: Document) -> Document:
        ids, layer = torch.tensor([question["ids"]], device=options.device), question["layer"]
        try:
            with torch.inference_mode(), model.trace(ids, logits_to_keep=1):
                saved = layers[layer - 1].output.save()
            hidden = saved if isinstance(saved, torch.Tensor) else saved[0]
            host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=cuda).copy_(hidden)
            began = time.perf_counter()
            back = host.to(options.device, non_blocking=True)
            given = back if isinstance(saved, torch.Tensor) else (back, *saved[1:])
            with torch.inference_mode(), model.trace(ids, logits_to_keep=1):
                for index in range(layer):
                    layers[index].skip(given)
                token = model.lm_head.output[0, -1].argmax().save()
            got = int(token.item())
            return {"s": time.perf_counter() - began, "token": got}
        except Exception as error:  # whatever a peer raises is the reason why it is not in the figures
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"}

    answer_lines(answer)
    return 0


def parser() -> argparse.ArgumentParser:
    made = sessions_common.parser("sessions_resume", __doc__, n=10, budget=300)
    made.add_argument("--cuts", type=_numbers, help="layers after which to stop (default: the first, quarters, last)")
    made.add_argument("--nnsight", type=Path, help="Python of an environment with nnsight")
    made.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    return made


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    made = parser()
    if (given := made.parse_args()).peer:
        sys.exit(peer(given))
    sys.exit(sessions_common.main("sessions_resume", made, body))
