"""A pool's daemon that owns no replicas: it speaks the admin API over a real socket, out of a PoolView.

What it is asked changes the view a little, as the real one's would: enough for the client and the commands. A test
tells it wrong answers with :meth:`FakePool.on`.
"""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from msgspec.structs import replace

from gpuckpt.service.view import EventView, GoldenView, HistogramView, ModelView, PoolView, ReplicaView, UseView
from tests.fake_guest import FakeGuest, Reply, answer
from tests.pool_views import GIB, MIB, a_model, a_pool, a_replica

NOW = 1_790_000_000.0


def replica(name: str, phase: str = "hot", **fields: Any) -> ReplicaView:
    return a_replica(name, phase, **({"since": NOW - 12, "memory": 300 * MIB, "pid": 4100} | fields))


def model(name: str, tier: str = "tmpfs", **fields: Any) -> ModelView:
    golden = GoldenView(name="gold", tier="tmpfs", bytes=GIB)
    base: dict[str, Any] = {"golden": golden, "requests": 0, "expected_memory": 300 * MIB}
    return a_model(name, tier, **(base | fields))


def view(*models: ModelView, **fields: Any) -> PoolView:
    """A pool with these models; without any, with one for each tier."""
    base: dict[str, Any] = {
        "pid": 4242,
        "started": NOW - 8000,
        "listen": ["127.0.0.1:8400"],
        "memory": UseView(used=3 * GIB, limit=14 * GIB),
        "gpu": UseView(used=0, limit=None),
        "store": UseView(used=9 * GIB, limit=10 * GIB),
        "host_memory": UseView(used=11 * GIB, limit=24 * GIB),
        "ttft": {"hot": HistogramView(bounds=[0.1, 1], counts=[90, 9, 1], p50=0.021, p95=0.48)},
        "events": [
            event(1, "restored", "qwen", "qwen.1", seconds=0.262),
            event(2, "failed", "broken", reason="it died"),
        ],
    }
    return a_pool(NOW, models or _models(), **(base | fields))


def _models() -> list[ModelView]:
    hot = [replica("qwen.1", requests=3), replica("qwen.2", "restoring", since=NOW - 0.4, memory=0, pid=None)]
    disk, none = (GoldenView(name="x", tier=tier, bytes=size) for tier, size in (("disk", 2 * GIB), ("none", 0)))
    return [
        model("qwen", "hot", aliases=["gpt-4o-mini"], replicas=hot, waiting=9, requests=3, answered=120, asked=NOW - 1),
        model("Llama/Llama-3.2-1B-Instruct", "standby", replicas=[replica("llama.1", "standby")], asked=NOW - 400),
        model("phi", asked=NOW - 90000),
        model("large", "disk", golden=disk, warm=True),
        model("broken", "cold", golden=none, trouble="golden x could not be made", retry_at=NOW + 30, failed=2),
    ]


def event(seq: int, kind: str, model: str = "", replica: str = "", **fields: Any) -> EventView:
    return EventView(seq=seq, time=NOW - 100 + seq, kind=kind, model=model, replica=replica, **fields)


def refusal(status: int, message: str = "the pool's words", **more: str) -> bytes:
    """An error in the pool's form."""
    return answer({"error": {"message": message, **more}}, status)


def raw(value: Any, status: int = 200) -> bytes:
    """A whole response, encoded as the daemon does."""
    return answer(msgspec.json.encode(value), status)


