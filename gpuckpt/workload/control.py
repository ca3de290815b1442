"""Tell a server to give its device memory back, and to take it again.

A server that can do so listens on a Unix socket beside its own (``CONTROL_NAME``): one request for each connection, a
line of JSON each way, open files beside the request (SCM_RIGHTS, unix(7)). The bundled guest server and vLLM do, by
``hooks/gpuckpt_guest/control.py``; docs/gpu.md says what any other one has to answer.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from msgspec import Struct

from gpuckpt.errors import DaemonUnreachableError, GpuckptError

_LINE = 1 << 20
# Seconds for each order: requests end before a sleep, the weights of a large model are written and read.
_LIMITS = {"ranks": 30.0, "state": 30.0, "sleep": 120.0, "save": 1800.0, "wake": 600.0}
_SLOWEST = 50e6  # bytes per second of what is read, from a slow disk


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

    def __init__(self, path: Path, *, timeout: float = 1800.0) -> None:
        self._path = path
        self._timeout = timeout

    def ranks(self) -> int:
        """How many of its processes hold weights: so many files are wanted."""
        return self._number(self._ask("ranks"), "ranks")

    def save(self, files: Sequence[int]) -> list[int]:
        """Have the weights written, as they lie on the devices, into open files, one a rank; returns their bytes."""
        answer = self._ask("save", files)
        counts = answer.get("bytes")
        if not isinstance(counts, list) or len(counts) != len(files) or not all(map(_is_count, counts)):
            raise _nonsense(answer)
        return counts

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
        count, phases, told = answer.get("bytes"), answer.get("phases"), answer.get("told")
        if not _is_count(count) or not isinstance(phases, dict) or not all(map(_is_seconds, phases.values())):
            raise _nonsense(answer)
        return Woken(
            count, {_shown(name): float(took) for name, took in phases.items()}, _shown(told) if told else None
        )

    def asleep(self) -> bool:
        """Whether it has given its memory back."""
        return self._ask("state").get("asleep") is True

    def _number(self, answer: Mapping[str, Any], name: str) -> int:
        value = answer.get(name)
        if not _is_count(value):
            raise _nonsense(answer)
        return int(value)

    def _ask(self, what: str, files: Sequence[int] = (), more: Mapping[str, int] | None = None) -> dict[str, Any]:
        limit = min(self._timeout, _LIMITS[what] + sum(os.fstat(file).st_size for file in files) / _SLOWEST)
        line = json.dumps({"do": what, **(more or {})}).encode() + b"\n"
        try:
            text = self._exchanged(line, files, time.monotonic() + limit)
        except OSError as error:
            late = isinstance(error, TimeoutError)
            kind = ControlAbsent if isinstance(error, FileNotFoundError) else DaemonUnreachableError
            why = f"{self._path}: {error.strerror or error}"
            raise kind(
                f"the server does not answer on its control socket ({what})",
                cause=f"nothing came within {limit:g} s" if late else why,
            ) from error
        if not text:
            raise DaemonUnreachableError(f"the server ended while it was told to {what}")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _nonsense(text[:200]) from error
        if not isinstance(answer, dict):
            raise _nonsense(answer)
        if "error" in answer:
            told = answer["error"] if isinstance(answer["error"], dict) else {"message": answer["error"]}
            cause = told.get("cause")
            raise ControlRefused(
                _shown(told.get("message") or "it gives no reason"), cause=_shown(cause) if cause else None
            )
        return answer

    def _exchanged(self, line: bytes, files: Sequence[int], until: float) -> bytes:
        """What the server answers until ``until``, a line; empty if it ends before."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            self._connect(connection, until)
            connection.settimeout(_left(until))
            if files:
                socket.send_fds(connection, [line], list(files))
            else:
                connection.sendall(line)
            text = b""
            while b"\n" not in text and len(text) < _LINE:
                connection.settimeout(_left(until))
                data = connection.recv(_LINE - len(text))
                if not data:
                    break
                text += data
            return text.partition(b"\n")[0]

    def _connect(self, connection: socket.socket, until: float) -> None:
        # The server may put anything there, a link to another server's socket, say.
        found = os.open(self._path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
            while True:
                connection.settimeout(_left(until))
                try:
                    connection.connect(f"/proc/self/fd/{found}")
                    return
                except BlockingIOError:  # others wait for it already, as many as it lets
                    time.sleep(0.01)
        finally:
            os.close(found)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1e6  # which NaN is not


def _shown(value: object) -> str:
    """A stranger's words: without what would command a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in str(value)[:500])


def _nonsense(answer: object) -> ControlRefused:
    return ControlRefused("the server's answer on its control socket is not understood", cause=_shown(answer)[:200])
