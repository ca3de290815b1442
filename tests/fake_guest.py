"""A guest that says what a test tells it to, wrong things too, and what a real one says."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpuckpt.sessions import Tensor

PAUSE: dict[str, Any] = {
    "layer": 2,
    "layers": 4,
    "step": 0,
    "position": 0,
    "tokens": 3,
    "breakpoint": "b1",
    "shape": [1, 3, 8],
    "dtype": "bfloat16",
    "checkpoint": {"bytes": 48, "dispatch_us": 12.5, "complete_us": None, "pinned": True},
    "edits": [{"name": "", "kind": "scale", "layer": 2, "factor": 0.5, "first": 0, "last": 2, "vector": None}],
    "replaced": False,
    "norms": [[0, 1.0], [1, 4.0], [2, None]],
    "seconds": 0.25,
    "wire_bytes": {"received": 0, "sent": 90},
}
SESSION: dict[str, Any] = {
    "id": "demo",
    "state": "paused",
    "parent": None,
    "created": 1.0,
    "tokens": 3,
    "length": 0,
    "cache_bytes": 3072,
    "memory": {
        "state": "device",
        "bytes": {"device": 1048576, "host": 0, "disk": 0},
        "waiting": False,
        "pinned": None,
        "expected": None,
        "durable": False,
    },
    "turns": 0,
    "passes": 0,
    "steering": [{"name": "r1", "kind": "add", "layer": 1, "factor": 2.0, "first": 0, "last": None, "vector": 1.5}],
    "breakpoints": [
        {
            "id": "b1",
            "layer": 2,
            "phase": "prefill",
            "position": None,
            "step": 0,
            "condition": dict.fromkeys(("tokens", "entropy_above", "entropy_below", "norm_above"), None)
            | {"norm_below": 9.0},
            "once": False,
            "hits": 1,
        }
    ],
    "pause": PAUSE,
    "generated": 0,
    "text": "",
    "failed": "",
    "wire_bytes": {"received": 90, "sent": 512},
}
IDLE = SESSION | {"state": "idle", "pause": None}
RESULT: dict[str, Any] = {
    "session": "demo",
    "state": "done",
    "text": " one two",
    "tokens": [7, 8],
    "finish_reason": "length",
    "stop": None,
    "logprobs": [{"token": 7, "logprob": -0.5, "top": [[7, -0.5], [9, -2.0]]}] * 2,
    "logits": None,
    "pause": None,
    "prompt_tokens": 3,
    "error": None,
}
ENGINE: dict[str, Any] = {
    "model": "tiny",
    "identity": "83db",
    "verdict": {"layers": 4, "batching": True},
    "device": "cpu",
    "dtype": "bfloat16",
    "limit": 32768,
    "vocabulary": 8192,
    "features": 8,
    "ring": {"bytes": 64, "spilled": 0},
    "memory": {
        "block_bytes": 1 << 20,
        "device": {"budget": 64 << 20, "free": 16 << 20, "outside_blocks": 0},
        "host": {"budget": 32 << 20, "free": 32 << 20},
        "disk": {"budget": 0, "used": 0, "error": ""},
        "longest": 2048,
        "waiting": 1,
        "evicted": 3,
        "preempted": 1,
        "dropped": 0,
        "out": {"bytes": 3 << 20, "seconds": 0.003, "blocks": 3, "spared": 2},
        "in": {"bytes": 0, "seconds": 0.0, "blocks": 0, "spared": 0},
        "to_disk": {"bytes": 0, "seconds": 0.0, "blocks": 0, "spared": 0},
    },
    "counters": {"layers_run": 0},
}
TOKEN = {"type": "token", "session": "demo", "token": 7, "step": 0, "text": " one"}
DONE = {"type": "done", "session": "demo", "reason": "length", "tokens": 1}
PAUSED = {"type": "paused", "session": "demo", "layer": 2, "step": 0, "breakpoint": "b1"}

Reply = bytes | Callable[[socket.socket], None]


def answer(value: Any, status: int = 200) -> bytes:
    """A whole response: JSON, or bytes as they are."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return f"HTTP/1.1 {status} Some\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def problem(status: int, message: str = "the guest's words", code: str = "conflict") -> bytes:
    """An error in the guest's form."""
    return answer({"error": {"message": message, "type": code, "code": code}}, status)


def stream(*events: dict[str, Any], ends: bool = True) -> bytes:
    """Server-sent events in chunks, each cut in two."""
    made = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for event in events:
        text = f"event: {event.get('type', 'state')}\ndata: {json.dumps(event)}\n\n".encode()
        for part in (text[:20], text[20:]):
            made += f"{len(part):x}\r\n".encode() + part + b"\r\n"
    return made + (b"0\r\n\r\n" if ends else b"")


class FakeGuest:
    """Answers requests with what ``replies`` has for ``"METHOD /path"``, in turn; keeps what it was asked: JSON decoded
    if it says that it is, other bodies as they came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[tuple[str, Any]] = []
        self.answered: list[str] = []  # what has its whole answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def on(self, what: str, *replies: Reply) -> None:
        """Answer ``what`` with these; with the last one for ever."""
        self.replies[what] = list(replies)

    def bodies(self, what: str) -> list[Any]:
        """The bodies of the requests ``what``."""
        return [body for asked, body in self.asked if asked == what]

    def otherwise(self, what: str, data: Any) -> Reply:
        """The reply to what :meth:`on` was told nothing about."""
        return problem(404, f"nothing for {what}", "http_error")

    def close(self) -> None:
        """Take no more; wait for what is under way."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=60)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader, suppress(OSError):
            line = reader.readline().decode()
            headers: dict[bytes, bytes] = {}
            while header := reader.readline().strip().lower():
                name, _, value = header.partition(b": ")
                headers[name] = value
            data: Any = reader.read(int(headers.get(b"content-length", 0)))
            what = line.rpartition(" ")[0]
            if headers.get(b"content-type") == b"application/json":
                data = json.loads(data)
            self.asked.append((what, data))
            known = self.replies.get(what) or [self.otherwise(what, data)]
            reply = known.pop(0) if len(known) > 1 else known[0]
            if callable(reply):
                reply(connection)
            else:
                connection.sendall(reply)
            self.answered.append(what)


@contextmanager
def fake_guest() -> Iterator[FakeGuest]:
    """One on a path that fits a Unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        made = FakeGuest(Path(folder, "s"))
        try:
            yield made
        finally:
            made.close()


def hidden() -> Tensor:
    return Tensor("BF16", (1, 3, 8), bytes(range(48)))


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)
