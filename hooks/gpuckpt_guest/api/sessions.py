"""The session API: create, generate, stop, look, steer, branch, go on, move."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from .. import transfer
from ..engine.breakpoints import Condition
from ..engine.engine import Engine, EngineError, Request, Variant, conflict, missing
from ..engine.sampling import Sampling
from ..engine.session import Session, State, Turn
from ..engine.steering import Edit
from . import schema
from .bridge import Bridge, Mailbox, sse, unless_gone
from .text import encode, encode_chat, stops, token_text

router = APIRouter(prefix="/v1", tags=["sessions"])
_SAFETENSORS = "application/octet-stream"
_BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {_SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}, "description": "safetensors"}
}
_BINARY_BODY = {
    "requestBody": {
        "required": True,
        "content": {_SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "server-sent events"}
}


def _bridge(request: HttpRequest) -> Bridge:
    bridge: Bridge = request.app.state.bridge
    return bridge


# ---------------------------------------------------------------------- the engine


@router.get("/engine", response_model=schema.EngineInfo)
async def engine_info(request: HttpRequest) -> dict[str, Any]:
    """The model, the probe's verdict, and counters."""
    bridge = _bridge(request)
    return await bridge.do(_engine_info, bridge.engine)


def _engine_info(engine: Engine) -> dict[str, Any]:
    loaded, scheduler = engine.loaded, engine.scheduler
    return {
        "model": loaded.name,
        "identity": loaded.identity,
        "verdict": loaded.verdict.as_json(),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "limit": loaded.limit,
        "vocabulary": loaded.vocabulary,
        "features": loaded.features,
        "ring": {"bytes": engine.ring.size, "spilled": engine.ring.spilled},
        "counters": {
            "layers_run": scheduler.layers_run,
            "tokens_sampled": scheduler.tokens_sampled,
            "largest_batch": scheduler.largest_batch,
        },
    }


# ---------------------------------------------------------------------- sessions


@router.post("/sessions", response_model=schema.SessionInfo, status_code=201)
async def create(spec: schema.SessionSpec, request: HttpRequest) -> dict[str, Any]:
    """Make a session that has read nothing."""
    bridge = _bridge(request)
    return await bridge.do(_create, bridge.engine, spec)


def _create(engine: Engine, spec: schema.SessionSpec) -> dict[str, Any]:
    session = engine.create(spec.id, edits=_edits(engine, spec.steering, None), seed=spec.seed)
    try:
        _stop_at(engine, session, spec.breakpoints)
    except EngineError:
        engine.delete(session)
        raise
    return info(engine, session)


@router.get("/sessions", response_model=schema.SessionList)
async def sessions(request: HttpRequest) -> dict[str, Any]:
    """All sessions but those of OpenAI's endpoints."""
    bridge = _bridge(request)

    def listed() -> dict[str, Any]:
        engine = bridge.engine
        return {"sessions": [info(engine, session) for session in engine.sessions.values() if not session.ephemeral]}

    return await bridge.do(listed)


@router.get("/sessions/{id}", response_model=schema.SessionInfo)
async def show(id: str, request: HttpRequest) -> dict[str, Any]:
    """One session; where it has stopped, if it has."""
    bridge = _bridge(request)
    return await bridge.do(lambda: info(bridge.engine, bridge.engine.session(id)))


