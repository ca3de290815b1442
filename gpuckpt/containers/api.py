"""podman's REST API over its Unix socket: one connection a call, JSON in and out.

podman-py has the same calls except checkpoint and restore, but importing it costs 0.33 s here (this module 0.03 s),
which is longer than a whole mapped restore; the dozen calls needed are few enough to make directly.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gpuckpt import http1
from gpuckpt.errors import BusyError, DaemonUnreachableError, DeadlineError, GpuckptError, NotFoundError

_VERSION = "v4.0.0"


class PodmanError(GpuckptError):
    """podman answered with an error; ``cause`` is its message."""

    def __init__(self, message: str, *, status: int, cause: str) -> None:
        super().__init__(message, cause=cause)
        self.status = status


class Api:
    """Calls to the podman service listening on ``path``; ``timeout`` is in seconds, for each call.

    ``reconnect`` is called once when nobody listens there any more, to start the service again.
    """

    def __init__(self, path: Path, timeout: float = 600, *, reconnect: Callable[[], None] | None = None) -> None:
        self.path = path
        self.timeout = timeout
        self._reconnect = reconnect

    def call(self, method: str, route: str, body: Any = None, **query: Any) -> Any:
        """Make one call; return the decoded JSON, or the raw bytes if the answer is not JSON, or None if empty.

        Query values that are None are left out; booleans become ``true``/``false``. Raises NotFoundError (404),
        BusyError (409), PodmanError (any other error status), DeadlineError, DaemonUnreachableError.
        """
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in query.items()}
        words = {key: value for key, value in words.items() if value is not None}
        url = f"/{_VERSION}/libpod{route}" + (f"?{urlencode(words)}" if words else "")
        content = b"" if body is None else json.dumps(body).encode()
        try:
            with self._connect() as connected, http1.exchange(connected, method, url, content) as response:
                data = response.body.read()
        except TimeoutError as error:
            raise DeadlineError(f"podman did not answer {method} {route} within {self.timeout:g} s") from error
        except (OSError, http1.HttpError) as error:
            raise DaemonUnreachableError(
                f"the podman service at {self.path} does not answer",
                cause=f"{type(error).__name__}: {error}",
                remedy="gpuckpt doctor",
            ) from error
        if response.status >= 400:
            raise _error(response.status, data, f"podman refused {method} {route}")
        if not data:
            return None
        try:
            return json.loads(data)
        except ValueError:
            return data

    def _connect(self) -> socket.socket:
        try:
            return http1.connect_unix(self.path, self.timeout)
        except (FileNotFoundError, ConnectionRefusedError):
            # Nothing was sent, so nothing can happen twice.
            if self._reconnect is None:
                raise
            self._reconnect()
            return http1.connect_unix(self.path, self.timeout)


def _error(status: int, data: bytes, message: str) -> GpuckptError:
    try:
        answer = json.loads(data)
        cause = str(answer.get("cause") or ""), str(answer.get("message") or "")
        text = cause[1] if cause[0] in cause[1] else f"{cause[1]}: {cause[0]}"
    except (ValueError, AttributeError):
        text = data.decode(errors="replace").strip()
    if status == 404:
        return NotFoundError(message, cause=text)
    if status == 409:
        return BusyError(message, cause=text)
    return PodmanError(message, status=status, cause=text)
