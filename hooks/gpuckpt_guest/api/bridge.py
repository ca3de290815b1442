"""Between the event loop that serves HTTP and the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from ..engine.engine import Engine
from ..engine.session import Event, Session, Turn

_Result = TypeVar("_Result")
# How answers that may be streams are described in the OpenAPI document.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "JSON, or server-sent events"}
}
# A listener that is so many events behind does not read any more.
_BEHIND = 10_000


class Gone(Exception):
    """The client has hung up."""


class Bridge:
    """The engine, for coroutines."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def do(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call ``function`` on the engine's thread, between two layers."""
        return await asyncio.wrap_future(self.engine.do(function, *args, **kwargs))


def bridge_of(request: Request) -> Bridge:
    """The bridge of the application that has this request."""
    bridge: Bridge = request.app.state.bridge
    return bridge


class Mailbox:
    """Events of a session, from the engine's thread to a coroutine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._closed = False

    def __call__(self, event: Event) -> None:
        """The sink: called by the engine's thread."""
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        if self._events.qsize() > _BEHIND:
            self._closed = True
            self._events.put_nowait(None)
        elif not self._closed:
            self._events.put_nowait(event)

    async def get(self) -> Event:
        """The next event; waits for it."""
        event = await self._events.get()
        return {"type": "lost"} if event is None else event

    async def until(self, *types: str) -> AsyncIterator[Event]:
        """Events up to and including the first of one of ``types``."""
        while True:
            event = await self.get()
            yield event
            if event["type"] in types or event["type"] in ("lost", "deleted"):
                return

    def close(self) -> None:
        """Take no more."""
        self._closed = True


async def unless_gone(request: Request, work: Awaitable[_Result]) -> _Result:
    """Wait for ``work``; raises Gone, and cancels it, if the client hangs up meanwhile."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for pending in (task, watcher):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending


async def _disconnected(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


async def until(
    request: Request,
    bridge: Bridge,
    session: Session,
    turn: Turn,
    box: Mailbox,
    types: Sequence[str],
    *,
    cancel: bool,
) -> None:
    """Wait for an event of one of ``types``, in ``box``; raises Gone if the client hangs up meanwhile.

    ``cancel``: the generation then ends, unless it has stopped.
    """

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


def sse(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n"
