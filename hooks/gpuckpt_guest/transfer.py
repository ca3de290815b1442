"""A session as one safetensors file: to look at, to keep, to go on with on another replica.

Tensors: ``hidden`` (the activation of a paused session), ``cache.LAYER.keys`` and so on, ``random`` (the state of its
generator), ``vector.N`` (of its edits), ``carried.…`` (what layers handed on within the stopped pass). The metadata's
one entry, ``gpuckpt_session``, is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from .checkpoint import Ring
from .engine.breakpoints import Breakpoint, Condition
from .engine.engine import Engine, EngineError, conflict
from .engine.sampling import Sampling, Scores
from .engine.session import Pause, Session, State, Turn
from .engine.steering import KINDS, Edit
from .engine.text import TextStream

VERSION = 1
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
    return bytes(save_tensors(held, {name: json.dumps(value) for name, value in metadata.items()}))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a safetensors file. Raises EngineError if it is none."""
    try:
        tensors = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise EngineError(f"this is no safetensors file: {error}", code="malformed") from None


def one_tensor(data: bytes, name: str) -> Any:
    """The tensor ``name`` of a safetensors file, or the only one in it."""
    tensors, _ = unpack(data)
    if name in tensors:
        return tensors[name]
    if len(tensors) != 1:
        raise EngineError(f"the file has {len(tensors)} tensors, and none of them is called {name!r}")
    return next(iter(tensors.values()))


def export(engine: Engine, session: Session) -> bytes:
    """The session as a file. Called by the engine's thread."""
    if session.state is State.RUNNING:
        raise conflict(f"session {session.id} is running; pause it first")
    if session.failed:
        raise conflict(f"session {session.id} has failed: {session.failed}")
    if engine.loaded.blueprint.unknown:
        kinds = ", ".join(engine.loaded.blueprint.unknown)
        raise conflict(f"sessions of this model cannot be exported: its cache has layers of the kind {kinds}")
    engine.scheduler.settle(session)
    tensors: dict[str, Any] = {f"cache.{name}": tensor for name, tensor in session.cache.tensors()}
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
            **{
                name: getattr(pause, name) for name in ("layer", "step", "position", "tokens", "breakpoint", "executed")
            },
            "norms": pause.norms,
            "replaced": pause.replaced,
            "edits": [written(edit) for edit in pause.edits],
            "carried": carried,
        }
    return pack(tensors, {_KEY: facts})


def load(engine: Engine, data: bytes, name: str | None) -> Session:
    """A session out of a file, as it was. Called by the engine's thread.

    Raises EngineError: the file is malformed, is of another model, or does not hold together; nothing is left behind.
    """
    tensors, metadata = unpack(data)
    facts = metadata.get(_KEY)
    if not isinstance(facts, dict) or facts.get("version") != VERSION:
        raise EngineError("this safetensors file is no session, or one of another version", code="malformed")
    if facts.get("model") != engine.loaded.identity:
        raise conflict("the session belongs to another model")
    session = engine.create(name or facts.get("id"))
    try:
        _fill(engine, session, facts, tensors)
    except EngineError:
        engine.delete(session)
        raise
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        engine.delete(session)
        raise EngineError(f"the session in the file does not hold together: {error}", code="malformed") from None
    return session


