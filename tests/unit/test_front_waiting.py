"""Waiting for a replica, or for a model that thinks: who is held, who is told so, and until when."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gpuckpt.pool.book import RefusedError
from gpuckpt.service.front import Limits
from tests.service_world import (
    ASK,
    EVENT,
    OK,
    STREAM,
    STREAMED,
    Asked,
    Client,
    answer,
    chunk,
    raw,
    request,
    run,
    until,
    world,
)


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
            if told:
                await until(lambda: client.reader._buffer)  # type: ignore[attr-defined]
            else:
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
        async with world(limits=Limits(keep_alive=0.02)) as here:
            here.pool.gate.clear()
            client = await here.client()
            await client.send(request(STREAMED))
            await _comments(client, 2)
            here.pool.refusal = RefusedError("no replica was free", retry_after=5)
            here.pool.gate.set()
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
            await until(lambda: here.records)
            assert here.records[0].outcome == "gone"
            await here.settled()

    run(test())
