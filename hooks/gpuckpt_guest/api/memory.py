"""The session API where a session's cache is: off the device, back, to stay, not needed for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from ..engine.errors import EngineError
from ..engine.session import Session
from . import schema
from .bridge import Mailbox, bridge_of, unless_gone
from .forms import info

router = APIRouter(prefix="/v1", tags=["memory"])


async def moved(
    request: HttpRequest, id: str, order: Callable[[Session], bool], event: str, *, wait: bool
) -> dict[str, Any]:
    """Give the order, and wait until it is told ``event`` if there is anything to wait for; returns the session."""
    bridge = bridge_of(request)
    box = Mailbox()

    def begin() -> Session | None:
        session = bridge.engine.session(id)
        if not order(session) or not wait:
            return None
        session.listeners.append(box)
        return session

    async def until() -> None:
        async for heard in box.until(event, "failed", "not_kept", "suspended", "woken"):
            if heard["type"] == "not_kept":
                raise EngineError(
                    f"session {id} has left the device, but could not be kept in files: {heard['error']}",
                    status=507,
                    code="not_kept",
                )

    session = await bridge.do(begin)
    if session is not None:
        try:
            await unless_gone(request, until())
        finally:
            box.close()
            bridge.engine.do(session.listeners.remove, box)
    return await bridge.do(lambda: info(bridge.engine, bridge.engine.session(id)))


@router.post("/sessions/{id}/suspend", response_model=schema.SessionInfo)
async def suspend(id: str, request: HttpRequest, spec: schema.SuspendSpec | None = None) -> dict[str, Any]:
    """Take an idle or stopped session's cache off the device, until it is resumed; answers when it has left."""
    engine, what = bridge_of(request).engine, spec or schema.SuspendSpec()

    def order(session: Session) -> bool:
        return engine.suspend(session, durable=what.durable)

    return await moved(request, id, order, "suspended", wait=what.wait)


@router.post("/sessions/{id}/prefetch", response_model=schema.SessionInfo)
async def prefetch(id: str, request: HttpRequest, spec: schema.PrefetchSpec | None = None) -> dict[str, Any]:
    """Begin to bring a session's cache back to the device; one that was suspended is idle or stopped then."""
    engine, what = bridge_of(request).engine, spec or schema.PrefetchSpec()
    return await moved(request, id, engine.wake, "woken", wait=what.wait)


@router.post("/sessions/{id}/pin", response_model=schema.SessionInfo)
async def pin(id: str, spec: schema.PinSpec, request: HttpRequest) -> dict[str, Any]:
    """Keep a session's cache on the device for a while, and bring it there if it is not."""
    engine = bridge_of(request).engine

    def order(session: Session) -> bool:
        engine.pin(session, spec.seconds)
        return False

    return await moved(request, id, order, "woken", wait=False)


@router.post("/sessions/{id}/idle", response_model=schema.SessionInfo)
async def idle(id: str, spec: schema.IdleSpec, request: HttpRequest) -> dict[str, Any]:
    """Say that nothing is to be expected for a while: others may have the memory, and it is brought back in time."""
    engine = bridge_of(request).engine

    def order(session: Session) -> bool:
        engine.expect(session, spec.seconds)
        return False

    return await moved(request, id, order, "woken", wait=False)
