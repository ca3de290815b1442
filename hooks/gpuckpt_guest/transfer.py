"""A session as one safetensors file: to look at, to keep, to go on with on another replica.

Tensors: ``hidden`` (the activation of a paused session), ``cache.LAYER.keys`` and so on, ``random`` (the state of its
generator), ``vector.N`` (of its edits), ``carried.…`` (what layers handed on within the stopped pass). The metadata's
one entry, ``gpuckpt_session``, is JSON. Its ``digest`` is of all the rest: a bit that was lost on the way would else be
a wrong answer without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from . import filed
from .checkpoint import Ring
from .engine.breakpoints import Breakpoint, Condition
from .engine.engine import FLOATS, Engine
from .engine.errors import EngineError, conflict
from .engine.sampling import Sampling, Scores
from .engine.session import Pause, Session, State, Turn, norms
from .engine.steering import Edit
from .engine.text import TextStream
from .kv.snapshot import Snapshot

VERSION = 1
# Gives a session the keys and values that lie in blocks of their own.
Attach = Callable[[Session, Sequence[filed.Block]], None]
_PAUSE = ("layer", "step", "position", "tokens", "breakpoint", "executed", "replaced")
_KEY = "gpuckpt_session"


def pack(tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """A safetensors file; the metadata's values are written as JSON."""
    held, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory: what layers hand on may be a view of the cache.
        place = whole.untyped_storage().data_ptr()
        held[name] = whole.clone() if place in seen else whole
        seen.add(place)
    if _KEY in metadata:
        metadata = {_KEY: metadata[_KEY] | {"digest": _digest(held, metadata[_KEY])}}
    return bytes(save_tensors(held, {name: json.dumps(value) for name, value in metadata.items()}))


