"""Requests to replicas: HTTP/1.1 over kept connections, what comes handed on as it comes.

A general client's machinery costs more than everything else a relayed token needs (measured at 64 streams: about half
of the processor time a token). Here llhttp's parser (httptools) calls the connection, which keeps the bytes until the
reader takes them, or hands them on itself; nothing in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import httptools

from gpuckpt.workload.endpoint import Endpoint

Headers = Sequence[tuple[bytes, bytes]]
Sink = Callable[[bytes], bool]
_MOST_BUFFERED = 256 << 10  # bytes; beyond, the replica is not read from until the client has caught up
_MOST_HEADERS = 256 << 10  # bytes
_COPIED = 64 << 10  # bytes of a body that go out in one write with the head
_CONNECT_SECONDS = 5.0
_QUEUE_SECONDS = 0.005  # before another try where a server's queue of connections is full


class UpstreamError(Exception):
    """The replica cannot be reached, or broke off. What came of the answer before was handed on, and is right."""


class Connection(asyncio.Protocol):
    """One connection to a replica: one request at a time, and its answer. ``home``: where it is kept meanwhile."""

    def __init__(self, home: list[Connection]) -> None:
        self.home = home
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._waiter: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._sink: Sink | None = None
        self._lost = False
        self._trouble: str | None = None
        self._busy = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._has_head = self._complete = self._framed = False
        self._bodiless = self._kept = False

    # ------------------------------------------------------------------ what the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by type

    def data_received(self, data: bytes) -> None:
        if not self._busy or self._complete:
            self.abort()  # a server that talks unasked is not to be trusted with the next request
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"its answer is no HTTP: {error.__context__ or error}")
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEADERS:
                self._fail("its headers are too long")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._parser = None  # which refers to us
        if self._busy and not self._complete:
            # Without a length and without chunks the end of the connection is the end of the body (RFC 9112, 6.3).
            if self._has_head and not self._framed and error is None and self._trouble is None:
                self._complete = True
            else:
                self._trouble = self._trouble or f"the connection broke{f': {error}' if error else ''}"
        self._wake()

    # ------------------------------------------------------------------ what the parser calls

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("it sent more than its answer")  # the parser stops, and the connection is cut

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # a trailer: it is not promised to anybody, and no header
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # an interim answer: the real one follows
            return
        if self.status > 599:
            raise ValueError(f"there is no status {self.status}")
        self._has_head = True
        self._kept = self._parser.should_keep_alive()  # at the end of the message it has forgotten
        # The parser does not know that the request was HEAD, and would wait for the body.
        self._complete = self._bodiless
        if self.status in (204, 304):
            self._framed = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        if self._bodiless:
            return
        # Only while the reader waits: else this would overtake what it has in its hands.
        if self._sink is not None and self._waiter is not None and not self._pieces and self._sink(body):
            return
        self._pieces.append(body)
        self._buffered += len(body)
        if self._buffered > _MOST_BUFFERED and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if self._has_head:
            self._complete = True
            self._wake()
        else:
            self.headers, self._framed = [], False

    # ------------------------------------------------------------------ what the front calls

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it."""
        return not (self._lost or self._busy) and self._transport is not None and not self._transport.is_closing()

    async def exchange(self, method: str, target: bytes, headers: Headers, body: bytes) -> None:
        """Send the request, and wait for the head of the answer: ``status`` and ``headers``. Raises UpstreamError."""
        assert self._transport is not None and not self._busy
        self._reset()
        self._parser = httptools.HttpResponseParser(self)
        self._busy = True
        self._bodiless = method == "HEAD"
        lines = [method.encode(), b" ", target, b" HTTP/1.1\r\n"]
        hosts = 0
        for name, value in headers:
            hosts += name == b"host"
            lines += [name, b": ", value, b"\r\n"]
        if not hosts:  # HTTP/1.0 does without, 1.1 does not
            lines.append(b"host: localhost\r\n")
        if body or method in ("PATCH", "POST", "PUT"):
            lines += [b"content-length: ", str(len(body)).encode(), b"\r\n"]
        lines.append(b"\r\n")
        if len(body) <= _COPIED:
            lines.append(body)
            body = b""
        self._transport.write(b"".join(lines))
        if body:
            self._transport.write(body)
        while not self._has_head:
            await self._news()

    def pour(self, sink: Sink) -> None:
        """From now on what comes while :meth:`read` waits goes into ``sink`` at once; read gets what it does not take.

        So a token costs neither a task's turn nor a future.
        """
        self._sink = sink

    async def read(self) -> bytes:
        """What has come of the body since the last call; empty at its end. Raises UpstreamError if it breaks off."""
        while not self._pieces:
            if self._complete:
                return b""
            await self._news()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        if self._paused and self._transport is not None:
            self._paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()
        return data

    @property
    def ended(self) -> bool:
        """Whether nothing more will come than what :meth:`read` has given."""
        return self._complete and not self._pieces

    def finish(self) -> bool:
        """The answer has been read, or is not wanted any more. Whether the connection can serve another request.

        A server notices that nobody listens by the connection's end, so one with an answer under way is cut; as is one
        whose answer came before all of the request was sent.
        """
        again = (
            self.ended
            and not (self._bodiless or self._lost)
            and self._transport is not None
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
            and self._kept
        )
        self._busy = False
        self._sink = None
        if not again:
            self.abort()
        return again

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    async def _news(self) -> None:
        if self._trouble is not None or self._lost:
            raise UpstreamError(self._trouble or "the connection broke")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._trouble is not None and not self._pieces:
            raise UpstreamError(self._trouble)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble
        self.abort()
        self._wake()


