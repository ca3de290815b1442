"""The front between real sockets: what comes from a replica goes to the client as it came, and nothing is left over."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.service_world import ASK, OK, STREAM, STREAMED, Asked, answer, chunk, raw, request, run, world


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
