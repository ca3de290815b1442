"""The real guest server, once for each run, and a client that asserts the form of every answer.

Runs in the server's environment (torch, transformers), where the guest runs:

    PYTHONPATH=.:hooks /opt/gpuckpt/server/bin/python -m pytest tests/guest_api
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]
MODEL, LAYERS, WIDTH = "tiny", 4, 256  # and its features
PROMPT = "def read(self):"
START_S = 300  # importing torch on a loaded machine, a model of a few megabytes
# Elsewhere there is no guest to start; `make test` runs this folder with the server's interpreter.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test may start several servers, each of which imports torch; on a loaded machine that has taken half a minute.

    What hangs is told by limits of its own.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1200))


class Guest:
    """A running server, and requests to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.base = f"http://127.0.0.1:{port}"

    def send(
        self, method: str, path: str, body: Any = None, *, stream: bool = False, kind: str = "application/octet-stream"
    ) -> requests.Response:
        """One request; ``body`` is sent as JSON, or as it is, under the type ``kind``, if it is bytes."""
        given: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            given = {"data": body, "headers": {"Content-Type": kind}}
        return requests.request(method, self.base + path, stream=stream, timeout=120, **given)

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be a good one."""
        answer = self.send(method, path, body)
        assert answer.status_code < 300, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return json.loads(answer.text, parse_constant=_no_constant)

    def data(self, path: str) -> bytes:
        """The bytes of an answer that must be a good one."""
        answer = self.send("GET", path)
        assert answer.status_code == 200, answer.text[:500]
        return answer.content

    def refused(self, status: int, method: str, path: str, body: Any = None) -> str:
        """The message of an answer that must be a refusal, in the form of OpenAI's errors."""
        answer = self.send(method, path, body)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        error = answer.json()["error"]
        assert {"message", "type", "code"} <= set(error)
        assert error["message"] and isinstance(error["message"], str)
        return str(error["message"])

    def events(self, path: str, body: Any = None) -> Iterator[tuple[str, Any]]:
        """Server-sent events: (name, data), the data as JSON but for OpenAI's [DONE]."""
        with self.send("GET" if body is None else "POST", path, body, stream=True) as answer:
            assert answer.status_code == 200, answer.text[:500]
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = ""
            # In the smallest pieces: an event is to be seen when it comes.
            for raw in answer.iter_lines(chunk_size=1):
                line = raw.decode()
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    text = line[6:]
                    yield name, text if text == "[DONE]" else json.loads(text, parse_constant=_no_constant)
                    name = ""

    # ------------------------------------------------------------------ sessions

    def session(self, name: str, **spec: Any) -> str:
        """A new session; returns its path."""
        assert self.ok("POST", "/v1/sessions", {"id": name, **spec})["id"] == name
        return f"/v1/sessions/{name}"

    def paused(self, name: str, *layers: int, prompt: str = PROMPT, tokens: int = 8, **spec: Any) -> str:
        """A session that has stopped in the prompt, after the first of ``layers``; returns its path."""
        path = self.session(name)
        breakpoints = [{"layer": list(layers), "phase": "prefill"}]
        told = self.ok(
            "POST",
            f"{path}/generate",
            {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "breakpoints": breakpoints, **spec},
        )
        assert (told["state"], told["pause"]["layer"]) == ("paused", layers[0])
        return path

    def tokens(self, prompt: str, count: int) -> list[int]:
        """What the model writes when nobody stops it: greedy, by OpenAI's endpoint."""
        told = self.ok(
            "POST",
            "/v1/completions",
            {
                "prompt": prompt,
                "max_tokens": count,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 0,
                "return_tokens_as_token_ids": True,
            },
        )
        return [int(token.removeprefix("token_id:")) for token in told["choices"][0]["logprobs"]["tokens"]]

    def metrics(self) -> dict[str, float]:
        """The counters of /metrics."""
        lines = self.send("GET", "/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def clear(self, *keep: str) -> None:
        """Delete all sessions but those named, and see to it that they are gone."""
        for session in self.ok("GET", "/v1/sessions")["sessions"]:
            if session["id"] not in keep:
                self.send("DELETE", f"/v1/sessions/{session['id']}")
        until(lambda: {s["id"] for s in self.ok("GET", "/v1/sessions")["sessions"]} <= set(keep))

    def memory(self) -> int:
        """Bytes of memory that the server's process has touched."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def vanish(
        self,
        head: str,
        body: bytes = b"",
        *,
        read: int = 0,
        when: Callable[[], bool] | None = None,
        reset: bool = False,
    ) -> None:
        """Send a request, read some bytes of the answer, and hang up; with ``reset``, without a farewell.

        ``when``: not before that is so. A server that has not read a request may never read it.
        """
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as client:
            client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            got = 0
            while got < read:
                piece = client.recv(read - got)
                assert piece, "the server hung up first"
                got += len(piece)
            if when is not None:
                until(when)
            elif not read:
                time.sleep(0.3)  # most likely it has been taken up by then; if not, that must do no harm either
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON: browsers refuse it")


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``true`` is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers with random weights."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    script = ROOT / "scripts" / "make_model.py"
    subprocess.run([sys.executable, script, "--shape", "tiny", folder], check=True, env=_environment(), timeout=START_S)
    return folder


def _environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT / "hooks"),
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Guest]:
    """A server of ``model``; ended by SIGTERM, to which it must answer with exit code 0."""
    with reserved() as port:
        yield from _serving(model, log, port, options)


@contextlib.contextmanager
def reserved() -> Iterator[int]:
    """A port for a server to listen at. Nobody else is given it meanwhile: it is bound, in a way that lets one listen
    there who says SO_REUSEADDR, as asyncio's servers do."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _serving(model: Path, log: Path, port: int, options: tuple[str, ...]) -> Iterator[Guest]:
    argv = [
        sys.executable,
        "-m",
        "gpuckpt_guest",
        "serve",
        "--model",
        str(model),
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen([*argv, *options], stdout=output, stderr=subprocess.STDOUT, env=_environment())
    guest = Guest(process, port)
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None, f"the server has ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"the server does not answer:\n{log.read_text()[-3000:]}"
            with contextlib.suppress(requests.ConnectionError):
                if guest.send("GET", "/health").ok:
                    break
            time.sleep(0.1)
        yield guest
        assert process.poll() is None, f"the server has ended:\n{log.read_text()[-3000:]}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM), log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def guest(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A server in 32-bit floats: with them what shares a batch does not change greedy tokens here."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serving(model, log, "--dtype", "float32", "--max-model-len", "8192") as started:
        yield started


@pytest.fixture(scope="session")
def expected(guest: Guest) -> list[int]:
    """What the bystander is to write."""
    return guest.tokens("the bystander's prompt", 8)


@pytest.fixture
def bystander(guest: Guest, expected: list[int]) -> Iterator[None]:
    """A stopped session that nobody touches. It must go on as if nothing had happened, and the server be healthy."""
    path = guest.paused("bystander", 2, prompt="the bystander's prompt")
    yield
    guest.clear("bystander")
    assert guest.ok("GET", "/health")["ok"] is True
    assert guest.process.poll() is None
    told = guest.ok("POST", f"{path}/resume", {})
    assert (told["state"], told["tokens"]) == ("done", expected)
    guest.clear()
