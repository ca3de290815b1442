"""The part of the service that the dashboard needs, on a port of its own: what it serves is put in by the test."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
from msgspec import structs

from gpuckpt.service.dashboard import files
from gpuckpt.service.view import PoolView

INTERVAL = 0.1  # seconds between two looks for something new
LONGEST = 5.0  # seconds without an event


class FakePool:
    """Tells ``view``, with the time as it is; set it to another one and it is sent.

    ``key``: what is asked for. ``away``: connections are dropped, those that stream too. ``silent``: streams stay, and
    nothing is sent. ``status``: of all answers but the static files', if it is not 200.
    """

    def __init__(self, view: PoolView) -> None:
        self.view = view
        self.key = ""
        self.away = False
        self.silent = False
        self.status = 200
        self.asked: list[str] = []  # paths
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[FakePool]:
        """Serve in a thread."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield self
        finally:
            self.away = True
            self._server.shutdown()
            thread.join(10)
            self._server.server_close()

    def encoded(self) -> bytes:
        """The state as it is sent."""
        return msgspec.json.encode(structs.replace(self.view, now=time.time()))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        pool = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                pool.asked.append(self.path)
                if pool.away:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                name = self.path.removeprefix("/dashboard").lstrip("/") or "index.html"
                if file := files().get(name):
                    known = file.known(self.headers["If-None-Match"])
                    self._answer(304 if known else 200, file.headers, b"" if known else file.body)
                elif name not in ("state", "events"):
                    self._answer(404, {}, b"")
                elif pool.status != 200:
                    self._answer(pool.status, {}, b"{}")
                elif pool.key and self.headers["Authorization"] != f"Bearer {pool.key}":
                    self._answer(401, {"WWW-Authenticate": "Bearer"}, b"{}")
                elif name == "state":
                    self._answer(200, {"Content-Type": "application/json"}, pool.encoded())
                else:
                    self._stream()

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for header, value in headers.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(body)

            def _stream(self) -> None:
                self._answer(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}, b": hello\n\n")
                sent: PoolView | None = None
                at = 0.0
                try:
                    while not pool.away:
                        view = pool.view
                        if not pool.silent and (view is not sent or time.monotonic() - at > LONGEST):
                            self.wfile.write(b"data: " + pool.encoded() + b"\n\n")
                            sent, at = view, time.monotonic()
                        time.sleep(INTERVAL)
                except OSError:
                    pass  # the page has gone

        return Handler