class FakePool(FakeGuest):
    """The daemon; ``view`` is what it tells, ``happened`` its events."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.view = view()
        self.happened = list(self.view.events)
        self._news = threading.Condition()
        self._over = False

    def happen(self, *events: EventView) -> None:
        """Tell those who follow."""
        with self._news:
            self.happened += events
            self._news.notify_all()

    def go_down(self) -> None:
        """End every stream, in the middle of an event."""
        with self._news:
            self._over = True
            self._news.notify_all()

    def close(self) -> None:
        self.go_down()
        super().close()

    # ------------------------------------------------------------------ answers

    def otherwise(self, what: str, data: Any) -> Reply:
        method, _, target = what.partition(" ")
        parts = urlsplit(target)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match [method, *map(unquote, parts.path.strip("/").split("/"))]:
            case ["GET", "metrics"]:
                return answer(b"gpuckpt_replicas 2\n")
            case ["GET", "v1", "state"]:
                return raw(self.view)
            case ["GET", "v1", "events"]:
                return self._follow(asked) if "follow" in asked else raw({"events": self._events(asked)})
            case ["POST", "v1", "models", name, verb]:
                return self._act(name, verb, data or {})
            case ["POST", "v1", "reload"]:
                return raw({"added": ["new"], "removed": [], "changed": ["qwen", "phi"], "notes": ["listen: restart"]})
            case ["POST", "v1", "drain"]:
                self.view = replace(self.view, state="draining")
                return raw({}, 202)
        return refusal(404, f"there is no {target}")

    def _events(self, asked: dict[str, str]) -> list[EventView]:
        found = [one for one in self.happened if one.seq > int(asked.get("after", 0))]
        found = [one for one in found if asked.get("model") in (None, one.model)]
        return found[-int(asked.get("limit", 1000)) :]

    def _follow(self, asked: dict[str, str]) -> Callable[[socket.socket], None]:
        def serve(connection: socket.socket) -> None:
            told = self.happened[-1].seq if self.happened else 0
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            _chunk(connection, b": following\n\n")
            while True:
                with self._news:
                    found = [one for one in self._events(asked) if one.seq > told]
                    over = self._over
                    if not found and not over:
                        self._news.wait(5)
                        continue
                for one in found:
                    _chunk(connection, b": alive\n\n")
                    text = b"data: " + msgspec.json.encode(one) + b"\n\n"
                    _chunk(connection, text[:9])
                    _chunk(connection, text[9:])
                    told = one.seq
                if over:
                    _chunk(connection, b'data: {"seq": 99')
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                    return

        return serve

    def _act(self, name: str, verb: str, body: dict[str, Any]) -> bytes:
        one = next((each for each in self.view.models if name in (each.name, *each.aliases)), None)
        if one is None:
            return refusal(404, f"there is no model {name}")
        going = [each.name for each in one.replicas if each.phase in ("hot", "standby")]
        match verb:
            case "wake":
                woken = replica(going[0] if going else f"{one.golden.name}.1")
                self._become(replace(one, tier="hot", replicas=[woken]))
                return raw({"model": one.name, "replica": woken.name, "tier": one.tier, "seconds": 0.0213})
            case "sleep" if body.get("release"):
                self._become(replace(one, replicas=[]))
                return raw({"model": one.name, "stopped": going})
            case "sleep":
                idle = [each.name for each in one.replicas if each.phase == "hot" and not each.requests]
                return raw({"model": one.name, "frozen": idle})
            case "scale":
                most = int(one.rules["max_replicas"] or 0)
                if body["replicas"] is not None and body["replicas"] > most:
                    return refusal(400, f"{one.name} can have 0 to {most} replicas", remedy="raise max_replicas")
                return raw({"model": one.name, "replicas": body["replicas"]})
            case "drain":
                self._become(replace(one, replicas=[], drained=True))
                return raw({"model": one.name, "stopped": going})
        return refusal(404, f"there is no {verb}")

    def _become(self, one: ModelView) -> None:
        self.view = replace(self.view, models=[one if each.name == one.name else each for each in self.view.models])


def _chunk(connection: socket.socket, data: bytes) -> None:
    connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@contextmanager
def fake_pool() -> Iterator[FakePool]:
    """One on a path that fits a Unix socket."""
    with tempfile.TemporaryDirectory() as folder:
        made = FakePool(Path(folder, "s"))
        try:
            yield made
        finally:
            made.close()
