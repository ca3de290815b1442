"""The client of the guest's sessions, against a guest that says what a test tells it to, wrong things too."""

from __future__ import annotations

import json
import math
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gpuckpt import errors, sessions
from gpuckpt.sessions import (
    Breakpoint,
    Client,
    Condition,
    Edit,
    Event,
    Pause,
    Sampling,
    Tensor,
    Variant,
    files,
    tensors,
    words,
)

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

    def close(self) -> None:
        """Take no more; wait for what is under way."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=5)

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
            known = self.replies.get(what) or [problem(404, f"nothing for {what}", "http_error")]
            reply = known.pop(0) if len(known) > 1 else known[0]
            if callable(reply):
                reply(connection)
            else:
                connection.sendall(reply)


@contextmanager
def fake_guest() -> Iterator[FakeGuest]:
    """One on a path that fits a Unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        made = FakeGuest(Path(folder, "s"))
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    with fake_guest() as made:
        yield made


@pytest.fixture
def client(guest: FakeGuest) -> Client:
    return Client(f"unix:{guest.path}", timeout=5)


def hidden() -> Tensor:
    return Tensor("BF16", (1, 3, 8), bytes(range(48)))


# --- what is asked, and what comes back -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "what", "body", "reply"),
    [
        (lambda c: c.engine(), "GET /v1/engine", b"", ENGINE),
        (lambda c: c.session("demo"), "GET /v1/sessions/demo", b"", SESSION),
        (lambda c: c.session("ä b*"), "GET /v1/sessions/%C3%A4%20b*", b"", SESSION),
        (
            lambda c: c.create("demo", seed=1, steering=[Edit("scale", 1, 0.5)]),
            "POST /v1/sessions",
            {"id": "demo", "seed": 1, "steering": [{"kind": "scale", "layer": 1, "factor": 0.5}], "breakpoints": []},
            IDLE,
        ),
        (
            lambda c: c.generate("demo", prompt="Hi", max_tokens=4, breakpoints=[Breakpoint(layer=(1, 2), once=True)]),
            "POST /v1/sessions/demo/generate",
            {"prompt": "Hi", "max_tokens": 4, "breakpoints": [{"layer": [1, 2], "once": True}], "wait": True},
            RESULT,
        ),
        (
            lambda c: c.generate("demo", wait=False),
            "POST /v1/sessions/demo/generate",
            {"wait": False},
            RESULT | {"state": "running", "finish_reason": None, "logprobs": None},
        ),
        (lambda c: c.pause("demo", layer=2), "POST /v1/sessions/demo/pause", {"layer": 2, "wait": True}, SESSION),
        (lambda c: c.resume("demo", wait="token"), "POST /v1/sessions/demo/resume", {"wait": "token"}, RESULT),
        (lambda c: c.resume("demo"), "POST /v1/sessions/demo/resume", {"wait": "end"}, IDLE),
        (lambda c: c.suspend("demo"), "POST /v1/sessions/demo/suspend", b"", SESSION | {"state": "suspended"}),
        (lambda c: c.cancel("demo"), "POST /v1/sessions/demo/cancel", b"", IDLE),
        (
            lambda c: c.branch("demo", [Variant(), Variant(id="b", sampling=Sampling(0.8), seed=1)], wait=False),
            "POST /v1/sessions/demo/branch",
            {"variants": [{}, {"id": "b", "sampling": {"temperature": 0.8}, "seed": 1}], "resume": True, "wait": False},
            {"sessions": ["s-1", "b"], "results": None},
        ),
        (
            lambda c: c.lens("demo", 3),
            "GET /v1/sessions/demo/lens?top=3",
            b"",
            {"layer": 2, "tokens": [{"id": 1, "text": "a", "probability": 0.5}]},
        ),
        (lambda c: c.vectors(), "GET /v1/vectors", b"", {"vectors": ["v"], "features": 8}),
    ],
)
def test_requests_and_answers(
    client: Client, guest: FakeGuest, call: Callable[[Client], Any], what: str, body: Any, reply: dict[str, Any]
) -> None:
    guest.on(what, answer(reply))
    assert json.loads(msgspec.json.encode(call(client))) == reply
    assert guest.asked == [(what, body)]


