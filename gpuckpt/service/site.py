"""What the service answers itself on the clients' address: the list of models, health, metrics, the dashboard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from gpuckpt.service.dashboard import files
from gpuckpt.service.exchange import Receive, Scope, Send, error_body
from gpuckpt.service.routing import RoutingError
from gpuckpt.service.service import Service

_OPEN = frozenset({"/", "/health", "/dashboard", "/dashboard/", *(f"/dashboard/{name}" for name in files())})
"""Without a key; the page itself asks for one. Whatever is not here wants one, however the routes read its path."""
_REFRESH = 0.5  # seconds between two views to a dashboard while something changes
_QUIET = 5.0  # and while nothing does


class Site:
    """The ASGI application: what is not ours goes to the front."""

    def __init__(self, service: Service) -> None:
        self._service = service
        routes = [
            Route("/", self._root),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/dashboard", self._page),
            Route("/dashboard/", self._page),
            Route("/dashboard/state", self._state),
            Route("/dashboard/events", self._events),
            Route("/dashboard/{name}", self._page),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _nothing_there})
        self._ours = {"/", "/health", "/metrics", "/v1/models", "/dashboard"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        mine = path in self._ours or path.startswith(("/dashboard/", "/v1/models/"))
        if not mine or scope["method"] not in ("GET", "HEAD"):
            await self._service.front(scope, receive, send)
            return
        if path not in _OPEN and not self._service.front.keys.allow(dict(scope["headers"])):
            answer = _error(401, "no valid API key: send it as “Authorization: Bearer KEY”", "invalid_api_key")
            answer.headers["www-authenticate"] = "Bearer"
            await answer(scope, receive, send)  # type: ignore[arg-type]
            return
        await self._app(scope, receive, send)  # type: ignore[arg-type]

    async def _root(self, request: Request) -> Response:
        return RedirectResponse("/dashboard")

    async def _health(self, request: Request) -> Response:
        state = self._service.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, request: Request) -> Response:
        names = [name for name, model in self._service.config.models.items() for name in (name, *model.aliases)]
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in names]})

    async def _model(self, request: Request) -> Response:
        try:
            return JSONResponse(self._entry(request.path_params["name"]))
        except RoutingError as error:
            return _error(error.status, str(error), error.code)

    def _entry(self, name: str) -> dict[str, Any]:
        model = self._service.find(name)
        return {
            "id": name,
            "object": "model",
            "created": int(self._service.started),
            "owned_by": "gpuckpt",
            "root": model,
            "tier": self._service.tier_of(model),
        }

    # ------------------------------------------------------------------ the dashboard

    async def _page(self, request: Request) -> Response:
        file = files().get(request.path_params.get("name", "index.html"))
        if file is None:
            return _error(404, f"there is nothing at {request.url.path}", None)
        headers = {name: value for name, value in file.headers.items() if name != "Content-Length"}
        if file.known(request.headers.get("if-none-match")):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers)

    async def _state(self, request: Request) -> Response:
        return _view(self._service)

    async def _events(self, request: Request) -> Response:
        return StreamingResponse(self._views(), media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def _views(self) -> AsyncIterator[bytes]:
        async for view in self._service.views(_REFRESH, _QUIET):
            yield b"data: " + view + b"\n\n"


async def _nothing_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}", None)


def _view(service: Service) -> Response:
    body = msgspec.json.encode(service.view())
    return Response(body, media_type="application/json", headers={"cache-control": "no-store"})


def _error(status: int, message: str, code: str | None) -> Response:
    return JSONResponse(error_body(message, code, status), status)
