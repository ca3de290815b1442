"""What the service answers itself: which of it wants a key."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpuckpt.config import Settings
from gpuckpt.pool.config import Front, Pool
from gpuckpt.service.dashboard import files
from gpuckpt.service.server import Guard, HttpServer, listen
from gpuckpt.service.service import Service
from gpuckpt.service.site import Site
from tests.pool_world import FakeHands
from tests.service_world import Client, request, run


async def status(site: Site, target: str, head: str = "") -> int:
    socket = listen("127.0.0.1:0")
    port = socket.getsockname()[1]
    server = HttpServer(site, [socket], guard=Guard())
    await server.start()
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    await client.send(request(target=target, method="GET", head=head))
    found = await client.answer()
    await client.close()
    await server.close(1)
    return found.status


def site(tmp_path: Path) -> Site:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    return Site(Service(Settings(), Pool(front=Front(keys=file)), hands=FakeHands()))


@pytest.mark.parametrize("target", ["/dashboard", "/dashboard/", *(f"/dashboard/{name}" for name in files())])
def test_the_page_wants_no_key(tmp_path: Path, target: str) -> None:
    assert run(status(site(tmp_path), target)) == 200


@pytest.mark.parametrize(
    "target",
    [
        "/metrics",
        "/v1/models",
        "/v1/models/m",
        "/dashboard/state",
        "/dashboard/events",
        # Starlette's routes end with “$”, which stands before a line break at the end, too.
        "/dashboard/state%0A",
        "/dashboard/events%0a",
        "/dashboard/state/",
        "/dashboard/%73tate",
        "/dashboard//state",
        "/metrics%0A",
        "/v1/completions",
    ],
)
def test_what_tells_of_the_pool_wants_a_key_however_it_is_written(tmp_path: Path, target: str) -> None:
    assert run(status(site(tmp_path), target)) == 401


def test_with_a_key_it_is_told(tmp_path: Path) -> None:
    assert run(status(site(tmp_path), "/dashboard/state", "authorization: Bearer secret\r\n")) == 200
