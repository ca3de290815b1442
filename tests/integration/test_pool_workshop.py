"""The pool's loop with its real hands: real containers, restored, frozen, woken, replaced, adopted."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from gpuckpt.config_load import load
from gpuckpt.pool.book import Event
from gpuckpt.pool.hands import Source
from gpuckpt.pool.owner import Owner
from gpuckpt.pool.state import Golden, Phase, Rules
from gpuckpt.pool.workshop import Workshop
from tests.integration.conftest import HERE, SERVER, Bench

RULES = Rules(max_replicas=4, concurrency=1, idle_freeze=1000, idle_release=1000)


def workshop(bench: Bench, golden: str, *create: str) -> Workshop:
    environ = {name: value for name, value in bench.env.items() if name.startswith("GPUCKPT_")}
    settings = load(None, environ=environ, env_file=None, flags={}).settings
    return Workshop(settings, {"m": Source(golden, create)})


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 500))


async def until(holds: Any) -> None:
    async with asyncio.timeout(180):
        while not holds():
            await asyncio.sleep(0.01)


def test_a_model_goes_through_all_its_tiers(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)

    async def work() -> None:
        hands, events = workshop(bench, name), list[Event]()
        await hands.open()
        owner = Owner(hands, tell=events.append)
        await owner.adopt({"m": RULES})
        assert owner.view().models[0].golden is Golden.TMPFS
        # Four requests at once: four clones.
        leases = await asyncio.gather(*(owner.acquire("m", 180) for _ in range(4)))
        assert len({lease.replica.name for lease in leases}) == 4
        answers = {lease.replica.endpoint.request("GET", "/digest", timeout=60).body for lease in leases}
        assert len(answers) == 1
        for lease in leases:
            owner.release(lease.replica)
        # Idle they are frozen, and one that is asked for is woken, in milliseconds.
        owner.set_rules({"m": Rules(max_replicas=4, concurrency=1, idle_freeze=0.01, idle_release=1000)})
        await asyncio.sleep(0.05)
        owner.settle()
        await until(lambda: {one.phase for one in owner.view().models[0].replicas} == {Phase.STANDBY})
        owner.set_rules({"m": RULES})
        lease = await owner.acquire("m", 180)
        assert lease.tier == "standby"
        assert {lease.replica.endpoint.request("GET", "/digest", timeout=60).body} == answers
        # The service goes away without a word, and the next one finds them.
        hands.close()
        again = workshop(bench, name)
        await again.open()
        second = Owner(again, tell=events.append)
        await second.adopt({"m": RULES})
        phases = sorted(one.phase for one in second.view().models[0].replicas)
        assert phases == [Phase.HOT, *[Phase.STANDBY] * 3]
        await second.drain(1)
        again.close()
        assert bench.left() == []

    run(work())


def test_a_golden_that_is_not_there_is_made(bench: Bench) -> None:
    name = bench.name("made")

    async def work() -> None:
        words = (
            "--volume",
            f"{HERE}:{HERE}",
            "--canary",
            "GET /digest",
            "--",
            "/usr/bin/python3",
            str(SERVER),
            "{socket}",
        )
        hands = workshop(bench, name, *words)
        await hands.open()
        owner = Owner(hands)
        await owner.adopt({"m": RULES})
        lease = await owner.acquire("m", 180)
        assert lease.tier == "cold" and lease.replica.endpoint.request("GET", "/digest", timeout=60).status == 200
        assert owner.view().models[0].golden is Golden.TMPFS
        second = await owner.acquire("m", 180)  # from the golden
        assert second.replica is not lease.replica
        await owner.drain(0.1)
        hands.close()
        assert bench.left() == []

    run(work())
