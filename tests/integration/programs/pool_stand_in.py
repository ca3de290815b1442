"""A stand-in for ``gpuckpt pool run`` and ``gpuckpt pool reload``: the daemon's life under systemd, without models.

It uses the service's modules as the daemon does: one asyncio loop, sockets and credentials from systemd, SIGHUP, pings.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import tomllib
from pathlib import Path

from gpuckpt.service import activation, journal
from gpuckpt.service.journal import fields
from gpuckpt.service.notify import Notifier

ADMIN = Path("/run/gpuckpt/pool.sock")
SLOW = 0.5  # seconds that a start and a reload take, long enough to see whether systemd waits for them
log = logging.getLogger("gpuckpt.pool")


class Daemon:
    def __init__(self, config: Path) -> None:
        self.config = config
        self.notifier = Notifier.from_environment()
        keys = activation.credential()
        self.keys = None if keys is None else keys.read_text().split()
        self.ended = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.read()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ended.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: self.keep(self.reload()))
        if every := self.notifier.ping_every:
            self.keep(self.ping(every))
        await asyncio.sleep(SLOW)
        handed = activation.listeners()
        backlog = activation.BACKLOG
        servers = [await asyncio.start_server(self.answer, sock=one.socket, backlog=backlog) for one in handed]
        ADMIN.unlink(missing_ok=True)
        servers.append(await asyncio.start_unix_server(self.administer, ADMIN))
        self.notifier.ready(f"{len(handed)} addresses, 0 models")
        log.info("listening", extra=fields("started", names=":".join(one.name for one in handed)))
        await self.ended.wait()
        self.notifier.stopping("0 requests at work")
        log.info("ending", extra=fields("draining"))
        for server in servers:
            server.close()

    def keep(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def read(self) -> None:
        tomllib.loads(self.config.read_text())

    async def ping(self, every: float) -> None:
        while True:
            self.notifier.ping()
            await asyncio.sleep(every)

    async def reload(self) -> bool:
        self.notifier.reloading()
        await asyncio.sleep(SLOW)
        try:
            self.read()
        except (OSError, tomllib.TOMLDecodeError) as error:
            log.error("not reloaded: %s", error, extra=fields("failed"))
            return False
        else:
            log.info("the configuration was read again", extra=fields("reloaded", model="example"))
            return True
        finally:
            self.notifier.ready()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        allowed = self.keys is None or any(f"Bearer {key}\r\n" in head for key in self.keys)
        reply(writer, 200 if allowed else 401, {"pid": os.getpid()})

    async def administer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reply(writer, 200 if await self.reload() else 400, {})


def reply(writer: asyncio.StreamWriter, status: int, document: object) -> None:
    body = json.dumps(document)
    head = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write((head + body).encode())
    writer.close()


def ask_for_reload() -> int:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(ADMIN))
        channel.sendall(b"POST /v1/reload HTTP/1.1\r\nHost: pool\r\n\r\n")
        return 0 if channel.recv(65536).startswith(b"HTTP/1.1 200") else 1


def main() -> int:
    if sys.argv[1:] == ["pool", "reload"]:
        return ask_for_reload()
    if sys.argv[1:4] != ["pool", "run", "--config"]:
        return 2
    journal.set_up()
    asyncio.run(Daemon(Path(sys.argv[4])).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