def with_blocks(metadata: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metadata of a session whose keys and values lie in these blocks, in files of their own."""
    return {_KEY: metadata[_KEY] | {"blocks": list(blocks)}}


def pack_session(tensors: Mapping[str, Any], metadata: Mapping[str, Any], snapshot: Snapshot) -> bytes:
    """What :func:`export` gave, as a file; for any thread. Raises LostError."""
    columns = {f"cache.{name}": tensor for name, tensor in snapshot.tensors()}
    return pack({**tensors, **columns}, metadata)


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. Raises EngineError if it is none, or not as it was written."""
    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        told = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        if _KEY not in told:  # what others tell beside their tensors need not be JSON
            return tensors, {}
        facts = json.loads(told[_KEY])
        if "digest" in facts and facts["digest"] != _digest(tensors, facts):
            raise EngineError("the file was damaged: it does not hold what was written", code="damaged")
        return tensors, {_KEY: facts}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineError(f"this is no safetensors file: {error}", code="malformed") from None


def _digest(tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """BLAKE2b of the facts, and of the tensors' names, shapes and bytes in the order of their names."""
    rest = {name: value for name, value in facts.items() if name != "digest"}
    made = hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        made.update(f"\0{name}\0{list(tensor.shape)}\0".encode())
        made.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()


def one_tensor(data: bytes, name: str) -> Any:
    """The tensor ``name`` of a safetensors file, or the only one in it."""
    tensors, _ = unpack(data)
    if name in tensors:
        return tensors[name]
    if len(tensors) != 1:
        raise EngineError(f"the file has {len(tensors)} tensors, and none of them is called {name!r}")
    return next(iter(tensors.values()))


def export(engine: Engine, session: Session) -> tuple[dict[str, Any], dict[str, Any], Snapshot]:
    """The session as tensors and metadata, for :func:`pack`, and its keys and values, wherever they lie.

    Called by the engine's thread. The snapshot's tensors belong among the others, ``cache.`` in front of their names;
    any thread may read them, and the engine's is to release it then.
    """
    if session.state is State.RUNNING:
        raise conflict(f"session {session.id} is running; pause it first")
    if session.failed:
        raise conflict(f"session {session.id} has failed: {session.failed}")
    if engine.loaded.blueprint.unknown:
        kinds = ", ".join(engine.loaded.blueprint.unknown)
        raise conflict(f"sessions of this model cannot be exported: its cache has layers of the kind {kinds}")
    engine.scheduler.batches.settle(session)
    tensors: dict[str, Any] = {f"cache.{name}": tensor.clone() for name, tensor in session.cache.states()}
    tensors["random"] = session.random.get_state()
    vectors: list[Any] = []

    def written(edit: Edit) -> dict[str, Any]:
        facts = {name: getattr(edit, name) for name in ("kind", "layer", "factor", "first", "last", "name")}
        if edit.vector is not None:
            facts["vector"] = len(vectors)
            tensors[f"vector.{len(vectors)}"] = edit.vector
            vectors.append(edit.vector)
        return facts

    facts: dict[str, Any] = {
        "version": VERSION,
        "model": engine.loaded.identity,
        "id": session.id,
        "tokens": session.tokens,
        "length": session.cache.length,
        "reads": session.reads,
        "replay": list(session.replay),
        "cache": session.cache.facts(),
        "edits": [written(edit) for edit in session.edits.values()],
        "breakpoints": [breakpoint_facts(breakpoint) for breakpoint in session.breakpoints.values()],
        "messages": session.messages,
        "turns": session.turns,
        "passes": session.passes,
        "turn": _turn(session.turn) if session.turn else None,
        "pause": None,
    }
    if pause := session.pause:
        tensors["hidden"] = pause.checkpoint.wait()
        carried: list[Any] = []
        for name, held in pause.carried.items():
            for key, values in held.items():
                for index, tensor in enumerate(values):
                    tensors[f"carried.{len(carried)}.{index}"] = tensor
                carried.append([name, key, len(values)])
        facts["pause"] = {
            **{name: getattr(pause, name) for name in _PAUSE},
            "norms": [[layer, norm if math.isfinite(norm) else None] for layer, norm in norms(pause)],
            "edits": [written(edit) for edit in pause.edits],
            "carried": carried,
        }
    return tensors, {_KEY: facts}, Snapshot(engine.memory.pager, session.cache)


def load(
    engine: Engine,
    file: tuple[dict[str, Any], dict[str, Any]],
    name: str | None,
    attach: Attach | None = None,
) -> Session:
    """A session out of what :func:`unpack` found in a file, as it was. Called by the engine's thread.

    ``attach`` gives it its keys and values, where the file does not have them. Raises EngineError: the file is
    malformed, is of another model, or does not hold together; nothing is left behind.
    """
    tensors, metadata = file
    facts = metadata.get(_KEY)
    if not isinstance(facts, dict) or facts.get("version") != VERSION or "digest" not in facts:
        raise EngineError("this safetensors file is no session, or one of another version", code="malformed")
    if facts.get("model") != engine.loaded.identity:
        raise conflict("the session belongs to another model")
    try:
        held = filed.Session.model_validate(facts)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"the session in the file has a wrong form: {error}", code="malformed") from None
    session = engine.create(name or held.id)
    try:
        _fill(engine, session, held, tensors, attach)
    except EngineError:
        engine.delete(session)
        raise
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError, AttributeError) as error:
        engine.delete(session)
        raise EngineError(f"the session in the file does not hold together: {error}", code="malformed") from None
    return session