def _fill(engine: Engine, session: Session, facts: dict[str, Any], tensors: dict[str, Any]) -> None:
    loaded = engine.loaded
    tokens = [int(token) for token in facts["tokens"]]
    if not all(0 <= token < loaded.vocabulary for token in tokens) or len(tokens) > loaded.limit:
        raise ValueError("its tokens are not this model's")
    length = int(facts["length"])
    if not 0 <= length <= len(tokens):
        raise ValueError("its cache is longer than its text")
    _check_dtypes(tensors, loaded.dtype)
    session.tokens = tokens
    cached = {key.removeprefix("cache."): tensor for key, tensor in tensors.items() if key.startswith("cache.")}
    session.cache.load(length, facts["cache"], cached, loaded.device)
    session.random.set_state(tensors["random"])

    def read(edit: dict[str, Any]) -> Edit:
        vector = tensors[f"vector.{edit['vector']}"] if "vector" in edit else None
        if edit["kind"] not in KINDS:
            raise ValueError(f"an edit of the kind {edit['kind']}")
        last = None if edit["last"] is None else int(edit["last"])
        return Edit(
            edit["kind"], int(edit["layer"]), float(edit["factor"]), vector, int(edit["first"]), last, str(edit["name"])
        )

    engine.steer(session, [read(edit) for edit in facts["edits"]], standing=True)
    for item in facts["breakpoints"]:
        wanted = dict(item.pop("condition"))
        tokens_wanted = wanted.pop("tokens")
        condition = Condition(tokens=None if tokens_wanted is None else frozenset(tokens_wanted), **wanted)
        hits = int(item.pop("hits"))
        name = engine.stop_at(session, name=str(item.pop("id")), condition=condition, **item)
        session.breakpoints[name].hits = hits
    session.messages = list(facts["messages"])
    session.turns, session.passes = int(facts["turns"]), int(facts["passes"])
    if facts["turn"]:
        session.turn = _read_turn(engine, facts["turn"])
    if held := facts["pause"]:
        session.pause = _read_pause(engine.ring, held, tensors)
        pause = session.pause
        if not session.turn or pause.position != length or not 0 < pause.tokens <= len(tokens) - length:
            raise ValueError("its pause does not fit its text")
        if not 0 <= pause.layer <= loaded.verdict.layers or pause.executed != pause.layer:
            raise ValueError("its pause is after a layer that is not there")
        ids = torch.tensor([session.unread[: pause.tokens]], device=loaded.device)
        begun = loaded.stepper.begin(loaded.stepper.inputs(ids, past=[length]), session.cache).hidden
        if tuple(begun.shape) != pause.checkpoint.shape:
            raise ValueError(f"its activation has the shape {list(pause.checkpoint.shape)}, not {list(begun.shape)}")
        engine.steer(session, [read(edit) for edit in held["edits"]], standing=False)
    elif session.turn:
        raise ValueError("it was in a generation, but not paused")


def _check_dtypes(tensors: dict[str, Any], dtype: Any) -> None:
    wrong = [name for name, tensor in tensors.items() if name.endswith((".keys", "hidden")) and tensor.dtype != dtype]
    if wrong:
        raise ValueError(f"{wrong[0]} is {tensors[wrong[0]].dtype}, the model {dtype}")


def breakpoint_facts(breakpoint: Breakpoint) -> dict[str, Any]:
    facts = asdict(breakpoint)
    tokens = facts["condition"]["tokens"]
    facts["condition"]["tokens"] = None if tokens is None else sorted(tokens)
    return facts


_TURN = ("max_tokens", "top_scores", "ignore_stops", "keep_logits", "step", "prompt_tokens", "generated")


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        **{name: getattr(turn, name) for name in _TURN},
        "sampling": asdict(turn.sampling),
        "stops": turn.text.stops,
        "stop_tokens": sorted(turn.stop_tokens),
        "scores": [[scores.chosen, list(scores.top)] for scores in turn.scores],
    }


def _read_turn(engine: Engine, facts: dict[str, Any]) -> Turn:
    text = TextStream(engine.loaded.tokenizer, [str(stop) for stop in facts["stops"]])
    for token in facts["generated"]:
        text.add(int(token))
    return Turn(
        sampling=Sampling(**facts["sampling"]),
        stop_tokens=frozenset(int(token) for token in facts["stop_tokens"]),
        text=text,
        scores=[
            Scores(float(chosen), tuple((int(token), float(value)) for token, value in top))
            for chosen, top in facts["scores"]
        ],
        **{name: facts[name] for name in _TURN},
    )


def _read_pause(ring: Ring, facts: dict[str, Any], tensors: dict[str, Any]) -> Pause:
    carried: dict[str, dict[Any, Any]] = {}
    for number, (name, key, count) in enumerate(facts["carried"]):
        handed = [tensors[f"carried.{number}.{index}"].to(ring.device) for index in range(count)]
        carried.setdefault(name, {})[key] = tuple(handed)
    return Pause(
        layer=int(facts["layer"]),
        step=int(facts["step"]),
        position=int(facts["position"]),
        tokens=int(facts["tokens"]),
        checkpoint=ring.adopt(tensors["hidden"]),
        breakpoint=str(facts["breakpoint"]),
        executed=int(facts["executed"]),
        carried=carried,
        norms=[(int(layer), float(norm)) for layer, norm in facts["norms"]],
        replaced=bool(facts["replaced"]),
    )
