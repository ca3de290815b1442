"""HTTP servers on sockets of ours: uvicorn, with a protocol that has limits (see :mod:`gpuckpt.service.protocol`)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from gpuckpt.service.activation import BACKLOG
from gpuckpt.service.exchange import BrokenOffError
from gpuckpt.service.protocol import Guard, Guarded

__all__ = ["Guard", "HttpServer", "listen"]

_KEEP_ALIVE = 75  # seconds that an idle connection is kept: longer than most clients keep theirs
_STEP = 0.02


class HttpServer:
    """Serves the ASGI application ``app`` on listening sockets, until it is closed."""

    def __init__(self, app: Any, sockets: list[socket.socket], *, guard: Guard) -> None:
        self.guard = guard
        self._config = uvicorn.Config(
            app,
            http=type("_Protocol", (Guarded,), {"guard": guard}),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        self._state = ServerState()
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Accept connections from now on."""
        self._config.load()
        for each in self._sockets:
            server = await asyncio.get_running_loop().create_server(self._connection, sock=each, backlog=BACKLOG)
            self._servers.append(server)

    def _connection(self) -> Guarded:
        made = self._config.http_protocol_class(self._config, self._state, {})  # type: ignore[call-arg]
        assert isinstance(made, Guarded)
        return made

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._state.connections)

    @property
    def requests(self) -> int:
        """How many requests are being answered."""
        return len(self._state.tasks)

    def stop_listening(self) -> None:
        """Accept no more connections. Where systemd holds the sockets, too, they wait there for the next service."""
        for server in self._servers:
            server.close()

    async def close(self, patience: float) -> None:
        """Accept no more, let answers end for ``patience`` seconds at most, then cut."""
        self.stop_listening()
        for connection in list(self._state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._state.connections or self._state.tasks:
                    await asyncio.sleep(_STEP)
        for task in self._state.tasks:
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # the loop tells the connections that they are lost


class _NoCuts(logging.Filter):
    """An answer that we cut on purpose is no fault of the application's."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, BrokenOffError | asyncio.CancelledError)


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
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return _listening(made, (host, int(port)))
    except BaseException:
        made.close()
        raise


def _listen_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left(path):
            os.unlink(path)
        return _listening(made, path)
    except BaseException:
        made.close()
        raise


def _is_left(path: str) -> bool:
    """Whether there is a Unix socket that nobody listens at; raises OSError for anything else that is there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "there is something else than a socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # one whose queue is full would let us wait
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "somebody listens there already", path)


def _listening(made: socket.socket, address: Any) -> socket.socket:
    made.bind(address)
    made.listen(BACKLOG)
    made.setblocking(False)
    return made
