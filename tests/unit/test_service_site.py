"""What the public address answers itself: models, health, metrics, the dashboard; and who may see which."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from gpuckpt.pool.config import Front
from gpuckpt.service import site as module
from gpuckpt.service.dashboard import files
from gpuckpt.service.view import PoolView
from tests.pool_service import MODEL, Running, pool, running
from tests.service_world import request, run, until

OPEN = ("/", "/health", "/dashboard", "/dashboard/")
CLOSED = ("/v1/models", "/v1/models/a", "/metrics", "/dashboard/state", "/dashboard/events")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    return file


async def body(made: Running, target: str) -> object:
    found = await made.site(target)
    assert found.status == 200
    return json.loads(found.body)


def test_models_by_every_name() -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("rich")
            found = await body(made, "/v1/models")
            assert isinstance(found, dict) and found["object"] == "list"
            about = [(one["id"], one["root"], one["tier"], one["object"]) for one in found["data"]]
            assert about == [
                ("a", "a", "tmpfs", "model"),
                ("rich", "rich", "hot", "model"),
                ("org/rich-1", "rich", "hot", "model"),
                ("gpt", "rich", "hot", "model"),
            ]
            for target in ("org/rich-1", "org%2Frich-1"):
                assert await body(made, f"/v1/models/{target}") == found["data"][2]
            unknown = await made.site("/v1/models/gtp")
            assert unknown.status == 404 and unknown.error["code"] == "model_not_found"
            assert "did you mean “gpt”" in unknown.error["message"]
            assert (await made.site("/v1/models/")).status == 404
            head = await made.site("/v1/models", "HEAD")
            assert head.status == 200 and not head.body

    run(work())


def test_health_is_the_service_s_state() -> None:
    async def work() -> None:
        async with running(opened=False) as made:
            early = await made.site("/health")
            assert early.status == 503 and json.loads(early.body) == {"status": "starting"}
            assert await body(made, "/v1/models")  # what is configured is known
            await made.service.open()
            assert await body(made, "/health") == {"status": "ready"}
            lease = await made.service.acquire("a", 50)
            closing = asyncio.ensure_future(made.service.close(5))
            await until(lambda: made.service.state == "draining")
            assert (await made.site("/health")).status == 503
            made.service.release(lease.replica)
            await closing

    run(work())


def test_with_keys_only_what_tells_nothing_is_open(keys: Path) -> None:
    async def work() -> None:
        async with running(keys=keys) as made:
            for target in OPEN:
                assert (await made.site(target)).status < 400, target
            for target in CLOSED:
                for head in ("", "authorization: Bearer wrong\r\n", "authorization: secret\r\n"):
                    refused = await made.site(target, head=head)
                    assert refused.status == 401 and refused.header("www-authenticate") == "Bearer", target
                    assert refused.error["code"] == "invalid_api_key"
                if target != "/dashboard/events":
                    for head in ("authorization: Bearer secret\r\n", "x-api-key: secret\r\n"):
                        assert (await made.site(target, head=head)).status == 200, target
            # Requests to models are the front's, which asks for the key itself.
            assert (await made.site("/v1/completions", "POST")).status == 401

    run(work())


async def status(keys: Path, target: str, head: str = "") -> int:
    """Of an answer of a service whose configuration names the keys."""
    async with running(structs.replace(pool(a=MODEL), front=Front(keys=keys))) as made:
        return (await made.site(target, head=head)).status


@pytest.mark.parametrize("target", ["/dashboard", "/dashboard/", *(f"/dashboard/{name}" for name in files())])
def test_the_page_wants_no_key(keys: Path, target: str) -> None:
    assert run(status(keys, target)) == 200


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
def test_what_tells_of_the_pool_wants_a_key_however_it_is_written(keys: Path, target: str) -> None:
    assert run(status(keys, target)) == 401


def test_with_a_key_it_is_told(keys: Path) -> None:
    assert run(status(keys, "/dashboard/state", "authorization: Bearer secret\r\n")) == 200


def test_metrics_and_the_way_to_the_dashboard() -> None:
    async def work() -> None:
        async with running() as made:
            found = await made.site("/metrics")
            assert found.status == 200 and b"gpuckpt_connections 1.0" in found.body
            root = await made.site("/")
            assert root.status == 307 and root.header("location") == "/dashboard"

    run(work())


def test_the_dashboard_s_page_is_kept_by_browsers_and_its_state_is_not() -> None:
    async def work() -> None:
        async with running() as made:
            page = await made.site("/dashboard")
            assert page.status == 200 and "text/html" in (page.header("content-type") or "")
            assert page.header("content-length") == str(len(page.body))
            tag = page.header("etag")
            assert tag and (await made.site("/dashboard", head=f"if-none-match: {tag}\r\n")).status == 304
            assert (await made.site("/dashboard/nothing.js")).status == 404
            assert (await made.site("/dashboard/../admin")).status == 404
            state = await made.site("/dashboard/state")
            assert state.header("cache-control") == "no-store"
            assert msgspec.json.decode(state.body, type=PoolView).state == "ready"

    run(work())


def test_a_dashboard_hears_of_changes_and_that_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REFRESH", 0.005)
    monkeypatch.setattr(module, "_QUIET", 0.2)

    async def work() -> None:
        async with running() as made:
            client = await made.connect(made.site_port)
            await client.send(request(method="GET", target="/dashboard/events"))
            head = await client.head()
            assert head.status == 200 and head.header("cache-control") == "no-store"

            async def view() -> PoolView:
                size = int(await client.reader.readuntil(b"\r\n"), 16)
                piece = (await client.reader.readexactly(size + 2))[:-2]
                assert piece.startswith(b"data: ") and piece.endswith(b"\n\n")
                return msgspec.json.decode(piece[6:], type=PoolView)

            first = await view()
            assert first.models[0].tier == "tmpfs"
            quiet = await view()
            assert quiet.models == first.models and quiet.now - first.now > 0.15
            await made.hot("a")
            async with asyncio.timeout(50):
                while (await view()).models[0].tier != "hot":
                    pass
            await made.service.close(0.1)
            async with asyncio.timeout(50):
                await client.reader.readuntil(b"\r\n0\r\n\r\n")  # the stream ends with the service
            await client.close()

    run(work())


def test_what_is_not_ours_goes_to_the_front() -> None:
    async def work() -> None:
        async with running() as made:
            for target, method in (("/v1/models/a", "DELETE"), ("/nothing", "GET"), ("/health", "POST")):
                found = await made.site(target, method)
                assert found.status == 400 and found.error["code"] == "model_missing"

    run(work())
