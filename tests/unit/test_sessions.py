"""The client of the guest's sessions: what it asks, and what it makes of the answers and events."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from gpuckpt import errors, sessions
from gpuckpt.sessions import Breakpoint, Client, Condition, Edit, Event, Pause, Sampling, Tensor, Variant, tensors
from tests.fake_guest import (
    DONE,
    ENGINE,
    IDLE,
    PAUSED,
    RESULT,
    SESSION,
    TOKEN,
    FakeGuest,
    answer,
    hidden,
    problem,
    stream,
)


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
        (
            lambda c: c.suspend("demo", durable=True),
            "POST /v1/sessions/demo/suspend",
            {"durable": True, "wait": True},
            SESSION | {"state": "suspended"},
        ),
        (lambda c: c.prefetch("demo"), "POST /v1/sessions/demo/prefetch", {"wait": False}, SESSION),
        (lambda c: c.pin("demo", 30), "POST /v1/sessions/demo/pin", {"seconds": 30}, SESSION),
        (lambda c: c.idle("demo", 1.5), "POST /v1/sessions/demo/idle", {"seconds": 1.5}, SESSION),
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
        assert go.wait(60)
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
        with suppress(ConnectionResetError):  # of what it has not read
            assert connection.recv(1) == b""
        hung_up.set()

    guest.on("POST /v1/sessions/demo/generate", until_gone)
    found = client.stream("demo")
    next(found)
    assert not hung_up.is_set()
    found.close()  # type: ignore[attr-defined]
    assert hung_up.wait(60)


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
        thread.join(60)


def test_importing_it_needs_no_library_for_numbers() -> None:
    code = "import sys, gpuckpt.sessions.words, gpuckpt.sessions.files; print({'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
