"""The client of the pool's admin API: what it asks, what it makes of answers, how it ends when something is wrong."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.json import encode
from msgspec.structs import replace

from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    NotFoundError,
    PreflightError,
    UsageError,
)
from gpuckpt.service import client as clients
from gpuckpt.service.client import Client, Drained, Reloaded, Scaled, Slept, Woken
from tests.fake_guest import answer, hang_up
from tests.fake_pool import FakePool, event, fake_pool, model, raw, refusal, view

STATE = "GET /v1/state"
WAKE = "POST /v1/models/qwen/wake"


@pytest.fixture
def pool() -> Iterator[FakePool]:
    with fake_pool() as made:
        yield made


@pytest.fixture
def client(pool: FakePool) -> Client:
    return Client(pool.path, timeout=60)


# --- answers ----------------------------------------------------------------------------------------------------


def test_the_state_is_the_view(pool: FakePool, client: Client) -> None:
    assert client.state() == pool.view


def test_what_is_asked_and_what_it_becomes(pool: FakePool, client: Client) -> None:
    assert client.wake("phi") == Woken("gold.1", "tmpfs", 0.0213, "phi")
    assert client.wake("qwen", deadline=2.5).tier == "hot"
    assert client.sleep("qwen") == Slept("qwen", frozen=["qwen.1"])
    assert client.sleep("phi", release=True) == Slept("phi", stopped=["gold.1"])
    assert client.scale("qwen", 2) == Scaled("qwen", 2) and client.scale("qwen", None).replicas is None
    assert client.drain("qwen") == Drained("qwen", ["qwen.1"])
    assert client.reload() == Reloaded(["new"], [], ["qwen", "phi"], ["listen: restart"])
    client.drain()
    assert client.state().state == "draining"
    assert client.metrics().startswith("gpuckpt_replicas")
    bodies = [body for what, body in pool.asked if what.startswith("POST")]
    assert bodies == [{}, {"deadline": 2.5}, {}, {"release": True}, {"replicas": 2}, {"replicas": None}, {}, {}, {}]


def test_events_are_asked_for_with_what_limits_them(pool: FakePool, client: Client) -> None:
    pool.happened += [event(3, "woken", "a b/&c", "x.1"), event(4, "frozen", "a b/&c", "x.1")]
    assert [one.seq for one in client.events()] == [1, 2, 3, 4]
    assert [one.seq for one in client.events(after=2)] == [3, 4]
    assert [one.kind for one in client.events(model="a b/&c", limit=1)] == ["frozen"]
    assert pool.asked[-1][0] == "GET /v1/events?model=a%20b%2F%26c&limit=1"


@pytest.mark.parametrize("name", ["org/model:7b", "a b", "..", "ü", "100%", "?x=1#y"])
def test_any_name_reaches_its_model(pool: FakePool, client: Client, name: str) -> None:
    pool.view = view(model(name))
    assert client.scale(name, 1).model == name


# --- events as they happen --------------------------------------------------------------------------------------


def test_following_ends_when_the_daemon_does(pool: FakePool, client: Client) -> None:
    seen = client.follow_events(after=1)
    assert next(seen).seq == 2
    pool.happen(event(3, "woken", "qwen", "qwen.1", seconds=0.02, phases={"thaw": 0.01}))
    third = next(seen)
    assert third.kind == "woken" and third.phases == {"thaw": 0.01}
    threading.Timer(0.1, pool.go_down).start()
    assert list(seen) == []  # half an event is none


def test_following_one_model(pool: FakePool, client: Client) -> None:
    pool.happen(event(3, "woken", "qwen"), event(4, "woken", "phi"))
    pool.go_down()
    assert [one.seq for one in client.follow_events(model="qwen")] == [1, 3]


def test_who_stops_following_hangs_up(pool: FakePool, client: Client) -> None:
    seen = client.follow_events()
    next(seen)
    assert isinstance(seen, Iterator)
    seen.close()  # type: ignore[attr-defined]
    assert client.state().pid == 4242


@pytest.mark.parametrize("ends", [b"0\r\n\r\n", b""])
def test_a_stream_that_ends_well_or_not(pool: FakePool, client: Client, ends: bytes) -> None:
    text = b'data: {"seq": 7, "time": 1, "kind": "woken", "new field": 1}\n\n: alive\n\nevent: odd\n\n'
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    pool.on("GET /v1/events?follow=1", head + f"{len(text):x}\r\n".encode() + text + b"\r\n" + ends)
    assert [one.seq for one in client.follow_events()] == [1, 2, 7]


def test_nothing_is_lost_or_told_twice_between_what_was_and_what_comes(pool: FakePool, client: Client) -> None:
    pool.on(
        "GET /v1/events?follow=1", answer(b"".join(b"data: " + encode(event(n, "woken")) + b"\n\n" for n in (2, 3)))
    )
    assert [one.seq for one in client.follow_events()] == [1, 2, 3]


def test_an_event_that_is_none(pool: FakePool, client: Client) -> None:
    pool.on("GET /v1/events?follow=1", answer(b'data: {"seq": "x"}\n\n'))
    with pytest.raises(DaemonUnreachableError, match="cannot be understood"):
        list(client.follow_events())


def test_following_may_be_refused(pool: FakePool, client: Client) -> None:
    pool.on("GET /v1/events?follow=1", refusal(503))
    with pytest.raises(BusyError):
        next(client.follow_events())


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, UsageError, 2),
        (409, BusyError, 7),
        (422, UsageError, 2),
        (500, GpuckptError, 1),
        (503, BusyError, 7),
        (504, DeadlineError, 13),
    ],
)
def test_refusals_by_status(pool: FakePool, client: Client, status: int, kind: type[GpuckptError], code: int) -> None:
    pool.on(WAKE, refusal(status, "no", cause="because", remedy="do"))
    with pytest.raises(kind) as caught:
        client.wake("qwen")
    error = caught.value
    assert (error.message, error.cause, error.remedy, error.exit_code) == ("no", "because", "do", code)
    assert type(error) is kind


def test_a_refusal_without_a_remedy_has_one(pool: FakePool, client: Client) -> None:
    pool.on(WAKE, refusal(503))
    with pytest.raises(BusyError) as caught:
        client.wake("qwen")
    assert "gpuckpt pool status" in str(caught.value.remedy)


def test_a_name_that_is_nearly_right(client: Client) -> None:
    for name, remedy in (("qwn", "did you mean qwen?"), ("gpt-4o-mni", "gpt-4o-mini"), ("xyzzy", "pool status")):
        with pytest.raises(NotFoundError) as caught:
            client.scale(name, 1)
        assert caught.value.exit_code == 6 and remedy in str(caught.value.remedy) and "phi" in str(caught.value.cause)
    with pytest.raises(UsageError):
        client.wake("")


def test_a_404_that_is_not_about_the_name(pool: FakePool, client: Client) -> None:
    pool.on(WAKE, refusal(404, "the golden is gone"))
    with pytest.raises(NotFoundError, match="golden is gone"):
        client.wake("qwen")
    pool.on(STATE, hang_up)
    with pytest.raises(NotFoundError, match="golden is gone"):
        client.wake("qwen")


# --- no daemon, or none that makes sense ------------------------------------------------------------------------


def unreachable(client: Client, ask: Callable[[Client], Any] = Client.state) -> DaemonUnreachableError:
    with pytest.raises(DaemonUnreachableError) as caught:
        ask(client)
    assert caught.value.exit_code == 12 and caught.value.remedy and caught.value.cause
    return caught.value


def test_no_daemon(pool: FakePool, tmp_path: Path) -> None:
    missing = unreachable(Client(tmp_path / "none.sock"))
    assert "no socket" in str(missing.cause) and "systemctl start gpuckpt-pool" in str(missing.remedy)
    path = pool.path.with_name("dead")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert "nobody listens" in str(unreachable(Client(path)).cause)
    pool.path.with_name("file").touch()
    unreachable(Client(pool.path.with_name("file")))
    unreachable(Client(Path("/" + "x" * 200)))


@pytest.mark.parametrize(
    "reply",
    [
        hang_up,
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab",
        answer(b"<html>"),
        answer(b""),
        answer(b"\xff\xfe"),
        answer(b"[" * 5000),
        answer({"schema": 1}),
        answer(b"<html>", 500),
        answer(b'{"error": "text"}', 404),
    ],
)
def test_answers_that_are_none(pool: FakePool, client: Client, reply: Any) -> None:
    pool.on(STATE, reply)
    unreachable(client)


def test_another_schema_is_not_guessed_at(pool: FakePool, client: Client) -> None:
    pool.view = replace(pool.view, schema=2)
    assert "schema 2" in str(unreachable(client).cause)


def test_an_answer_without_end(pool: FakePool, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_LONGEST", 1000)
    unreachable(client)


def test_a_silent_daemon(pool: FakePool) -> None:
    over = threading.Event()

    def say_nothing(connection: socket.socket) -> None:
        over.wait(60)

    pool.on(STATE, say_nothing)
    try:
        with pytest.raises(DeadlineError, match="silent for 0") as caught:
            Client(pool.path, timeout=0.1).state()
    finally:
        over.set()
    assert caught.value.exit_code == 13


def test_a_wake_may_take_longer_than_a_look(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_MARGIN", 0.1)
    over = threading.Event()

    def late(connection: socket.socket) -> None:
        over.wait(0.4)
        connection.sendall(raw({"replica": "qwen.1", "tier": "cold", "seconds": 70.0}))

    def never(connection: socket.socket) -> None:
        over.wait(60)
        connection.sendall(raw({"replica": "qwen.1", "tier": "cold", "seconds": 70.0}))

    pool.on(WAKE, late, never)
    client = Client(pool.path, timeout=0.1)
    assert client.wake("qwen").seconds == 70.0
    try:
        with pytest.raises(DeadlineError):
            client.wake("qwen", deadline=0.05)
    finally:
        over.set()


def test_another_user_s_socket_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_listener", lambda made: 12345)
    with pytest.raises(PreflightError, match="not the warm pool's") as caught:
        client.state()
    assert "12345" in str(caught.value.cause)


def test_the_listener_is_who_listens(pool: FakePool) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(pool.path))
        assert clients._listener(made) == os.geteuid()


def test_who_is_not_root_is_told_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, timeout: float) -> socket.socket:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gpuckpt.http1.connect_unix", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PreflightError, match="must run as root"):
        client.state()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    unreachable(client)
