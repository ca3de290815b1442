"""Answers as servers frame them, whole and broken."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

import pytest

from gpuckpt.http1 import BYTES, JSON, HttpError, exchange


def asked(
    answer: bytes, method: str = "GET", target: str = "/", body: bytes = b"", kind: str = JSON
) -> tuple[int, bytes, bytes]:
    """Status and body of ``answer``, byte by byte, and the request that came."""
    ours, theirs = socket.socketpair()
    got = b""

    def serve() -> None:
        nonlocal got
        with theirs, suppress(BrokenPipeError, ConnectionResetError):  # whoever has seen enough goes
            got = theirs.recv(1 << 16)
            for byte in answer:
                theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours, exchange(ours, method, target, body, kind) as response:
            return response.status, response.body.read(), got
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef", 200, b"abc"),
        (b"HTTP/1.1 200\r\n\r\nto the end", 200, b"to the end"),
        (b"HTTP/1.0 404 Not Found\nX: y\n\nno", 404, b"no"),
        (b"HTTP/1.1 200\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nab\r\nA;x=y\r\n0123456789\r\n0\r\nT: 1\r\n\r\n", 200,
         b"ab0123456789"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", 201, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b""),
    ],
)  # fmt: skip
def test_whole_answers(answer: bytes, status: int, body: bytes) -> None:
    assert asked(answer)[:2] == (status, body)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 201 + b"\r\n",
    ],
)
def test_broken_answers(answer: bytes) -> None:
    with pytest.raises(HttpError):
        asked(answer)


def test_a_line_that_does_not_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        theirs.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 16))
        with pytest.raises(HttpError, match="too long"), exchange(ours, "GET", "/"):
            pass


def test_requests() -> None:
    answer = b"HTTP/1.1 204 No Content\r\n\r\n"
    plain, empty, full = (asked(answer, *rest)[2] for rest in (("GET", "/a?b=c"), ("POST", "/"), ("POST", "/", b"{}")))
    assert plain.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: ") and b"Content-Length" not in plain
    assert b"\r\nContent-Length: 0\r\n" in empty and b"Content-Type" not in empty
    assert b"\r\nContent-Length: 2\r\n" in full and full.endswith(b"\r\nContent-Type: application/json\r\n\r\n{}")
    upload = asked(answer, "PUT", "/", b"\0\xff", BYTES)[2]
    assert upload.endswith(b"\r\nContent-Type: application/octet-stream\r\n\r\n\0\xff")


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/ä", ""])
def test_requests_that_would_say_something_else(target: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(HttpError), exchange(ours, "GET", target):
            pass
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
