"""The front between real sockets: what comes from a replica goes to the client as it came, and nothing is left over."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.pool.book import RefusedError
from gpuckpt.service.front import Limits
from gpuckpt.service.keys import Keys
from tests.service_world import STREAM, Asked, Client, World, answer, chunk, raw, request, run, until, world

ASK: dict[str, Any] = {"model": "m", "prompt": "x"}
STREAMED: dict[str, Any] = ASK | {"stream": True}
OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"choices":[]}\n\n'


async def hang(asked: Asked) -> None:
    await asked.listen()


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ((b"content-length: 5\r\n\r\nhello",), b"hello"),
        ((b"content-length: 5\r\n\r\n", b"he", b"llo"), b"hello"),
        ((b"content-length: 0\r\n\r\n",), b""),
        ((b"transfer-encoding: chunked\r\n\r\n" + chunk(b"hel") + chunk(b"lo") + chunk(b""),), b"hello"),
        ((b"transfer-encoding: chunked\r\n\r\n5;x=y\r\nhel", b"lo\r\n", b"0\r\n", b"trailer: t\r\n\r\n"), b"hello"),
        ((b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",), b""),
    ],
)
def test_every_framing_arrives(pieces: tuple[bytes, ...], body: bytes) -> None:
    async def test() -> None:
        async with world(raw(OK, *pieces, pause=0.002)) as here:
            client = await here.client()
            for _ in range(2):  # the connections, on both sides, are kept
                await client.send(request(ASK))
                got = await client.answer()
                assert (got.status, got.body, got.whole) == (200, body, True)
                assert got.header("trailer") is None
            await here.settled()
            assert here.replica.connections == 1
            assert [record.outcome for record in here.records] == ["ok", "ok"]

    run(test())


def test_a_body_that_ends_with_its_connection() -> None:
    async def test() -> None:
        async with world(raw(b"HTTP/1.0 200 OK\r\n\r\n", b"hel", b"lo", pause=0.002, close=True)) as here:
            for _ in range(2):
                got = await here.ask(ASK)
                assert (got.body, got.whole, got.header("transfer-encoding")) == (b"hello", True, "chunked")
            assert here.replica.connections == 2

    run(test())


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_a_body(status: str) -> None:
    async def test() -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-length: 7\r\netag: e\r\n\r\n".encode()
        async with world(raw(head)) as here:
            client = await here.client()
            for _ in range(2):
                await client.send(request(ASK))
                got = await client.answer()
                assert (got.status, got.body, got.header("etag")) == (int(status[:3]), b"", "e")
            assert here.replica.connections == 1

    run(test())


@pytest.mark.parametrize("framing", [b"content-length: 7\r\n", b"transfer-encoding: chunked\r\n", b""])
def test_head(framing: bytes) -> None:
    async def test() -> None:
        async with world(raw(OK, framing, b"x: y\r\n\r\n", pause=0.001)) as here:
            client = await here.client()
            for _ in range(2):
                await client.send(request(method="HEAD", target="/v1/files"))
                got = await client.answer(head_only=True)
                assert (got.status, got.header("x")) == (200, "y")
                assert got.header("content-length") == ("7" if b"7" in framing else None)
            await here.settled()

    run(test())


def test_interim_answers_are_not_the_answer() -> None:
    async def test() -> None:
        interim = b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
        async with world(raw(*interim, OK + b"content-length: 2\r\nx: y\r\n\r\nok", pause=0.002)) as here:
            got = await here.ask(ASK)
            assert (got.status, got.body, got.header("link"), got.header("x")) == (200, b"ok", None, "y")

    run(test())


def test_a_stream_comes_piece_by_piece() -> None:
    async def test() -> None:
        turn = asyncio.Event()

        async def script(asked: Asked) -> None:
            await asked.send(OK, STREAM)
            for number in range(5):
                await turn.wait()
                turn.clear()
                await asked.send(chunk(b"data: %d\n\n" % number))
            await asked.send(chunk(b""))

        async with world(script) as here:
            client = await here.client()
            await client.send(request(STREAMED))
            for number in range(5):
                turn.set()
                if not number:
                    assert (await client.head()).header("content-type") == "text/event-stream"
                assert await client.reader.readexactly(14) == chunk(b"data: %d\n\n" % number)
            assert await client.reader.readexactly(5) == b"0\r\n\r\n"

    run(test())


def test_many_small_chunks() -> None:
    async def test() -> None:
        body = bytes(range(256)) * 400
        wire = b"".join(chunk(bytes((byte,))) for byte in body)
        async with world(raw(OK, STREAM, wire, chunk(b""))) as here:
            assert (await here.ask(STREAMED)).body == body

    run(test())


def test_headers_say_where_the_time_went() -> None:
    async def test() -> None:
        async with world(answer(head=b"server: x\r\nserver-timing: own;dur=1\r\n")) as here:
            here.pool.tier = "tmpfs"
            got = await here.ask(ASK)
            assert got.header("x-gpuckpt-tier") == "tmpfs" and got.header("x-gpuckpt-replica") == "m.0"
            timings = [value for name, value in got.headers if name == "server-timing"]
            assert timings[0] == "own;dur=1" and timings[1].startswith('tier;desc="tmpfs", wait;dur=')
            [record] = here.records
            assert (record.model, record.tier, record.status, record.outcome) == ("m", "tmpfs", 200, "ok")
            assert record.first is not None and 0 < record.first <= record.total

    run(test())


# ---------------------------------------------------------------------- what is passed on


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


def test_http_1_0() -> None:
    async def test() -> None:
        async with world(raw(OK, b"transfer-encoding: chunked\r\n\r\n", chunk(b"hello"), chunk(b""))) as here:
            client = await here.client()
            body = json.dumps(ASK).encode()
            head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            await client.send(head.encode(), b"connection: keep-alive\r\n\r\n", body)
            got = await client.answer()
            assert got.header("transfer-encoding") is None and got.header("connection") == "close"
            assert got.body == b"hello"
            assert here.replica.asked[0].header("host")  # which HTTP/1.1 must have

            here.replica.script = answer(b"with a length")
            got = await here.ask(ASK, version="1.0")
            assert (got.header("content-length"), got.body) == ("13", b"with a length")
            here.replica.script = raw(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert (await here.ask(ASK, version="1.0")).status == 204

    run(test())


def test_connection_close() -> None:
    async def test() -> None:
        async with world() as here:
            client = await here.client()
            await client.send(request(ASK, head="connection: close\r\n"))
            assert (await client.answer()).header("connection") == "close"
            assert await client.ended() == b""

    run(test())


def test_requests_one_behind_the_other() -> None:
    async def test() -> None:
        async def script(asked: Asked) -> None:
            await asyncio.sleep(0.01)
            await answer(asked.body)(asked)

        async with world(script) as here:
            client = await here.client()
            asks = [ASK | {"n": number} for number in range(30)]
            await client.send(*map(request, asks[:10]))
            for ask in asks[10:]:
                await client.send(request(ask))
            for ask in asks:
                assert json.loads((await client.answer()).body) == ask
            assert here.replica.connections == 1

    run(test())


# ---------------------------------------------------------------------- clients that go away


async def leave(client: Client, how: str) -> None:
    if how == "close":
        await client.close()
    elif how == "reset":
        client.writer.transport.abort()
    else:  # to a server, one that sends no more cannot be told from one that is gone
        client.writer.write_eof()


@pytest.mark.parametrize("how", ["close", "reset", "half"])
@pytest.mark.parametrize("when", ["waiting", "silent", "streaming", "pipelined"])
def test_a_client_that_goes_away_cancels(when: str, how: str) -> None:
    async def test() -> None:
        async def script(asked: Asked) -> None:
            if when == "streaming":
                await asked.send(OK, STREAM, chunk(EVENT))
            await asked.listen()

        async with world(script) as here:
            if when == "waiting":
                here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            if when == "pipelined":
                await client.send(request(STREAMED))
            if when == "waiting":
                await until(lambda: here.pool.waiting)
            else:
                await until(lambda: here.replica.asked)
            if when == "streaming":
                await client.head()
            await leave(client, how)
            await until(lambda: here.records, 1.0)
            if when != "waiting":
                await until(here.replica.asked[0].gone.is_set, 1.0)
            await here.settled()
            assert here.records[0].outcome == "gone"
            assert len(here.records) == 1 and here.pool.acquired == (when != "waiting")

    run(test())


def test_a_client_that_goes_away_in_the_midst_of_its_request() -> None:
    async def test() -> None:
        async with world() as here:
            client = await here.client()
            await client.send(request(b"x" * 100)[:-10])
            await asyncio.sleep(0.02)
            await client.close()
            await until(lambda: here.records)
            assert here.records[0].outcome == "gone" and not here.pool.acquired

    run(test())


def test_a_client_that_goes_away_while_a_replica_is_looked_at() -> None:
    async def test() -> None:
        async with world(raw(close=True)) as here:
            looked = asyncio.Event()

            async def suspect(held: object) -> None:
                looked.set()
                await asyncio.sleep(10)

            here.pool.suspect = suspect  # type: ignore[method-assign]
            client = await here.client()
            await client.send(request(ASK))
            await looked.wait()
            await client.close()
            await until(lambda: here.records, 1.0)
            await here.settled()

    run(test())


def test_a_connection_is_free_for_the_next_request_at_once() -> None:
    async def test() -> None:
        async with world(hang) as here:
            client = await here.client()
            await client.send(request(ASK))
            await until(lambda: here.replica.asked)
            await client.close()
            await here.settled()
            here.replica.script = answer(b"next")
            assert (await here.ask(ASK)).body == b"next"
            assert here.replica.connections == 2  # the one with an answer under way was cut

    run(test())


# ---------------------------------------------------------------------- clients that are slow


def test_a_slow_reader_holds_the_replica_back() -> None:
    """Neither the service nor the client's socket takes what nobody reads."""

    async def test() -> None:
        sent = 0

        async def script(asked: Asked) -> None:
            nonlocal sent
            await asked.send(OK, b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(400):
                await asked.send(chunk(b"x" * (64 << 10)))
                sent += 64 << 10
            await asked.send(chunk(b""))

        async with world(script) as here:
            client = await here.client()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(request(ASK))
            await until(lambda: sent)
            before = -1
            while before != sent:
                before = sent
                await asyncio.sleep(0.1)
            assert sent < 16 << 20  # what the kernel's buffers hold
            buffered = [one.transport.get_write_buffer_size() for one in here.replica.open]
            assert max(buffered) < 1 << 20
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            got = await client.answer()
            assert len(got.body) == 400 * (64 << 10) and got.whole

    run(test())


def test_a_slow_sender_is_told_so() -> None:
    async def test() -> None:
        async with world(limits=Limits(request=0.1)) as here:
            client = await here.client()
            await client.send(request(b"x" * 100)[:-10])
            got = await client.answer()
            assert (got.status, got.error["code"], got.header("connection")) == (408, "too_slow", "close")
            assert not here.pool.acquired
            await client.close()

    run(test())


def test_a_long_body_may_take_its_time() -> None:
    async def test() -> None:
        async with world(limits=Limits(request=0.1)) as here:
            client = await here.client()
            whole = request(b'{"model":"m","x":"' + b"x" * 60000 + b'"}')
            for at in range(0, len(whole), 10000):  # half as fast again as it must
                await client.send(whole[at : at + 10000])
                await asyncio.sleep(0.04)
            assert (await client.answer()).status == 200

    run(test())


# ---------------------------------------------------------------------- bodies


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long(chunked: bool) -> None:
    """The answer arrives although the client goes on sending: a reset would make it forget the answer."""

    async def test() -> None:
        async with world(limits=Limits(body=100_000)) as here:
            client = await here.client()
            framing = "transfer-encoding: chunked" if chunked else "content-length: 50000000"
            await client.send(f"POST /v1/x HTTP/1.1\r\nhost: h\r\n{framing}\r\n\r\n".encode())
            sent = 0
            for _ in range(100):
                await client.send(chunk(b"x" * 50_000) if chunked else b"x" * 50_000)
                sent += 50_000
                await asyncio.sleep(0.0005)
            assert sent == 5_000_000
            got = await client.answer()
            assert (got.status, got.error["code"], got.header("connection")) == (413, "body_too_long", "close")
            assert "100000" in got.error["message"]
            await client.close()
            assert not here.pool.acquired

    run(test())


def test_a_body_that_is_too_long_is_not_even_asked_for() -> None:
    async def test() -> None:
        async with world(limits=Limits(body=100)) as here:
            client = await here.client()
            await client.send(b"POST /v1/x HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 101\r\n\r\n")
            assert (await client.answer()).status == 413
            client = await here.client()
            body = json.dumps(ASK).encode()
            head = "content-type: application/json\r\nexpect: 100-continue\r\n"
            await client.send(request(body, head=head).removesuffix(body))
            assert (await client.answer()).status == 100
            await client.send(body)
            assert (await client.answer()).status == 200
            assert here.replica.asked[0].header("expect") is None

    run(test())


def test_a_long_body_arrives() -> None:
    async def test() -> None:
        body = b'{"model":"m","x":"' + b"x" * 3_000_000 + b'"}'
        async with world() as here:
            for framing in ("content-length", "chunked"):
                client = await here.client()
                if framing == "chunked":
                    head = b"POST /v1/x HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
                    await client.send(head, chunk(body[:1000]), chunk(body[1000:]), chunk(b""))
                else:
                    await client.send(request(body))
                assert (await client.answer()).status == 200
                assert here.replica.asked[-1].body == body
                assert here.replica.asked[-1].header("transfer-encoding") is None

    run(test())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": 7}', 400, "invalid_body"),
        (b'{"model": ["m"]}', 400, "invalid_body"),
        (b'{"model": "x"}', 404, "model_not_found"),
        (b'{"model": "m"', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[1]", 400, "invalid_body"),
        (b'{"model": "m", "x": ' + b"[" * 100_000, 400, "invalid_json"),
    ],
)
def test_bad_bodies(body: bytes, status: int, code: str) -> None:
    async def test() -> None:
        async with world() as here:
            client = await here.client()
            await client.send(request(body, head="content-type: application/json\r\n"))
            got = await client.answer()
            assert (got.status, got.error["code"]) == (status, code)
            assert got.error["message"] and got.error["type"] == "invalid_request_error"
            await client.send(request(ASK))  # the connection is as good as before
            assert (await client.answer()).status == 200

    run(test())


