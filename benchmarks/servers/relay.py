"""The pool's front in a process of its own, as the service has it, before one replica that is always hot.

python -m benchmarks.servers.relay SOCKET

SOCKET is where the replica listens. Prints the port that the front listens at. The loop that owns the pool's state is
the real one; only the operations on replicas do nothing.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import signal
import sys
from pathlib import Path
from typing import Any, cast

import uvloop

from gpuckpt.pool.book import Held
from gpuckpt.pool.hands import Found, Hands, Made
from gpuckpt.pool.owner import Lease, Owner
from gpuckpt.pool.state import Golden, Phase, Pin, Rules
from gpuckpt.service.front import Front, Limits
from gpuckpt.service.keys import Keys
from gpuckpt.service.metrics import Metrics
from gpuckpt.service.routing import Routes
from gpuckpt.service.server import Guard, HttpServer, listen
from gpuckpt.service.upstream import Upstream
from gpuckpt.workload.endpoint import Endpoint


class Always:
    """Hands with one replica of the model "m"."""

    def __init__(self, path: str) -> None:
        self._found = Found("m", Golden.TMPFS, replicas=((Made("m.1", Endpoint(socket=Path(path))), Phase.HOT),))

    async def adopt(self, model: str) -> Found:
        return self._found


class Pool:
    """What the service is to its front."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def tier_of(self, name: str) -> str:
        return self._owner.models[name].tier()

    async def acquire(self, name: str, deadline: float) -> Lease:
        return await self._owner.acquire(name, deadline)

    def release(self, held: Held) -> None:
        self._owner.release(held)

    async def suspect(self, held: Held) -> None:
        return None


async def main(path: str) -> None:
    owner = Owner(cast("Hands", Always(path)))
    await owner.adopt({"m": Rules(concurrency=10_000, pin=Pin.HOT)})
    metrics = Metrics(owner.view, lambda: 0)
    routes = Routes({"m": "m"}, {"m": "m"}.get)
    front = Front(Pool(owner), Upstream(), routes.route, keys=Keys(), limits=Limits(), done=metrics.request)
    socket = listen("127.0.0.1:0")
    server = HttpServer(front, [socket], guard=Guard())
    port = socket.getsockname()[1]
    await server.start()
    print(port, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    watching = asyncio.create_task(owner.watch())
    await stop.wait()
    watching.cancel()
    await server.close(1)


def profiled(path: str, file: str) -> None:
    """Run with a profile of the interpreter, written to ``file`` at the end."""
    profile: Any = cProfile.Profile()
    try:
        profile.runcall(uvloop.run, main(path))
    finally:
        profile.dump_stats(file)


if __name__ == "__main__":
    if wanted := os.environ.get("RELAY_PROFILE"):
        profiled(sys.argv[1], wanted)
    else:
        uvloop.run(main(sys.argv[1]))