@router.delete("/sessions/{id}", response_model=schema.Done)
async def delete(id: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a session, in whatever state; a running generation ends as cancelled."""
    bridge = _bridge(request)
    box = Mailbox()

    def deleted() -> None:
        session = bridge.engine.session(id)
        session.listeners.append(box)
        bridge.engine.delete(session)

    await bridge.do(deleted)
    async for _ in box.until("deleted"):  # one that shares a batch goes when the pass has landed
        pass
    return {}


@router.post("/sessions/{id}/generate", response_model=schema.Result, responses=_EVENTS)
async def generate(id: str, spec: schema.GenerateSpec, request: HttpRequest) -> Any:
    """Read on and write. Answers when it is done or has stopped; with `stream`, sends events as they come.

    A session remembers: only what it has not read yet is read. If the client hangs up, the generation is cancelled,
    unless it has stopped at a breakpoint.
    """
    bridge = _bridge(request)
    box = Mailbox()
    session, turn = await bridge.do(_generate, bridge.engine, id, spec, box)
    if spec.stream:
        return StreamingResponse(_streamed(bridge, session, turn, box), media_type="text/event-stream")
    if spec.wait:
        await _until(request, bridge, session, turn, box, ("done", "paused"), cancel=True)
    return await bridge.do(result, bridge.engine, session, turn)


def _generate(engine: Engine, id: str, spec: schema.GenerateSpec, box: Mailbox) -> tuple[Session, Turn]:
    session = engine.session(id)
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(spec, name) is not None]
    if len(given) > 1:
        raise EngineError(f"give one of prompt, token_ids and messages, not {' and '.join(given)}")
    read: list[int] = []
    if spec.prompt is not None:
        # What a tokenizer puts before a text belongs before the first one only.
        tokenizer = engine.loaded.tokenizer
        read = encode(tokenizer, spec.prompt) if not session.tokens else _plain(tokenizer, spec.prompt)
    elif spec.token_ids is not None:
        read = list(spec.token_ids)
    messages = session.messages
    if spec.messages is not None:
        messages = [*session.messages, *(message.model_dump() for message in spec.messages)]
        read = _continued(engine, session, messages)
    added: list[str] = []
    try:
        added = _stop_at(engine, session, spec.breakpoints)
        turn = engine.generate(
            session,
            Request(
                read=read,
                max_tokens=spec.max_tokens,
                sampling=Sampling(spec.temperature, spec.top_p, spec.top_k),
                seed=spec.seed,
                stops=stops(spec.stop),
                stop_tokens=frozenset(spec.stop_token_ids),
                ignore_stops=spec.ignore_eos,
                top_scores=spec.logprobs,
                keep_logits=spec.logits,
            ),
            box if spec.stream or spec.wait else None,
        )
    except EngineError:
        for name in added:
            session.breakpoints.pop(name, None)
        raise
    session.messages = messages
    return session, turn


def _plain(tokenizer: Any, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _continued(engine: Engine, session: Session, messages: list[dict[str, Any]]) -> list[int]:
    """The tokens of a conversation beyond those that the session has; its own answers are what it wrote."""
    wanted = encode_chat(engine.loaded.tokenizer, messages)
    if not session.tokens:
        return wanted
    # The template's text for what is new: how the whole conversation goes on behind what came before it.
    known = len(session.messages)
    if known == 0:
        raise conflict(f"session {session.id} was not begun with messages; go on with a prompt")
    before = engine.loaded.tokenizer.apply_chat_template(messages[:known], tokenize=False, add_generation_prompt=True)
    marker = "\x00answer\x00"
    answered = [*messages[:known], {"role": "assistant", "content": marker}, *messages[known:]]
    text = engine.loaded.tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=True)
    if not text.startswith(before) or marker not in text:
        raise conflict("the chat template rewrites earlier messages; send the conversation to a new session")
    return _plain(engine.loaded.tokenizer, text[text.index(marker) + len(marker) :])


async def _until(
    request: HttpRequest,
    bridge: Bridge,
    session: Session,
    turn: Turn,
    box: Mailbox,
    types: Sequence[str],
    *,
    cancel: bool,
) -> None:
    async def wait() -> None:
        async for _ in box.until(*types):
            pass

    async def leave(hung_up: bool) -> None:
        def left() -> None:
            if box in turn.sinks:
                turn.sinks.remove(box)
            if hung_up and cancel and session.turn is turn and not session.pause:
                bridge.engine.cancel(session)

        box.close()
        await bridge.do(left)

    try:
        await unless_gone(request, wait())
    except BaseException:
        await asyncio.shield(leave(True))
        raise
    await leave(False)


async def _streamed(bridge: Bridge, session: Session, turn: Turn, box: Mailbox) -> AsyncIterator[str]:
    ended = False
    try:
        async for event in box.until("done", "paused"):
            ended = event["type"] in ("done", "paused")
            yield sse(_public(event), event["type"])
    finally:

        def left() -> None:
            if box in turn.sinks:
                turn.sinks.remove(box)
            # Behind a stop it is others' business: someone may have let it go on already.
            if not ended and session.turn is turn and not session.pause:
                bridge.engine.cancel(session)

        box.close()
        bridge.engine.do(left)


def _public(event: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in event.items() if key != "scores"}
    if scores := event.get("scores"):
        made["logprob"] = scores.chosen
        made["top_logprobs"] = [list(pair) for pair in scores.top]
    return made


@router.get("/sessions/{id}/events", responses=_EVENTS, response_model=None)
async def events(id: str, request: HttpRequest) -> Response:
    """What happens to the session, as it happens: `state` first, then token, paused, resumed, done, deleted …"""
    bridge = _bridge(request)
    box = Mailbox()

    def listen() -> tuple[Session, dict[str, Any]]:
        session = bridge.engine.session(id)
        session.listeners.append(box)
        return session, info(bridge.engine, session)

    session, state = await bridge.do(listen)

    async def stream() -> AsyncIterator[str]:
        try:
            yield sse(state, "state")
            async for event in box.until("deleted"):
                yield sse(_public(event), event["type"])
        finally:
            box.close()
            bridge.engine.do(lambda: session.listeners.remove(box))

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.post("/sessions/{id}/cancel", response_model=schema.SessionInfo)
async def cancel(id: str, request: HttpRequest) -> dict[str, Any]:
    """End the generation at work; the session stays, with what it has read and written."""
    bridge = _bridge(request)

    def cancelled() -> dict[str, Any]:
        session = bridge.engine.session(id)
        if session.suspended:
            raise conflict(f"session {id} is suspended; resume it first")
        bridge.engine.cancel(session)
        return info(bridge.engine, session)

    return await bridge.do(cancelled)


# ---------------------------------------------------------------------- stopping and going on


@router.post("/sessions/{id}/pause", response_model=schema.SessionInfo)
async def pause(id: str, spec: schema.PauseSpec, request: HttpRequest) -> dict[str, Any]:
    """Stop a running generation after its next layer, or after `layer` layers; answers when it has stopped or ended."""
    bridge = _bridge(request)
    box = Mailbox()

    def begin() -> tuple[Session, Turn]:
        session = bridge.engine.session(id)
        if session.pause:
            raise conflict(f"session {id} has stopped already, after layer {session.pause.layer}")
        bridge.engine.pause(session, spec.layer)
        assert session.turn is not None
        if spec.wait:
            session.turn.sinks.append(box)
        return session, session.turn

    session, turn = await bridge.do(begin)
    if spec.wait:
        await _until(request, bridge, session, turn, box, ("paused", "done"), cancel=False)
    return await bridge.do(info, bridge.engine, session)


@router.post("/sessions/{id}/resume", response_model=schema.Result | schema.SessionInfo)
async def resume(id: str, spec: schema.ResumeSpec, request: HttpRequest) -> Any:
    """Go on where it stopped; of a suspended session, bring its cache back to the device."""
    bridge = _bridge(request)
    box = Mailbox()

    def begin() -> tuple[Session, Turn | None]:
        session = bridge.engine.session(id)
        bridge.engine.resume(session, None if spec.wait == "none" else box)
        return session, session.turn

    session, turn = await bridge.do(begin)
    if turn is None:
        return await bridge.do(info, bridge.engine, session)
    if spec.wait != "none":
        types = ("done", "paused", "token") if spec.wait == "token" else ("done", "paused")
        await _until(request, bridge, session, turn, box, types, cancel=False)
    return await bridge.do(result, bridge.engine, session, turn)


@router.post("/sessions/{id}/suspend", response_model=schema.SessionInfo)
async def suspend(id: str, request: HttpRequest) -> dict[str, Any]:
    """Take an idle or stopped session's cache off the device."""
    bridge = _bridge(request)

    def suspended() -> dict[str, Any]:
        session = bridge.engine.session(id)
        bridge.engine.suspend(session)
        return info(bridge.engine, session)

    return await bridge.do(suspended)


@router.post("/sessions/{id}/breakpoints", response_model=schema.Created, status_code=201)
async def add_breakpoint(id: str, spec: schema.BreakpointSpec, request: HttpRequest) -> dict[str, Any]:
    """Add breakpoints; they hold for this and later generations."""
    bridge = _bridge(request)
    return {"ids": await bridge.do(lambda: _stop_at(bridge.engine, bridge.engine.session(id), [spec]))}


@router.delete("/sessions/{id}/breakpoints/{name}", response_model=schema.Done)
async def remove_breakpoint(id: str, name: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a breakpoint; a session that it has stopped stays stopped."""
    bridge = _bridge(request)

    def removed() -> None:
        if bridge.engine.session(id).breakpoints.pop(name, None) is None:
            raise missing("breakpoint", name)

    await bridge.do(removed)
    return {}


# ---------------------------------------------------------------------- looking and changing


@router.get("/sessions/{id}/activation", responses=_BINARY, response_model=None)
async def get_activation(id: str, request: HttpRequest) -> Response:
    """The hidden state at the stop, edits made, as a safetensors file with one tensor, `hidden`."""
    bridge = _bridge(request)

    def read() -> bytes:
        session = bridge.engine.session(id)
        state = bridge.engine.activation(session)
        assert session.pause is not None
        facts = {name: getattr(session.pause, name) for name in ("layer", "step", "position", "tokens")}
        return transfer.pack({"hidden": state}, {"pause": facts})

    return Response(await bridge.do(read), media_type=_SAFETENSORS)


@router.put("/sessions/{id}/activation", response_model=schema.Done, openapi_extra=_BINARY_BODY)
async def put_activation(id: str, request: HttpRequest) -> dict[str, Any]:
    """Put another tensor in the place of the hidden state: same shape, same type, finite numbers."""
    bridge = _bridge(request)
    tensor = transfer.one_tensor(await request.body(), "hidden")
    await bridge.do(lambda: bridge.engine.set_activation(bridge.engine.session(id), tensor))
    return {}


@router.get("/sessions/{id}/lens", response_model=schema.Lens)
async def lens(id: str, request: HttpRequest, top: Annotated[int, Query(ge=1, le=1000)] = 10) -> dict[str, Any]:
    """The most likely next tokens, by the model's own head on the hidden state at the stop (logit lens)."""
    bridge = _bridge(request)

    def seen() -> dict[str, Any]:
        session = bridge.engine.session(id)
        found = bridge.engine.lens(session, top)
        assert session.pause is not None
        tokens = [
            {"id": token, "text": token_text(bridge.engine.loaded.tokenizer, token), "probability": share}
            for token, share in found
        ]
        return {"layer": session.pause.layer, "tokens": tokens}

    return await bridge.do(seen)


@router.post("/sessions/{id}/steer", response_model=schema.Created)
async def steer(id: str, spec: schema.SteerSpec, request: HttpRequest) -> dict[str, Any]:
    """Edit the hidden state at the stop; or, `standing`, at a layer in all passes to come."""
    bridge = _bridge(request)

    def steered() -> list[str]:
        session = bridge.engine.session(id)
        layer = session.pause.layer if session.pause else None
        return bridge.engine.steer(session, _edits(bridge.engine, spec.edits, layer), standing=spec.standing)

    return {"ids": await bridge.do(steered)}


@router.delete("/sessions/{id}/steering/{name}", response_model=schema.Done)
async def unsteer(id: str, name: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a standing rule; `*` removes all, and the edits made at the stop."""
    bridge = _bridge(request)

    def removed() -> None:
        session = bridge.engine.session(id)
        if name == "*":
            session.edits.clear()
            if session.pause:
                session.pause.edits.clear()
        elif session.edits.pop(name, None) is None:
            raise missing("standing rule", name)

    await bridge.do(removed)
    return {}


@router.post("/sessions/{id}/branch", response_model=schema.BranchResult)
async def branch(id: str, spec: schema.BranchSpec, request: HttpRequest) -> dict[str, Any]:
    """Make a session for each variant from here; the rest of the stopped pass is run for all of them as one batch."""
    bridge = _bridge(request)
    boxes = [Mailbox() for _ in spec.variants]

    def begin() -> list[tuple[Session, Turn | None]]:
        engine = bridge.engine
        parent = engine.session(id)
        layer = parent.pause.layer if parent.pause else None
        variants = [
            Variant(
                id=variant.id,
                edits=tuple(_edits(engine, variant.edits, layer)),
                standing=tuple(_edits(engine, variant.standing, layer)),
                sampling=Sampling(**variant.sampling.model_dump()) if variant.sampling else None,
                seed=variant.seed,
                max_tokens=variant.max_tokens,
            )
            for variant in spec.variants
        ]
        sinks = boxes if spec.resume and spec.wait else []
        children = engine.branch(parent, variants, resume=spec.resume, sinks=sinks)
        return [(child, child.turn) for child in children]

    begun = await bridge.do(begin)
    results = None
    if spec.resume and spec.wait and all(turn for _, turn in begun):
        for (session, turn), box in zip(begun, boxes, strict=True):
            assert turn is not None
            await _until(request, bridge, session, turn, box, ("done", "paused"), cancel=False)
        results = [await bridge.do(result, bridge.engine, session, turn) for session, turn in begun]
    return {"sessions": [session.id for session, _ in begun], "results": results}


# ---------------------------------------------------------------------- moving


@router.get("/sessions/{id}/export", responses=_BINARY, response_model=None)
async def export(id: str, request: HttpRequest) -> Response:
    """The session, stopped or idle, as one safetensors file: to keep, or for `POST /v1/sessions/import` elsewhere."""
    bridge = _bridge(request)
    data = await bridge.do(lambda: transfer.export(bridge.engine, bridge.engine.session(id)))
    return Response(data, media_type=_SAFETENSORS)


@router.post("/sessions/import", response_model=schema.SessionInfo, status_code=201, openapi_extra=_BINARY_BODY)
async def load(request: HttpRequest, id: schema.Name | None = None) -> dict[str, Any]:
    """A session out of a file that `export` made, of the same model; under another name if one is given."""
    bridge = _bridge(request)
    data = await request.body()

    def loaded() -> dict[str, Any]:
        return info(bridge.engine, transfer.load(bridge.engine, data, id))

    return await bridge.do(loaded)


@router.get("/vectors", response_model=schema.Vectors)
async def vectors(request: HttpRequest) -> dict[str, Any]:
    """Names of the vectors that edits can name."""
    engine = _bridge(request).engine
    return {"vectors": sorted(engine.vectors), "features": engine.loaded.features}


@router.put("/vectors/{name}", response_model=schema.Done, openapi_extra=_BINARY_BODY)
async def put_vector(name: str, request: HttpRequest) -> dict[str, Any]:
    """Store a vector, as a safetensors file with one tensor; one of that name is replaced."""
    bridge = _bridge(request)
    tensor = transfer.one_tensor(await request.body(), "vector")
    await bridge.do(lambda: bridge.engine.store_vector(name, tensor))
    return {}


@router.get("/vectors/{name}", responses=_BINARY, response_model=None)
async def get_vector(name: str, request: HttpRequest) -> Response:
    """A stored vector, as a safetensors file."""
    bridge = _bridge(request)

    def read() -> bytes:
        if name not in bridge.engine.vectors:
            raise missing("vector", name)
        return transfer.pack({"vector": bridge.engine.vectors[name]}, {})

    return Response(await bridge.do(read), media_type=_SAFETENSORS)


@router.delete("/vectors/{name}", response_model=schema.Done)
async def delete_vector(name: str, request: HttpRequest) -> dict[str, Any]:
    """Forget a vector; edits that use it keep it."""
    bridge = _bridge(request)

    def removed() -> None:
        if bridge.engine.vectors.pop(name, None) is None:
            raise missing("vector", name)

    await bridge.do(removed)
    return {}


# ---------------------------------------------------------------------- forms


def _edits(engine: Engine, specs: Sequence[schema.EditSpec], layer: int | None) -> list[Edit]:
    made = []
    for spec in specs:
        at = spec.layer if spec.layer is not None else layer
        if at is None:
            raise EngineError("the edit needs a layer: the session has not stopped at one")
        vector: Any = None
        if isinstance(spec.vector, str):
            if (vector := engine.vectors.get(spec.vector)) is None:
                raise missing("vector", spec.vector)
        elif spec.vector is not None:
            vector = torch.tensor(spec.vector, dtype=torch.float32)
        made.append(Edit(spec.kind, at, spec.factor, vector, spec.first, spec.last, spec.name or ""))
    return made


def _stop_at(engine: Engine, session: Session, specs: Sequence[schema.BreakpointSpec]) -> list[str]:
    made: list[str] = []
    try:
        for spec in specs:
            layers = spec.layer if isinstance(spec.layer, list) else [spec.layer]
            if spec.id and len(layers) > 1:
                raise EngineError("a breakpoint with several layers makes several: they cannot share an id")
            condition = spec.condition.model_dump()
            if condition["tokens"] is not None:
                condition["tokens"] = frozenset(condition["tokens"])
            stop = partial(
                engine.stop_at,
                session,
                name=spec.id,
                phase=spec.phase,
                position=spec.position,
                step=spec.step,
                condition=Condition(**condition),
                once=spec.once,
            )
            made += [stop(layer=layer) for layer in layers]
    except EngineError:
        for name in made:
            session.breakpoints.pop(name, None)
        raise
    return made


def _edit_info(edit: Edit) -> dict[str, Any]:
    made = {name: getattr(edit, name) for name in ("name", "kind", "layer", "factor", "first", "last")}
    return made | {"vector": None if edit.vector is None else float(edit.vector.float().norm())}


def info(engine: Engine, session: Session) -> dict[str, Any]:
    """A session in the form of :class:`schema.SessionInfo`."""
    turn = session.turn
    return {
        "id": session.id,
        "state": session.state,
        "parent": session.parent,
        "created": session.created,
        "tokens": len(session.tokens),
        "length": session.cache.length,
        "cache_bytes": session.cache.bytes() if session.state is not State.RUNNING else 0,
        "turns": session.turns,
        "passes": session.passes,
        "steering": [_edit_info(edit) for edit in session.edits.values()],
        "breakpoints": [transfer.breakpoint_facts(breakpoint) for breakpoint in session.breakpoints.values()],
        "pause": _pause_info(engine, session),
        "generated": len(turn.generated) if turn else 0,
        "text": turn.text.text if turn else "",
        "failed": session.failed,
        "wire_bytes": {"received": session.wire_received, "sent": session.wire_sent},
    }


def _pause_info(engine: Engine, session: Session) -> dict[str, Any] | None:
    pause = session.pause
    if pause is None:
        return None
    held = pause.checkpoint
    return {
        **{name: getattr(pause, name) for name in ("layer", "step", "position", "tokens", "breakpoint", "replaced")},
        "layers": engine.loaded.verdict.layers,
        "shape": list(held.shape),
        "dtype": str(held.dtype).removeprefix("torch."),
        "checkpoint": {
            "bytes": held.bytes,
            "dispatch_us": held.dispatch_us,
            "complete_us": held.complete_us if held.done else None,
            "pinned": held.pinned,
        },
        "edits": [_edit_info(edit) for edit in pause.edits],
        "norms": [(layer, norm if math.isfinite(norm) else None) for layer, norm in pause.norms],
        "seconds": (time.monotonic_ns() - pause.began_ns) / 1e9,
        "wire_bytes": {
            "received": session.wire_received - pause.wire[0],
            "sent": session.wire_sent - pause.wire[1],
        },
    }


def result(engine: Engine, session: Session, turn: Turn) -> dict[str, Any]:
    """A generation in the form of :class:`schema.Result`."""
    state = "done" if turn.reason else "paused" if session.turn is turn and session.pause else "running"
    logs = None
    if turn.top_scores is not None:
        logs = [
            {"token": token, "logprob": scores.chosen, "top": [list(pair) for pair in scores.top]}
            for token, scores in zip(turn.generated, turn.scores, strict=True)
        ]
    return {
        "session": session.id,
        "state": state,
        "text": turn.text.text,
        "tokens": turn.generated,
        "finish_reason": turn.reason or None,
        "stop": turn.stop,
        "logprobs": logs,
        "logits": turn.logits.tolist() if turn.logits is not None else None,
        "pause": _pause_info(engine, session) if state == "paused" else None,
        "prompt_tokens": turn.prompt_tokens,
        "error": turn.error or None,
    }
