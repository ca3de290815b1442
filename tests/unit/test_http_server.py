"""The server before the front: clients that are slow, many, early, late or wrong, and the sockets it listens at."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.service.exchange import Receive, Scope, Send
from gpuckpt.service.keys import Keys
from gpuckpt.service.server import Guard, HttpServer, listen
from tests.service_world import Asked, Client, answer, chunk, raw, request, run, run_patiently, until, world

ASK: dict[str, Any] = {"model": "m"}
IDLE = 10_000
SPARE_FILES = 400


# ---------------------------------------------------------------------- slow clients


def test_a_head_that_does_not_come_to_its_end() -> None:
    """Byte after byte, so that every single wait is short."""

    async def test() -> None:
        async with world(guard=Guard(head_seconds=0.15)) as here:
            client = await here.client()
            for byte in b"GET /v1/models HTTP/1.1\r\nhost: h\r\nx-" + b"y" * 1000:
                if client.reader._buffer:  # type: ignore[attr-defined]
                    break
                await client.send(bytes((byte,)))
                await asyncio.sleep(0.005)
            else:
                raise AssertionError("nothing was said in more than thirty times as long")
            got = await client.answer()
            assert (got.status, got.error["code"], got.header("connection")) == (408, "too_slow", "close")
            await client.close()

    run(test())


def test_the_second_head_has_a_limit_too() -> None:
    async def test(patience: float) -> None:
        async with world(guard=Guard(head_seconds=0.1 * patience)) as here:
            client = await here.client()
            await client.send(request(ASK))
            assert (await client.answer()).status == 200
            await asyncio.sleep(0.15 * patience)  # between two requests a client may take its time
            await client.send(request(ASK))
            assert (await client.answer()).status == 200
            await client.send(b"\r\n")
            await asyncio.sleep(0.15 * patience)
            await client.send(request(ASK)[:20])
            assert (await client.answer()).status == 408

    run_patiently(test)


def test_a_connection_on_which_nothing_comes() -> None:
    async def test() -> None:
        async with world(guard=Guard(head_seconds=0.05)) as here:
            client = await here.client()
            assert await client.ended() == b""
            assert here.server.connections == 0

    run(test())


@pytest.mark.parametrize("line", [b"x: " + b"y" * 100_000, b"x: y\r\n" * 20_000, b""])
def test_a_head_that_is_too_long(line: bytes) -> None:
    async def test() -> None:
        async with world(guard=Guard(head_bytes=50_000)) as here:
            client = await here.client()
            url = b"/" if line else b"/" + b"x" * 60_000
            await client.send(b"GET " + url + b" HTTP/1.1\r\nhost: h\r\n", line, b"\r\n\r\n")
            got = await client.answer()
            assert (got.status, got.error["code"]) == (431, "head_too_long")
            assert not here.replica.asked

    run(test())


def test_a_head_without_an_end_takes_no_memory() -> None:
    """A header is known to the parser's caller only when it is complete."""

    async def test() -> None:
        async with world(guard=Guard(head_bytes=50_000)) as here:
            client = await here.client()
            await client.send(b"GET / HTTP/1.1\r\nx: ")
            for _ in range(20):
                with contextlib.suppress(ConnectionError):
                    await client.send(b"y" * 50_000)
            assert (await client.answer()).status == 431

    run(test())


def test_a_client_that_takes_nothing_is_cut() -> None:
    async def test() -> None:
        async with world(answer(b"x" * 30_000_000), guard=Guard(stalled_seconds=0.2)) as here:
            client = await here.client()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send(request(ASK))
            await until(lambda: here.records)
            assert here.records[0].outcome == "gone"
            await here.settled()
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert not (await client.answer()).whole

    run(test())


def test_a_client_that_takes_little_is_not() -> None:
    async def test(patience: float) -> None:
        async with world(answer(b"x" * 10_000_000), guard=Guard(stalled_seconds=0.3 * patience)) as here:
            # With small buffers: what is taken makes room at once.
            here.server._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
            own = socket.socket()
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            own.connect(("127.0.0.1", here.port))
            client = Client(*await asyncio.open_connection(sock=own, limit=1 << 14))
            here._stack.push_async_callback(client.close)
            await client.send(request(ASK))
            await client.head()
            for _ in range(40):
                await client.reader.readexactly(250_000)
                await asyncio.sleep(0.02 * patience)
            await here.settled()
            assert here.records[0].outcome == "ok"

    run_patiently(test)


