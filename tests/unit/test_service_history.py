"""What has happened: numbers, the last ones, those who follow; and what is counted of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpuckpt.manifest import Held
from gpuckpt.pool.book import Event
from gpuckpt.pool.state import Budget, Golden, Model, Phase, Replica, Rules, State
from gpuckpt.service import history as module
from gpuckpt.service.exchange import Record
from gpuckpt.service.history import History
from gpuckpt.service.metrics import BOUNDS, Metrics
from gpuckpt.service.view import EventView
from tests.pool_world import run


def event(kind: str, model: str = "a", **more: object) -> Event:
    return Event(1.0, kind, model, **more)  # type: ignore[arg-type]


def filled(count: int) -> History:
    made = History()
    for number in range(count):
        made.add(event("woken", "ab"[number % 2], replica=f"r{number}"))
    return made


def numbers(found: list[EventView]) -> list[int]:
    return [one.seq for one in found]


async def some(following: AsyncGenerator[EventView | None, None], count: int) -> list[int | None]:
    return [one.seq if one else None for one in [await anext(following) for _ in range(count)]]


def test_the_last_ones_by_number_and_model() -> None:
    made = filled(6)
    assert numbers(made.last()) == [1, 2, 3, 4, 5, 6]
    assert numbers(made.last(2)) == [5, 6] and made.last(0) == []
    assert numbers(made.last(after=4)) == [5, 6] and made.last(after=6) == made.last(after=99) == []
    assert numbers(made.last(2, after=1, model="a")) == [3, 5] and made.last(model="c") == []
    assert made.last()[0] == EventView(seq=1, time=1.0, kind="woken", model="a", replica="r0")


def test_only_so_many_are_kept_and_numbers_go_on() -> None:
    made = filled(1500)
    assert numbers(made.last()) == list(range(501, 1501))


def test_who_follows_hears_what_was_what_happens_and_when_nothing_does() -> None:
    async def work() -> None:
        made = filled(4)
        following = made.follow(0.01, after=2)
        assert await some(following, 1) == [None]
        made.add(event("lost"))  # between the past and the present nothing is missed, and nothing told twice
        assert await some(following, 5) == [3, 4, 5, None, None]
        made.add(event("lost"))
        assert await some(following, 1) == [6]
        await following.aclose()
        assert not made._followers
        # Without a number only what happens from now on; of one model only its own.
        following = made.follow(5, model="b")
        assert await some(following, 1) == [None]
        made.add(event("lost", "a"))
        made.add(event("lost", "b"))
        assert await some(following, 1) == [8]
        await following.aclose()
        both = made.follow(5, after=0, limit=3, model="a")
        assert await some(both, 4) == [None, 5, 6, 7]
        await both.aclose()

    run(work())


def test_a_slow_reader_is_cut_off_with_what_it_can_still_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEHIND", 3)

    async def work() -> None:
        made = History()
        slow, quick = made.follow(5), made.follow(5)
        await some(slow, 1)
        await some(quick, 1)
        for _ in range(5):
            made.add(event("woken"))
            await some(quick, 1)
        assert [one and one.seq async for one in slow] == [1, 2, 3]
        made.add(event("woken"))
        assert await some(quick, 1) == [6]
        await quick.aclose()
        assert not made._followers

    run(work())


def test_at_the_end_everybody_has_all_of_it_and_nobody_waits_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEHIND", 2)

    async def work() -> None:
        made = History()
        waiting, full = made.follow(5), made.follow(5)
        await some(waiting, 1)
        await some(full, 1)
        ended = asyncio.ensure_future(waiting.__anext__())
        await asyncio.sleep(0.01)
        made.close()
        with pytest.raises(StopAsyncIteration):
            await ended
        assert [one async for one in full] == []
        late = made.follow(5)
        with pytest.raises(StopAsyncIteration):
            await anext(late)
        other = History()
        behind = other.follow(5)
        await some(behind, 1)
        other.add(event("woken"))
        other.add(event("woken"))
        other.close()  # its queue has no room for the end
        assert [one and one.seq async for one in behind] == [1, 2]

    run(work())


# ---------------------------------------------------------------------- metrics

STATE = State(
    5.0,
    (
        Model(
            "a",
            Rules(),
            Golden.TMPFS,
            golden_bytes=40,
            replicas=(
                Replica("a.1", Phase.HOT, 0.0, 2, 7, (Held("GPU-0", "H100", 1),)),
                Replica("a.2", Phase.STANDBY, 0.0, 0, 5, (Held("GPU-0", "H100", 1),)),
                Replica("a.3", Phase.STOPPING, 0.0, 1, 3, (Held("GPU-0", "H100", 1),)),
            ),
            waiting=4,
        ),
        Model("b", Rules(), Golden.DISK, golden_bytes=60),
        Model("c", Rules(), Golden.QUARANTINED, golden_bytes=80),
    ),
    Budget(),
)
NAMES = {
    "gpuckpt_bytes": ("gauge", {"tier"}),
    "gpuckpt_canaries": ("counter", {"model", "outcome"}),
    "gpuckpt_connections": ("gauge", set[str]()),
    "gpuckpt_evictions": ("counter", {"model", "reason"}),
    "gpuckpt_golden_moves": ("counter", {"model", "to"}),
    "gpuckpt_goldens_quarantined": ("counter", {"model"}),
    "gpuckpt_gpu_bytes": ("gauge", set[str]()),
    "gpuckpt_queue_requests": ("gauge", {"model"}),
    "gpuckpt_replicas": ("gauge", {"model", "phase"}),
    "gpuckpt_replicas_lost": ("counter", {"model", "reason"}),
    "gpuckpt_requests": ("counter", {"code", "model", "outcome"}),
    "gpuckpt_requests_at_work": ("gauge", {"model"}),
    "gpuckpt_restore_phase_seconds": ("histogram", {"phase"}),
    "gpuckpt_retries": ("counter", {"model"}),
    "gpuckpt_ttft_seconds": ("histogram", {"tier"}),
    "gpuckpt_wait_seconds": ("histogram", {"tier"}),
    "gpuckpt_wakes": ("counter", {"model", "outcome", "tier"}),
}
"""What dashboards and alerts of others go by: it does not change within a version of the API."""


def metrics() -> Metrics:
    return Metrics(lambda: STATE, lambda: 9)


def record(outcome: str = "ok", status: int = 200, **more: object) -> Record:
    made = Record()
    made.model, made.outcome, made.status, made.tier = "a", outcome, status, "hot"
    for name, value in more.items():
        setattr(made, name, value)
    return made


def values(made: Metrics) -> dict[str, float]:
    """Every sample as Prometheus would call it, but those that are 0 and the times of creation."""
    found = {}
    for family in text_string_to_metric_families(made.text().decode()):
        for sample in family.samples:
            words = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            if sample.value and not sample.name.endswith("_created"):
                found[f"{sample.name}{{{words}}}" if words else sample.name] = sample.value
    return found


def busy() -> Metrics:
    """One that has counted something of every kind."""
    made = metrics()
    for one in (
        event("restored", tier="tmpfs", seconds=0.2, phases={"criu": 0.1, "unaccounted": 0.01}),
        event("started", tier="cold"),
        event("woken", tier="standby"),
        event("failed", tier="disk", reason="no"),
        event("failed", reason="not stopped"),
        event("stopped", replica="a.1", reason="idle"),
        event("stopped", replica="a.1", reason="canary: the server answered 500"),
        event("lost", reason="canary: the server answered 500"),
        event("moved", reason="disk: idle"),
        event("quarantined"),
        event("adopted"),
        event("reloaded", ""),
    ):
        made.event(one)
    made.canary("a", "ok")
    made.request(record(first=0.02, waited=0.01, retries=["broke", "broke"]))
    return made


def test_names_kinds_and_labels_are_a_contract() -> None:
    found = {}
    for family in text_string_to_metric_families(busy().text().decode()):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        if not family.name.endswith("_created"):
            found[family.name] = (family.type, labels)
    assert found == NAMES


def test_what_happens_is_counted() -> None:
    found = values(busy())
    assert {name: value for name, value in found.items() if name.partition("{")[0].endswith("_total")} == {
        "gpuckpt_wakes_total{model=a,outcome=ok,tier=tmpfs}": 1,
        "gpuckpt_wakes_total{model=a,outcome=ok,tier=cold}": 1,
        "gpuckpt_wakes_total{model=a,outcome=ok,tier=standby}": 1,
        "gpuckpt_wakes_total{model=a,outcome=failed,tier=disk}": 1,
        # Only the first word of a reason: what an error says is no label.
        "gpuckpt_evictions_total{model=a,reason=idle}": 1,
        "gpuckpt_evictions_total{model=a,reason=canary}": 1,
        "gpuckpt_replicas_lost_total{model=a,reason=canary}": 1,
        "gpuckpt_golden_moves_total{model=a,to=disk}": 1,
        "gpuckpt_goldens_quarantined_total{model=a}": 1,
        "gpuckpt_canaries_total{model=a,outcome=ok}": 1,
        "gpuckpt_requests_total{code=200,model=a,outcome=ok}": 1,
        "gpuckpt_retries_total{model=a}": 2,
    }
    assert found["gpuckpt_restore_phase_seconds_sum{phase=criu}"] == 0.1
    assert found["gpuckpt_wait_seconds_sum{tier=hot}"] == 0.01
    assert found["gpuckpt_ttft_seconds_bucket{le=0.025,tier=hot}"] == 1
    assert "gpuckpt_ttft_seconds_bucket{le=0.01,tier=hot}" not in found


def test_what_is_there_is_told_when_somebody_reads() -> None:
    assert values(metrics()) == {
        "gpuckpt_replicas{model=a,phase=hot}": 1,
        "gpuckpt_replicas{model=a,phase=standby}": 1,
        "gpuckpt_replicas{model=a,phase=stopping}": 1,
        "gpuckpt_queue_requests{model=a}": 4,
        "gpuckpt_requests_at_work{model=a}": 3,
        "gpuckpt_bytes{tier=hot}": 10,
        "gpuckpt_bytes{tier=standby}": 5,
        "gpuckpt_bytes{tier=tmpfs}": 40,
        "gpuckpt_bytes{tier=disk}": 60,
        "gpuckpt_gpu_bytes": 2,
        "gpuckpt_connections": 9,
    }


def test_requests_that_were_answered_and_those_that_were_not() -> None:
    made = metrics()
    for one in (
        record(),
        record("error", 400),
        record("gone", 0),
        record("refused", 503, tier=""),
        record("broken", 200),
        record("", 500),
        record("refused", 404, model="", tier=""),
    ):
        made.request(one)
    assert made.answered == {"a": 2} and made.failed == {"a": 3}
    assert values(made)["gpuckpt_requests_total{code=404,model=-,outcome=refused}"] == 1
    assert values(made)["gpuckpt_requests_total{code=500,model=a,outcome=failed}"] == 1


def test_times_to_the_first_token_by_tier() -> None:
    made = metrics()
    assert {(one.p50, one.p95, sum(one.counts)) for one in made.ttft().values()} == {(None, None, 0)}
    for number in range(1, 101):
        made.request(record(first=number / 100))
    made.request(record(first=500.0, tier="cold"))
    made.request(record("error", 500, first=0.001))
    made.request(record("broken", 200, first=None))
    found = made.ttft()
    assert list(found) == ["hot", "standby", "tmpfs", "disk", "cold"]
    hot = found["hot"]
    assert hot.bounds == list(BOUNDS) and len(hot.counts) == len(BOUNDS) + 1
    assert (hot.p50, hot.p95) == (0.51, 0.96) and sum(hot.counts) == 100
    assert hot.counts[:4] == [1, 1, 3, 5]  # a bound belongs to what is below it
    assert found["cold"].counts[-1] == 1 and found["cold"].p50 == found["cold"].p95 == 500.0


def test_quantiles_are_of_the_last_ones() -> None:
    made = metrics()
    for seconds in (9.0, 0.02):
        for _ in range(1000):
            made.request(record(first=seconds))
    hot = made.ttft()["hot"]
    assert (hot.p50, hot.p95) == (0.02, 0.02) and sum(hot.counts) == 2000