class Upstream:
    """The connections to replicas; those that wait for another request are kept by replica."""

    def __init__(self) -> None:
        self._idle: dict[str, list[Connection]] = {}

    async def send(
        self, replica: str, endpoint: Endpoint, method: str, target: bytes, headers: Headers, body: bytes
    ) -> Connection:
        """Send a request; the connection has the head of the answer. Give it to :meth:`done`, whatever comes of it.

        Raises UpstreamError.
        """
        home = self._idle.setdefault(replica, [])
        while home:
            connection = home.pop()
            if connection.usable:
                try:
                    return await _asked(connection, method, target, headers, body)
                except UpstreamError:
                    if connection.status:
                        raise
                    # Servers close connections that have been idle: that may cross with the request on its way.
                    break
        return await _asked(await self._connect(endpoint, home), method, target, headers, body)

    async def _connect(self, endpoint: Endpoint, home: list[Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        new = partial(Connection, home)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                while True:
                    try:
                        if endpoint.socket is not None:
                            _, made = await loop.create_unix_connection(new, str(endpoint.socket))
                        else:
                            _, made = await loop.create_connection(new, endpoint.host, endpoint.port)
                        return made
                    except BlockingIOError:  # a Unix socket whose queue is full refuses, instead of waiting as TCP does
                        await asyncio.sleep(_QUEUE_SECONDS)
        except (OSError, TimeoutError) as error:
            raise UpstreamError(f"no connection: {error or 'timed out'}") from error

    def done(self, replica: str, connection: Connection) -> None:
        """The request that :meth:`send` has sent is over, its answer read or not."""
        if connection.finish():
            if self._idle.get(replica) is connection.home:
                connection.home.append(connection)
            else:  # the replica has gone meanwhile, and the next one may have its name
                connection.abort()

    def forget(self, replica: str) -> None:
        """The replica is gone: so are its connections."""
        for connection in self._idle.pop(replica, []):
            connection.abort()

    def close(self) -> None:
        """Cut all that are idle."""
        for replica in list(self._idle):
            self.forget(replica)


async def _asked(connection: Connection, method: str, target: bytes, headers: Headers, body: bytes) -> Connection:
    try:
        await connection.exchange(method, target, headers, body)
    except BaseException:
        connection.finish()
        raise
    return connection
