"""Talk HTTP to a server in a container, over its Unix socket or a TCP port of this machine.

A few dozen lines over the standard library: a full client's import alone costs more than a mapped restore may.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.timing import now_ns

_LONGEST = 64 << 20  # bytes of an answer, or of one event of a stream; a server that sends more is not asked again


class RequestFailed(GpuckptError):
    """The server answered with an error status; ``status`` and the begin of its body (``cause``) say which."""

    def __init__(self, message: str, *, status: int, cause: str) -> None:
        super().__init__(message, cause=cause)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    body: bytes


class _Connection(http.client.HTTPConnection):
    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._endpoint = endpoint

    def connect(self) -> None:
        if self._endpoint.socket is not None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(self._endpoint.socket))
        else:
            self.sock = socket.create_connection((self._endpoint.host, self._endpoint.port), self.timeout)


@contextmanager
def _ended_after(seconds: float, connection: _Connection) -> Iterator[None]:
    """Cut the connection after so many seconds: a socket's own timeout is for each byte, and bytes may trickle."""

    late = threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError, AttributeError):  # not connected yet, or closed already
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if late.is_set():  # what was cut can look like an answer that ended
        raise TimeoutError(f"the answer was not complete within {seconds:g} s")


@dataclass(frozen=True)
class Endpoint:
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
        connection = _Connection(self, timeout)
        try:
            with _ended_after(timeout, connection), self._send(connection, method, path, body) as response:
                data = response.read(_LONGEST + 1)
                if len(data) > _LONGEST:
                    raise http.client.HTTPException(f"the answer has more than {_LONGEST >> 20} MiB")
                return Answer(response.status, data)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def stream(
        self, method: str, path: str, body: Any, *, timeout: float = 300
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Send a JSON request and yield the server-sent events of the answer as they come: (arrival in ns, event).

        Raises RequestFailed on an error status, DaemonUnreachableError when the server does not answer or stops
        in the middle.
        """
        connection = _Connection(self, timeout)
        try:
            # Closing the connection does not close an answer that is left in the middle.
            with self._send(connection, method, path, json.dumps(body)) as response:
                if response.status != 200:
                    text = response.read(2000).decode(errors="replace")
                    raise RequestFailed(
                        f"{method} {path} answered {response.status}", status=response.status, cause=text
                    )
                finished = False
                while line := response.readline(_LONGEST):
                    arrived = now_ns()
                    data = line.strip()
                    if data == b"data: [DONE]":
                        finished = True
                    elif data.startswith(b"data: "):
                        yield arrived, json.loads(data[6:])
                if not finished:
                    raise http.client.IncompleteRead(b"")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    @staticmethod
    def _send(connection: _Connection, method: str, path: str, body: str) -> http.client.HTTPResponse:
        headers = {"Connection": "close"}
        if body:
            headers["Content-Type"] = "application/json"
        connection.request(method, path, body=body.encode() or None, headers=headers)
        return connection.getresponse()

    def _unreachable(self, error: BaseException) -> DaemonUnreachableError:
        return DaemonUnreachableError(f"the server at {self} does not answer", cause=f"{type(error).__name__}: {error}")
