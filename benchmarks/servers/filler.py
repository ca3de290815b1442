"""An HTTP server with as much memory as one likes, to see what a restore's time depends on.

python3 filler.py (SOCKET | PORT) [--megabytes N] [--processes N] [--mappings N]

The memory is written with pseudo-random bytes, so that neither zero pages nor equal ones nor compression help anybody.
It is spread evenly over the processes, and in each over its share of the mappings. Between two mappings lies a page
that may only be read: the kernel would merge neighbours of one kind, so there are twice as many.

/health answers at once; /sample hashes a thousand pages spread over all the memory (the same work whatever the
size); /digest hashes all of it; /write?N writes into N pages.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import socket
import socketserver
from http.server import BaseHTTPRequestHandler

PAGE = 4096
BLOCK = 256 * PAGE
SAMPLES = 1000


class Memory:
    """The share of one process: mappings filled with bytes that are known from ``seed``."""

    def __init__(self, size: int, mappings: int, seed: int) -> None:
        self.guards: list[mmap.mmap] = []
        self.parts: list[mmap.mmap] = []
        chance = random.Random(seed)
        each = max(size // mappings // PAGE, 1) * PAGE if size else 0
        for _ in range(mappings if each else 0):
            part = mmap.mmap(-1, each, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.guards.append(mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ))
            for at in range(0, each, BLOCK):
                length = min(BLOCK, each - at)
                part[at : at + length] = chance.randbytes(length)
            self.parts.append(part)
        self.each = each

    def page(self, index: int) -> tuple[mmap.mmap, int]:
        per_part = self.each // PAGE
        return self.parts[index // per_part], index % per_part * PAGE

    @property
    def count(self) -> int:
        return len(self.parts) * (self.each // PAGE)

    def sample(self, number: int) -> bytes:
        found = hashlib.sha256()
        for step in range(min(number, self.count)):
            part, at = self.page(step * self.count // min(number, self.count))
            found.update(part[at : at + 64])
        return found.digest()

    def digest(self) -> bytes:
        found = hashlib.sha256()
        for part in self.parts:
            for at in range(0, len(part), BLOCK):
                found.update(part[at : at + BLOCK])
        return found.digest()

    def write(self, number: int) -> None:
        for step in range(min(number, self.count)):
            part, at = self.page(step * self.count // min(number, self.count))
            part[at + PAGE - 1] = 1


def serve_share(memory: Memory, channel: socket.socket, samples: int) -> None:
    """A child: answers its parent's questions about its share until the parent is gone."""
    with channel, channel.makefile("rwb", buffering=0) as stream:
        while line := stream.readline():
            stream.write((memory.digest() if line == b"digest\n" else memory.sample(samples)).hex().encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("where")
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mappings", type=int, default=1)
    options = parser.parse_args()
    size = options.megabytes * 10**6 // options.processes
    mappings = max(options.mappings // options.processes, 1)
    samples = SAMPLES // options.processes

    children: list[tuple[socket.socket, socket.SocketIO]] = []
    for number in range(1, options.processes):
        ours, its = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            for _, stream in children:
                stream.close()
            serve_share(Memory(size, mappings, number), its, samples)
            os._exit(0)
        its.close()
        children.append((ours, ours.makefile("rwb", buffering=0)))
    memory = Memory(size, mappings, 0)

    def ask(question: bytes) -> str:
        for _, stream in children:
            stream.write(question + b"\n")
        own = memory.digest() if question == b"digest" else memory.sample(samples)
        return "\n".join([own.hex(), *(stream.readline().decode().strip() for _, stream in children)])

    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "client"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path, _, argument = self.path.partition("?")
            if path == "/health":
                self.answer("ok")
            elif path in ("/sample", "/digest"):
                self.answer(ask(path[1:].encode()))
            elif path == "/write":
                memory.write(int(argument))
                self.answer("ok")
            else:
                self.answer("no such page", 404)

        def answer(self, text: str, status: int = 200) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Unix(socketserver.UnixStreamServer):
        request_queue_size = 128

    class Tcp(socketserver.TCPServer):
        allow_reuse_address = True

    ask(b"sample")  # every share is filled now
    print("ready", flush=True)
    if options.where.isdigit():
        Tcp(("0.0.0.0", int(options.where)), Handler).serve_forever()
    else:
        Unix(options.where, Handler).serve_forever()


if __name__ == "__main__":
    main()
