"""Bodies of requests: long ones, wrong ones, and all of them together."""

from __future__ import annotations

import asyncio
import json

import pytest

from gpuckpt.service.front import Limits
from tests.service_world import ASK, answer, chunk, request, run, until, world


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