def test_requests_that_are_answered_with_names_or_nothing(client: Client, guest: FakeGuest) -> None:
    done = answer({"ok": True})
    guest.on("POST /v1/sessions/demo/breakpoints", answer({"ids": ["b1", "b2"]}, 201))
    guest.on("POST /v1/sessions/demo/steer", answer({"ids": ["r1"]}))
    for what in ("sessions/demo", "sessions/demo/breakpoints/b1", "sessions/demo/steering/*", "vectors/v"):
        guest.on(f"DELETE /v1/{what}", done)
    assert client.stop_at("demo", Breakpoint(layer=(1, 2), condition=Condition(entropy_above=2.5))) == ("b1", "b2")
    assert client.steer("demo", Edit("add", 1, 2.0, "v"), Edit("set", 1, vector=(1.0, 2.0)), standing=True) == ("r1",)
    client.delete("demo")
    client.remove_breakpoint("demo", "b1")
    client.unsteer("demo")
    client.delete_vector("v")
    assert guest.asked[0][1] == {"layer": [1, 2], "condition": {"entropy_above": 2.5}}
    assert guest.asked[1][1] == {
        "edits": [
            {"kind": "add", "layer": 1, "factor": 2.0, "vector": "v"},
            {"kind": "set", "layer": 1, "vector": [1.0, 2.0]},
        ],
        "standing": True,
    }
    assert len(guest.asked) == 6


