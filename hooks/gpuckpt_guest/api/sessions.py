"""The session API: create, generate, look on, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from ..engine.engine import Engine, Request
from ..engine.errors import EngineError, conflict
from ..engine.sampling import Sampling
from ..engine.session import Session, Turn
from . import schema
from .bridge import EVENTS, Bridge, Mailbox, bridge_of, sse, until
from .forms import edits_from, info, result, stop_at
from .text import continued, encode, encode_chat, stops

router = APIRouter(prefix="/v1", tags=["sessions"])


# ---------------------------------------------------------------------- the engine


@router.get("/engine", response_model=schema.EngineInfo)
async def engine_info(request: HttpRequest) -> dict[str, Any]:
    """The model, the probe's verdict, and counters."""
    bridge = bridge_of(request)
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
        "memory": engine.memory.report(),
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
    bridge = bridge_of(request)
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
    bridge = bridge_of(request)

    def listed() -> dict[str, Any]:
        engine = bridge.engine
        return {"sessions": [info(engine, session) for session in engine.sessions.values() if not session.ephemeral]}

    return await bridge.do(listed)


@router.get("/sessions/{id}", response_model=schema.SessionInfo)
async def show(id: str, request: HttpRequest) -> dict[str, Any]:
    """One session; where it has stopped, if it has."""
    bridge = bridge_of(request)
    return await bridge.do(lambda: info(bridge.engine, bridge.engine.session(id)))


@router.delete("/sessions/{id}", response_model=schema.Done)
async def delete(id: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a session, in whatever state; a running generation ends as cancelled."""
    bridge = bridge_of(request)
    box = Mailbox()

    def deleted() -> None:
        session = bridge.engine.session(id)
        session.listeners.append(box)
        bridge.engine.delete(session)

    await bridge.do(deleted)
    async for _ in box.until("deleted"):  # one that shares a batch goes when the pass has landed
        pass
    return {}


@router.post("/sessions/{id}/generate", response_model=schema.Result, responses=EVENTS)
async def generate(id: str, spec: schema.GenerateSpec, request: HttpRequest) -> Any:
    """Read on and write. Answers when it is done or has stopped; with `stream`, sends events as they come.

    A session remembers: only what it has not read yet is read. If the client hangs up, the generation is cancelled,
    unless it has stopped at a breakpoint.
    """
    bridge = bridge_of(request)
    box = Mailbox()
    read, messages = await _tokens(bridge, id, spec)
    session, turn = await bridge.do(_generate, bridge.engine, id, spec, read, messages, box)
    if spec.stream:
        return StreamingResponse(_streamed(bridge, session, turn, box), media_type="text/event-stream")
    if spec.wait:
        await until(request, bridge, session, turn, box, ("done", "paused"), cancel=True)
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


@router.get("/sessions/{id}/events", responses=EVENTS, response_model=None)
async def events(id: str, request: HttpRequest) -> Response:
    """What happens to the session, as it happens: `state` first, then token, paused, resumed, done, deleted …"""
    bridge = bridge_of(request)
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
    bridge = bridge_of(request)

    def cancelled() -> dict[str, Any]:
        session = bridge.engine.session(id)
        if session.suspended:
            raise conflict(f"session {id} is suspended; resume it first")
        bridge.engine.cancel(session)
        return info(bridge.engine, session)

    return await bridge.do(cancelled)
