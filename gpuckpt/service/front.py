"""The address that clients use: OpenAI-compatible requests, each relayed to a replica of the model that it names.

A plain ASGI application: what comes from a replica goes to the client as it came, piece by piece. A request that no
replica has begun to answer can be given to another one; so the head of an answer is sent with its first bytes, not
before. Only a stream whose client would otherwise hear nothing for long gets its head ahead, and comments to wait by
(lines that begin with a colon are ignored by readers of server-sent events; WHATWG HTML, 9.2.6).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gpuckpt.pool.book import Held, RefusedError
from gpuckpt.pool.owner import Lease
from gpuckpt.service.keys import Keys
from gpuckpt.service.routing import Route, RoutingError
from gpuckpt.service.upstream import Connection, Upstream, UpstreamError

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

_log = logging.getLogger("gpuckpt.pool")
_ATTEMPTS = 4  # replicas that a request is given to, one after the other, before it is given up
_SLOWEST = 16 << 10  # bytes a second that a body must come at on average
# They are about one connection, not about the message (RFC 9110, 7.6.1); the length is counted anew.
_HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
    )
    + (b"trailers", b"transfer-encoding", b"upgrade")
)
_NOT_PASSED_ON = _HOP_BY_HOP | {b"content-length", b"expect", b"x-gpuckpt-model"}
_EVENTS = b"text/event-stream"


class Pool(Protocol):
    """What the front asks of the pool."""

    def tier(self, name: str) -> str: ...
    async def acquire(self, name: str, deadline: float) -> Lease: ...
    def release(self, held: Held) -> None: ...
    async def suspect(self, held: Held) -> None: ...


@dataclass
class Limits:
    """What a client may do, and how long things may take; seconds and bytes (see :mod:`gpuckpt.pool.config`)."""

    body: int = 64 << 20
    deadline: float = 120.0
    keep_alive: float = 5.0
    request: float = 20.0


@dataclass
class Record:
    """How a request went, for metrics and logs. ``first`` and ``total`` are seconds from its arrival.

    ``outcome``: ok, error (the model's own), refused, broken (its stream was cut), gone (the client went away).
    """

    model: str = ""
    tier: str = ""
    replica: str = ""
    status: int = 0
    outcome: str = ""
    waited: float = 0.0
    first: float | None = None
    total: float = 0.0
    retries: list[str] = field(default_factory=list)


class _AnswerError(Exception):
    """To be answered with an error of our own."""

    def __init__(self, status: int, message: str, code: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Front:
    """The application. ``route`` says where a request goes, ``done`` is told how each went."""

    def __init__(
        self,
        pool: Pool,
        upstream: Upstream,
        route: Callable[[str, bytes, bytes, Mapping[bytes, bytes], bytes], Route],
        *,
        keys: Keys,
        limits: Limits,
        done: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._pool = pool
        self._upstream = upstream
        self._route = route
        self.keys = keys
        self.limits = limits
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = _Exchange(scope, receive, send, time.monotonic())
        record = exchange.record
        try:
            await self._answer(exchange)
        except (_AnswerError, RefusedError, RoutingError) as error:
            record.outcome = record.outcome or "refused"
            await exchange.refuse(_as_answer(error))
        except _ClientGone:
            record.outcome = "gone"
        except BrokenOffError:
            raise
        except Exception:  # a fault of ours: the client is told, the log has it
            _log.exception("a request could not be answered")
            record.outcome = "broken" if exchange.begun else "failed"
            if exchange.begun:
                raise
            await exchange.refuse(_AnswerError(500, "the service has failed on this request", "internal_error"))
        finally:
            record.total = time.monotonic() - exchange.began
            self._done(record)

    async def _answer(self, exchange: _Exchange) -> None:
        if not self.keys.allow(exchange.headers):
            raise _AnswerError(401, "no valid API key: send it as “Authorization: Bearer KEY”", "invalid_api_key")
        body = await exchange.body(self.limits)
        scope = exchange.scope
        route = self._route(scope["path"], scope["query_string"], scope["raw_path"], exchange.headers, body)
        exchange.record.model, exchange.record.tier = route.model, self._pool.tier(route.model)
        exchange.stream = route.stream
        passed = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _NOT_PASSED_ON and name not in exchange.connection_names
        ]
        if self.keys:  # ours, and nobody else's to know
            passed = [(name, value) for name, value in passed if name not in (b"authorization", b"x-api-key")]
        async with exchange.while_client_stays(), exchange.comments(self.limits.keep_alive):
            await self._relay(exchange, route, passed)

    async def _relay(self, exchange: _Exchange, route: Route, headers: list[tuple[bytes, bytes]]) -> None:
        record = exchange.record
        for attempt in range(1, _ATTEMPTS + 1):
            lease = await self._pool.acquire(route.model, max(0.1, self.limits.deadline - record.waited))
            held = lease.replica
            record.tier = lease.tier if attempt == 1 else record.tier
            record.replica, record.waited = held.name, record.waited + lease.waited
            connection: Connection | None = None
            try:
                connection = await self._upstream.send(
                    held.name, held.endpoint, exchange.method, route.target, headers, route.body
                )
                first = await connection.read()
                if connection.status >= 500 and attempt < _ATTEMPTS and await self._is_down(held):
                    raise UpstreamError(f"it answered {connection.status}, and is down")
                record.first = time.monotonic() - exchange.began
                await self._pass_on(exchange, connection, held, first)
                return
            except UpstreamError as error:
                if exchange.begun:
                    record.outcome = "broken"
                    await self._pool.suspect(held)
                    await exchange.break_off(f"the replica has failed: {error}")
                    return
                record.retries.append(str(error))
                if attempt == _ATTEMPTS:
                    raise _AnswerError(
                        502, f"{attempt} replicas of {route.model} have failed on it: {error}", "replica_failed"
                    ) from None
                await self._pool.suspect(held)
            finally:
                if connection is not None:
                    self._upstream.done(held.name, connection)
                self._pool.release(held)

    async def _is_down(self, held: Held) -> bool:
        await self._pool.suspect(held)
        return held.phase != "hot"

    async def _pass_on(self, exchange: _Exchange, connection: Connection, held: Held, first: bytes) -> None:
        clock = time.monotonic
        await exchange.head(connection.status, connection.headers, first, last=connection.ended)
        piece = first
        while piece and not connection.ended:
            piece = await connection.read()
            held.heard = clock()
            await exchange.piece(piece, last=connection.ended or not piece)
        exchange.record.outcome = "ok" if connection.status < 400 else "error"


class _Exchange:
    """One request of a client, and what it has been sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, began: float) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        named = self.headers.get(b"connection", b"").lower()
        self.connection_names = frozenset(name.strip() for name in named.split(b",")) if named else frozenset()
        self._receive = receive
        self._send = send
        self.began = began
        self.record = Record()
        self.stream = False
        self.begun = False  # bytes of an answer have been sent
        self._ahead = False  # a head has been sent, before there was an answer
        self._tail = b""

    # ------------------------------------------------------------------ what the client sends

    async def body(self, limits: Limits) -> bytes:
        """The whole body; raises _AnswerError if it is too long or too slow, _ClientGone."""
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limits.body:
            raise _too_long(limits.body)
        pieces: list[bytes] = []
        size = 0
        while True:
            try:
                async with asyncio.timeout(self.began + limits.request + size / _SLOWEST - time.monotonic()):
                    message = await self._receive()
            except TimeoutError:
                raise _AnswerError(
                    408, f"the request was not complete after {time.monotonic() - self.began:.0f} s", "too_slow"
                ) from None
            if message["type"] == "http.disconnect":
                raise _ClientGone
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > limits.body:
                raise _too_long(limits.body)
            if not message.get("more_body"):
                return b"".join(pieces)

    @contextlib.asynccontextmanager
    async def while_client_stays(self) -> Any:
        """Cancel the body when the client goes away; the body then ends with _ClientGone."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def listen() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        listener = asyncio.get_running_loop().create_task(listen())
        try:
            yield
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            raise _ClientGone from None
        finally:
            listener.cancel()

    # ------------------------------------------------------------------ what it is sent

    @contextlib.asynccontextmanager
    async def comments(self, interval: float) -> Any:
        """Send comments to a stream that waits, so that nothing on the way takes it for dead."""
        if not self.stream or interval <= 0:
            yield
            return
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        running: set[asyncio.Task[None]] = set()

        def due() -> None:
            nonlocal timer
            if not self.begun:
                task = loop.create_task(self._comment())
                running.add(task)
                task.add_done_callback(running.discard)
                timer = loop.call_later(interval, due)

        timer = loop.call_later(interval, due)
        try:
            yield
        finally:
            timer.cancel()

    async def _comment(self) -> None:
        if self.begun:
            return
        if not self._ahead:
            self._ahead = True
            self.record.status = 200
            await self._start(
                200, [(b"content-type", _EVENTS), (b"cache-control", b"no-cache"), *self._ours(held=True)]
            )
        if not self.begun:
            waited = f": waiting for the model, {time.monotonic() - self.began:.0f} s\n\n"
            await self._body(waited.encode(), more=True)

    async def head(self, status: int, headers: list[tuple[bytes, bytes]], first: bytes, *, last: bool) -> None:
        """Send the head of the replica's answer, and its first bytes."""
        self.begun = True
        kind = next((value for name, value in headers if name.lower() == b"content-type"), b"")
        self.stream = kind.startswith(_EVENTS)
        if not self._ahead:
            self.record.status = status
            await self._start(status, [*_kept(headers), *self._ours()])
            await self.piece(first, last=last)
        elif self.stream and status == 200:
            await self._body(f": {self._timing().decode()}\n\n".encode(), more=True)
            await self.piece(first, last=last)
        else:
            # It was promised a stream: an answer that is none, mostly an error, comes as its one event.
            await self._body(b"data: " + b" ".join(first.split(b"\n")), more=True)
            self._promised = True
            if last:
                await self.piece(b"", last=True)

    _promised = False

    async def piece(self, data: bytes, *, last: bool) -> None:
        """Send the next bytes of the answer."""
        if self._promised:
            data = b" ".join(data.split(b"\n")) + (b"\n\n" if last else b"")
        self._tail = (self._tail + data)[-2:] if len(data) < 2 else data[-2:]
        await self._body(data, more=not last)

    async def break_off(self, message: str) -> None:
        """The answer has begun and cannot go on: say so where a stream can say it, and cut the connection."""
        if self.stream:
            event = b"data: " + json.dumps(error_body(message, "replica_failed", 502)).encode() + b"\n\n"
            with contextlib.suppress(Exception):
                await self._body((b"" if self._tail in (b"", b"\n\n") else b"\n\n") + event, more=True)
        # Its end is missing, so the server cuts the connection: the client must not take it for whole.
        raise BrokenOffError(message)

    async def refuse(self, error: _AnswerError) -> None:
        """Send an error of ours."""
        self.begun = True
        content = json.dumps(error_body(error.message, error.code, error.status)).encode()
        if self._ahead:
            await self._body(b"data: " + content + b"\n\n", more=False)
            return
        self.record.status = error.status
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if error.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(error.retry_after))).encode()))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if error.status in (408, 413):  # the rest of the request is not read
            headers.append((b"connection", b"close"))
        await self._start(error.status, [*headers, *self._ours()])
        await self._body(content, more=False)

    def _ours(self, *, held: bool = False) -> list[tuple[bytes, bytes]]:
        if not self.record.tier:
            return [(b"server-timing", self._timing())] if held else []
        ours = [(b"x-gpuckpt-tier", self.record.tier.encode()), (b"server-timing", self._timing())]
        if self.record.replica:
            ours.append((b"x-gpuckpt-replica", self.record.replica.encode()))
        return ours

    def _timing(self) -> bytes:
        """Where the time went until now, in milliseconds (W3C Server Timing)."""
        now = time.monotonic() - self.began
        model = max(0.0, (self.record.first or now) - self.record.waited)
        text = f"wait;dur={self.record.waited * 1e3:.1f}, model;dur={model * 1e3:.1f}, total;dur={now * 1e3:.1f}"
        if self.record.tier:
            text = f'tier;desc="{self.record.tier}", {text}'
        if self.record.retries:
            text += f', retries;desc="{len(self.record.retries)}"'
        return text.encode()

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


class BrokenOffError(Exception):
    """An answer that was begun has been cut; the server then cuts the connection."""


def _kept(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    lowered = [(name.lower(), value) for name, value in headers]
    named = b",".join(value.lower() for name, value in lowered if name == b"connection")
    dropped = _HOP_BY_HOP | {name.strip() for name in named.split(b",")}
    return [(name, value) for name, value in lowered if name not in dropped]


def _too_long(limit: int) -> _AnswerError:
    return _AnswerError(413, f"the body is longer than {limit} bytes, which is the limit here", "body_too_long")


def _as_answer(error: _AnswerError | RefusedError | RoutingError) -> _AnswerError:
    if isinstance(error, RoutingError):
        return _AnswerError(error.status, str(error), error.code or "invalid_request")
    if isinstance(error, RefusedError):
        return _AnswerError(error.status, str(error), "not_available", error.retry_after)
    return error


def error_body(message: str, code: str | None, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