def test_all_sessions(client: Client, guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions", answer({"sessions": [SESSION, IDLE]}))
    first, second = client.sessions()
    assert isinstance(first.pause, Pause) and first.pause.norms == ((0, 1.0), (1, 4.0), (2, None))
    assert second.pause is None and second.breakpoints[0].condition.norm_below == 9.0


def test_answers_of_a_newer_guest_are_understood(client: Client, guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions/demo", answer(IDLE | {"mood": "good"}))
    assert client.session("demo").state == "idle"


def test_activations_go_both_ways(client: Client, guest: FakeGuest) -> None:
    file = tensors.write({"hidden": hidden()}, {"pause": "{}"})
    guest.on("GET /v1/sessions/demo/activation", answer(file))
    guest.on("PUT /v1/sessions/demo/activation", answer({"ok": True}))
    client.set_activation("demo", client.activation("demo"))
    assert guest.bodies("PUT /v1/sessions/demo/activation") == [tensors.write({"hidden": hidden()})]


def test_vectors_go_both_ways(client: Client, guest: FakeGuest) -> None:
    vector = Tensor("F32", (2,), bytes(8))
    guest.on("PUT /v1/vectors/v", answer({"ok": True}))
    guest.on("GET /v1/vectors/v", answer(tensors.write({"vector": vector})))
    client.set_vector("v", vector)
    assert client.vector("v") == vector


def test_an_activation_without_the_tensor(client: Client, guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions/demo/activation", answer(tensors.write({"other": hidden()})))
    with pytest.raises(errors.DaemonUnreachableError, match="cannot be understood"):
        client.activation("demo")


def test_export_and_import(client: Client, guest: FakeGuest) -> None:
    file = tensors.write({"hidden": Tensor("U8", (3 << 20,), bytes(3 << 20))})
    guest.on("GET /v1/sessions/demo/export", answer(file))
    guest.on("POST /v1/sessions/import?id=copy", answer(IDLE | {"id": "copy"}, 201))
    guest.on("POST /v1/sessions/import", answer(IDLE, 201))
    assert client.export("demo") == file
    assert client.import_(file, "copy").id == "copy" and client.import_(file).id == "demo"
    assert guest.asked[1][1] == file


# --- events -----------------------------------------------------------------------------------------------------


def test_a_stream_of_a_generation(client: Client, guest: FakeGuest) -> None:
    scored = TOKEN | {"logprob": -0.5, "top_logprobs": [[7, -0.5]]}
    guest.on("POST /v1/sessions/demo/generate", stream(scored, TOKEN, DONE), stream(TOKEN, PAUSED))
    first, second, done = client.stream("demo", prompt="Hi", logprobs=1)
    assert first == Event("token", "demo", 7, " one", 0, logprob=-0.5, top_logprobs=((7, -0.5),))
    assert (second.text, done.reason, done.tokens) == (" one", "length", 1)
    assert [event.type for event in client.stream("demo")] == ["token", "paused"]
    assert guest.asked[0][1] == {"prompt": "Hi", "logprobs": 1, "stream": True}


def test_events_of_a_session(client: Client, guest: FakeGuest) -> None:
    deleted = {"type": "deleted", "session": "demo"}
    guest.on("GET /v1/sessions/demo/events", stream(SESSION, TOKEN, DONE, deleted))
    found = list(client.events("demo"))
    assert [event.type for event in found] == ["state", "token", "done", "deleted"]
    assert found[0].state is not None and found[0].state.pause is not None and found[0].session == "demo"


def test_events_come_as_they_happen(client: Client, guest: FakeGuest) -> None:
    go = threading.Event()

    def slowly(connection: socket.socket) -> None:
        connection.sendall(stream(TOKEN, ends=False))
        assert go.wait(5)
        connection.sendall(stream(DONE).partition(b"\r\n\r\n")[2])

    guest.on("POST /v1/sessions/demo/generate", slowly)
    found = client.stream("demo")
    assert next(found).type == "token"  # the guest has not sent the rest yet
    go.set()
    assert next(found).type == "done"


def test_a_stream_that_is_closed_hangs_up(client: Client, guest: FakeGuest) -> None:
    hung_up = threading.Event()

    def until_gone(connection: socket.socket) -> None:
        connection.sendall(stream(TOKEN, ends=False))
        if connection.recv(1) == b"":
            hung_up.set()

    guest.on("POST /v1/sessions/demo/generate", until_gone)
    found = client.stream("demo")
    next(found)
    assert not hung_up.is_set()
    found.close()  # type: ignore[attr-defined]
    assert hung_up.wait(5)


@pytest.mark.parametrize(
    ("reply", "kind", "why"),
    [
        (stream(TOKEN), errors.DaemonUnreachableError, "before its last event"),
        (stream(TOKEN, ends=False), errors.DaemonUnreachableError, "closed"),
        (stream(TOKEN, {"type": "lost"}), errors.GpuckptError, "faster than they were read"),
        (stream({"type": 7}), errors.DaemonUnreachableError, "str"),
        (answer(b"event: token\ndata: {\n\n"), errors.DaemonUnreachableError, "truncated"),
        (problem(409), errors.BusyError, None),
    ],
)
def test_streams_that_go_wrong(
    client: Client, guest: FakeGuest, reply: bytes, kind: type[errors.GpuckptError], why: str | None
) -> None:
    guest.on("POST /v1/sessions/demo/generate", reply)
    with pytest.raises(errors.GpuckptError) as raised:
        list(client.stream("demo"))
    assert type(raised.value) is kind
    assert why is None or why in str(raised.value.cause)


# --- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "bad_request", errors.UsageError),
        (413, "too_large", errors.UsageError),
        (422, "malformed", errors.UsageError),
        (404, "not_found", errors.NotFoundError),
        (409, "conflict", errors.BusyError),
        (429, "too_many_sessions", errors.OutOfSpaceError),
        (503, "engine_stopped", errors.DaemonUnreachableError),
    ],
)
def test_refusals_keep_the_guest_s_words(
    client: Client, guest: FakeGuest, status: int, code: str, kind: type[errors.GpuckptError]
) -> None:
    guest.on("GET /v1/sessions/demo", problem(status, "the guest's words", code))
    with pytest.raises(errors.GpuckptError) as raised:
        client.session("demo")
    assert type(raised.value) is kind and raised.value.message == "the guest's words"


@pytest.mark.parametrize("reply", [answer({"detail": "Not Found"}, 404), problem(405, code="http_error")])
def test_a_server_without_sessions(client: Client, guest: FakeGuest, reply: bytes) -> None:
    guest.on("GET /v1/engine", reply)
    with pytest.raises(errors.NotFoundError, match="has no sessions") as raised:
        client.engine()
    assert "--workload guest" in str(raised.value.remedy)


@pytest.mark.parametrize("body", [b"oh no", b'{"error": "oh no"}', b'["oh no"]', b'{"error": {"oh": "no"}}'])
def test_other_refusals_show_what_came(client: Client, guest: FakeGuest, body: bytes) -> None:
    guest.on("GET /v1/engine", answer(body, 500))
    with pytest.raises(errors.GpuckptError, match="answered with 500") as raised:
        client.engine()
    assert type(raised.value) is errors.GpuckptError and "oh" in str(raised.value.cause)


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "reply",
    [
        hang_up,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10",
        answer(SESSION)[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"SSH-2.0-other\r\n",
        answer(b"{"),
        answer({"id": "demo"}),
        answer(SESSION | {"tokens": "three"}),
        answer(SESSION | {"state": "happy"}),
        answer(b"[NaN]"),
        answer(b"\xff\xfe"),
    ],
)
def test_what_is_no_answer(client: Client, guest: FakeGuest, reply: Reply) -> None:
    guest.on("GET /v1/sessions/demo", reply)
    with pytest.raises(errors.DaemonUnreachableError) as raised:
        client.session("demo")
    assert raised.value.cause and str(guest.path) in raised.value.message


def test_nobody_listens(tmp_path: Path) -> None:
    for where in (f"unix:{tmp_path}/s", "http://127.0.0.1:1"):
        with pytest.raises(errors.DaemonUnreachableError):
            Client(where).engine()


def test_silence_is_waited_for_only_where_a_generation_is(guest: FakeGuest) -> None:
    def later(connection: socket.socket) -> None:
        time.sleep(0.5)
        connection.sendall(answer(RESULT))

    client = Client(f"unix:{guest.path}", timeout=0.1)
    guest.on("POST /v1/sessions/demo/generate", later)
    assert client.generate("demo").state == "done"
    for wait, timeout in ((False, None), (True, 0.1)):
        with pytest.raises(errors.DeadlineError, match=r"silent for 0\.1 s"):
            client.generate("demo", wait=wait, timeout=timeout)


@pytest.mark.parametrize("name", ["", "a/b", "../engine"])
def test_names_that_would_lead_elsewhere(client: Client, guest: FakeGuest, name: str) -> None:
    for call in (client.session, client.delete_vector, lambda name: client.unsteer("demo", name)):
        with pytest.raises(errors.UsageError, match="cannot be a name"):
            call(name)
    assert guest.asked == []


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_does_not_have(client: Client, guest: FakeGuest, number: float) -> None:
    """Sent as null they would mean that nothing is asked."""
    with pytest.raises(errors.UsageError):
        client.stop_at("demo", Breakpoint(layer=1, condition=Condition(entropy_above=number)))
    assert guest.asked == []


def test_addresses(guest: FakeGuest) -> None:
    assert str(sessions.address("unix:/a/b")) == "unix:/a/b"
    found = sessions.address("http://[::1]:80/")
    assert (found.host, found.port, found.socket) == ("::1", 80, None)
    for text in (
        "",
        "unix:",
        "/a/b",
        "https://a:1",
        "http://a",
        "http://a:x",
        "http://a:1/b",
        "http://u@a:1",
        "http://[a:1",
    ):
        with pytest.raises(errors.UsageError, match="is no address"):
            sessions.address(text)


def test_over_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer(ENGINE))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert Client(f"http://127.0.0.1:{listener.getsockname()[1]}").engine().model == "tiny"
        thread.join(5)


