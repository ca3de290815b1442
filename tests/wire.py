"""A connection to a replica without a network: what it writes is written down, and an answer is fed to it in pieces."""

from __future__ import annotations

import asyncio
from typing import cast

from gpuckpt.service.upstream import Connection

CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


class Wire:
    """A transport that only writes down what happens."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.closed = True


def connected() -> tuple[Connection, Wire]:
    connection, wire = Connection([]), Wire()
    connection.connection_made(cast("asyncio.BaseTransport", wire))
    return connection, wire


async def exchanged(pieces: list[bytes], method: str = "POST", *, lost: bool = False) -> tuple[Connection, bytes]:
    """Feed these pieces as the answer, read in between as a front would; the whole body."""
    connection, _ = connected()
    asking = asyncio.create_task(connection.exchange(method, b"/", [], b""))
    body = b""
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
        await asyncio.sleep(0)
    if lost:
        connection.connection_lost(None)
    await asking
    while piece := await connection.read():
        body += piece
    return connection, body
