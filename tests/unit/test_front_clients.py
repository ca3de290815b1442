"""Clients that go away, that are slow, or that are curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from gpuckpt.service.front import Limits
from tests.service_world import (
    ASK,
    EVENT,
    OK,
    STREAM,
    STREAMED,
    Asked,
    Client,
    World,
    answer,
    chunk,
    hang,
    raw,
    request,
    run,
    run_patiently,
    until,
    world,
)

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
            await until(lambda: here.records)
            if when != "waiting":
                await until(here.replica.asked[0].gone.is_set)
            await here.settled()
            assert here.records[0].outcome == "gone"
            assert len(here.records) == 1 and here.pool.acquired == (when != "waiting")

    run(test())


def test_a_client_that_goes_away_in_the_midst_of_its_request() -> None:
    async def test() -> None:
        async with world() as here:
            client = await here.client()
            await client.send(request(b"x" * 100)[:-10])
            await until(lambda: here.server.requests)
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
                await asyncio.sleep(1000)

            here.pool.suspect = suspect  # type: ignore[method-assign]
            client = await here.client()
            await client.send(request(ASK))
            await looked.wait()
            await client.close()
            await until(lambda: here.records)
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
    async def test(patience: float) -> None:
        async with world(limits=Limits(request=0.1 * patience)) as here:
            client = await here.client()
            whole = request(b'{"model":"m","x":"' + b"x" * 60000 + b'"}')
            for at in range(0, len(whole), 10000):  # half as fast again as it must
                await client.send(whole[at : at + 10000])
                await asyncio.sleep(0.04 * patience)
            assert (await client.answer()).status == 200

    run_patiently(test)


# ---------------------------------------------------------------------- other people's clients


def curl(port: int, *words: str) -> tuple[str, str]:
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "50", "-w", "\n%{http_code} %{num_connects}", *words],
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