def test_importing_it_needs_no_library_for_numbers() -> None:
    code = "import sys, gpuckpt.sessions.words, gpuckpt.sessions.files; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


# --- tensors ----------------------------------------------------------------------------------------------------


def test_safetensors_files_come_back() -> None:
    held = {
        "b": Tensor("BF16", (1, 3, 8), bytes(range(48))),
        "a": Tensor("F64", (2,), bytes(16)),
        "ünï": Tensor("U8", (), b"x"),
        "empty": Tensor("I32", (0, 5), b""),
        "eight": Tensor("F8_E4M3", (3,), b"abc"),
    }
    file = tensors.write(held, {"why": '{"a": 1}'})
    assert tensors.read(file) == (held, {"why": '{"a": 1}'})
    assert int.from_bytes(file[:8], "little") % 8 == 0
    assert tensors.read(tensors.write({})) == ({}, {})


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "within its header"),
        (b"\0" * 7, "within its header"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "within its header"),
        (file_of({})[:-1], "within its header"),
        (file_of(b"{"), "no JSON"),
        (file_of(b"\xff"), "no JSON"),
        (file_of(b"[" * 100_000), "no JSON"),
        (file_of([]), "no JSON object"),
        (file_of(b" {}"), "no JSON object"),
        (file_of(b'{"a": {}, "a": {}}'), "twice"),
        (file_of(b'{"a": NaN}'), "NaN"),
        (file_of({"__metadata__": {"a": 1}}), "not all texts"),
        (file_of({"__metadata__": []}), "not all texts"),
        (file_of({"a": 1}), "not described"),
        (file_of({"a": entry(more=1)}, b"xy"), "not described"),
        (file_of({"a": entry(dtype="F3")}, b"xy"), "unknown type"),
        (file_of({"a": entry(dtype=["U8"])}, b"xy"), "unknown type"),
        (file_of({"a": entry(shape=[-2])}, b"xy"), "the shape"),
        (file_of({"a": entry(shape=[2.0])}, b"xy"), "the shape"),
        (file_of({"a": entry(shape=[True])}, b"x"), "the shape"),
        (file_of({"a": entry(offsets=[0])}, b"xy"), "the offsets"),
        (file_of({"a": entry(offsets=[2, 0])}, b"xy"), "its shape"),
        (file_of({"a": entry(shape=[3])}, b"xy"), "its shape"),
        (file_of({"a": entry(offsets=[1, 3])}, b"xyz"), "ends at 0"),
        (file_of({"a": entry(), "b": entry()}, b"xy"), "ends at 2"),
        (file_of({"a": entry(), "b": entry(offsets=(3, 5))}, b"xyzab"), "ends at 2"),
        (file_of({"a": entry()}, b"x"), "the file at"),
        (file_of({"a": entry()}, b"xyz"), "the file at"),
    ],
)
def test_malformed_safetensors(file: bytes, why: str) -> None:
    with pytest.raises(errors.VerificationError, match="no safetensors file") as raised:
        tensors.read(file)
    assert why in str(raised.value.cause)


