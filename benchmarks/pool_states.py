"""Bring a model of a running pool into one of the states in which a request may find it, and wait until it is there.

By the orders that users have (wake, sleep, scale), and by the passing of idle times.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Phases, with_rest
from benchmarks.pool_client import Reply
from benchmarks.pool_process import PoolProcess
from benchmarks.workspace import Workspace
from gpuckpt import manifest as manifests
from gpuckpt.errors import DeadlineError
from gpuckpt.golden.prepare import Options, Source
from gpuckpt.golden.replica import Replica, all_of
from gpuckpt.service.view import EventView, ModelView
from gpuckpt.store.digests import digest_bytes
from gpuckpt.timing import UNACCOUNTED
from gpuckpt.workload.endpoint import Endpoint

_PAUSE = 0.02
_MOST = 180.0  # seconds that any state may take to come
_BROUGHT = ("restored", "woken", "started")


def phases(model: ModelView) -> list[str]:
    """What its replicas are doing."""
    return [one.phase for one in model.replicas]


def hot(model: ModelView, count: int = 1) -> bool:
    """Whether exactly ``count`` replicas are hot, and nothing else is there or under way."""
    return phases(model) == ["hot"] * count and not model.requests


def standby(model: ModelView) -> bool:
    """Whether a frozen replica is all that there is."""
    return phases(model) == ["standby"]


def golden_only(model: ModelView) -> bool:
    """Whether there is no replica."""
    return not model.replicas


def make_hot(pool: PoolProcess, name: str) -> None:
    """See to it that one replica is hot and idle, and no other is there."""
    until = time.monotonic() + _MOST
    while True:
        pool.client.wake(name)
        found = pool.until(name, lambda model: not model.requests and {*phases(model)} <= {"hot", "standby"}, _MOST)
        if hot(found):
            return
        if time.monotonic() > until:
            raise DeadlineError(f"{name} did not come to have one hot replica within {_MOST:g} s", cause=str(found))
        release(pool, name)


def until_hot(pool: PoolProcess, name: str, count: int = 1) -> None:
    """Wait until so many replicas are hot and idle, and nothing else is there."""
    pool.until(name, lambda model: hot(model, count), _MOST)


def make_standby(pool: PoolProcess, name: str) -> None:
    """Freeze the one replica. The order is repeated: a replica whose health is being looked at is not frozen."""
    make_hot(pool, name)
    until = time.monotonic() + _MOST
    while not standby(pool.model(name)):
        if time.monotonic() > until:
            raise DeadlineError(f"{name} was not frozen within {_MOST:g} s")
        pool.client.sleep(name)
        time.sleep(_PAUSE)


def release(pool: PoolProcess, name: str) -> None:
    """Remove every replica, so that only the golden is there."""
    until = time.monotonic() + _MOST
    while not golden_only(pool.model(name)):
        if time.monotonic() > until:
            raise DeadlineError(f"the replicas of {name} did not go within {_MOST:g} s")
        pool.client.sleep(name, release=True)
        time.sleep(_PAUSE)


def replicas(state: Path, golden: str) -> list[Replica]:
    """The records of a golden's replicas, those that are prepared included; ``state`` is gpuckpt's state folder."""
    return [one for one in all_of(state / "replicas") if one.golden == golden]


def endpoints(space: Workspace, golden: str) -> list[Endpoint]:
    """Where the golden's running replicas listen."""
    return [one.endpoint for one in replicas(space.state, golden) if one.state == "ready"]


def until_prepared(space: Workspace, golden: str, count: int, tier: str = "tmpfs") -> None:
    """Wait until so many containers stand prepared for the golden where it lies now.

    The pool makes them when nothing else is under way; those for where it lay before are of no use.
    """
    folder = (space.store if tier == "tmpfs" else space.state) / "goldens" / golden
    digest = digest_bytes((folder / "manifest.json").read_bytes())
    key = Source(manifests.read(folder), folder, digest).key(Options())
    until = time.monotonic() + _MOST
    while sum(one.state == "prepared" and one.key == key for one in replicas(space.state, golden)) < count:
        if time.monotonic() > until:
            raise DeadlineError(f"{count} containers of {golden} were not prepared within {_MOST:g} s")
        time.sleep(_PAUSE)


def until_in(pool: PoolProcess, name: str, tier: str) -> None:
    """Wait until the model's golden lies in ``tier``, and no longer moves."""
    pool.until(name, lambda model: model.golden.tier == tier, _MOST)


def brought_up(events: list[EventView]) -> list[EventView]:
    """Those of the events that tell how a replica came to be hot."""
    return [event for event in events if event.kind in _BROUGHT]


def phases_of(reply: Reply, event: EventView | None) -> Phases:
    """Where the time until the first token went: the replica's coming up, the model, and what is not accounted for.

    ``event`` tells how the replica came up that the request waited for; None where one was hot. A restore tells its own
    phases; of a cold start what comes before its restore is one phase. What the service says that the request waited
    beyond all that (decisions, queues) is another.
    """
    rows: Phases = []
    if event is not None:
        taken = event.seconds or sum(event.phases.values())
        if event.kind == "started" or not event.phases:
            name = "gpuckpt create" if event.kind == "started" else event.kind
            rows.append(_row(name, taken - sum(event.phases.values())))
        rows += [_row(name, seconds) for name, seconds in event.phases.items() if name != UNACCOUNTED]
        rows.append(_row("pool: decision, threads, accounts", reply.told.get("wait", 0.0) - taken))
    rows.append(_row("model: first token", reply.told.get("model", 0.0)))
    return with_rest(rows, reply.first_s)


def _row(name: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "seconds": round(seconds, 6)}
