"""The admin API over real connections: every order and question, what is refused and how, followers."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from gpuckpt.errors import BusyError, NotFoundError, RestoreError, UsageError
from gpuckpt.pool.config import Model
from gpuckpt.pool.state import Golden
from gpuckpt.service import admin as module
from gpuckpt.service.view import EventView, PoolView
from tests.pool_service import MODEL, hands_for, pool, running
from tests.service_world import Answer, Client, request, run, until

BOTH = ["a", "rich"]


def error(found: Answer) -> dict[str, Any]:
    assert found.header("content-type") == "application/json"
    return found.error


# ---------------------------------------------------------------------- looking


def test_the_state_is_the_view() -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            found = await made.admin("GET", "/v1/state")
            view = msgspec.json.decode(found.body, type=PoolView)
            assert found.status == 200 and [one.name for one in view.models] == BOTH
            assert [one.name for one in view.models[0].replicas] == ["a.1"] and view.models[0].asked
            assert view.models[1].aliases == ["org/rich-1", "gpt"] and view.models[1].golden.name == "rich"
            assert view.models[1].asked is None and [one.kind for one in view.events] == ["restored"]
            assert not msgspec.json.decode((await made.admin("GET", "/v1/state?events=0")).body, type=PoolView).events

    run(work())


def test_events_by_number_model_and_count() -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            await made.hot("rich")
            await made.order("a", "sleep")
            await until(lambda: made.phases("a") == ["standby"])

            async def events(query: str) -> list[int]:
                found = await made.admin("GET", f"/v1/events{query}")
                assert found.status == 200
                return [one["seq"] for one in json.loads(found.body)["events"]]

            assert await events("") == await events("?after=0") == await events("?follow=0") == [1, 2, 3]
            assert await events("?after=1") == [2, 3] and await events("?after=3") == []
            assert await events("?limit=1") == [3] and await events("?limit=0") == []
            assert await events("?model=a") == [1, 3]
            assert await events("?model=gpt&limit=5&after=1") == await events("?model=org%2Frich-1") == [2]
            for query, word in (
                ("?after=x", "after"),
                ("?limit=-1", "limit"),
                ("?after=1.5", "after"),
                ("?after=" + "9" * 16, "after"),
            ):
                refused = await made.admin("GET", f"/v1/events{query}")
                assert refused.status == 400 and word in error(refused)["message"]
            for follow in ("", "&follow=1"):
                unknown = await made.admin("GET", f"/v1/events?model=nobody{follow}")
                assert unknown.status == 404 and "nobody" in error(unknown)["message"]
            assert (await made.admin("GET", "/v1/state?events=many")).status == 400

    run(work())


class Stream:
    """A client that follows events."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def piece(self) -> bytes:
        size = int(await self.client.reader.readuntil(b"\r\n"), 16)
        return (await self.client.reader.readexactly(size + 2))[:-2]

    async def next(self) -> EventView:
        """The next event; comments are passed over."""
        while (found := await self.piece()).startswith(b":"):
            pass
        assert found.startswith(b"data: ") and found.endswith(b"\n\n")
        return msgspec.json.decode(found[6:], type=EventView)


async def followed(made: Any, query: str) -> Stream:
    client = await made.connect(made.admin_port)
    await client.send(request(method="GET", target=f"/v1/events?follow=1{query}"))
    head = await client.head()
    assert head.status == 200 and "text/event-stream" in (head.header("content-type") or "")
    found = Stream(client)
    assert (await found.piece()).startswith(b":")  # from here on nothing is missed
    return found


def test_followers_hear_what_was_what_happens_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT", 0.02)

    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            new, old, one = await asyncio.gather(
                followed(made, ""), followed(made, "&after=0"), followed(made, "&after=0&model=gpt")
            )
            assert (await old.next()).seq == 1
            assert (await new.piece()).startswith(b":") and (await new.piece()).startswith(b":")
            await made.hot("rich")
            assert (await new.next()).seq == (await old.next()).seq == 2
            assert (await one.next()).model == "rich"
            late = await followed(made, "&after=1")
            assert (await late.next()).seq == 2
            # One that goes leaves nothing behind.
            await late.client.close()
            await until(lambda: len(made.service.history._followers) == 3)
            await made.service.close(0.1)
            kinds = []
            while (found := await new.piece()) != b"":
                kinds += [] if found.startswith(b":") else [msgspec.json.decode(found[6:], type=EventView).kind]
            assert kinds == ["draining", "stopped", "stopped"]
            for stream in (new, old, one):
                await stream.client.close()

    run(work())


