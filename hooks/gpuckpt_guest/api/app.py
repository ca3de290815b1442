"""The application: routes, the form of errors, counting bytes, health and metrics."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import lifecycle
from ..engine.engine import NAME_RULE, Engine
from ..engine.errors import EngineError
from ..engine.session import State
from . import files, memory, openai, schema, sessions, stops
from .bridge import Bridge, Gone, bridge_of

_PAGE = Path(__file__).with_name("page.html")
_SESSION = "/v1/sessions/"
_JSON_LIMIT = 256 << 20  # a prompt of a million tokens, an activation, a vector
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Problem, "description": text}
    for status, text in (
        (400, "the request cannot be met"),
        (404, "there is no such thing"),
        (409, "it is not in a state that allows this"),
        (413, "the body is too large"),
        (422, "the request is not in the right form"),
        (429, "too many sessions"),
        (500, "the generation failed"),
        (503, "the engine has stopped"),
        (507, "host memory for caches is used up"),
    )
}


def application(engine: Engine, *, body_limit: int = 4 << 30) -> ASGIApp:
    """The whole HTTP interface of an engine that has been started."""
    app = FastAPI(
        title="gpuckpt guest",
        version="1",
        description="An OpenAI-compatible server whose generations can be stopped between any two layers.",
        responses=_PROBLEMS,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.bridge = Bridge(engine)
    app.state.created = int(time.time())
    for part in (openai, sessions, stops, memory, files):
        app.include_router(part.router)
    app.add_api_route("/health", _health, methods=["GET"], tags=["server"], response_model=schema.Done)
    app.add_api_route("/metrics", _metrics, methods=["GET"], tags=["server"], response_class=PlainTextResponse)
    app.add_api_route("/", _page, methods=["GET"], include_in_schema=False)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    return _Wire(app, engine, body_limit)


async def _health(request: Request) -> dict[str, Any]:
    """Whether the engine works; answered by its thread, between two layers."""
    await bridge_of(request).do(lambda: None)
    return {}


async def _metrics(request: Request) -> PlainTextResponse:
    """Counters in Prometheus' text format."""
    bridge = bridge_of(request)
    return PlainTextResponse(await bridge.do(_exposition, bridge.engine), media_type="text/plain; version=0.0.4")


def _exposition(engine: Engine) -> str:
    states = dict.fromkeys(State, 0)
    for session in engine.sessions.values():
        states[session.state] += 1
    lines = ["# TYPE gpuckpt_guest_sessions gauge"]
    lines += [f'gpuckpt_guest_sessions{{state="{state}"}} {count}' for state, count in states.items()]
    scheduler, memory = engine.scheduler, engine.memory.report()
    for name, kind, value in (
        # A server that is to be frozen is waited for until this is 0: no file of a block is half written then.
        ("requests_running", "gauge", states[State.RUNNING] + engine.memory.pager.at_work),
        ("layers_run_total", "counter", scheduler.layers_run),
        ("tokens_sampled_total", "counter", scheduler.passes.tokens_sampled),
        ("batch_size_max", "gauge", scheduler.largest_batch),
        ("checkpoint_ring_bytes", "gauge", engine.ring.size),
        ("checkpoints_spilled_total", "counter", engine.ring.spilled),
        ("memory_waiting", "gauge", engine.memory.residency.waiting),
        ("memory_device_free_bytes", "gauge", memory["device"]["free"]),
        ("memory_host_free_bytes", "gauge", memory["host"]["free"]),
        ("memory_disk_used_bytes", "gauge", memory["disk"]["used"]),
        ("paged_out_bytes_total", "counter", memory["out"]["bytes"]),
        ("paged_in_bytes_total", "counter", memory["in"]["bytes"]),
        ("evicted_total", "counter", memory["evicted"]),
        ("cache_bytes", "gauge", sum(s.cache.bytes() for s in engine.sessions.values() if s.state != State.RUNNING)),
    ):
        lines += [f"# TYPE gpuckpt_guest_{name} {kind}", f"gpuckpt_guest_{name} {value}"]
    return "\n".join(lines) + "\n"


async def _page() -> Response:
    return FileResponse(_PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})


def _problem(status: int, message: str, code: str) -> JSONResponse:
    error = {"message": message, "type": code, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


async def _engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return _problem(error.status, str(error), error.code)


async def _malformed(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    parts = []
    for item in error.errors()[:5]:
        where = ".".join(str(step) for step in item["loc"] if step != "body")
        # The only pattern is that of names.
        message = "is no name: " + NAME_RULE if item["type"] == "string_pattern_mismatch" else str(item["msg"])
        parts.append(f"{where}: {message}" if where else message)
    return _problem(422, "; ".join(parts), "malformed")


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException | StarletteHTTPException)
    made = _problem(error.status_code, str(error.detail), "http_error")
    made.headers.update(error.headers or {})
    return made


async def _failed(_: Request, error: Exception) -> Response:
    """A fault of this server: clients get the form of errors that they know; the log gets the rest."""
    return _problem(500, f"this is a fault of the server: {type(error).__name__}; its log tells more", "internal")


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class _Wire:
    """Counts the bytes that requests for a session receive and send; notices that the process woke up as a clone.

    Also the door: a web page that somebody looks at on this machine must not reach a server that only listens here. Its
    requests carry an Origin that is not this server's; or, where it has made its own name mean 127.0.0.1, a Host.
    """

    def __init__(self, app: ASGIApp, engine: Engine, limit: int) -> None:
        self._app = app
        self._engine = engine
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lifecycle.check()
        if refused := _foreign(scope):
            await _problem(403, refused, "forbidden")(scope, receive, send)
            return
        path: str = scope["path"]
        name = path[len(_SESSION) :].partition("/")[0] if path.startswith(_SESSION) else ""
        # A file may be large; what is written in JSON is not.
        limit = self._limit if path.endswith("/import") else min(self._limit, _JSON_LIMIT)
        total = 0
        too_large = StarletteHTTPException(413, f"the body has more than {limit} bytes", {"Connection": "close"})
        # What says that it is too large is refused before it is read.
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said) > limit:
            refusal = await _http_error(Request(scope), too_large)
            await refusal(scope, receive, send)
            return

        async def counted_receive() -> Message:
            nonlocal total
            message = await receive()
            size = len(message.get("body", b""))
            total += size
            if total > limit:
                raise too_large  # of all exceptions only this one passes through what reads bodies as it is
            if size and (session := self._engine.sessions.get(name)):
                session.wire_received += size
            return message

        async def counted_send(message: Message) -> None:
            size = len(message.get("body", b""))
            if size and (session := self._engine.sessions.get(name)):
                session.wire_sent += size
            await send(message)

        await self._app(scope, counted_receive, counted_send)


def _foreign(scope: Scope) -> str:
    """Why a request is not for this server; empty if it is."""
    headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return f"requests of pages from {origin} are refused"
    address = scope.get("server")
    if address and address[1] is not None and _loopback(address[0]) and host:
        name = urlsplit(f"//{host}").hostname or ""
        if name != "localhost" and not _loopback(name):
            return f"this server is not called {name}"
    return ""


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
