"""A server that forks workers, whose memory is partly their parent's, partly their own, and says what each has.

python3 prefork.py SOCKET         serve HTTP: /health /digest /write
python3 prefork.py --once         print what /digest answers

Three processes of one executable: a parent fills its areas and forks; the first worker changes half of the pages, the
second none. /write has the parent fill its areas anew, and answers its digest.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import socket
import socketserver
import sys
from http.server import BaseHTTPRequestHandler

PAGE, HUGE = mmap.PAGESIZE, 2 << 20
AREA, AREAS = 4 << 20, 4  # of 2 MiB blocks, which become extents; a small one behind each goes into a small file
SMALL = 64 * PAGE
# Which of the pages the first worker changes in each of the areas: half of them all.
CHANGED = (slice(0, None, 2), slice(None), slice(1, None, 2), slice(0, 0))


def area(size: int) -> memoryview:
    """Private memory at a multiple of 2 MiB that is no other area's neighbour."""
    room = mmap.mmap(-1, size + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = HUGE + -ctypes.addressof(ctypes.c_char.from_buffer(room)) % HUGE
    return memoryview(room)[begin : begin + size]


def fill(areas: list[memoryview], seed: int, chosen: tuple[slice, ...] | None = None) -> None:
    contents = random.Random(seed)
    for index, memory in enumerate(areas):
        pages = range(len(memory) // PAGE)
        for page in pages[chosen[index % AREAS]] if chosen else pages:
            memory[page * PAGE : (page + 1) * PAGE] = contents.randbytes(PAGE)


def digest(areas: list[memoryview]) -> str:
    return hashlib.sha256(b"".join(areas)).hexdigest()


def worker(areas: list[memoryview], ours: socket.socket) -> None:
    while ours.recv(1):
        ours.sendall(digest(areas).encode())


def main(where: str) -> None:
    areas = [area(AREA) for _ in range(AREAS)] + [area(SMALL) for _ in range(AREAS)]
    fill(areas, 1)
    workers: list[socket.socket] = []
    for number in range(2):
        near, far = socket.socketpair()
        if os.fork() == 0:
            near.close()
            for other in workers:  # a worker ends when nobody but it has its socket any more
                other.close()
            if number == 0:
                fill(areas, 2, CHANGED)
            worker(areas, far)
            os._exit(0)
        far.close()
        workers.append(near)

    def digests() -> str:
        found = [digest(areas)]
        for one in workers:
            one.sendall(b"?")
            found.append(one.recv(64, socket.MSG_WAITALL).decode())
        return json.dumps(found)

    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "client"

        def do_GET(self) -> None:
            if self.path == "/write":
                fill(areas, 3)
            body = (digests() if self.path in ("/digest", "/write") else "ok").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    if where == "--once":
        print(digests())
    else:
        socketserver.UnixStreamServer(where, Handler).serve_forever()


main(sys.argv[1])
