"""Talk HTTP to a server in a container, over its Unix socket or a TCP port of this machine.

A few dozen lines over the standard library: a full client's import alone costs more than a mapped restore may.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import SHUT_RDWR, create_connection
from socket import socket as Socket
from typing import Any

from msgspec import Struct

from gpuckpt import http1
from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.timing import now_ns

_LONGEST = 64 << 20  # bytes of an answer, or of one event of a stream; a server that sends more is not asked again


class RequestFailed(GpuckptError):
    """The server answered with an error status; ``status`` and the begin of its body (``cause``) say which."""

    def __init__(self, message: str, *, status: int, cause: str) -> None:
        super().__init__(message, cause=cause)
        self.status = status


class Answer(Struct, frozen=True):
    """A whole response."""

    status: int
    body: bytes


@contextmanager
def _ended_after(seconds: float, connected: Socket) -> Iterator[None]:
    """Cut the connection after so many seconds: a socket's own timeout is for each byte, and bytes may trickle."""

    late = threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError):  # closed already
            connected.shutdown(SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if late.is_set():  # what was cut can look like an answer that ended
        raise TimeoutError(f"the answer was not complete within {seconds:g} s")


class Endpoint(Struct, frozen=True):
    """Where a replica listens: ``socket`` (a path of the host), or ``host`` and ``port``."""

    socket: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"http://{self.host}:{self.port}"

    def request(self, method: str, path: str, body: str = "", *, timeout: float = 60) -> Answer:
        """Send one request and read the whole answer, whatever its status.

        Raises DaemonUnreachableError if the answer is not complete within ``timeout`` seconds, or longer than 64 MiB.
        """
        deadline = time.monotonic() + timeout
        try:
            with (
                self._connect(timeout) as connected,
                _ended_after(deadline - time.monotonic(), connected),
                http1.exchange(connected, method, path, body.encode()) as response,
            ):
                data = response.body.read(_LONGEST + 1)
                if len(data) > _LONGEST:
                    raise http1.HttpError(f"the answer has more than {_LONGEST >> 20} MiB")
                return Answer(response.status, data)
        except (OSError, http1.HttpError) as error:
            raise self._unreachable(error) from error

    def stream(
        self, method: str, path: str, body: Any, *, timeout: float = 300
    ) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Send a JSON request and yield the server-sent events of the answer as they come: (arrival in ns, event).

        Raises RequestFailed on an error status, DaemonUnreachableError when the server does not answer or stops
        in the middle.
        """
        content = json.dumps(body).encode()
        try:
            with self._connect(timeout) as connected, http1.exchange(connected, method, path, content) as response:
                if response.status != 200:
                    text = response.body.read(2000).decode(errors="replace")
                    raise RequestFailed(
                        f"{method} {path} answered {response.status}", status=response.status, cause=text
                    )
                finished = False
                while line := response.body.readline(_LONGEST):
                    arrived = now_ns()
                    data = line.strip()
                    if data == b"data: [DONE]":
                        finished = True
                    elif data.startswith(b"data: "):
                        yield arrived, json.loads(data[6:])
                if not finished:
                    raise http1.HttpError("the stream ended before its last event")
        except (OSError, http1.HttpError, ValueError) as error:
            raise self._unreachable(error) from error

    def _connect(self, timeout: float) -> Socket:
        if self.socket is not None:
            return http1.connect_unix(self.socket, timeout)
        return create_connection((self.host, self.port), timeout)

    def _unreachable(self, error: BaseException) -> DaemonUnreachableError:
        return DaemonUnreachableError(f"the server at {self} does not answer", cause=f"{type(error).__name__}: {error}")
