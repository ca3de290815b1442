"""The session API where a generation has stopped: pause, look, change, branch, go on."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from .. import transfer
from ..engine.engine import Variant
from ..engine.errors import conflict, missing
from ..engine.session import Session, Turn
from . import schema
from .bridge import Mailbox, bridge_of, until
from .files import BINARY, BINARY_BODY, SAFETENSORS
from .forms import edits_from, info, result, stop_at
from .memory import moved
from .text import token_text

router = APIRouter(prefix="/v1", tags=["sessions"])


@router.post("/sessions/{id}/pause", response_model=schema.SessionInfo)
async def pause(id: str, spec: schema.PauseSpec, request: HttpRequest) -> dict[str, Any]:
    """Stop a running generation after its next layer, or after `layer` layers; answers when it has stopped or ended."""
    bridge = bridge_of(request)
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
        await until(request, bridge, session, turn, box, ("paused", "done"), cancel=False)
    return await bridge.do(info, bridge.engine, session)


@router.post("/sessions/{id}/resume", response_model=schema.Result | schema.SessionInfo)
async def resume(id: str, spec: schema.ResumeSpec, request: HttpRequest) -> Any:
    """Go on where it stopped; of a suspended session, bring its cache back to the device."""
    bridge = bridge_of(request)
    box = Mailbox()

    def begin() -> tuple[Session, Turn | None]:
        session = bridge.engine.session(id)
        bridge.engine.resume(session, None if spec.wait == "none" else box)
        return session, session.turn

    if spec.wait == "paused":
        return await moved(request, id, bridge.engine.wake, "woken", wait=True)
    session, turn = await bridge.do(begin)
    if turn is None:
        return await bridge.do(info, bridge.engine, session)
    if spec.wait != "none":
        types = ("done", "paused", "token") if spec.wait == "token" else ("done", "paused")
        await until(request, bridge, session, turn, box, types, cancel=False)
    # Not by the engine's thread, which is in a layer of the next pass already: nothing here changes under it but the
    # end of a list. Written as it is: to check what was just made takes longer than all the rest of an answer.
    return JSONResponse(result(bridge.engine, session, turn))


@router.post("/sessions/{id}/breakpoints", response_model=schema.Created, status_code=201)
async def add_breakpoint(id: str, spec: schema.BreakpointSpec, request: HttpRequest) -> dict[str, Any]:
    """Add breakpoints; they hold for this and later generations."""
    bridge = bridge_of(request)
    return {"ids": await bridge.do(lambda: stop_at(bridge.engine, bridge.engine.session(id), [spec]))}


@router.delete("/sessions/{id}/breakpoints/{name}", response_model=schema.Done)
async def remove_breakpoint(id: str, name: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a breakpoint; a session that it has stopped stays stopped."""
    bridge = bridge_of(request)

    def removed() -> None:
        if bridge.engine.session(id).breakpoints.pop(name, None) is None:
            raise missing("breakpoint", name)

    await bridge.do(removed)
    return {}


# ---------------------------------------------------------------------- looking and changing


@router.get("/sessions/{id}/activation", responses=BINARY, response_model=None)
async def get_activation(id: str, request: HttpRequest) -> Response:
    """The hidden state at the stop, edits made, as a safetensors file with one tensor, `hidden`."""
    bridge = bridge_of(request)

    def read() -> bytes:
        session = bridge.engine.session(id)
        state = bridge.engine.activation(session)
        assert session.pause is not None
        facts = {name: getattr(session.pause, name) for name in ("layer", "step", "position", "tokens")}
        return transfer.pack({"hidden": state}, {"pause": facts})

    return Response(await bridge.do(read), media_type=SAFETENSORS)


@router.put("/sessions/{id}/activation", response_model=schema.Done, openapi_extra=BINARY_BODY)
async def put_activation(id: str, request: HttpRequest) -> dict[str, Any]:
    """Put another tensor in the place of the hidden state: same shape, same type, finite numbers."""
    bridge = bridge_of(request)
    tensor = transfer.one_tensor(await request.body(), "hidden")
    await bridge.do(lambda: bridge.engine.set_activation(bridge.engine.session(id), tensor))
    return {}


@router.get("/sessions/{id}/lens", response_model=schema.Lens)
async def lens(id: str, request: HttpRequest, top: Annotated[int, Query(ge=1, le=1000)] = 10) -> dict[str, Any]:
    """The most likely next tokens, by the model's own head on the hidden state at the stop (logit lens)."""
    bridge = bridge_of(request)

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
    bridge = bridge_of(request)

    def steered() -> list[str]:
        session = bridge.engine.session(id)
        layer = session.pause.layer if session.pause else None
        return bridge.engine.steer(session, edits_from(bridge.engine, spec.edits, layer), standing=spec.standing)

    return {"ids": await bridge.do(steered)}


@router.delete("/sessions/{id}/steering/{name}", response_model=schema.Done)
async def unsteer(id: str, name: str, request: HttpRequest) -> dict[str, Any]:
    """Remove a standing rule; `*` removes all, and the edits made at the stop."""
    bridge = bridge_of(request)

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
    bridge = bridge_of(request)
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
            await until(request, bridge, session, turn, box, ("done", "paused"), cancel=False)
        results = [await bridge.do(result, bridge.engine, session, turn) for session, turn in begun]
    return {"sessions": [session.id for session, _ in begun], "results": results}
