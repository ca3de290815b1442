"""The session API: create, generate, stop, look, steer, branch, go on, move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from .. import transfer
from ..engine.engine import Engine, EngineError, Request, Variant, conflict, missing
from ..engine.sampling import Sampling
from ..engine.session import Session, Turn
from . import schema
from .bridge import Bridge, Mailbox, sse, unless_gone
from .forms import edits_from, info, result, stop_at
from .text import continued, encode, encode_chat, stops, token_text

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
            "tokens_sampled": scheduler.passes.tokens_sampled,
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
    session = engine.create(spec.id, edits=edits_from(engine, spec.steering, None), seed=spec.seed)
    try:
        stop_at(engine, session, spec.breakpoints)
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
    read, messages = await _tokens(bridge, id, spec)
    session, turn = await bridge.do(_generate, bridge.engine, id, spec, read, messages, box)
    if spec.stream:
        return StreamingResponse(_streamed(bridge, session, turn, box), media_type="text/event-stream")
    if spec.wait:
        await _until(request, bridge, session, turn, box, ("done", "paused"), cancel=True)
    return await bridge.do(result, bridge.engine, session, turn)


async def _tokens(bridge: Bridge, id: str, spec: schema.GenerateSpec) -> tuple[list[int], list[dict[str, Any]] | None]:
    """What is to be read, and the whole conversation if messages were given. Long texts do not hold the engine up."""
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(spec, name) is not None]
    if len(given) > 1:
        raise EngineError(f"give one of prompt, token_ids and messages, not {' and '.join(given)}")
    if spec.token_ids is not None:
        return list(spec.token_ids), None
    if not given:
        return [], None

    def known() -> tuple[int | None, list[dict[str, Any]]]:
        session = bridge.engine.session(id)
        return session.tokens[-1] if session.tokens else None, list(session.messages)

    last, before = await bridge.do(known)
    loaded = bridge.engine.loaded
    if spec.prompt is not None:
        # What a tokenizer puts before a text belongs before the first one only.
        return await asyncio.to_thread(encode, loaded.tokenizer, spec.prompt, first=last is None), None
    new = [message.model_dump() for message in spec.messages or ()]
    if last is None:
        return await asyncio.to_thread(encode_chat, loaded.tokenizer, new), new
    if not before:
        raise conflict(f"session {id} was not begun with messages; go on with a prompt")
    read = await asyncio.to_thread(continued, loaded.tokenizer, before, new, last, loaded.stops)
    return read, [*before, *new]


def _generate(
    engine: Engine,
    id: str,
    spec: schema.GenerateSpec,
    read: list[int],
    messages: list[dict[str, Any]] | None,
    box: Mailbox,
) -> tuple[Session, Turn]:
    session = engine.session(id)
    added: list[str] = []
    try:
        added = stop_at(engine, session, spec.breakpoints)
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
                chat=messages is not None,
            ),
            box if spec.stream or spec.wait else None,
        )
    except EngineError:
        for name in added:
            session.breakpoints.pop(name, None)
        raise
    if messages is not None:
        session.messages = messages
    return session, turn


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

    def left() -> None:
        if box in turn.sinks:
            turn.sinks.remove(box)
        if gone and cancel and session.turn is turn and not session.pause:
            bridge.engine.cancel(session)

    gone = True
    try:
        await unless_gone(request, wait())
        gone = False
    finally:
        box.close()
        bridge.engine.do(left)


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
        if spec.wait == "paused":
            bridge.engine.wake(session)
            return session, None
        bridge.engine.resume(session, None if spec.wait == "none" else box)
        return session, session.turn

    session, turn = await bridge.do(begin)
    if turn is None:
        return await bridge.do(info, bridge.engine, session)
    if spec.wait != "none":
        types = ("done", "paused", "token") if spec.wait == "token" else ("done", "paused")
        await _until(request, bridge, session, turn, box, types, cancel=False)
    # Not by the engine's thread, which is in a layer of the next pass already: nothing here changes under it but the
    # end of a list.
    return result(bridge.engine, session, turn)


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
    return {"ids": await bridge.do(lambda: stop_at(bridge.engine, bridge.engine.session(id), [spec]))}


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
        return bridge.engine.steer(session, edits_from(bridge.engine, spec.edits, layer), standing=spec.standing)

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
                edits=tuple(edits_from(engine, variant.edits, layer)),
                standing=tuple(edits_from(engine, variant.standing, layer)),
                sampling=variant.sampling.model_dump(exclude_unset=True) if variant.sampling else {},
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

    def taken() -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, metadata = transfer.export(bridge.engine, bridge.engine.session(id))
        # Copies: the session may go on while the file is written.
        return {name: tensor.clone() for name, tensor in tensors.items()}, metadata

    tensors, metadata = await bridge.do(taken)
    return Response(await asyncio.to_thread(transfer.pack, tensors, metadata), media_type=_SAFETENSORS)


@router.post("/sessions/import", response_model=schema.SessionInfo, status_code=201, openapi_extra=_BINARY_BODY)
async def load(request: HttpRequest, id: schema.Name | None = None) -> dict[str, Any]:
    """A session out of a file that `export` made, of the same model; under another name if one is given."""
    bridge = _bridge(request)
    file = await asyncio.to_thread(transfer.unpack, await request.body())

    def loaded() -> dict[str, Any]:
        return info(bridge.engine, transfer.load(bridge.engine, file, id))

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