def test_tensors_have_as_many_bytes_as_their_shape_says() -> None:
    with pytest.raises(errors.UsageError, match="has 6 bytes"):
        Tensor("BF16", (3,), bytes(5))
    with pytest.raises(errors.UsageError, match="no numbers of the type"):
        Tensor("bfloat16", (3,), bytes(6))
    with pytest.raises(errors.UsageError, match="__metadata__"):
        tensors.write({"__metadata__": hidden()})


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I16", "F16", "I32", "F32", "I64", "F64", "BF16"])
def test_numbers_come_back_from_numpy(dtype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]])
    made = Tensor.of(array.T, dtype)
    assert made.shape == (3, 2) and (made.numpy() == array.T).all()
    assert Tensor.of(np.array(1), dtype).shape == ()
    made.numpy()[0, 0] = 1  # it is a copy


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    values = [1.0, -2.5, 3.0e38, 1e-40, math.inf, -math.inf]
    made = Tensor.of(np.array(values, "f4"), "BF16")
    assert made.data[:4] == bytes.fromhex("803f20c0")
    assert np.allclose(made.numpy(), np.array(values, "f4"), rtol=2**-8, atol=1e-40)
    assert made.numpy().dtype == np.float32


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], "<u4")
    with np.errstate(invalid="ignore"):
        halves = np.frombuffer(Tensor.of(bits.view("f4"), "BF16").data, "<u2")
    assert [f"{half:04x}" for half in halves] == ["3f80", "3f82", "3f81", "3f80", "7f80", "7fc0", "ffff"]