def _fill(
    engine: Engine,
    session: Session,
    held: filed.Session,
    tensors: dict[str, Any],
    attach: Attach | None,
) -> None:
    loaded = engine.loaded
    if not all(token < loaded.vocabulary for token in held.tokens):
        raise ValueError("its tokens are not this model's")
    if len(held.tokens) > loaded.limit:
        raise EngineError(
            f"the session in the file has {len(held.tokens)} tokens, a session here at most {loaded.limit}",
            code="too_long",
        )
    if held.length + sum(held.replay) > len(held.tokens):
        raise ValueError("its cache is longer than its text")
    if (held.replay and held.pause) or (held.reads is not None and sum(held.reads) != held.length + sum(held.replay)):
        raise ValueError("the passes that it has made do not fit its text")
    pause, turn = held.pause, held.turn
    if (pause is None) != (turn is None):
        raise ValueError("it was in a generation, but not stopped, or the other way round")
    if pause:
        if pause.position != held.length or pause.tokens > len(held.tokens) - held.length:
            raise ValueError("its pause does not fit its text")
        if pause.layer > loaded.verdict.layers or pause.executed != pause.layer:
            raise ValueError("its pause is after a layer that is not there")
    if turn and pause:
        if any(token >= loaded.vocabulary for token in turn.generated):
            raise ValueError("what it has written is not this model's")
        if len(turn.scores) != (0 if turn.top_scores is None else len(turn.generated)):
            raise ValueError("its scores are not those of what it has written")
        if pause.step != turn.step:
            raise ValueError("its pause is in another pass than its generation")
    session.tokens = list(held.tokens)
    cached = {key.removeprefix("cache."): tensor for key, tensor in tensors.items() if key.startswith("cache.")}
    stopped = (pause.layer, pause.tokens) if pause else (0, 0)
    layers = [layer.model_dump() for layer in held.cache]
    columns = session.cache.load(held.length, layers, cached, loaded.device, stopped, without=attach is not None)
    if attach is None:
        engine.memory.adopt(session, columns)
    else:
        attach(session, held.blocks or [])
    session.random.set_state(tensors["random"])

    def read(edit: filed.FiledEdit) -> Edit:
        vector = None if edit.vector is None else tensors[f"vector.{edit.vector}"]
        if vector is not None and (vector.dtype not in FLOATS or not bool(vector.isfinite().all())):
            raise ValueError("a vector is made of finite floating-point numbers")
        return Edit(edit.kind, edit.layer, edit.factor, vector, edit.first, edit.last, edit.name or "")

    engine.steer(session, [read(edit) for edit in held.edits], standing=True)
    for item in held.breakpoints:
        wanted = item.condition.model_dump()
        wanted["tokens"] = None if wanted["tokens"] is None else frozenset(wanted["tokens"])
        what = {key: getattr(item, key) for key in ("layer", "phase", "position", "step", "once")}
        name = engine.stop_at(session, name=item.id, condition=Condition(**wanted), **what)
        session.breakpoints[name].hits = item.hits
    session.messages = [message.model_dump() for message in held.messages]
    session.turns, session.passes = held.turns, held.passes
    session.reads, session.replay = held.reads, deque(held.replay)
    if pause and turn:
        session.turn = _read_turn(engine, turn)
        session.pause = _read_pause(engine.ring, pause, tensors)
        ids = torch.tensor([session.unread[: pause.tokens]], device=loaded.device)
        begun = loaded.stepper.begin(loaded.stepper.inputs(ids, past=[held.length]), session.cache).hidden
        got = session.pause.checkpoint
        if tuple(begun.shape) != tuple(got.shape) or begun.dtype != got.dtype:
            raise ValueError(f"its activation is {got.dtype} {list(got.shape)}, not {begun.dtype} {list(begun.shape)}")
        if not bool(got.wait().isfinite().all()):
            raise ValueError("its activation has values that are not finite numbers")
        engine.steer(session, [read(edit) for edit in pause.edits], standing=False)


def breakpoint_facts(breakpoint: Breakpoint) -> dict[str, Any]:
    facts = asdict(breakpoint)
    tokens = facts["condition"]["tokens"]
    facts["condition"]["tokens"] = None if tokens is None else sorted(tokens)
    return facts


_TURN = ("max_tokens", "top_scores", "ignore_stops", "keep_logits", "chat", "step", "prompt_tokens", "generated")


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        **{name: getattr(turn, name) for name in _TURN},
        "sampling": asdict(turn.sampling),
        "stops": turn.text.stops,
        "stop_tokens": sorted(turn.stop_tokens),
        "scores": [[scores.chosen, list(scores.top)] for scores in turn.scores],
    }


def _read_turn(engine: Engine, held: filed.Turn) -> Turn:
    text = TextStream(engine.loaded.tokenizer, held.stops)
    for token in held.generated:
        text.add(token)
    return Turn(
        sampling=Sampling(**held.sampling.model_dump()),
        stop_tokens=frozenset(held.stop_tokens),
        text=text,
        scores=[Scores(chosen, tuple(top)) for chosen, top in held.scores],
        **{name: getattr(held, name) for name in _TURN},
    )


def _read_pause(ring: Ring, held: filed.Pause, tensors: dict[str, Any]) -> Pause:
    carried: dict[str, dict[Any, Any]] = {}
    for number, (name, key, count) in enumerate(held.carried):
        handed = [tensors[f"carried.{number}.{index}"] for index in range(count)]
        carried.setdefault(name, {})[key] = tuple(handed)
    return Pause(
        **{name: getattr(held, name) for name in _PAUSE},
        checkpoint=ring.adopt(tensors["hidden"]),
        carried=carried,
        norms=[(layer, float("nan") if norm is None else norm) for layer, norm in held.norms],
    )
