"""What the front passes on and what it keeps: headers, keys, targets; and what it refuses."""

from __future__ import annotations

import pytest

from gpuckpt.service.keys import Keys
from tests.service_world import ASK, answer, run, world


def test_what_is_about_one_connection_stays_there() -> None:
    async def test() -> None:
        dropped = b"connection: x-mine, keep-alive\r\nx-mine: 1\r\nkeep-alive: timeout=5\r\nproxy-authenticate: b\r\n"
        async with world(answer(head=dropped + b"upgrade: h2\r\ntrailer: t\r\nx-kept: 1\r\n")) as here:
            head = "connection: X-Yours\r\nConnection: keep-alive, TE\r\nx-yours: 1\r\nte: trailers\r\nx-kept: 2\r\n"
            head += "keep-alive: 9\r\nproxy-authorization: b\r\ntrailer: t\r\nexpect: nothing\r\n"
            got = await here.ask(ASK, head=head + "x-gpuckpt-model: m\r\nauthorization: Bearer theirs\r\n")
            names = {name for name, _ in got.headers}
            assert names == {"content-length", "x-kept", "x-gpuckpt-tier", "x-gpuckpt-replica", "server-timing"}
            asked = dict(here.replica.asked[0].headers)
            assert set(asked) == {"host", "content-type", "x-kept", "authorization", "content-length"}
            assert asked["authorization"] == "Bearer theirs"  # no keys of ours: it is for the model's server

    run(test())


def test_keys_are_asked_for_and_not_passed_on() -> None:
    async def test() -> None:
        async with world(keys=Keys(frozenset((b"k1", b"k2")))) as here:
            refused = await here.ask(ASK, head="authorization: Bearer no\r\n")
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
            assert refused.header("www-authenticate") == "Bearer"
            assert (await here.ask(ASK)).status == 401
            for head in ("authorization: bearer  k1\r\n", "x-api-key: k2\r\n"):
                assert (await here.ask(ASK, head=head)).status == 200
                assert {"authorization", "x-api-key"}.isdisjoint(dict(here.replica.asked[-1].headers))
            assert here.pool.acquired == 2

    run(test())


@pytest.mark.parametrize(
    "head",
    [
        "x-a: b\rx-evil: 1\r\n",
        "x-a: b\x00\r\n",
        "x-a: b\r\n folded\r\n",
        "x a: b\r\n",
        "x-a : b\r\n",
        "transfer-encoding: chunked\r\n",
        "content-length: 3\r\n",
    ],
)
def test_heads_that_two_servers_could_read_differently_are_refused(head: str) -> None:
    async def test() -> None:
        async with world() as here:
            got = await here.ask(ASK, head=head)
            assert (got.status, got.error["code"], got.header("connection")) == (400, "invalid_http", "close")
            assert not here.replica.asked

    run(test())


@pytest.mark.parametrize("head", [b"x: \x01\r\n", b"x y: 1\r\n", b"x: a\r\n\tb\r\n", b"content-length: 9\r\n"])
def test_a_replica_injects_no_headers(head: bytes) -> None:
    async def test() -> None:
        async with world(answer(head=head)) as here:
            got = await here.ask(ASK)
            assert (got.status, got.error["code"]) == (502, "replica_failed")
            await here.settled()

    run(test())


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        ("/v1/%C3%BC?q=%20&r=ü", None),
        ("/v1/%C3%BC/%2F%00?q=%20&&r", "/v1/%C3%BC/%2F%00?q=%20&&r"),
        ("/v1/%ff%zz", "/v1/%ff%zz"),
        ("http://elsewhere/v1/x?y", "/v1/x?y"),
        ("//v1//x", "//v1//x"),
        ("*", "*"),
    ],
)
def test_targets_are_passed_on_as_they_came(sent: str, passed: str | None) -> None:
    async def test() -> None:
        async with world() as here:
            got = await here.ask(method="GET", target=sent)
            assert got.status == (400 if passed is None else 200)
            assert [asked.target for asked in here.replica.asked] == ([passed] if passed else [])

    run(test())
