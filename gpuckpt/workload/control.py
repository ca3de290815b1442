"""Tell a server to give its device memory back, and to take it again.

A server that can do so listens on a Unix socket beside its own (``CONTROL_NAME``): one request for each connection, a
line of JSON each way, open files beside the request (SCM_RIGHTS, unix(7)). The bundled guest server and vLLM do, by
``hooks/gpuckpt_guest/control.py``; docs/gpu.md says what any other one has to answer.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from gpuckpt.errors import DaemonUnreachableError, GpuckptError

_LINE = 1 << 20
_LONGEST = 600.0  # seconds: the weights of a large model go through it


class ControlRefused(GpuckptError):
    """The server says that it cannot, or could not."""


class ControlAbsent(DaemonUnreachableError):
    """There is no control socket."""


class Woken(Struct, frozen=True):
    """What taking the weights again took: bytes that were read, and the seconds of its steps by name.

    ``told``: why what was carried to the device could not be used, if it could not.
    """

    bytes: int
    phases: dict[str, float]
    told: str | None = None


class Control:
    """One server's control socket. Methods raise DaemonUnreachableError or :class:`ControlRefused`."""

    def __init__(self, path: Path, *, timeout: float = _LONGEST) -> None:
        self._path = path
        self._timeout = timeout

    def ranks(self) -> int:
        """How many of its processes hold weights: so many files are wanted."""
        return self._number(self._ask("ranks"), "ranks")

    def save(self, files: Sequence[int]) -> list[int]:
        """Have the weights written, as they lie on the devices, into open files, one a rank; returns their bytes."""
        answer = self._ask("save", files)
        try:
            return [int(count) for count in answer["bytes"]]
        except (KeyError, TypeError, ValueError) as error:
            raise _nonsense(answer) from error

    def sleep(self, *, caches: bool = False) -> int:
        """Have weights and key-value cache given back, their addresses kept; returns the bytes. Requests wait then.

        ``caches``: these only.
        """
        return self._number(self._ask("sleep", more={"caches": 1} if caches else {}), "released")

    def wake(self, files: Sequence[int], carried: Sequence[int] = (), *, caches: bool = False) -> Woken:
        """Have the weights read from open files, one a rank, and requests answered again.

        ``caches``: only these were given back, and there are no files. ``carried``: device memory with the same bytes
        (:mod:`gpuckpt.cuda.carrier`), from which they are copied then.
        """
        more = ({"carried": len(carried)} if carried else {}) | ({"caches": 1} if caches else {})
        answer = self._ask("wake", [*files, *carried], more)
        try:
            phases = {str(name): float(took) for name, took in answer["phases"].items()}
            told = answer.get("told")
            return Woken(int(answer["bytes"]), phases, None if told is None else str(told))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _nonsense(answer) from error

    def asleep(self) -> bool:
        """Whether it has given its memory back."""
        return self._ask("state").get("asleep") is True

    def _number(self, answer: Mapping[str, Any], name: str) -> int:
        value = answer.get(name)
        if not isinstance(value, int):
            raise _nonsense(answer)
        return value

    def _ask(self, what: str, files: Sequence[int] = (), more: Mapping[str, int] | None = None) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(str(self._path))
                line = json.dumps({"do": what, **(more or {})}).encode() + b"\n"
                if files:
                    socket.send_fds(connection, [line], list(files))
                else:
                    connection.sendall(line)
                with connection.makefile("rb") as stream:
                    text = stream.readline(_LINE)
        except OSError as error:
            late = isinstance(error, TimeoutError)
            kind = ControlAbsent if isinstance(error, FileNotFoundError) else DaemonUnreachableError
            raise kind(
                f"the server does not answer on its control socket ({what})",
                cause=f"nothing came within {self._timeout:g} s"
                if late
                else f"{self._path}: {error.strerror or error}",
            ) from error
        if not text:
            raise DaemonUnreachableError(f"the server ended while it was told to {what}")
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise _nonsense(text[:200]) from error
        if not isinstance(answer, dict):
            raise _nonsense(answer)
        if "error" in answer:
            told = answer["error"] if isinstance(answer["error"], dict) else {"message": answer["error"]}
            cause = told.get("cause")
            raise ControlRefused(str(told.get("message")), cause=None if cause is None else str(cause))
        return answer


def _nonsense(answer: object) -> ControlRefused:
    return ControlRefused("the server's answer on its control socket is not understood", cause=str(answer)[:200])
