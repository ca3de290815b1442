"""Replicas that fail: what has not begun is given to another one. Faults of ours, and the end of the service."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.service_world import (
    ASK,
    EVENT,
    OK,
    STREAM,
    STREAMED,
    Asked,
    answer,
    chunk,
    hang,
    raw,
    request,
    run,
    until,
    world,
)

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
            closing = asyncio.create_task(here.server.close(50.0))
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