def test_the_metrics() -> None:
    async def work() -> None:
        async with running() as made:
            await made.hot("a")
            found = await made.admin("GET", "/metrics")
            assert found.status == 200 and "text/plain; version=0.0.4" in (found.header("content-type") or "")
            assert b'gpuckpt_wakes_total{model="a",outcome="ok",tier="tmpfs"} 1.0' in found.body

    run(work())


# ---------------------------------------------------------------------- orders


def test_orders_are_followed_and_answered() -> None:
    async def work() -> None:
        async with running() as made:
            woken = await made.order("a", "wake")
            assert {**woken, "seconds": 0} == {"model": "a", "replica": "a.1", "tier": "tmpfs", "seconds": 0}
            assert await made.order("a", "scale", {"replicas": 2}) == {"model": "a", "replicas": 2}
            await until(lambda: made.phases("a") == ["hot", "hot"])
            assert await made.order("a", "sleep") == {"model": "a", "frozen": []}
            assert await made.order("a", "scale", {"replicas": None}) == {"model": "a", "replicas": None}
            assert await made.order("a", "sleep", b" \n") == {"model": "a", "frozen": ["a.1", "a.2"]}
            await until(lambda: made.phases("a") == ["standby", "standby"])
            assert (await made.order("a", "wake", {"deadline": 3}))["tier"] == "standby"
            stopped = await made.order("a", "sleep", {"release": True})
            assert sorted(stopped["stopped"]) == ["a.1", "a.2"]
            await until(lambda: made.phases("a") == [])
            await made.order("a", "wake")
            assert await made.order("a", "drain") == {"model": "a", "stopped": ["a.1"]}
            await until(lambda: made.phases("a") == [])
            view = made.service.view().models[0]
            assert view.drained and view.scale is None
            await made.order("a", "wake")
            assert not made.service.view().models[0].drained

    run(work())


@pytest.mark.parametrize("name", ["org/rich-1", quote("org/rich-1", safe=""), "gpt", "rich"])
def test_a_model_is_found_by_every_name(name: str) -> None:
    async def work() -> None:
        async with running() as made:
            assert (await made.order(name, "wake"))["model"] == "rich"

    run(work())


def test_a_name_may_look_like_an_order_or_be_written_in_any_script() -> None:
    models = {"wake": MODEL, "m/sleep": Model(golden="x", prepare=0), "größer 模型": Model(golden="y", prepare=0)}

    async def work() -> None:
        async with running(pool(**models)) as made:
            for name in models:
                assert (await made.order(quote(name), "wake"))["model"] == name
                assert (await made.order(quote(name, safe=""), "sleep"))["model"] == name

    run(work())


@pytest.mark.parametrize(
    ("target", "body", "words"),
    [
        ("a/wake", b"{", "the body cannot be used"),
        ("a/wake", b"[]", "the body cannot be used"),
        ("a/wake", b'{"deadline": "5"}', "deadline"),
        ("a/wake", b'{"deadline": 0}', "between 0 and 3600"),
        ("a/wake", b'{"deadline": 1e9}', "between 0 and 3600"),
        ("a/wake", b'{"dead_line": 1}', "dead_line"),
        ("a/wake", b'{"deadline": NaN}', "the body cannot be used"),
        ("a/wake", b"[" * 100_000, "the body cannot be used"),
        ("a/wake", b'{"deadline": 1, "x\xff": 1}', "the body cannot be used"),
        ("a/sleep", b'{"release": 1}', "release"),
        ("a/sleep", b"null", "the body cannot be used"),
        ("a/scale", b"", "the body cannot be used"),
        ("a/scale", b"{}", "replicas"),
        ("a/scale", b'{"replicas": 4}', "0 to 3"),
        ("a/scale", b'{"replicas": -1}', "0 to 3"),
        ("a/scale", b'{"replicas": 1.5}', "replicas"),
        ("a/scale", b'{"replicas": true}', "replicas"),
    ],
)
def test_what_is_wrong_with_an_order_is_said(target: str, body: bytes, words: str) -> None:
    async def work() -> None:
        async with running() as made:
            found = await made.admin("POST", f"/v1/models/{target}", body)
            assert found.status == 400 and words in error(found)["message"]
            assert made.phases("a") == [] and made.kinds() == []

    run(work())


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/v1/models/b/wake", 404),
        ("POST", "/v1/models//sleep", 404),
        ("POST", "/v1/models/b/scale", 404),
        ("POST", "/v1/models/b/drain", 404),
        ("POST", "/v1/models/a/dance", 404),
        ("GET", "/v2/state", 404),
        ("GET", "/", 404),
        ("GET", "/v1/models/a/wake", 405),
        ("POST", "/v1/state", 405),
        ("GET", "/v1/drain", 405),
    ],
)
def test_what_there_is_not_is_said_in_json_too(method: str, target: str, status: int) -> None:
    async def work() -> None:
        async with running() as made:
            found = await made.admin(method, target)
            assert found.status == status and error(found)["message"]

    run(work())