# ---------------------------------------------------------------------- many clients


@contextlib.contextmanager
def idle_clients(port: int, count: int) -> Iterator[None]:
    """A process that connects so often, in the time of the body, and says nothing."""
    code = f"""
import socket, sys
made = [socket.create_connection(("127.0.0.1", {port})) for _ in range({count})]
sys.stdin.read()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert child.stdin is not None
    try:
        yield
    finally:
        child.stdin.close()
        assert child.wait(60) == 0


@pytest.fixture
def many_files() -> Iterator[int]:
    """As many open files as the system allows us; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_idle_connections_disturb_nobody(many_files: int) -> None:
    """Ten thousand, or as many as the limit of open files allows where that is less."""
    count = min(IDLE, many_files - SPARE_FILES)

    async def test() -> None:
        async with world(guard=Guard(connections=count + 10, head_seconds=60)) as here:
            with idle_clients(here.port, count):
                await until(lambda: here.server.connections == count)
                took = []
                for _ in range(20):
                    began = time.monotonic()
                    assert (await here.ask(ASK)).status == 200
                    took.append(time.monotonic() - began)
                assert min(took) < 0.1  # others on this machine disturb some of them, and these connections all
            await until(lambda: here.server.connections == 0)

    if count < IDLE:
        print(f"only {count} connections: the limit of open files is {many_files}")
    run(test())


def test_connections_over_the_limit_are_told() -> None:
    async def test() -> None:
        async with world(guard=Guard(connections=2, linger_seconds=30)) as here:
            first, _ = await here.client(), await here.client()
            await first.send(request(ASK))
            assert (await first.answer()).status == 200
            third = await here.client()
            await third.send(request(ASK))
            got = await third.answer()
            assert (got.status, got.header("retry-after"), got.error["code"]) == (503, "1", "too_many_connections")
            await third.close()
            await until(lambda: here.server.connections == 2)
            await first.close()
            await until(lambda: here.server.connections == 1)
            assert (await here.ask(ASK)).status == 200

    run(test())


# ---------------------------------------------------------------------- answers before the end of a request


async def go_on(client: Client) -> None:
    for _ in range(4000):  # twenty seconds at least
        await client.send(b"x" * 1000)
        await asyncio.sleep(0.005)


def test_who_goes_on_sending_is_cut_in_the_end() -> None:
    async def test() -> None:
        async with world(keys=Keys(frozenset((b"k",))), guard=Guard(linger_seconds=0.2)) as here:
            client = await here.client()
            began = time.monotonic()
            await client.send(b"POST /v1/x HTTP/1.1\r\nhost: h\r\ncontent-length: 1000000000\r\n\r\n")
            got = await client.answer()
            assert (got.status, got.header("connection")) == (401, "close")
            with pytest.raises(ConnectionError):
                await go_on(client)
            assert time.monotonic() - began > 0.1
            await until(lambda: here.server.connections == 0)

    run(test())


