"""A small HTTP server to freeze: memory of a known content, files, a loopback connection, a way to die.

python3 server.py (SOCKET | PORT) [--megabytes N] [--crash-on PATH] [--never-healthy] [--deleted-file BYTES]
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import mmap
import os
import random
import socket
import socketserver
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler

from gpuckpt_guest import lifecycle  # every container has it

parser = argparse.ArgumentParser()
parser.add_argument("where")
parser.add_argument("--megabytes", type=int, default=8)
parser.add_argument("--crash-on", default="")
parser.add_argument("--exit-at-once", action="store_true")
parser.add_argument("--never-healthy", action="store_true")
parser.add_argument("--deleted-file", type=int, default=0)
parser.add_argument("--note", default="")
arguments = parser.parse_args()

if arguments.exit_at_once:
    print("cannot start: the moon is in the wrong phase", file=sys.stderr)
    sys.exit(3)

# The same bytes in every server, no two MiB alike, at a multiple of 2 MiB: what goldens of one model share.
HUGE = 2 << 20
room = mmap.mmap(-1, (arguments.megabytes << 20) + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
begin = HUGE + -ctypes.addressof(ctypes.c_char.from_buffer(room)) % HUGE
memory = memoryview(room)[begin : begin + (arguments.megabytes << 20)]
contents = random.Random(1)
for at in range(0, len(memory), 1 << 20):
    memory[at : at + (1 << 20)] = contents.randbytes(1 << 20)
counter = 0
# Memory that a program may drop and count on to read as zeros afterwards.
droppable = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
droppable.write(b"x" * len(droppable))
growable = mmap.mmap(-1, 1 << 18, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
growable.write(b"y" * len(growable))

# A connection of the server with itself, over the container's own loopback.
listener = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(listener.getsockname())
far, _ = listener.accept()

# A lock on a file, as model caches hold.
locked = tempfile.TemporaryFile(dir="/var/tmp")  # noqa: SIM115 - held open for the server's life
fcntl.flock(locked, fcntl.LOCK_EX)
deleted = tempfile.TemporaryFile(dir="/var/tmp")  # noqa: SIM115 - held open for the server's life
if arguments.deleted_file:
    deleted.write(b"x" * arguments.deleted_file)
    deleted.flush()
if arguments.note:
    with open(arguments.note, "w") as note:
        note.write("written before the dump")


class Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "client"

    def do_GET(self) -> None:
        global counter  # noqa: PLW0603 - the state that a restore must bring back
        if arguments.crash_on and self.path == arguments.crash_on:
            print("fatal: asked for the forbidden path", file=sys.stderr, flush=True)
            os._exit(7)
        if self.path == "/health":
            self.answer("ok" if not arguments.never_healthy else "not yet", 200 if not arguments.never_healthy else 503)
        elif self.path == "/digest":
            self.answer(hashlib.sha256(memory).hexdigest())
        elif self.path == "/count":
            counter += 1
            self.answer(str(counter))
        elif self.path == "/random":
            lifecycle.check()
            self.answer(str(random.random()))
        elif self.path == "/random-unchecked":
            self.answer(str(random.random()))
        elif self.path == "/tcp":
            near.sendall(b"ping")
            self.answer(far.recv(4).decode())
        elif self.path == "/drop":
            try:
                droppable.madvise(mmap.MADV_DONTNEED)
            except OSError as error:
                self.answer(f"refused: errno {error.errno}")
            else:
                self.answer("stale bytes" if droppable[:].strip(b"\0") else "zeros")
        elif self.path == "/grow":
            size = len(growable)
            try:
                growable.resize(2 * size)
            except OSError as error:
                self.answer(f"refused: errno {error.errno}")
            else:
                self.answer("stale bytes" if growable[size:].strip(b"\0") else "zeros")
        elif self.path == "/hostname":
            self.answer(socket.gethostname())
        elif self.path.startswith("/read/"):
            try:
                with open(self.path[5:]) as file:
                    self.answer(file.read())
            except OSError as error:
                self.answer(str(error), 404)
        else:
            self.answer("no such page", 404)

    def answer(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class Tcp(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True


# More than one thread, as servers have: what is recorded of them all differs from what is of the first alone.
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("ready", threading.active_count(), flush=True)
if arguments.where.isdigit():
    Tcp(("0.0.0.0", int(arguments.where)), Handler).serve_forever()
else:
    Unix(arguments.where, Handler).serve_forever()
