"""A warm pool of a test's own: the real daemon with small model servers, and clients of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pool_process import PoolProcess
from benchmarks.pool_setup import assignments, bigrams_words
from benchmarks.servers.bigrams import Bigrams
from tests.integration.conftest import Bench

TEXT = "the quick brown fox jumps over the lazy dog and the quick cat sleeps over the brown fence and the dog jumps"


def words(count: int) -> str:
    """What the model says behind “the”."""
    return "".join(Bigrams(TEXT).words("the", count))


def create_words(bench: Bench, name: str, *more: str) -> list[str]:
    """What follows `gpuckpt create NAME` for a small model server called ``name``."""
    text = bench.folder / "texts" / "text.txt"
    if not text.exists():
        text.parent.mkdir()
        text.write_text(TEXT)
    return ["--warmup", "1", *bigrams_words(name, *more, text=text)]


def table(bench: Bench, name: str, *server: str, **rules: Any) -> str:
    """The configuration's table of one such model."""
    keys = {"golden": bench.name(name), "create": create_words(bench, name, *server), "concurrency": 4} | rules
    return "\n".join([f"[models.{json.dumps(name)}]", *assignments(keys)])


@contextlib.contextmanager
def pool(bench: Bench, *parts: str, health: str = "interval = '1s'") -> Iterator[PoolProcess]:
    """The daemon with these parts of a configuration. At the end it is stopped and has left nothing."""
    toml = "\n\n".join(["[health]", health, *parts])
    made = PoolProcess(bench.folder, toml, {k: v for k, v in bench.env.items() if k.startswith("GPUCKPT_")})
    try:
        made.start()
        yield made
        assert made.stop() == 0, made.log.read_text()
        assert bench.left() == []
    except BaseException:
        print(made.log.read_text())
        raise
    finally:
        made.close()


@dataclass
class Answer:
    """What a client got: ``pieces`` with the time at which each came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    broken: str = ""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The words of a completion, streamed or not."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return str(self.json["choices"][0]["text"])
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: {")]
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def ask(
    made: PoolProcess,
    path: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    timeout: float = 180,
    into: Answer | None = None,
) -> Answer:
    """One request; whatever becomes of it is in the answer. ``into``: one to which others look meanwhile."""
    answer = into or Answer()
    connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=timeout)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if data is not None else {}
        connection.request("POST" if data is not None else "GET", path, data, kind | (headers or {}))
        response = connection.getresponse()
        answer.status, answer.headers = response.status, {k.lower(): v for k, v in response.getheaders()}
        while piece := response.read1(65536):
            answer.pieces.append((time.monotonic(), piece))
    except (OSError, http.client.HTTPException) as error:
        answer.broken = repr(error)
    finally:
        connection.close()
    return answer


def complete(made: PoolProcess, model: str, tokens: int = 4, *, stream: bool = False, **more: Any) -> Answer:
    """A completion of one model."""
    body = {"model": model, "prompt": "the", "max_tokens": tokens, "stream": stream}
    return ask(made, "/v1/completions", body, **more)


class Asking(threading.Thread):
    """A request beside the test; ``answer`` when it has ended."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.answer = Answer()
        self.start()

    def run(self) -> None:
        self.answer = self._work()

    def done(self, timeout: float = 200) -> Answer:
        self.join(timeout)
        assert not self.is_alive(), "the request has not ended"
        return self.answer


def reload(bench: Bench, made: PoolProcess, before: str, after: str) -> None:
    """Have a part of the configuration be another one."""
    text = made.config.read_text()
    assert before in text
    made.config.write_text(text.replace(before, after))
    bench.ok("pool", "reload", "--socket", str(made.admin))


def kill(pid: int | None) -> None:
    assert pid
    os.kill(pid, signal.SIGKILL)


def kinds(made: PoolProcess, model: str | None = None) -> list[str]:
    """What has happened."""
    return [event.kind for event in made.client.events(model=model)]


def folder_of(bench: Bench, name: str) -> Path:
    """A model's golden in the store."""
    return bench.store / "goldens" / bench.name(name)
