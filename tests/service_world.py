"""The front in a small world of its own: a real server before it, scripted replicas behind it, a pool that pretends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from gpuckpt.pool.book import Held, RefusedError
from gpuckpt.pool.owner import Lease
from gpuckpt.pool.state import Phase
from gpuckpt.service.front import Front, Limits, Record
from gpuckpt.service.keys import Keys
from gpuckpt.service.routing import Routes
from gpuckpt.service.server import Guard, HttpServer, listen
from gpuckpt.service.upstream import Upstream
from gpuckpt.workload.endpoint import Endpoint

T = TypeVar("T")
LIMIT = 60  # seconds that a test may take
STREAM = b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ASK: dict[str, Any] = {"model": "m", "prompt": "x"}
STREAMED: dict[str, Any] = ASK | {"stream": True}
OK = b"HTTP/1.1 200 OK\r\n"
EVENT = b'data: {"choices":[]}\n\n'


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run a test on the loop that the service uses; whatever the loop complains of fails it."""
    complaints: list[dict[str, Any]] = []

    async def whole() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context))
        async with asyncio.timeout(LIMIT):
            return await test

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(whole())
    gc.collect()  # now, so that what was not closed is this test's
    assert not complaints
    return result


def run_patiently(test: Callable[[float], Coroutine[Any, Any, None]]) -> None:
    """Run a test in which something must be in time. It is told by which factor its times are to be longer: a busy
    machine makes short ones too short for right code, wrong code fails with long ones, too."""
    for patience in (1, 5):
        with contextlib.suppress(Exception):
            return run(test(patience))
    run(test(25))


