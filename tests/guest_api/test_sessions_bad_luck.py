"""The session API over HTTP: clients that vanish, sessions that are deleted meanwhile, bodies without end."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.guest_api.conftest import PROMPT, Guest, until

pytestmark = pytest.mark.usefixtures("bystander")


def head(method: str, path: str, size: int, kind: str = "application/json") -> str:
    return f"{method} {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nContent-Length: {size}"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_its_generation(guest: Guest, stream: bool, reset: bool) -> None:
    path = guest.session("left")
    spec = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    body = json.dumps(spec).encode()
    told = head("POST", f"{path}/generate", len(body))
    if stream:
        guest.vanish(told, body, read=1500, reset=reset)
    else:
        guest.vanish(told, body, when=lambda: guest.ok("GET", path)["generated"] > 0, reset=reset)
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    shown = guest.ok("GET", path)
    assert 0 < shown["tokens"] < 8000
    assert guest.ok("POST", f"{path}/generate", {"max_tokens": 2})["state"] == "done"


def test_a_client_that_vanishes_leaves_a_stopped_session_stopped(guest: Guest) -> None:
    path = guest.session("stopped")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "breakpoints": [{"layer": 2, "step": 0}]})
    told = head("POST", f"{path}/generate", len(body))
    guest.vanish(told, body.encode(), when=lambda: guest.ok("GET", path)["state"] == "paused", reset=True)
    assert guest.ok("GET", path)["state"] == "paused"
    # One that waits at a resume, too: the generation is the session's, not that client's.
    told = head("POST", f"{path}/resume", 2)
    guest.vanish(told, b"{}", when=lambda: guest.ok("GET", path)["state"] != "paused", reset=True)
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    assert guest.ok("GET", path)["turns"] == 1


def test_a_client_that_vanishes_in_an_upload(guest: Guest) -> None:
    path = guest.paused("upload", 2)
    good = guest.data(f"{path}/activation")
    for method, where in (("PUT", f"{path}/activation"), ("POST", "/v1/sessions/import"), ("PUT", "/v1/vectors/half")):
        for reset in (False, True):
            guest.vanish(head(method, where, 50 << 20, "application/octet-stream"), good[:1000], reset=reset)
    guest.vanish(head("POST", f"{path}/steer", 500), b'{"edits": [', reset=True)
    assert guest.data(f"{path}/activation") == good
    assert guest.ok("GET", "/v1/vectors")["vectors"] == []


def test_a_listener_that_vanishes(guest: Guest) -> None:
    path = guest.session("heard")
    for _ in range(20):
        guest.vanish(f"GET {path}/events HTTP/1.1\nHost: localhost", read=100, reset=True)
    assert guest.ok("POST", f"{path}/generate", {"prompt": PROMPT, "max_tokens": 3})["state"] == "done"


def test_deleting_in_any_state(guest: Guest) -> None:
    guest.ok("DELETE", guest.paused("paused", 2))
    guest.refused(404, "GET", "/v1/sessions/paused")
    path = guest.paused("suspended", 2)
    guest.ok("POST", f"{path}/suspend")
    guest.ok("DELETE", path)
    # Running, alone and in a batch; who waits for them is answered.
    waiting = []
    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            path = guest.session(f"running-{number}")
            spec = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}
            waiting.append(pool.submit(guest.send, "POST", f"{path}/generate", spec))
        names = [f"running-{number}" for number in range(4)]
        until(lambda: all(guest.ok("GET", f"/v1/sessions/{name}")["generated"] > 2 for name in names))
        for name in names:
            guest.ok("DELETE", f"/v1/sessions/{name}")
        for answer in waiting:
            told = answer.result(30).json()
            assert (told["state"], told["finish_reason"]) == ("done", "cancelled")
    until(lambda: [s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]] == ["bystander"])


def test_a_session_deleted_while_clients_wait_at_its_stop(guest: Guest) -> None:
    path = guest.paused("waited", 2, tokens=8000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(guest.send, "POST", f"{path}/resume", {"wait": "end"})
        until(lambda: guest.ok("GET", path)["state"] == "running")
        guest.ok("DELETE", path)
        assert answer.result(30).json()["finish_reason"] == "cancelled"


@pytest.mark.timeout(1200)
def test_a_thousand_paused_sessions(guest: Guest) -> None:
    """Three times: the first fills what allocators keep, so the others must take next to nothing more."""
    expected = guest.tokens(PROMPT, 2)

    def begin(number: int) -> None:
        guest.paused(f"many-{number}", 2, tokens=2)

    def finish(number: int) -> None:
        path = f"/v1/sessions/many-{number}"
        if number % 2:
            assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected
        guest.ok("DELETE", path)

    kept, answered = [], []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(begin, range(1000)))
            assert guest.metrics()['gpuckpt_guest_sessions{state="paused"}'] == 1001
            assert len(guest.ok("GET", "/v1/sessions")["sessions"]) == 1001
            ending = pool.submit(lambda: list(map(finish, range(1000))))
            answered.append(0)
            while not ending.done():
                assert guest.tokens(PROMPT, 2) == expected
                answered[-1] += 1
                time.sleep(0.1)
            ending.result()
            kept.append(guest.memory())
    assert min(answered) > 10, "others are answered meanwhile, not when all have ended"
    # A session keeps more than 60 KiB here: 2,000 of them, if they stayed, 120 MiB.
    assert kept[2] - kept[0] < 32 << 20, f"{[size >> 20 for size in kept]} MiB after each thousand"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(guest: Guest) -> None:
    """The server's limit is gigabytes: what says that it has more is refused by what it says."""
    path = guest.paused("large", 2)
    for method, where in (("PUT", f"{path}/activation"), ("POST", "/v1/sessions/import"), ("POST", "/v1/completions")):
        with socket.create_connection(("127.0.0.1", guest.port), timeout=120) as client:
            request = head(method, where, 1 << 45, "application/json").replace("\n", "\r\n")
            client.sendall(request.encode() + b"\r\n\r\n" + b" " * 1000)
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_pages_from_elsewhere_are_refused(guest: Guest) -> None:
    """A web page that somebody looks at on this machine must not reach a server that only listens here."""
    own = {"Origin": guest.base}
    assert requests.post(guest.base + "/v1/sessions", json={}, headers=own, timeout=120).status_code == 201
    for headers in ({"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Host": "rebound.example:80"}):
        answer = requests.post(guest.base + "/v1/sessions", json={}, headers=headers, timeout=120)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"
