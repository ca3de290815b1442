"""A server that streams events, each with the time at which it was written (CLOCK_MONOTONIC, nanoseconds).

python stamps.py SOCKET

It listens at the Unix socket and at a TCP port, which it prints. The body of a request says what to answer:
{"events": N, "interval": SECONDS, "step": true}. In step, all streams get their next event at the same moment, as a
server does that computes a batch; else each stream has times of its own. Without events it answers with a short body.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
SHORT = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{"object":"ok"}'
# About what a token takes in an OpenAI-compatible stream.
FILLING = b'"object":"text_completion","choices":[{"index":0,"text":" token","finish_reason":null}],"model":"m"'


class Stamps(asyncio.Protocol):
    """One connection."""

    in_step: set[Stamps] = set()  # noqa: RUF012  the streams that the one clock serves

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport
        self.buffer = b""
        self.left = 0
        self.interval = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.left = 0
        self.in_step.discard(self)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        _, _, length = head.lower().partition(b"content-length: ")
        if len(rest) < int(length.partition(b"\r\n")[0] or 0):
            return
        self.buffer = b""
        asked = json.loads(rest)
        if not asked["events"]:
            self.transport.write(SHORT)
            return
        self.left, self.interval = asked["events"], asked["interval"]
        self.transport.write(HEAD)
        if asked["step"]:
            self.in_step.add(self)
        else:
            self.write()
            self.loop.call_later(self.interval * random.random(), self.tick)

    def tick(self) -> None:
        if self.left:
            self.loop.call_later(self.interval, self.tick)
            self.write()

    def write(self) -> None:
        event = b'data: {"stamp":%d,%b}\n\n' % (time.monotonic_ns(), FILLING)
        self.left -= 1
        end = b"" if self.left else b"0\r\n\r\n"
        self.transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, end))
        if not self.left:
            self.in_step.discard(self)


async def keep_step() -> None:
    """The one clock: as fast as the fastest of the streams."""
    while True:
        await asyncio.sleep(min((stream.interval for stream in Stamps.in_step), default=0.01))
        for stream in list(Stamps.in_step):
            stream.write()


async def main(path: str) -> None:
    loop = asyncio.get_running_loop()
    local = await loop.create_unix_server(Stamps, path, backlog=1024)
    server = await loop.create_server(Stamps, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with local, server:
        await keep_step()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
