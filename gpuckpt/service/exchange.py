"""One request of a client, and what it has been sent.

The head of an answer is sent with its first bytes, not before: until then another replica may give the answer. Only a
stream whose client would otherwise hear nothing for long gets its head ahead, and comments to wait by (lines that begin
with a colon are ignored by readers of server-sent events; WHATWG HTML, 9.2.6).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

EVENTS = b"text/event-stream"
WRITE = "gpuckpt.write"
"""An extension of ASGI: a function that writes a piece of an answer that has begun, unless that has to wait."""
_SLOWEST = 16 << 10  # bytes a second that a body must come at on average
# They are about one connection, not about the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"trailers",
        b"transfer-encoding",
        b"upgrade",
    )
)
_BODILESS = (204, 304)
# There is no body that a length could be of, and the server would miss it.
_BODILESS_DROPPED = HOP_BY_HOP | {b"content-length"}
_ENDS_OF_EVENTS = (b"\n\n", b"\r\n\r\n", b"\r\r")


@dataclass
class Limits:
    """What a client may do, and how long things may take; seconds and bytes (see :mod:`gpuckpt.pool.config`)."""

    body: int = 64 << 20
    deadline: float = 120.0
    keep_alive: float = 5.0
    request: float = 20.0
    bodies: int = 1 << 30


@dataclass
class Bodies:
    """Bytes of all bodies that are held at this moment."""

    held: int = 0


@dataclass
class Record:
    """How a request went, for metrics and logs. ``first`` and ``total`` are seconds from its arrival.

    ``outcome``: ok, error (the model's own), refused, broken (its stream was cut), gone (the client went away),
    failed (a fault of ours).
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


class AnswerError(Exception):
    """To be answered with an error of our own."""

    def __init__(self, status: int, message: str, code: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class BrokenOffError(Exception):
    """An answer that was begun has been cut; the server then cuts the connection."""


class Exchange:
    """What a client asks, and what it hears."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, bodies: Bodies) -> None:
        self.began = time.monotonic()
        self.scope = scope
        self.method: str = scope["method"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.record = Record()
        self.waits_for_events = False  # it asked for a stream of events, and may get comments to wait by
        self.begun = False  # bytes of an answer have been sent
        self._bodies = bodies
        self._size = 0
        self._receive = receive
        self._write: Callable[[bytes], bool] | None = scope.get("extensions", {}).get(WRITE)
        self._send = send
        self._read = not (b"content-length" in self.headers or b"transfer-encoding" in self.headers)  # all has come
        self._ahead = False  # a head has been sent, before there was an answer
        self._as_event = False  # the answer is no stream, but a stream was promised: it is sent as one event
        self._events = False  # the answer is a stream of events
        self._tail = b""
        self._comment: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ what the client sends

    async def body(self, limits: Limits) -> bytes:
        """The whole body; raises AnswerError if it is too long or too slow, ClientGone."""
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limits.body:
            raise _too_long(limits.body)
        pieces: list[bytes] = []
        begin = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(limits.request) as limit:
                while not self._read:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    pieces.append(message["body"])
                    self._size += len(message["body"])
                    self._bodies.held += len(message["body"])
                    if self._size > limits.body:
                        raise _too_long(limits.body)
                    if self._bodies.held > limits.bodies:
                        raise AnswerError(503, "too many large requests at once", "not_available", retry_after=1)
                    if message.get("more_body"):
                        limit.reschedule(begin + limits.request + self._size / _SLOWEST)
                    else:
                        self._read = True
        except TimeoutError:
            took = time.monotonic() - self.began
            raise AnswerError(408, f"the request was not complete after {took:.0f} s", "too_slow") from None
        return b"".join(pieces)

    def forget_body(self) -> None:
        """Nobody holds the body any more."""
        self._bodies.held -= self._size
        self._size = 0

    def passed_headers(self, dropped: frozenset[bytes]) -> Headers:
        """What the replica is told: neither ``dropped`` nor what ``Connection`` names."""
        return _kept(self.scope["headers"], dropped)

    @contextlib.asynccontextmanager
    async def attended(self, interval: float) -> AsyncIterator[None]:
        """While the body works on an answer: a client that waits for events hears comments every ``interval`` seconds;
        one that goes away cancels the body, which then ends with ClientGone."""
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def listen() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        loop = asyncio.get_running_loop()
        listener = loop.create_task(listen())
        if self.waits_for_events and interval > 0:
            self._timer = loop.call_later(interval, self._due, interval)
        try:
            yield
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            listener.cancel()
            if self._timer is not None:
                self._timer.cancel()

    # ------------------------------------------------------------------ what it hears while it waits

    def _due(self, interval: float) -> None:
        loop = asyncio.get_running_loop()
        self._comment = loop.create_task(self._say_that_it_waits())
        self._timer = loop.call_later(interval, self._due, interval)

    async def _say_that_it_waits(self) -> None:
        if not self._ahead:
            self._ahead = True
            self.record.status = 200
            await self._start(200, [(b"content-type", EVENTS), (b"cache-control", b"no-cache"), *self._ours()])
        waited = time.monotonic() - self.began
        await self._body(f": waiting for the model, {waited:.0f} s\n\n".encode(), more=True)

    async def _begin(self) -> None:
        """From here on the answer is sent: no more comments; one that is under way comes first."""
        self.begun = True
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            await self._comment

    # ------------------------------------------------------------------ what it is answered

    async def head(self, status: int, headers: Headers, first: bytes, *, last: bool) -> None:
        """Send the head of the replica's answer, and its first bytes."""
        await self._begin()
        self._events = any(name == b"content-type" and value.startswith(EVENTS) for name, value in headers)
        if not self._ahead:
            self.record.status = status
            dropped = _BODILESS_DROPPED if status in _BODILESS else HOP_BY_HOP
            await self._start(status, _kept(headers, dropped) + self._ours())
        elif self._events and status == 200:
            await self._body(b": " + self._timing() + b"\n\n", more=True)
        else:
            # It was promised a stream: an answer that is none, mostly an error, comes as its one event.
            self._as_event = True
            await self._body(b"data: ", more=True)
        await self.piece(first, last=last)

    async def piece(self, data: bytes, *, last: bool) -> None:
        """Send the next bytes of the answer."""
        if self._as_event:
            data = data.replace(b"\n", b" ").replace(b"\r", b" ") + (b"\n\n" if last else b"")
        if data:
            self._tail = data if len(data) > 3 else self._tail[-3:] + data
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    def write(self, data: bytes) -> bool:
        """Send the next bytes of the answer without waiting; False if that cannot be: then they are not sent."""
        if self._as_event or self._write is None or not self._write(data):
            return False
        self._tail = data if len(data) > 3 else self._tail[-3:] + data
        return True

    async def break_off(self, message: str) -> None:
        """The answer has begun and cannot go on. Raises BrokenOffError, at which the server cuts the connection: the
        client must not take the answer for whole.

        A stream says why; but not in the middle of an event, which whatever followed would make look whole.
        """
        if self._events and (not self._tail or self._tail.endswith(_ENDS_OF_EVENTS)):
            event = json.dumps(error_body(message, "replica_failed", 502)).encode()
            with contextlib.suppress(Exception):
                await self._body(b"data: " + event + b"\n\n", more=True)
        raise BrokenOffError(message)

    async def refuse(self, error: AnswerError) -> None:
        """Send an error of ours."""
        await self._begin()
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
        if not self._read:  # and it will not be
            headers.append((b"connection", b"close"))
        await self._start(error.status, headers + self._ours())
        await self._body(content, more=False)

    def _ours(self) -> Headers:
        record = self.record
        if not record.model:
            return []
        ours = [(b"x-gpuckpt-tier", record.tier.encode()), (b"server-timing", self._timing())]
        if record.replica:
            ours.append((b"x-gpuckpt-replica", record.replica.encode()))
        return ours

    def _timing(self) -> bytes:
        """Where the time went until now, in milliseconds (W3C Server Timing)."""
        record, now = self.record, time.monotonic() - self.began
        waited = record.waited if record.replica else now
        model = max(0.0, (record.first or now) - waited)
        text = f'tier;desc="{record.tier}", wait;dur={waited * 1e3:.1f}, model;dur={model * 1e3:.1f}, '
        text += f"total;dur={now * 1e3:.1f}"
        if record.retries:
            text += f', retries;desc="{len(record.retries)}"'
        return text.encode()

    async def _start(self, status: int, headers: Headers) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _kept(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    """Without ``dropped``, and what is about one connection because ``Connection`` says so. Names are in lower case."""
    for name, value in headers:
        if name == b"connection":
            dropped |= {word.strip().lower() for word in value.split(b",")}
    return [pair for pair in headers if pair[0] not in dropped]


def _too_long(limit: int) -> AnswerError:
    return AnswerError(413, f"the body is longer than {limit} bytes, which is the limit here", "body_too_long")


def error_body(message: str, code: str | None, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
