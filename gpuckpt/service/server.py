"""HTTP servers on sockets of ours: uvicorn, with limits for clients that are slow on purpose, or too many."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gpuckpt.service.front import BrokenOffError

_KEEP_ALIVE = 75  # seconds that an idle connection is kept: longer than most clients keep theirs
_BACKLOG = 4096


@dataclass
class Guard:
    """Limits of connections: how many there may be, and how long the head of a request may take (seconds)."""

    connections: int = 20000
    head_seconds: float = 20.0


class _Guarded(HttpToolsProtocol):
    """uvicorn's protocol has no limit for the time that a client takes to send a head, and none that says 503."""

    guard: Guard
    _timer: asyncio.TimerHandle | None = None
    _begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.guard.connections:
            self._refuse(503, "Service Unavailable", "too many connections", "retry-after: 1\r\n")
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._begun = False
        super().on_headers_complete()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.guard.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._begun:
            self._refuse(408, "Request Timeout", "the request's head was not complete in time", "")
        else:
            self.transport.close()

    def _refuse(self, status: int, phrase: str, message: str, header: str) -> None:
        body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":null}}}}'
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}{header}connection: close\r\n\r\n{body}".encode())
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # the daemon's own loop has them


class HttpServer:
    """Serves the ASGI application ``app`` on listening sockets, until it is closed."""

    def __init__(self, app: Any, sockets: list[socket.socket], *, guard: Guard) -> None:
        self.guard = guard
        protocol = type("_Protocol", (_Guarded,), {"guard": guard})
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        self._server = _Server(config)
        self._sockets = sockets
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept connections from now on."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._server.server_state.connections)

    async def close(self, patience: float) -> None:
        """Accept no more, let answers end for ``patience`` seconds at most, then cut."""
        if self._task is None:
            return
        self._server.config.timeout_graceful_shutdown = max(1, round(patience))
        self._server.should_exit = True
        await self._task


class _NoCuts(logging.Filter):
    """An answer that we cut on purpose is no fault of the application's."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, BrokenOffError)


logging.getLogger("uvicorn.error").addFilter(_NoCuts())
logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its life is the daemon's to tell


def listen(address: str) -> socket.socket:
    """A socket that listens at ``HOST:PORT`` or ``unix:/PATH``; raises OSError.

    What an earlier service left of a Unix socket is removed; one that somebody still listens at is not.
    """
    if address.startswith("unix:"):
        return _listen_unix(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.bind((host, int(port)))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    made.setblocking(False)
    return made


def _listen_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                import os

                os.unlink(path)
            except FileNotFoundError:
                pass
            else:
                raise OSError(98, "somebody listens there already", path)
        made.bind(path)
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    made.setblocking(False)
    return made