def test_a_wake_that_is_late_and_one_that_cannot_be() -> None:
    async def work() -> None:
        async with running() as made:
            made.hands.gates["restore"] = asyncio.Event()
            late = await made.admin("POST", "/v1/models/a/wake", {"deadline": 0.02})
            assert late.status == 504 and "within 0.02 s" in error(late)["message"]
            made.hands.fails["restore"] = [RestoreError("held", cause="by somebody")] * 3
            made.hands.gates["restore"].set()
            refused = await made.admin("POST", "/v1/models/a/wake", {"deadline": 10})
            assert refused.status == 503 and "held: by somebody" in error(refused)["message"]

    run(work())


def test_before_it_is_ready_orders_are_refused_and_the_rest_is_answered() -> None:
    async def work() -> None:
        async with running(opened=False) as made:
            for verb in ("wake", "sleep", "drain"):
                found = await made.admin("POST", f"/v1/models/a/{verb}")
                assert found.status == 409 and "starting" in error(found)["message"]
            assert (await made.admin("POST", "/v1/models/a/scale", {"replicas": 1})).status == 409
            view = json.loads((await made.admin("GET", "/v1/state")).body)
            assert view["state"] == "starting" and view["models"] == []
            assert (await made.admin("GET", "/metrics")).status == 200
            assert json.loads((await made.admin("GET", "/v1/events")).body) == {"events": []}
            await made.service.open()
            await made.order("a", "wake")

    run(work())


def test_a_reload_tells_what_has_changed_or_why_it_cannot() -> None:
    async def work() -> None:
        async with running() as made:
            made.config = pool(a=Model(max_replicas=2, prepare=0), b=MODEL)
            made.hands.models["b"] = made.hands.models["a"]
            found = await made.admin("POST", "/v1/reload")
            assert json.loads(found.body) == {"added": ["b"], "removed": ["rich"], "changed": ["a"], "notes": []}
            for raised, status in ((UsageError("no"), 400), (NotFoundError("no"), 404), (BusyError("no"), 409)):
                made.reload_error = raised
                found = await made.admin("POST", "/v1/reload")
                assert found.status == status and error(found)["message"] == "no"
            made.reload_error = BusyError("no", cause="because", remedy="wait")
            found = await made.admin("POST", "/v1/reload")
            assert error(found) == {"message": "no", "cause": "because", "remedy": "wait"}

    run(work())


def test_a_fault_of_ours_is_an_answer_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with running() as made:
            made.reload_error = ZeroDivisionError("secret")
            found = await made.admin("POST", "/v1/reload")
            assert found.status == 500 and "secret" not in error(found)["message"]

    run(work())
    assert "ZeroDivisionError: secret" in caplog.text


def test_a_drain_of_everything_is_answered_before_it_begins() -> None:
    async def work() -> None:
        async with running() as made:
            found = await made.admin("POST", "/v1/drain")
            assert found.status == 202 and found.body == b"{}"
            await asyncio.wait_for(made.stopped.wait(), 50)

    run(work())


def test_while_it_goes_down_it_says_so() -> None:
    async def work() -> None:
        async with running(hands=hands_for(pool(a=MODEL, rich=MODEL), Golden.TMPFS)) as made:
            lease = await made.service.acquire("a", 50)
            closing = asyncio.ensure_future(made.service.close(5))
            await until(lambda: made.service.owner.draining)
            found = await made.admin("POST", "/v1/models/a/wake")
            assert found.status == 503 and "going down" in error(found)["message"]
            assert json.loads((await made.admin("GET", "/v1/state")).body)["state"] == "draining"
            made.service.release(lease.replica)
            await closing

    run(work())
