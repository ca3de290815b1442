"""HTTP/1.1 as uvicorn speaks it, with limits for clients that are slow on purpose, too many, or gone.

What uvicorn's protocol lacks, and is here: a limit for the time that a client takes to send a head, and for the length
of one; for the time in which it takes nothing of an answer; errors that say what is wrong; an answer before the end of
a request that reaches the client; the end of a client that has sent more than one request; answers without a length to
HTTP/1.0; and requests that offer another protocol with a body behind.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gpuckpt.service.exchange import WRITE, error_body

_PIPELINED = 8  # requests that may wait behind one before no more is read; until then a client's end is noticed


@dataclass
class Guard:
    """Limits of connections: how many there may be, and for each of them seconds and bytes.

    ``head_seconds`` and ``head_bytes``: for the head of a request. ``stalled_seconds``: in which a client takes nothing
    of what it was sent. ``linger_seconds``: for which a client that still sends can read an answer that came early.
    """

    connections: int = 20000
    head_seconds: float = 20.0
    head_bytes: int = 64 << 10
    stalled_seconds: float = 120.0
    linger_seconds: float = 5.0


class _Door:
    """A connection's transport, as uvicorn uses it; its end is decided by ``end``."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info
        self.abort = transport.abort
        self._transport = transport
        self._end = end
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed or self._transport.is_closing()

    def close(self) -> None:
        if self.closed:
            self._transport.close()
        else:
            self.closed = True
            self._end()


class _Rest:
    """What follows a head that offers another protocol: a body, if the head says so, which llhttp leaves to us."""

    def __init__(self, protocol: Guarded) -> None:
        self._protocol = protocol
        self.on_body = protocol.on_body

    def on_message_complete(self) -> None:
        self._protocol.rest_complete()


class Guarded(HttpToolsProtocol):
    """One connection of a client. ``guard`` is an attribute of the class that a server makes of it."""

    guard: Guard
    _wire: asyncio.Transport  # the transport itself; uvicorn's ``transport`` is the door before it
    _door: _Door
    _extensions: dict[str, Any]
    _in_head = False
    _head_bytes = 0  # in whole headers
    _fed = 0  # whole or not
    _deaf = False  # what still comes is let go
    _answering: RequestResponseCycle | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire = transport
        self._door = _Door(transport, self._end)
        super().connection_made(self._door)  # type: ignore[arg-type]
        self._extensions = {WRITE: self._write}
        self._head_timer = self.loop.call_later(self.guard.head_seconds, self._no_head)
        if len(self.connections) > self.guard.connections:
            self._refuse(503, "there are too many connections", "too_many_connections", "retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_stall_timer()
        self._unset_keepalive_if_required()
        self._deaf = self._door.closed = True
        if self._answering is not None:
            _leave(self._answering)  # uvicorn tells the last request only
        super().connection_lost(exc)

    def _end(self) -> None:
        """Close it, but not onto what the client still sends: the kernel would answer that with a reset, at which
        clients forget what they have been told."""
        self._deaf = True
        if not self._in_head and (self.cycle is None or not self.cycle.more_body):
            self._wire.close()
            return
        if self._wire.is_closing():
            return
        self._wire.write_eof()
        self.flow.resume_reading()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.guard.linger_seconds, self._wire.abort)

    # ------------------------------------------------------------------ what comes

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._no_http(error)
        if self._in_head and not self._deaf:
            self._unfinished(len(data))

    def _unfinished(self, size: int) -> None:
        """So many bytes have come, and the head is not complete; the parser may hold them all as one header."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.guard.head_seconds, self._no_head)
        self._fed += size
        if self._fed > self.guard.head_bytes:
            self._refuse_long()

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_bytes = self._fed = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.guard.head_bytes:
            raise ValueError("the head is too long")  # the parser stops, and :meth:`_no_http` has it

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        super().on_headers_complete()
        self._in_head = False
        if 0 < len(self.pipeline) <= _PIPELINED:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else its body, if it has one, has not even begun: see _decline
            super().on_message_complete()

    def _decline(self, rest: bytes) -> None:
        # HTTP/2 or WebSocket is offered, and may be declined (RFC 9110, 7.8): what counts is the request.
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self.parser = httptools.HttpRequestParser(_Rest(self))
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + (b"".join(framing) or b"content-length: 0\r\n") + b"\r\n")
            if rest:
                self.parser.feed_data(rest)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._no_http(error)

    def rest_complete(self) -> None:
        """The body of a request that offered another protocol is complete."""
        self.parser = httptools.HttpRequestParser(self)
        super().on_message_complete()

    # ------------------------------------------------------------------ what is answered

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        cycle.scope["extensions"] = self._extensions
        super()._start_asgi_task(cycle, _until_the_end(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def _write(self, data: bytes) -> bool:
        """Write a chunk at once: what uvicorn does with a piece of an answer, without its coroutine (see WRITE)."""
        cycle = self._answering
        if self.flow.write_paused or cycle is None or cycle.disconnected or not cycle.chunked_encoding:
            return False
        self._wire.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def on_response_complete(self) -> None:
        if self.cycle.more_body and self.cycle is self._answering and not self.transport.is_closing():
            self.transport.close()  # what else comes of the request would hold the connection without a limit
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.guard.stalled_seconds, self._wire.abort)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    # ------------------------------------------------------------------ what is refused

    def _no_http(self, error: Exception) -> None:
        if self._head_bytes > self.guard.head_bytes:
            self._refuse_long()
        else:
            self._refuse(400, f"this is no HTTP: {error}", "invalid_http")

    def _refuse_long(self) -> None:
        self._refuse(431, f"the head is longer than {self.guard.head_bytes} bytes", "head_too_long")

    def _no_head(self) -> None:
        self._head_timer = None
        if self._in_head:
            self._refuse(408, "the head of the request was not complete in time", "too_slow")
        else:
            self._wire.close()

    def _refuse(self, status: int, message: str, code: str, header: str = "") -> None:
        self._deaf = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle is not self._answering or cycle.response_started or not cycle.more_body:
                cycle.keep_alive = False  # nothing can be put into an answer that is under way: it is the last one
                return
            _leave(cycle)
        body = json.dumps(error_body(message, code, status))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n{header}connection: close\r\n\r\n"
        self._wire.write(f"{head}{body}".encode())
        self._in_head = True  # whatever else comes
        self._door.close()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def _leave(cycle: RequestResponseCycle) -> None:
    """Let the application know that its client is gone."""
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()


def _until_the_end(cycle: RequestResponseCycle, app: Any) -> Any:
    """HTTP/1.0 knows no chunks: an answer without a length ends with the connection (RFC 9112, 6.1 and 6.3)."""

    async def answer(scope: Any, receive: Any, send: Callable[[Mapping[str, Any]], Awaitable[None]]) -> None:
        async def sent(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                if not any(name.lower() == b"content-length" for name, _ in message["headers"]):
                    cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
            elif cycle.expected_content_length > sys.maxsize // 2 and not message.get("more_body"):
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, sent)

    return answer