async def until(happened: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it is true."""
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.002)


async def turns(count: int = 5) -> None:
    """Let the loop do what it has to do after something was closed."""
    for _ in range(count):
        await asyncio.sleep(0)


def chunk(data: bytes) -> bytes:
    """A chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---------------------------------------------------------------------- a replica


@dataclass
class Asked:
    """A request as a replica got it, and the way to answer."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known == name), None)

    async def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await self.writer.drain()

    async def listen(self) -> None:
        """Wait until the other side goes."""
        with contextlib.suppress(OSError):
            await self.reader.read()
        self.gone.set()

    def cut(self) -> None:
        self.writer.transport.abort()


Script = Callable[[Asked], Awaitable[None]]


def answer(body: bytes = b"{}", status: str = "200 OK", head: bytes = b"") -> Script:
    """A script that answers this, with its length."""

    async def script(asked: Asked) -> None:
        await asked.send(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n".encode(), head, b"\r\n", body)

    return script


def raw(*pieces: bytes, pause: float = 0.0, close: bool = False) -> Script:
    """A script that sends these bytes, one piece after the other."""

    async def script(asked: Asked) -> None:
        for piece in pieces:
            await asked.send(piece)
            await asyncio.sleep(pause)
        if close:
            asked.writer.close()

    return script


async def hang(asked: Asked) -> None:
    """A script that answers nothing, until the other side goes."""
    await asked.listen()


class Replica:
    """A server on a Unix socket that answers as its script says."""

    def __init__(self, path: Path, script: Script) -> None:
        self.path = path
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=1 << 20)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await turns()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while (asked := await _read_request(reader, writer)) is not None:
                self.asked.append(asked)
                await self.script(asked)
                if writer.is_closing():
                    break
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.open.discard(writer)
            writer.close()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    length = int(dict(headers).get("content-length", 0))
    return Asked(method, target, headers, await reader.readexactly(length), reader, writer)


# ---------------------------------------------------------------------- the pool


class FakePool:
    """Hands out the replicas in turn; one that is suspected while ``dead`` is given up."""

    def __init__(self) -> None:
        self.replicas: list[Held] = []
        self.dead: set[str] = set()
        self.leases: list[Held] = []  # that have not been given back
        self.acquired = 0
        self.waiting = 0
        self.suspected: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal: RefusedError | None = None
        self.tier = "hot"

    def tier_of(self, name: str) -> str:
        return self.tier

    async def acquire(self, name: str, deadline: float) -> Lease:
        began = None if self.gate.is_set() else time.monotonic()
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline):
                await self.gate.wait()
        except TimeoutError:
            raise RefusedError("no replica was free", retry_after=5) from None
        finally:
            self.waiting -= 1
        if self.refusal is not None:
            raise self.refusal
        hot = [held for held in self.replicas if held.phase is Phase.HOT]
        if not hot:
            raise RefusedError("no replica is left", retry_after=1)
        held = hot[self.acquired % len(hot)]
        self.acquired += 1
        self.leases.append(held)
        held.requests += 1
        return Lease(held, self.tier, 0.0 if began is None else time.monotonic() - began)

    def release(self, held: Held) -> None:
        self.leases.remove(held)  # ValueError if it was given back before
        held.requests -= 1

    async def suspect(self, held: Held) -> None:
        self.suspected.append(held.name)
        await asyncio.sleep(0.001)
        if held.name in self.dead:
            held.phase = Phase.STOPPING


# ---------------------------------------------------------------------- a client


@dataclass
class Answer:
    """What a client got. ``whole``: the answer ended as its framing says it should."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool = True

    def header(self, name: str) -> str | None:
        return next((value for known, value in self.headers if known == name), None)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


class Client:
    """One connection to the front, on which a test writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await self.writer.drain()

    async def head(self) -> Answer:
        """The head of the next answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines[1:])]
        return Answer(int(lines[0].split()[1]), headers, b"")

    async def answer(self, *, head_only: bool = False) -> Answer:
        """The next answer, read as its framing says."""
        found = await self.head()
        if head_only or found.status in (204, 304) or found.status < 200:
            return found
        body = bytearray()  # many megabytes at times: to put bytes together anew for each chunk would take seconds
        try:
            if (length := found.header("content-length")) is not None:
                body += await self.reader.readexactly(int(length))
            elif found.header("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                assert await self.reader.readexactly(2) == b"\r\n"
            else:
                body += await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            body += getattr(error, "partial", b"")
            found.whole = False
        found.body = bytes(body)
        return found

    async def ended(self) -> bytes:
        """What still comes before the other side closes."""
        return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


def request(
    body: bytes | dict[str, Any] = b"",
    *,
    target: str = "/v1/completions",
    method: str = "POST",
    head: str = "",
    version: str = "1.1",
) -> bytes:
    """A request as bytes; a dictionary is sent as JSON."""
    if isinstance(body, dict):
        body, head = json.dumps(body).encode(), f"content-type: application/json\r\n{head}"
    if body or method == "POST":
        head += f"content-length: {len(body)}\r\n"
    return f"{method} {target} HTTP/{version}\r\nhost: front\r\n{head}\r\n".encode() + body


# ---------------------------------------------------------------------- all of it


@dataclass
class World:
    """Everything that a test may look at."""

    pool: FakePool
    front: Front
    server: HttpServer
    upstream: Upstream
    replicas: list[Replica]
    records: list[Record]
    port: int
    _stack: contextlib.AsyncExitStack

    @property
    def replica(self) -> Replica:
        return self.replicas[0]

    async def client(self, **options: Any) -> Client:
        made = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20, **options))
        self._stack.push_async_callback(made.close)
        return made

    async def ask(self, *arguments: Any, **options: Any) -> Answer:
        """Send one request on a connection of its own (see :func:`request`), and read the answer."""
        client = await self.client()
        await client.send(request(*arguments, **options))
        found = await client.answer(head_only=options.get("method") == "HEAD")
        await client.close()
        return found

    async def settled(self) -> None:
        """Wait until nothing is at work: each lease has been given back (once: the pool checks that)."""
        await until(lambda: not self.pool.leases and not self.pool.waiting and not self.server.requests)


@contextlib.asynccontextmanager
async def world(
    *scripts: Script,
    guard: Guard | None = None,
    limits: Limits | None = None,
    keys: Keys | None = None,
    names: dict[str, str] | None = None,
    served: dict[str, str] | None = None,
) -> AsyncIterator[World]:
    """A front before a replica for each script. The model is “m” unless ``names`` says otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        async with contextlib.AsyncExitStack() as stack:
            pool, upstream = FakePool(), Upstream()
            stack.callback(upstream.close)
            replicas = []
            for number, script in enumerate(scripts or (answer(),)):
                replica = Replica(Path(folder, f"r{number}"), script)
                await replica.start()
                stack.push_async_callback(replica.close)
                replicas.append(replica)
                held = Held(f"m.{number}", "m", Phase.HOT, 0.0, Endpoint(socket=replica.path))
                pool.replicas.append(held)
            records: list[Record] = []
            routes = Routes(names or {"m": "m"}, (served or {}).get)
            front = Front(
                pool, upstream, routes.route, keys=keys or Keys(), limits=limits or Limits(), done=records.append
            )
            socket = listen("127.0.0.1:0")
            port = socket.getsockname()[1]
            server = HttpServer(front, [socket], guard=guard or Guard())
            await server.start()
            stack.push_async_callback(server.close, 1.0)
            inner = await stack.enter_async_context(contextlib.AsyncExitStack())
            yield World(pool, front, server, upstream, replicas, records, port, inner)
            assert all(record.outcome for record in records)