# ---------------------------------------------------------------------- replicas that fail


FAILURES = {
    "no answer": raw(close=True),
    "head only": raw(OK, STREAM, pause=0.005, close=True),
    "half a head": raw(OK, b"content-le", pause=0.005, close=True),
    "garbage": raw(b"SSH-2.0-OpenSSH\r\n"),
    "endless head": raw(OK, *[b"x: " + b"y" * 60000 + b"\r\n"] * 9),
    "a status there is not": raw(b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n"),
    "another protocol": raw(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_has_not_begun_is_given_to_another_replica(failure: str) -> None:
    async def test() -> None:
        async with world(FAILURES[failure], answer(b"well")) as here:
            here.pool.dead = {"m.0"}
            got = await here.ask(ASK)
            assert (got.status, got.body, got.header("x-gpuckpt-replica")) == (200, b"well", "m.1")
            assert 'retries;desc="1"' in str(got.header("server-timing"))
            await here.settled()
            assert here.pool.suspected == ["m.0"] and here.pool.acquired == 2
            assert len(here.records[0].retries) == 1

    run(test())


def test_a_replica_that_is_not_there() -> None:
    async def test() -> None:
        async with world(answer(), answer(b"well")) as here:
            await here.replicas[0].close()
            here.replicas[0].path.unlink(missing_ok=True)
            here.pool.dead = {"m.0"}
            assert (await here.ask(ASK)).body == b"well"

    run(test())


def test_a_request_that_no_replica_survives() -> None:
    async def test() -> None:
        async with world(raw(close=True)) as here:
            got = await here.ask(ASK)
            assert (got.status, got.error["code"], got.error["type"]) == (502, "replica_failed", "server_error")
            await here.settled()
            assert here.pool.acquired == 4 and here.records[0].outcome == "refused"
            assert here.replica.connections == 4

    run(test())


def test_a_server_error_is_the_replica_s_answer_as_long_as_it_lives() -> None:
    async def test() -> None:
        async with world(answer(b"oops", "500 Oops"), answer(b"well")) as here:
            got = await here.ask(ASK)
            assert (got.status, got.body) == (500, b"oops")
            assert here.pool.suspected == ["m.0"] and here.records[0].outcome == "error"
            here.pool.dead = {"m.0"}
            here.pool.acquired = 0
            assert (await here.ask(ASK)).body == b"well"
            await here.settled()

    run(test())


@pytest.mark.parametrize("sent", [b"", EVENT, EVENT[:-2], EVENT[:-1] + b"\r\n\r\n"])
def test_a_stream_that_breaks_off_says_so(sent: bytes) -> None:
    async def test() -> None:
        first = b"data: 1\r\n\r\n"

        async def script(asked: Asked) -> None:
            await asked.send(OK, STREAM, chunk(first))
            await asyncio.sleep(0.01)
            if sent:
                await asked.send(chunk(sent))
                await asyncio.sleep(0.01)
            asked.cut()

        async with world(script, answer(b"other")) as here:
            got = await here.ask(STREAMED)
            assert not got.whole
            rest = got.body.removeprefix(first + sent)
            if sent and not sent.endswith(b"\n\n") and not sent.endswith(b"\r\n\r\n"):
                assert rest == b""  # whatever followed would end an event that is not whole
            else:
                assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "replica_failed"
            await until(lambda: here.pool.suspected)
            await here.settled()
            assert here.pool.acquired == 1 and here.records[0].outcome == "broken"

    run(test())


def test_an_answer_that_breaks_off_is_cut() -> None:
    async def test() -> None:
        async with world(raw(OK, b"content-length: 10\r\n\r\nhalf", pause=0.01, close=True)) as here:
            got = await here.ask(ASK)
            assert (got.body, got.whole) == (b"half", False)
            await here.settled()

    run(test())


# ---------------------------------------------------------------------- waiting for a replica


def test_requests_are_held_until_a_replica_is_there() -> None:
    async def test() -> None:
        async with world(answer(b"well")) as here:
            here.pool.gate.clear()
            waiting = [asyncio.create_task(here.ask(ASK)) for _ in range(20)]
            await until(lambda: here.pool.waiting == 20)
            here.pool.gate.set()
            assert {(one.status, one.body) for one in await asyncio.gather(*waiting)} == {(200, b"well")}

    run(test())


def test_what_a_server_calls_its_model_is_known_only_when_it_is_there() -> None:
    async def test() -> None:
        served = {"another": "a"}
        async with world(answer(b"well"), served=served) as here:
            here.pool.tier = "cold"
            here.pool.gate.clear()
            waiting = asyncio.create_task(here.ask(ASK))
            await until(lambda: here.pool.waiting == 1)
            served["m"] = "/models/m"  # its first golden has been made
            here.pool.gate.set()
            assert (await waiting).status == 200
            assert json.loads(here.replica.asked[0].body) == ASK | {"model": "/models/m"}

    run(test())


def test_a_full_queue() -> None:
    async def test() -> None:
        async with world() as here:
            here.pool.refusal = RefusedError("256 requests wait", retry_after=1.0)
            got = await here.ask(ASK)
            assert (got.status, got.header("retry-after"), got.error["message"]) == (503, "1", "256 requests wait")
            assert got.header("server-timing") and got.header("x-gpuckpt-tier") == "hot"
            assert here.records[0].outcome == "refused"

    run(test())


def test_a_deadline() -> None:
    async def test() -> None:
        async with world(limits=Limits(deadline=0.1)) as here:
            here.pool.gate.clear()
            got = await here.ask(ASK)
            assert (got.status, got.header("retry-after")) == (503, "5")

    run(test())


async def _comments(client: Client, count: int) -> None:
    head = await client.head()
    assert (head.status, head.header("content-type")) == (200, "text/event-stream")
    for _ in range(count):
        size = int(await client.reader.readuntil(b"\r\n"), 16)
        comment = await client.reader.readexactly(size + 2)
        assert comment.startswith(b": waiting for the model") and comment.endswith(b"\n\n\r\n")


async def _rest(client: Client) -> bytes:
    """What a reader of events has got, comments left out."""
    data = b""
    while size := int(await client.reader.readuntil(b"\r\n"), 16):
        data += (await client.reader.readexactly(size + 2))[:-2]
    return b"".join(event + b"\n\n" for event in data.split(b"\n\n") if event and not event.startswith(b":"))


def test_a_stream_that_waits_gets_comments() -> None:
    async def test() -> None:
        body = EVENT * 3
        async with world(raw(OK, STREAM, chunk(body), chunk(b"")), limits=Limits(keep_alive=0.02)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 3)
            here.pool.gate.set()
            assert await _rest(client) == body
            await here.settled()
            assert here.records[0].outcome == "ok"
            await client.send(request(ASK | {"model": "no"}))
            assert (await client.answer()).status == 404

    run(test())


@pytest.mark.parametrize(
    ("ask", "target", "head", "told"),
    [
        (ASK, "/v1/completions", "", False),
        (STREAMED, "/api/generate", "", False),  # which streams lines of JSON
        (STREAMED, "/api/generate", "accept: text/event-stream\r\n", True),
        (STREAMED, "/upstream/m/v1/chat/completions", "", True),
    ],
)
def test_who_gets_comments(ask: dict[str, Any], target: str, head: str, told: bool) -> None:
    async def test() -> None:
        async with world(raw(OK, STREAM, chunk(EVENT), chunk(b"")), limits=Limits(keep_alive=0.02)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(ask, target=target, head=head))
            await until(lambda: here.pool.waiting)
            await asyncio.sleep(0.06)
            here.pool.gate.set()
            got = await client.answer()
            assert got.body.startswith(b": waiting") == told and got.body.endswith(EVENT)
            assert got.header("x-gpuckpt-tier") == "hot"
            assert (got.header("x-gpuckpt-replica") is None) == told  # not known when the head was sent

    run(test())


@pytest.mark.parametrize("silent", ["before its head", "after its head"])
def test_a_model_that_thinks_for_long_gives_comments_too(silent: str) -> None:
    async def test() -> None:
        go = asyncio.Event()

        async def script(asked: Asked) -> None:
            if silent == "after its head":
                await asked.send(OK, STREAM)
            await go.wait()
            if silent == "before its head":
                await asked.send(OK, STREAM)
            await asked.send(chunk(EVENT), chunk(b""))

        async with world(script, limits=Limits(keep_alive=0.02)) as here:
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 2)
            go.set()
            assert await _rest(client) == EVENT

    run(test())


def test_a_stream_that_was_promised_and_is_refused() -> None:
    async def test() -> None:
        async with world(limits=Limits(keep_alive=0.02, deadline=0.1)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 2)
            rest = await _rest(client)
            assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "not_available"
            await here.settled()

    run(test())


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_that_was_promised_and_is_none(whole: bool) -> None:
    async def test() -> None:
        body = b'{\n  "error": {\r\n "message": "no"}}\n'
        pieces = (body[:9], body[9:]) if whole else (body[:9],)
        head = f"HTTP/1.1 400 Bad\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        script = raw(head, *pieces, pause=0.01, close=True)
        async with world(script, limits=Limits(keep_alive=0.02)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 1)
            here.pool.gate.set()
            if whole:
                event = await _rest(client)
                assert event.count(b"\n") == 2 and b"\r" not in event
                assert json.loads(event.removeprefix(b"data: ")) == {"error": {"message": "no"}}
                await here.settled()
                assert here.records[0].outcome == "error"
            else:
                with pytest.raises(asyncio.IncompleteReadError):
                    await _rest(client)

    run(test())


def test_a_client_that_reads_no_comments() -> None:
    """They are not heaped up, and what follows them waits for its turn."""

    async def test() -> None:
        async with world(raw(OK, STREAM, chunk(EVENT), chunk(b"")), limits=Limits(keep_alive=0.001)) as here:
            here.pool.gate.clear()
            client = await here.client()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(request(STREAMED))
            await asyncio.sleep(0.2)
            here.pool.gate.set()
            await asyncio.sleep(0.02)
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            got = await client.answer()
            assert got.whole and got.body.endswith(EVENT)

    run(test())


def test_a_client_that_goes_away_between_comments() -> None:
    async def test() -> None:
        async with world(limits=Limits(keep_alive=0.02)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 1)
            await client.close()
            await until(lambda: here.records, 1.0)
            assert here.records[0].outcome == "gone"
            await here.settled()

    run(test())


# ---------------------------------------------------------------------- faults of ours, and the end


def test_a_fault_of_ours_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with world() as here:

            async def acquire(name: str, deadline: float) -> None:
                raise ZeroDivisionError

            here.pool.acquire = acquire  # type: ignore[assignment, method-assign]
            got = await here.ask(ASK)
            assert (got.status, got.error["code"]) == (500, "internal_error")
            assert here.records[0].outcome == "failed"

    run(test())
    assert "ZeroDivisionError" in caplog.text


def test_answers_end_before_the_service_does() -> None:
    async def test() -> None:
        async def script(asked: Asked) -> None:
            await asked.send(OK, STREAM, chunk(EVENT))
            await asyncio.sleep(0.3)
            await asked.send(chunk(EVENT), chunk(b""))

        async with world(script) as here:
            client, idle = await here.client(), await here.client()
            await client.send(request(STREAMED))
            await client.head()
            closing = asyncio.create_task(here.server.close(5.0))
            assert await idle.ended() == b""
            assert await client.reader.readuntil(b"0\r\n\r\n") == chunk(EVENT) + chunk(EVENT) + b"0\r\n\r\n"
            await closing
            assert here.records[0].outcome == "ok"

    run(test())


def test_what_does_not_end_in_time_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with world(hang) as here:
            asking = asyncio.create_task(here.ask(ASK))
            await until(lambda: here.replica.asked)
            await here.server.close(1.0)
            assert (await asking).status in (500, 503)
            assert here.server.connections == 0
            await here.settled()
            assert here.records[0].outcome == "broken"

    run(test())
    assert "Traceback" not in caplog.text


# ---------------------------------------------------------------------- other people's clients


def curl(port: int, *words: str) -> tuple[str, str]:
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "10", "-w", "\n%{http_code} %{num_connects}", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return body, status


async def _curl(here: World, *words: str, target: str = "/v1/completions") -> tuple[str, str]:
    return await asyncio.to_thread(curl, here.port, *words, f"http://127.0.0.1:{here.port}{target}")


def test_curl(tmp_path: Path) -> None:
    long = tmp_path / "long"
    long.write_bytes(b"x" * 6_000_000)

    async def test() -> None:
        async with world(
            raw(OK, STREAM, chunk(EVENT), chunk(EVENT), chunk(b"")), limits=Limits(body=5_000_000)
        ) as here:
            json_ = "content-type: application/json"
            assert await _curl(here, "-N", "-H", json_, "-d", json.dumps(STREAMED)) == (EVENT.decode() * 2, "200 1")
            # An offer of HTTP/2 on a connection without TLS comes with the first request, and its body.
            assert await _curl(here, "--http2", "-H", json_, "-d", json.dumps(ASK)) == (EVENT.decode() * 2, "200 1")
            assert json.loads(here.replica.asked[-1].body) == ASK
            assert here.replica.asked[-1].header("upgrade") is None
            assert (await _curl(here, "--http1.0", "-d", "{}"))[1] == "200 1"
            assert (await _curl(here, "-F", "file=@/dev/null", "-F", "model=m"))[1] == "200 1"
            assert (await _curl(here, "-F", "file=@/dev/null", "-F", "model=n"))[1] == "404 1"
            for expect in ("expect: 100-continue", "expect:"):  # asked for first, and sent at once
                body, status = await _curl(here, "--data-binary", f"@{long}", "-H", expect)
                assert status == "413 1" and json.loads(body)["error"]["code"] == "body_too_long"

    run(test())


def test_all_bodies_together_have_a_limit() -> None:
    async def test() -> None:
        async with world(answer(b"well"), limits=Limits(bodies=100_000)) as here:
            here.pool.gate.clear()  # the first one is held while it waits for a replica
            large = ASK | {"prompt": "x" * 70_000}
            first = asyncio.create_task(here.ask(large))
            await until(lambda: here.pool.waiting == 1)
            second = await here.ask(large)
            assert (second.status, second.header("retry-after")) == (503, "1")
            here.pool.gate.set()
            assert (await first).status == 200
            assert (await here.ask(large)).status == 200

    run(test())
