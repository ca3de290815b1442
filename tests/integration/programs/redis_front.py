"""HTTP in front of a redis server that it starts: fill it, change it, save it, and compare what it holds.

python3 redis_front.py REDIS-SERVER SOCKET    serve HTTP: /health /digest /compare /churn /bgsave

Every value says what its key and generation are, so that each can be checked by itself, not only the sum of all.
"""

from __future__ import annotations

import hashlib
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

KEYS = 200_000
BATCH = 5000
folder = tempfile.mkdtemp(dir="/var/tmp")


class Redis:
    """A redis server on a Unix socket of its own, and a connection to it."""

    def __init__(self, program: str, name: str) -> None:
        path = f"{folder}/{name}.sock"
        options = ["--port", "0", "--unixsocket", path, "--dir", folder, "--dbfilename", "saved.rdb", "--save", ""]
        # Debian has the server also as redis-check-rdb: it goes by the name that it is called by.
        self.process = subprocess.Popen(["redis-server", *options], executable=program)
        self.connection = socket.socket(socket.AF_UNIX)
        for _ in range(500):
            try:
                self.connection.connect(path)
                break
            except OSError:
                time.sleep(0.02)
        self.reader = self.connection.makefile("rb")

    def all(self, commands: list[tuple[str, ...]]) -> list[object]:
        """The answers to the commands, sent at once."""
        words = []
        for command in commands:
            words.append(f"*{len(command)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in command))
        self.connection.sendall("".join(words).encode())
        return [self.answer() for _ in commands]

    def one(self, *command: str) -> object:
        return self.all([command])[0]

    def answer(self) -> object:
        line = self.reader.readline()
        kind, rest = line[:1], line[1:-2]
        if kind == b"$":
            return None if rest == b"-1" else self.reader.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        if kind == b"-" or not line:
            raise RuntimeError(f"redis says {rest.decode()}")
        return int(rest) if kind == b":" else rest

    def state(self) -> str:
        information = self.one("INFO", "persistence")
        assert isinstance(information, bytes)
        return information.decode()

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def value(key: int, generation: int) -> str:
    """From 34 bytes to a kilobyte."""
    return hashlib.md5(b"%d %d" % (key, generation)).hexdigest() * (1 + key % 32 // (1 + key % 7)) + f":{key}"


def batches(keys: range) -> Iterator[range]:
    for start in range(0, len(keys), BATCH):
        yield keys[start : start + BATCH]


def write(keys: range, generation: int) -> None:
    for batch in batches(keys):
        redis.all([("SET", f"key {key}", value(key, generation)) for key in batch])
        expected.update(dict.fromkeys(batch, generation))


def delete(keys: range) -> None:
    for batch in batches(keys):
        redis.all([("DEL", f"key {key}") for key in batch])
        for key in batch:
            expected.pop(key, None)


def sample() -> str:
    """What a canary may take its time for."""
    keys = sorted(expected)[:: len(expected) // 100]
    return f"{redis.one('DBSIZE')} {redis.one('MGET', *(f'key {key}' for key in keys))}"


def compare(server: Redis) -> str:
    """Every value that ``server`` holds with what was written."""
    if (count := server.one("DBSIZE")) != len(expected):
        raise RuntimeError(f"redis holds {count} keys, {len(expected)} were written")
    keys = sorted(expected)
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        answers = server.one("MGET", *(f"key {key}" for key in batch))
        if answers != [value(key, expected[key]).encode() for key in batch]:
            raise RuntimeError(f"a value of the keys from {batch[0]} to {batch[-1]} is wrong")
    return f"{len(keys)} right"


def churn() -> str:
    """Delete half, give the memory back, write others in its place: other sizes, a table that grows and shrinks."""
    global generation  # noqa: PLW0603 - the next churn begins where this one ended
    generation += 1
    delete(range(0, KEYS, 2))
    redis.one("MEMORY", "PURGE")
    fresh = range(KEYS * generation, KEYS * generation + KEYS // 2)
    write(fresh, generation)
    write(range(1, KEYS, 4), generation)
    delete(fresh[::4])
    redis.one("MEMORY", "PURGE")
    return compare(redis)


def save_in_background() -> str:
    """A forked child writes the file while the parent goes on writing; another server reads the file back."""
    redis.one("BGSAVE")
    for batch in batches(range(0, KEYS, 10)):
        redis.all([("SET", f"other {key}", "x" * 500) for key in batch])
    while "rdb_bgsave_in_progress:1" in redis.state():
        time.sleep(0.05)
    if "rdb_last_bgsave_status:ok" not in redis.state():
        raise RuntimeError("the background save failed")
    for batch in batches(range(0, KEYS, 10)):
        redis.all([("DEL", f"other {key}") for key in batch])
    second = Redis(program, "second")
    try:
        while "loading:1" in second.state():
            time.sleep(0.05)
        compare(second)
    finally:
        second.stop()
        os.unlink(f"{folder}/saved.rdb")
    return compare(redis)


class Handler(BaseHTTPRequestHandler):
    def address_string(self) -> str:
        return "client"

    def do_GET(self) -> None:
        pages = {
            "/health": lambda: "ok",
            "/digest": sample,
            "/compare": lambda: compare(redis),
            "/churn": churn,
            "/bgsave": save_in_background,
        }
        page = pages.get(self.path)
        try:
            text, status = (page(), 200) if page else ("no such page", 404)
        except (RuntimeError, OSError) as error:
            text, status = str(error), 500
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


program = sys.argv[1]
expected: dict[int, int] = {}
generation = 0
redis = Redis(program, "first")
write(range(KEYS), 0)
print("ready", flush=True)
socketserver.UnixStreamServer(sys.argv[2], Handler).serve_forever()
