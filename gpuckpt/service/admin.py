"""The admin API, on a Unix socket that only root may use; docs/pool-api.md is its contract."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gpuckpt.errors import BusyError, DeadlineError, GpuckptError, NotFoundError, UsageError
from gpuckpt.pool.book import LateError, RefusedError
from gpuckpt.service.routing import RoutingError
from gpuckpt.service.service import Service
from gpuckpt.service.view import EventView

_log = logging.getLogger("gpuckpt.pool")
_HEARTBEAT = 5.0
_LONGEST_WAKE = 3600.0
_LONGEST_LOOK = 10.0  # seconds that an order waits for a replica whose health is being looked at


class _Wake(Struct, forbid_unknown_fields=True):
    deadline: float = 600.0


class _Sleep(Struct, forbid_unknown_fields=True):
    release: bool = False


class _Scale(Struct, forbid_unknown_fields=True):
    replicas: int | None


class _RefusedHere(Exception):
    def __init__(self, status: int, message: str, cause: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "cause": cause, "remedy": remedy}


class Admin:
    """The application's endpoints. ``reload`` reads the configuration again; ``stop`` ends the service."""

    def __init__(self, service: Service, *, reload: Callable[[], Awaitable[Any]], stop: Callable[[], None]) -> None:
        self._service = service
        self._reload = reload
        self._stop = stop

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/state", self._answered(self._state), methods=["GET"]),
            Route("/v1/events", self._answered(self._events), methods=["GET"]),
            Route("/v1/models/{name:path}/wake", self._answered(self._wake), methods=["POST"]),
            Route("/v1/models/{name:path}/sleep", self._answered(self._sleep), methods=["POST"]),
            Route("/v1/models/{name:path}/scale", self._answered(self._scale), methods=["POST"]),
            Route("/v1/models/{name:path}/drain", self._answered(self._drain_model), methods=["POST"]),
            Route("/v1/reload", self._answered(self._reload_now), methods=["POST"]),
            Route("/v1/drain", self._answered(self._drain), methods=["POST"]),
            Route("/metrics", self._answered(self._metrics), methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_request})

    def _answered(self, work: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await work(request)
            except _RefusedHere as error:
                return _json({"error": {k: v for k, v in error.error.items() if v}}, error.status)
            except RoutingError as error:
                return _json({"error": {"message": str(error)}}, error.status)
            except RefusedError as error:
                return _json({"error": {"message": str(error)}}, error.status)
            except GpuckptError as error:
                said = {"message": error.message, "cause": error.cause, "remedy": error.remedy}
                return _json({"error": {k: v for k, v in said.items() if v}}, _status(error))
            except Exception:  # a fault of ours: whoever asked is told, the log has it
                _log.exception("%s %s could not be answered", request.method, request.url.path)
                return _json({"error": {"message": "the service has failed on this request; its log says more"}}, 500)

        return answer

    # ------------------------------------------------------------------ reading

    async def _state(self, request: Request) -> Response:
        return _json(self._service.view(_number(request, "events", 100)))

    async def _events(self, request: Request) -> Response:
        model = request.query_params.get("model")
        if model is not None:
            model = self._service.find(model)
        after, limit = _number(request, "after", 0), _number(request, "limit", 1000)
        history = self._service.history
        if request.query_params.get("follow") in ("1", "true"):
            told = after if request.query_params.get("after") else None
            found = history.follow(_HEARTBEAT, after=told, limit=limit, model=model)
            return StreamingResponse(_lines(found), media_type="text/event-stream")
        return _json({"events": history.last(limit, after=after, model=model)})

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ------------------------------------------------------------------ orders

    async def _wake(self, request: Request) -> Response:
        name = self._named(request)
        asked = await _body(request, _Wake, _Wake())
        if not 0 < asked.deadline <= _LONGEST_WAKE:
            raise _RefusedHere(400, f"deadline must be between 0 and {_LONGEST_WAKE:g} seconds")
        try:
            lease = await self._service.owner.wake(name, asked.deadline)
        except LateError as error:
            raise _RefusedHere(504, str(error)) from None
        return _json({"model": name, "replica": lease.replica.name, "tier": lease.tier, "seconds": lease.waited})

    async def _sleep(self, request: Request) -> Response:
        asked = await _body(request, _Sleep, _Sleep())
        await self._service.owner.looked_at(self._named(request), _LONGEST_LOOK)
        name = self._named(request)  # it may have been removed meanwhile
        names = self._service.owner.sleep(name, release=asked.release)
        return _json({"model": name, "stopped" if asked.release else "frozen": names})

    async def _scale(self, request: Request) -> Response:
        name = self._named(request)
        wanted = (await _body(request, _Scale, None)).replicas
        most = self._service.owner.models[name].rules.max_replicas
        if wanted is not None and not 0 <= wanted <= most:
            raise _RefusedHere(
                400,
                f"{name} can have 0 to {most} replicas, not {wanted}",
                remedy=f'raise max_replicas in [models."{name}"], and reload',
            )
        self._service.owner.scale(name, wanted)
        return _json({"model": name, "replicas": wanted})

    async def _drain_model(self, request: Request) -> Response:
        name = self._named(request)
        return _json({"model": name, "stopped": self._service.owner.drain_model(name)})

    async def _reload_now(self, request: Request) -> Response:
        return _json(msgspec.to_builtins(await self._reload()))

    async def _drain(self, request: Request) -> Response:
        # After this answer is on its way.
        asyncio.get_running_loop().call_later(0.05, self._stop)
        return _json({}, 202)

    def _named(self, request: Request) -> str:
        name = self._service.find(request.path_params["name"])
        if name not in self._service.owner.models:
            raise BusyError("the service is starting", remedy="try again in a moment")
        return name


async def _lines(found: AsyncGenerator[EventView | None, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(found):
        async for event in found:
            yield b": nothing\n\n" if event is None else b"data: " + msgspec.json.encode(event) + b"\n\n"


async def _no_such_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json({"error": {"message": message}}, error.status_code)


def _status(error: GpuckptError) -> int:
    known = {UsageError: 400, NotFoundError: 404, BusyError: 409, DeadlineError: 504}
    return next((status for kind, status in known.items() if isinstance(error, kind)), 500)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or len(text) > 15:
        raise _RefusedHere(400, f"{name} must be a number, not “{text[:40]}”")
    return int(text)


async def _body(request: Request, kind: type[Any], default: Any) -> Any:
    data = await request.body()
    if not data.strip() and default is not None:
        return default
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedHere(400, f"the body cannot be used: {error}") from None
