"""Answers that trickle or never end: the time and the memory they may take are bounded."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpuckpt.errors import DaemonUnreachableError
from gpuckpt.workload import endpoint as endpoints
from gpuckpt.workload.endpoint import Endpoint


@contextmanager
def server(path: Path, first: bytes, then: bytes, pause: float) -> Iterator[Endpoint]:
    """A server that answers ``first`` and then ``then`` again and again until its client goes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(first)
                while True:
                    connection.sendall(then)
                    time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Endpoint(socket=path)
    finally:
        listener.close()
        thread.join(timeout=60)


@pytest.mark.parametrize(
    ("first", "then"),
    [(b"HTTP/1.1 200 OK\r\n", b"X-More: yes\r\n"), (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"x")],
    ids=["headers", "body"],
)
def test_what_trickles_is_cut(first: bytes, then: bytes, short_path: Path) -> None:
    with server(short_path, first, then, 0.2) as endpoint:
        began = time.monotonic()
        with pytest.raises(DaemonUnreachableError):
            endpoint.request("GET", "/health", timeout=0.5)
        assert time.monotonic() - began < 20  # after forty the head would be too long, the body whole much later


def test_what_never_ends_is_not_kept(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    monkeypatch.setattr(endpoints, "_LONGEST", 1 << 16)
    with (
        server(short_path, b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096, 0) as endpoint,
        pytest.raises(DaemonUnreachableError) as raised,
    ):
        endpoint.request("GET", "/", timeout=60)
    assert "MiB" in str(raised.value.cause)


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path that fits a Unix socket."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, "s")
