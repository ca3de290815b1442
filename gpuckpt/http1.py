"""HTTP/1.1 over a connected socket, one request a connection: what podman's API and a replica's server are asked.

The standard library's client reads headers with the email package and imports ssl, which together take a third as
long to import as everything else that a restore needs.
"""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from msgspec import Struct

JSON, BYTES = "application/json", "application/octet-stream"  # what a body may be
_LONGEST_LINE = 1 << 16
_MOST_HEADERS = 200


class HttpError(Exception):
    """What came is no HTTP, or ended in the middle; or the request cannot be written as HTTP."""


class Response(Struct, frozen=True):
    """Status of an answer, and its body as a stream; reading raises :class:`HttpError` if it is cut short."""

    status: int
    body: IO[bytes]


def connect_unix(path: Path, timeout: float) -> socket.socket:
    """A socket connected to the one at ``path``; raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout)
        made.connect(str(path))
    except BaseException:
        made.close()
        raise
    return made


@contextmanager
def exchange(
    connected: socket.socket, method: str, target: str, body: bytes = b"", kind: str = JSON
) -> Iterator[Response]:
    """Send one request, with a body of the media type ``kind`` if there is one, and read the head of the answer.

    Raises HttpError, and OSError as the socket does (its timeout is for each byte).
    """
    if not re.fullmatch(r"[!-~]+ [!-~]+", f"{method} {target}"):
        raise HttpError(f"{method} {target!r} cannot be asked: it has blanks or letters that are not ASCII")
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", "Accept-Encoding: identity"]
    if body or method in ("PATCH", "POST", "PUT"):
        lines.append(f"Content-Length: {len(body)}")
    if body:
        lines.append(f"Content-Type: {kind}")
    connected.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + body)
    with connected.makefile("rb") as stream, _answer(stream) as response:
        yield response


@contextmanager
def _answer(stream: BinaryIO) -> Iterator[Response]:
    status = _status(stream)
    headers = _headers(stream)
    while 100 <= status < 200:  # news on the way to the answer
        status = _status(stream)
        headers = _headers(stream)
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    length = None if chunked else headers.get("content-length")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise HttpError(f"the answer's length is {length[:80]!r}")
    if status in (204, 304):
        length = "0"
    with io.BufferedReader(_Body(stream, None if length is None else int(length), chunked=chunked)) as body:
        yield Response(status, body)


class _Body(io.RawIOBase):
    """A body without what frames it: it ends after ``left`` bytes, after the last chunk, or with the connection."""

    def __init__(self, stream: BinaryIO, left: int | None, *, chunked: bool) -> None:
        self._stream = stream
        self._left = 0 if chunked else left
        self._chunked = chunked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._left == 0 and self._chunked:
            self._left = self._next_chunk()
        wanted = len(buffer) if self._left is None else min(self._left, len(buffer))
        if not wanted:
            return 0
        data: bytes = self._stream.read1(wanted)  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        if self._left is not None:
            if not data:
                raise HttpError("the answer ended in the middle")
            self._left -= len(data)
            if self._left == 0 and self._chunked and _line(self._stream):
                raise HttpError("a chunk of the answer is longer than it says")
        return len(data)

    def _next_chunk(self) -> int:
        line = _line(self._stream)
        size = re.match(r"[0-9a-fA-F]{1,15}(?=\s*(;|$))", line)
        if not size:
            raise HttpError(f"a chunk of the answer begins with {line[:80]!r}")
        if count := int(size[0], 16):
            return count
        self._chunked = False
        _headers(self._stream)
        return 0


def _status(stream: BinaryIO) -> int:
    line = _line(stream)
    match = re.match(r"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: |$)", line)
    if not match:
        raise HttpError(f"the answer begins with {line[:80]!r}")
    return int(match[1])


def _headers(stream: BinaryIO) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(_MOST_HEADERS):
        line = _line(stream)
        if not line:
            return headers
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    raise HttpError(f"the answer has more than {_MOST_HEADERS} headers")


def _line(stream: BinaryIO) -> str:
    line = stream.readline(_LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise HttpError("the answer has a line that is too long" if line else "the connection was closed")
    return line.decode("latin-1").rstrip("\r\n")
