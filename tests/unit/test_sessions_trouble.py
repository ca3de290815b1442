"""The client of the guest's sessions, when the guest refuses, is silent, or makes no sense."""

from __future__ import annotations

import math
import socket
import threading
from pathlib import Path

import pytest

from gpuckpt import errors
from gpuckpt.sessions import Breakpoint, Client, Condition
from tests.fake_guest import RESULT, SESSION, FakeGuest, Reply, answer, hang_up, problem


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
    over = threading.Event()

    def later(connection: socket.socket) -> None:
        over.wait(0.5)
        connection.sendall(answer(RESULT))

    def never(connection: socket.socket) -> None:
        over.wait(60)

    client = Client(f"unix:{guest.path}", timeout=0.1)
    guest.on("POST /v1/sessions/demo/generate", later, never)
    assert client.generate("demo").state == "done"
    try:
        for wait, timeout in ((False, None), (True, 0.1)):
            with pytest.raises(errors.DeadlineError, match=r"silent for 0\.1 s"):
                client.generate("demo", wait=wait, timeout=timeout)
    finally:
        over.set()


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
