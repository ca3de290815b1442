"""The whole service in a test's own world: its admin API and its public address on real sockets, hands that pretend."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuckpt.config import Settings
from gpuckpt.pool.book import Held
from gpuckpt.pool.config import Model, Pool
from gpuckpt.pool.hands import Found, Source
from gpuckpt.pool.state import Golden
from gpuckpt.service.admin import Admin
from gpuckpt.service.server import Guard, HttpServer, listen
from gpuckpt.service.service import Changes, Service
from gpuckpt.service.site import Site
from tests.pool_world import FakeHands
from tests.service_world import Answer, Client, request, until


def pool(**models: Model) -> Pool:
    """A configuration with these models; none of them prepares containers, or tries again late."""
    return Pool(models=models or {"a": MODEL})


MODEL = Model(max_replicas=3, concurrency=2, idle_freeze=1000.0, idle_release=1000.0, prepare=0)
RICH = Model(
    golden="rich",
    aliases=("org/rich-1", "gpt"),
    max_replicas=2,
    concurrency=2,
    idle_freeze=1000.0,
    idle_release=1000.0,
    prepare=0,
)


@dataclass
class Running:
    """The service, and clients of it."""

    service: Service
    hands: FakeHands
    admin_port: int
    site_port: int
    config: Pool
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reload_error: Exception | None = None

    async def reload(self) -> Changes:
        if self.reload_error:
            raise self.reload_error
        return await self.service.reload(self.config)

    async def connect(self, port: int) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def _ask(self, port: int, method: str, target: str, body: Any, head: str) -> Answer:
        client = await self.connect(port)
        await client.send(request(body, target=target, method=method, head=head))
        found = await client.answer(head_only=method == "HEAD")
        await client.close()
        return found

    async def admin(self, method: str, target: str, body: bytes | dict[str, Any] = b"") -> Answer:
        """One request to the admin API."""
        return await self._ask(self.admin_port, method, target, body, "")

    async def site(self, target: str, method: str = "GET", head: str = "") -> Answer:
        """One request to the public address."""
        return await self._ask(self.site_port, method, target, b"", head)

    async def order(self, name: str, verb: str, body: bytes | dict[str, Any] = b"") -> Any:
        """What an order is answered with, if it is followed."""
        found = await self.admin("POST", f"/v1/models/{name}/{verb}", body)
        assert found.status == 200, found.body
        return json.loads(found.body)

    async def hot(self, name: str) -> Held:
        """A hot replica at work on nothing."""
        return (await self.service.owner.wake(name, 10)).replica

    def phases(self, name: str) -> list[str]:
        return sorted(str(one.phase) for one in self.service.owner.models[name].replicas.values())

    def kinds(self) -> list[str]:
        return [event.kind for event in self.service.history.last()]


def hands_for(config: Pool, golden: Golden = Golden.TMPFS) -> FakeHands:
    """Hands that find a golden of each model there."""
    made = FakeHands(**{name: Found(name, golden, 4, 1) for name in config.models})
    made.set_sources({name: Source(model.golden or name) for name, model in config.models.items()}, ())
    return made


@contextlib.asynccontextmanager
async def running(
    config: Pool | None = None,
    *,
    hands: FakeHands | None = None,
    keys: Path | None = None,
    opened: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[Running]:
    """The service, open unless a test opens it; at its end it is closed and has left nothing."""
    config = config or pool(a=MODEL, rich=RICH)
    hands = hands or hands_for(config)
    service = Service(Settings(**(settings or {})), config, keys=keys, hands=hands)
    service.owner.operations.retry = 0.01
    sockets = [listen("127.0.0.1:0"), listen("127.0.0.1:0")]
    admin_port, site_port = (one.getsockname()[1] for one in sockets)
    made = Running(service, hands, admin_port, site_port, config)
    admin = Admin(service, reload=made.reload, stop=made.stopped.set).app()
    servers = [
        HttpServer(app, [socket], guard=Guard()) for app, socket in zip((admin, Site(service)), sockets, strict=True)
    ]
    service.connections = lambda: servers[1].connections
    for server in servers:
        await server.start()
    try:
        if opened:
            await service.open()
        yield made
    finally:
        for gate in hands.gates.values():
            gate.set()
        if service.state == "ready":
            await service.close(0.2)
        for server in servers:
            await server.close(0.5)
    await until(lambda: not [one for server in servers for one in [server.connections, server.requests] if one])
    if service.state == "closed":
        assert hands.closed and not service.history._followers
        assert not [held for model in service.owner.models.values() for held in model.replicas.values()]