def test_what_numpy_does_not_know() -> None:
    with pytest.raises(errors.UsageError, match="F8_E5M2"):
        Tensor("F8_E5M2", (1,), b"x").numpy()
    for dtype in ("F8_E5M2", "float32"):
        with pytest.raises(errors.UsageError, match=dtype):
            Tensor.of(np.zeros(1), dtype)


def test_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(errors.PreflightError, match="numpy is not installed"):
        hidden().numpy()


# --- files ------------------------------------------------------------------------------------------------------


def test_files_appear_whole(tmp_path: Path) -> None:
    content = tensors.write({"hidden": hidden()})
    target = tmp_path / "demo"
    assert files.write_whole(target, [content[:9], content[9:]]) == len(content)
    assert target.read_bytes() == content and stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def fail_after(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    raise errors.DaemonUnreachableError("gone")


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        (fail_after(tensors.write({"hidden": hidden()})), errors.DaemonUnreachableError),
        ([tensors.write({"hidden": hidden()})[:-1]], errors.VerificationError),
        ([b"{}"], errors.VerificationError),
        ([(1 << 62).to_bytes(8, "little")], errors.VerificationError),
    ],
)
def test_files_that_do_not_come_whole_leave_what_was_there(
    tmp_path: Path, pieces: Any, kind: type[errors.GpuckptError]
) -> None:
    target = tmp_path / "demo"
    target.write_text("before")
    with pytest.raises(kind):
        files.write_whole(target, pieces)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_a_file_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="no folder"):
        files.write_whole(tmp_path / "no" / "demo", [])


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "edit"),
    [
        ("scale:6:0.9", Edit("scale", 6, 0.9)),
        ("scale::-2", Edit("scale", None, -2.0)),
        ("add:0:1e1:calm.v-1", Edit("add", 0, 10.0, "calm.v-1")),
        ("project:6::v", Edit("project", 6, 1.0, "v")),
    ],
)
def test_edits(word: str, edit: Edit) -> None:
    assert words.edit(word) == edit


@pytest.mark.parametrize(
    "word",
    ["", "scale", "twist:1:1", "scale:x:1", "scale:-1:1", "scale:1:nan", "scale:1:1e999", "scale:1:1_0", "scale:٣:1"],
)
def test_what_is_no_edit(word: str) -> None:
    with pytest.raises(errors.UsageError, match="is no"):
        words.edit(word)


def test_variants() -> None:
    assert words.variant("") == Variant()
    made = words.variant("scale::2,temperature=0.8,top_k=5,seed=1,id=warm,max_tokens=3,standing=add:1:2:v")
    assert made == Variant(
        "warm", (Edit("scale", None, 2.0),), (Edit("add", 1, 2.0, "v"),), Sampling(0.8, top_k=5), 1, 3
    )
    for word in ("heat=1", "seed=1,seed=2", "seed=1.5", "temperature=", "cold", "temperature=hot"):
        with pytest.raises(errors.UsageError):
            words.variant(word)


def test_conditions() -> None:
    made = words.condition(["entropy>2.5", "entropy<3", "norm>1", "norm<9", "token=3", "token=4"])
    assert made == Condition((3, 4), 2.5, 3.0, 1.0, 9.0)
    assert words.condition([]) == Condition()
    for word in ("entropy=1", "heat>1", "norm>", "token=x", "norm>nan"):
        with pytest.raises(errors.UsageError):
            words.condition([word])
    with pytest.raises(errors.UsageError, match="second"):
        words.condition(["norm>1", "norm>2"])


def test_the_strip_of_layers() -> None:
    def drawn(norms: list[list[Any]], layer: int = 2) -> str:
        return words.strip(msgspec.convert(PAUSE | {"norms": norms, "layer": layer}, Pause))

    assert drawn([[0, 1.0], [1, 4.0], [2, None]]) == "0 ▃█!│·· 4   norms 1 to 4"
    assert drawn([[2, 3.0]]) == "0 □□█│·· 4   norms 3 to 3"
    assert drawn([], layer=4) == "0 □□□□□│ 4"
    assert drawn([[0, 0.0]], layer=0) == "0 ▁│···· 4   norms 0 to 0"
