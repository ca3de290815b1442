"""A small model server that is not vLLM: a bigram model of a text, behind OpenAI's completions and embeddings.

python3 bigrams.py (SOCKET | PORT) [--name NAME] [--text FILE] [--pause SECONDS] [--never-healthy]

Given one text it says the same words after the same prompt: the next word is the most frequent one behind the last,
and among those that were said already the rarest said. ``--pause`` is the time that each word takes. Standard library
only: any Python runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import socket
import socketserver
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

DIMENSIONS = 32


class Bigrams:
    """Which words follow which, and how often."""

    def __init__(self, text: str) -> None:
        words = re.findall(r"\w+|[^\w\s]", text)
        self._after: dict[str, Counter[str]] = defaultdict(Counter)
        for first, second in itertools.pairwise(words):
            self._after[first][second] += 1
        self._start = Counter(words).most_common(1)[0][0]

    def words(self, prompt: str, most: int) -> Iterator[str]:
        """What follows the prompt, a word at a time."""
        said: Counter[str] = Counter()
        found = re.findall(r"\w+|[^\w\s]", prompt)
        last = found[-1] if found else self._start
        for _ in range(most):
            follows = self._after.get(last) or Counter({self._start: 1})
            # Without a bias against what was said it would go round in a small circle.
            last = min(follows, key=lambda word: (said[word], -follows[word], word))
            said[last] += 1
            yield f" {last}"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    model: Bigrams
    name: str
    pause: float
    healthy: bool

    def do_GET(self) -> None:
        """Health, and the model's name."""
        if self.path == "/health":
            self._json({} if self.healthy else {"error": {"message": "not ready"}}, 200 if self.healthy else 503)
        elif self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": self.name, "object": "model"}]})
        else:
            self._json({"error": {"message": f"nothing at {self.path}"}}, 404)

    def do_POST(self) -> None:
        """Completions and embeddings."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            asked = json.loads(body or b"{}")
        except ValueError as error:
            self._json({"error": {"message": str(error)}}, 400)
            return
        if self.path == "/v1/completions":
            self._complete(asked)
        elif self.path == "/v1/embeddings":
            digest = hashlib.sha256(str(asked.get("input", "")).encode()).digest()
            vector = [byte / 127.5 - 1 for byte in digest[:DIMENSIONS]]
            self._json({"object": "list", "model": self.name, "data": [{"index": 0, "embedding": vector}]})
        else:
            self._json({"error": {"message": f"nothing at {self.path}"}}, 404)

    def _complete(self, asked: dict[str, Any]) -> None:
        words = self.model.words(str(asked.get("prompt", "")), int(asked.get("max_tokens", 16)))
        if not asked.get("stream"):
            text = "".join(self._slowly(words))
            self._json({"object": "text_completion", "model": self.name, "choices": [{"index": 0, "text": text}]})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for word in self._slowly(words):
            self._chunk(f"data: {json.dumps({'model': self.name, 'choices': [{'index': 0, 'text': word}]})}\n\n")
        self._chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _slowly(self, words: Iterator[str]) -> Iterator[str]:
        for word in words:
            time.sleep(self.pause)
            yield word

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the pool asks for its health every few seconds."""

    def address_string(self) -> str:
        """Of a Unix socket's client, which has none."""
        return "local"


class _Threads(socketserver.ThreadingMixIn):
    daemon_threads = True
    request_queue_size = 256


class _Unix(_Threads, socketserver.UnixStreamServer):
    pass


class _Tcp(_Threads, socketserver.TCPServer):
    allow_reuse_address = True
    address_family = socket.AF_INET


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("where")
    parser.add_argument("--name", default="bigrams")
    parser.add_argument("--text", default=__file__)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--never-healthy", action="store_true")
    options = parser.parse_args()
    with open(options.text, encoding="utf-8", errors="replace") as file:
        Handler.model = Bigrams(file.read())
    Handler.name, Handler.pause, Handler.healthy = options.name, options.pause, not options.never_healthy
    if options.where.isdigit():
        server: socketserver.BaseServer = _Tcp(("0.0.0.0", int(options.where)), Handler)
    else:
        server = _Unix(options.where, Handler)
    server.serve_forever()


if __name__ == "__main__":
    main()