def test_any_application_may_answer_early() -> None:
    async def early(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def test() -> None:
        server = HttpServer(early, [listen("127.0.0.1:0")], guard=Guard(linger_seconds=0.1))
        port = server._sockets[0].getsockname()[1]
        await server.start()
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        await client.send(request(b"x" * 100)[:-10])
        assert (await client.answer()).body == b"ok"
        await until(lambda: server.connections == 0)  # the rest of the request is not waited for
        await client.close()
        await server.close(1)

    run(test())


# ---------------------------------------------------------------------- what is no HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HELLO\r\n\r\n",
        b"GET /v1 HTTP/3.0\r\n\r\n",
        b"GET /\xc3\xbc HTTP/1.1\r\nhost: h\r\n\r\n",
        b"CONNECT host:443 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloX",
        b"POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with world() as here:
            client = await here.client()
            await client.send(sent)
            got = await client.answer()
            assert (got.status, got.error["code"], got.header("connection")) == (400, "invalid_http", "close")
            await client.close()
            await here.settled()
            assert not here.replica.asked

    run(test())
    assert not caplog.text  # whoever can connect could fill the log


def test_an_answer_under_way_is_not_disturbed_by_what_follows() -> None:
    async def test() -> None:
        async def script(asked: Asked) -> None:
            await asyncio.sleep(0.05)
            await answer(b"hello")(asked)

        async with world(script) as here:
            client = await here.client()
            await client.send(request(ASK), b"garbage\r\n\r\n")
            await asyncio.sleep(0.01)
            await client.send(b"and more")
            got = await client.answer()
            assert (got.status, got.body) == (200, b"hello")
            assert await client.ended() == b""

    run(test())


@pytest.mark.parametrize("begun", [b"GET /v1", b"GET /v1/x HTTP/1.1\r\nx: " + b"y" * 5000])
def test_an_answer_under_way_is_not_disturbed_by_half_a_head(begun: bytes) -> None:
    """Which is too slow, or too long; it could be said only in the midst of the answer."""

    async def test() -> None:
        stream = (b"x" * 100,) * 10

        async def script(asked: Asked) -> None:
            await asked.send(b"HTTP/1.1 200 OK\r\n", b"transfer-encoding: chunked\r\n\r\n")
            for piece in stream:
                await asked.send(chunk(piece))
                await asyncio.sleep(0.02)
            await asked.send(chunk(b""))

        async with world(script, guard=Guard(head_bytes=1000)) as here:
            client = await here.client()
            await until(lambda: here.server.connections)
            here.server.guard.head_seconds = 0.05  # for the second head; the first has its time
            await client.send(request(ASK), begun)
            got = await client.answer()
            assert got.whole and got.body == b"".join(stream)
            assert await client.ended() == b""

    run(test())


@pytest.mark.parametrize("cut", [0, 1, 30, 150])
@pytest.mark.parametrize("framing", ["length", "chunked", "none"])
def test_another_protocol_is_declined_and_the_body_kept(framing: str, cut: int, caplog: Any) -> None:
    """As Java's HttpClient sends its first request; llhttp stops at the head of one."""

    async def test() -> None:
        async with world() as here:
            client = await here.client()
            head = b"/v1/x HTTP/1.1\r\nhost: h\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
            body = b'{"model":"m","x":"GET / HTTP/1.1\\r\\n"}' if framing != "none" else b""
            if framing == "length":
                whole = b"POST " + head + b"content-length: %d\r\n\r\n" % len(body) + body
            elif framing == "chunked":
                whole = b"POST " + head + b"transfer-encoding: chunked\r\n\r\n" + chunk(body) + chunk(b"")
            else:
                whole = b"GET " + head + b"\r\n"
            at = len(whole) - cut if cut else len(whole)
            await client.send(whole[:at])
            await asyncio.sleep(0.02)
            await client.send(whole[at:])
            assert (await client.answer()).status == 200
            assert here.replica.asked[0].body == body
            await client.send(request(ASK))
            assert (await client.answer()).status == 200
            assert len(here.replica.asked) == 2

    run(test())
    assert not caplog.text


# ---------------------------------------------------------------------- sockets


def test_a_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    path = folder / "front"

    async def test() -> None:
        async with world(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")) as here:
            server = HttpServer(here.front, [listen(f"unix:{path}")], guard=Guard())
            await server.start()
            client = Client(*await asyncio.open_unix_connection(str(path)))
            await client.send(request(ASK))
            assert (await client.answer()).body == b"ok"
            with pytest.raises(OSError, match="somebody listens") as raised:
                listen(f"unix:{path}")
            assert raised.value.errno == errno.EADDRINUSE
            await client.close()
            await server.close(1)

    run(test())
    path.unlink(missing_ok=True)


def test_what_is_left_of_a_socket_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for names that are short enough
    left = socket.socket(socket.AF_UNIX)
    left.bind("left")
    left.close()
    listen("unix:left").close()
    Path("file").write_text("precious")
    with pytest.raises(FileExistsError):
        listen("unix:file")
    assert Path("file").read_text() == "precious"


def test_a_socket_whose_queue_is_full_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind("busy")
        busy.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect("busy")
        with pytest.raises(OSError, match="somebody listens"):
            listen("unix:busy")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_addresses(host: str) -> None:
    try:
        with listen(f"{host}:0") as made:
            assert made.getsockname()[1] > 0
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        pytest.skip(f"this machine has no {host}")
