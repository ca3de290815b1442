"""Connections to replicas: what counts as an answer, which connections are kept, and whenever one ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpuckpt.service.upstream import Connection, Upstream, UpstreamError
from gpuckpt.workload.endpoint import Endpoint
from tests.service_world import OK, Asked, Replica, Script, answer, chunk, raw, run, turns, until
from tests.wire import CHUNKED, connected, exchanged


@pytest.mark.parametrize("more", [b"HTTP/1.1 500 Oops\r\ncontent-length: 5\r\n\r\nwrong", b"x", b"\x00"])
@pytest.mark.parametrize("split", [True, False])
def test_what_follows_an_answer_is_not_part_of_it(more: bytes, split: bool) -> None:
    first = OK + b"content-length: 2\r\n\r\nok"
    connection, body = run(exchanged([first, more] if split else [first + more]))
    assert (connection.status, body) == (200, b"ok")
    assert connection.headers == [(b"content-length", b"2")]
    assert not connection.finish()


@pytest.mark.parametrize(
    ("answer", "method", "kept"),
    [
        (OK + b"content-length: 0\r\n\r\n", "GET", True),
        (OK + b"content-length: 0\r\nconnection: close\r\n\r\n", "GET", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", "GET", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n", "GET", True),
        (b"HTTP/1.1 204 No\r\n\r\n", "GET", True),
        (b"HTTP/1.1 304 No\r\ncontent-length: 9\r\n\r\n", "GET", True),
        (OK + b"content-length: 9\r\n\r\n", "HEAD", False),  # the parser still waits for the body
    ],
)
def test_which_connections_are_kept(answer: bytes, method: str, kept: bool) -> None:
    connection, body = run(exchanged([answer], method))
    assert body == b""
    assert connection.finish() is kept


def test_what_nobody_reads_is_not_taken() -> None:
    async def test() -> None:
        connection, wire = connected()
        asking = asyncio.create_task(connection.exchange("GET", b"/", [], b""))
        await asyncio.sleep(0)
        connection.data_received(OK + CHUNKED)
        await asking
        taken = 0
        while wire.reading:
            connection.data_received(chunk(b"x" * 10_000))
            taken += 10_000
        assert taken < 300_000
        assert len(await connection.read()) == taken
        assert wire.reading
        connection.abort()

    run(test())


def test_a_request_as_it_is_written() -> None:
    async def test() -> None:
        connection, wire = connected()
        asking = asyncio.create_task(connection.exchange("POST", b"/a?b", [(b"x", b"y")], b"body"))
        await asyncio.sleep(0)
        assert wire.written == b"POST /a?b HTTP/1.1\r\nx: y\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nbody"
        asking.cancel()
        connection, wire = connected()
        again = asyncio.create_task(connection.exchange("GET", b"/", [(b"host", b"h")], b""))
        await asyncio.sleep(0)
        assert wire.written == b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
        again.cancel()

    run(test())


# ---------------------------------------------------------------------- with sockets


@contextlib.asynccontextmanager
async def replica(script: Script) -> AsyncIterator[tuple[Upstream, Replica, Endpoint]]:
    with tempfile.TemporaryDirectory() as folder:
        made = Replica(Path(folder, "s"), script)
        await made.start()
        upstream = Upstream()
        try:
            yield upstream, made, Endpoint(socket=made.path)
        finally:
            upstream.close()
            await made.close()


async def ask(
    upstream: Upstream, endpoint: Endpoint, body: bytes = b"", *, done: bool = True
) -> tuple[Connection, bytes]:
    connection = await upstream.send("r", endpoint, "POST", b"/", [], body)
    got = b""
    try:
        while piece := await connection.read():
            got += piece
    finally:
        if done:
            upstream.done("r", connection)
    return connection, got


def test_connections_are_used_again() -> None:
    async def test() -> None:
        async with replica(answer(b"ok")) as (upstream, server, endpoint):
            first, _ = await ask(upstream, endpoint)
            second, got = await ask(upstream, endpoint)
            assert first is second and got == b"ok" and server.connections == 1
            assert {got for _, got in await asyncio.gather(*(ask(upstream, endpoint) for _ in range(8)))} == {b"ok"}
            assert server.connections == 8

    run(test())


def test_a_connection_that_is_closed_while_idle() -> None:
    """Known to us or not: the server may close it while the request is on its way."""

    async def test() -> None:
        async def script(asked: Asked) -> None:
            await answer(b"ok")(asked)
            asked.writer.close()

        async with replica(script) as (upstream, server, endpoint):
            for _ in range(20):
                assert (await ask(upstream, endpoint))[1] == b"ok"
            await until(lambda: not server.open)
            assert (await ask(upstream, endpoint))[1] == b"ok"

    run(test())


@pytest.mark.parametrize("how", ["eof", "reset"])
def test_a_kept_connection_that_ends_as_it_is_used(how: str) -> None:
    async def test() -> None:
        async def script(asked: Asked) -> None:
            if len(server.asked) == 2:  # the second request comes on the first's connection, and is its end
                if how == "eof":
                    asked.writer.close()
                else:
                    asked.cut()
                return
            await answer(b"ok")(asked)

        async with replica(script) as (upstream, server, endpoint):
            assert (await ask(upstream, endpoint))[1] == b"ok"
            assert (await ask(upstream, endpoint, b"again"))[1] == b"ok"
            assert [asked.body for asked in server.asked] == [b"", b"again", b"again"]
            assert server.connections == 2

    run(test())


def test_a_request_that_kills_is_not_sent_on_every_connection() -> None:
    async def test() -> None:
        async with replica(answer(b"ok")) as (upstream, server, endpoint):
            await asyncio.gather(*(ask(upstream, endpoint) for _ in range(8)))
            server.script = raw(close=True)
            before = len(server.asked)
            with pytest.raises(UpstreamError):
                await ask(upstream, endpoint)
            assert len(server.asked) == before + 2

    run(test())


def test_an_answer_that_has_begun_on_a_kept_connection_is_not_asked_for_again() -> None:
    async def test() -> None:
        async with replica(answer(b"ok")) as (upstream, server, endpoint):
            await ask(upstream, endpoint)
            server.script = raw(OK + b"content-length: 10\r\n\r\nhalf", close=True)
            with pytest.raises(UpstreamError):
                await ask(upstream, endpoint)
            assert len(server.asked) == 2

    run(test())


def test_an_answer_that_comes_before_all_of_the_request_is_sent() -> None:
    async def test() -> None:
        async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Long\r\ncontent-length: 2\r\n\r\nno")
            await over.wait()
            writer.transport.abort()

        over = asyncio.Event()
        async with replica(answer()) as (upstream, server, endpoint):
            endpoint = Endpoint(socket=server.path.with_name("early"))
            other = await asyncio.start_unix_server(early, str(endpoint.socket))
            connection, got = await ask(upstream, endpoint, b"x" * 10_000_000)
            assert (connection.status, got) == (413, b"no")
            assert not connection.usable
            over.set()
            other.close()
            await turns()

    run(test())


def test_what_is_forgotten_is_not_kept() -> None:
    """The next replica may have the name."""

    async def test() -> None:
        async with replica(answer(b"ok")) as (upstream, server, endpoint):
            await ask(upstream, endpoint)
            connection, _ = await ask(upstream, endpoint, done=False)
            upstream.forget("r")
            await ask(upstream, endpoint)
            upstream.done("r", connection)
            assert not connection.usable
            await ask(upstream, endpoint)
            assert server.connections == 2
            upstream.forget("r")
            await until(lambda: not server.open)

    run(test())


def test_who_waits_for_an_answer_can_be_cancelled() -> None:
    async def test() -> None:
        async def hang(asked: Asked) -> None:
            await asked.listen()

        async with replica(hang) as (upstream, server, endpoint):
            task = asyncio.create_task(ask(upstream, endpoint))
            await until(lambda: server.asked)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(server.asked[0].gone.is_set)

    run(test())


def test_a_queue_that_is_full_is_waited_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("q") / "s"

    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
            busy.bind(str(path))
            busy.listen(0)
            clients = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(str(path))
                    clients.append(client)
            upstream = Upstream()
            task = asyncio.create_task(ask(upstream, Endpoint(socket=path)))
            await asyncio.sleep(0.05)
            assert not task.done()
            for _ in clients:
                stack.enter_context(busy.accept()[0])
            busy.setblocking(False)
            loop = asyncio.get_running_loop()
            accepted = stack.enter_context((await loop.sock_accept(busy))[0])
            assert await loop.sock_recv(accepted, 4096)
            accepted.sendall(OK + b"content-length: 2\r\n\r\nok")
            assert (await task)[1] == b"ok"
            upstream.close()

    run(test())


def test_tcp_and_nobody() -> None:
    async def test() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: 2\r\n\r\nok")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        upstream = Upstream()
        assert (await ask(upstream, Endpoint(port=port)))[1] == b"ok"
        server.close()
        upstream.close()
        with socket.socket() as nobody:  # who has the port, and does not listen at it
            nobody.bind(("127.0.0.1", 0))
            for endpoint in (Endpoint(port=nobody.getsockname()[1]), Endpoint(socket=Path("/nowhere/at/all"))):
                with pytest.raises(UpstreamError, match="no connection"):
                    await ask(upstream, endpoint)

    run(test())
