"""What the pool decides: single decisions. What must hold whatever happens is in tests/property."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuckpt.cuda.driver import Gpu
from gpuckpt.manifest import Held
from gpuckpt.pool.policy import decide, never_fits, wanted_hot
from gpuckpt.pool.state import (
    COMING,
    Action,
    Budget,
    Freeze,
    Golden,
    Model,
    Move,
    Phase,
    Pin,
    Prepare,
    Replica,
    Restore,
    Rules,
    Start,
    State,
    Stop,
    Wake,
)

GB = 1 << 30
NOW = 1000.0


def model(name: str = "a", *replicas: Replica, **more: Any) -> Model:
    rules = {key: more.pop(key) for key in Rules.__slots__ if key in more and key != "memory"}
    made = Model(
        name,
        Rules(**({"prepare": 0} | rules)),
        Golden.TMPFS,
        golden_bytes=4 * GB,
        memory=GB,
        replicas=replicas,
        asked=NOW,
    )
    return replace(made, **more)


def replica(name: str, phase: Phase = Phase.HOT, idle: float = 0.0, requests: int = 0, **more: Any) -> Replica:
    return Replica(name, phase, NOW - idle, requests, **({"memory": GB} | more))


def ordered(
    *models: Model,
    memory: int | None = None,
    gpus: tuple[int, ...] | None = None,
    store: int | None = None,
    others: int = 0,
) -> list[Action]:
    return list(decide(State(NOW, models, Budget(memory, devices(gpus, others), store))))


def never(one: Model, gpus: tuple[int, ...], others: int = 0) -> bool:
    return never_fits(State(NOW, (one,), Budget(gpus=devices(gpus, others))), one)


def devices(sizes: tuple[int, ...] | None, others: int = 0) -> tuple[Gpu, ...] | None:
    """GPUs of so many GB; ``others`` hold so much of the first."""
    if sizes is None:
        return None
    left = [size - others * (number == 0) for number, size in enumerate(sizes)]
    return tuple(Gpu(f"GPU-{n}", "H100", sizes[n] * GB, free * GB) for n, free in enumerate(left))


def on(gpu: int, size: int, name: str = "H100") -> tuple[Held, ...]:
    return (Held(f"GPU-{gpu}", name, size * GB),)


# ---------------------------------------------------------------------- up


def test_nothing_is_asked_and_nothing_is_done() -> None:
    assert ordered(model(), model("b", replica("b"))) == []


def test_a_request_wakes_the_fastest_tier() -> None:
    assert ordered(model(waiting=1)) == [Restore("a")]
    assert ordered(model("a", replica("x", Phase.STANDBY), waiting=1)) == [Wake("a", "x")]
    assert ordered(model(waiting=1, golden=Golden.DISK)) == [Restore("a"), Move("a", Golden.TMPFS, "asked")]
    assert ordered(model(waiting=1, golden=Golden.NONE)) == [Start("a")]
    assert ordered(model(waiting=1, golden=Golden.QUARANTINED)) == [Start("a")]
    assert ordered(model(waiting=1, golden=Golden.MOVING)) == []


def test_of_several_standbys_the_one_that_was_used_last() -> None:
    held = [replica("x", Phase.STANDBY, 50), replica("y", Phase.STANDBY, 5), replica("z", Phase.STANDBY, 500)]
    assert ordered(model("a", *held, waiting=1, min_standby=3, max_replicas=3)) == [Wake("a", "y")]


@pytest.mark.parametrize("phase", sorted(COMING))
def test_wakes_coalesce(phase: Phase) -> None:
    assert ordered(model("a", replica("x", phase), waiting=5)) == []


def test_one_that_freezes_is_woken_and_not_joined_by_another() -> None:
    assert ordered(model("a", replica("x", Phase.FREEZING), waiting=1)) == []
    assert ordered(model("a", replica("x", Phase.FREEZING), waiting=9, max_replicas=2)) == [Restore("a")]
    assert ordered(model("a", replica("x", Phase.STANDBY), waiting=1)) == [Wake("a", "x")]  # a moment later


def test_a_queue_scales_out_as_far_as_the_rules_let_it() -> None:
    busy = replica("x", requests=2)
    assert wanted_hot(model("a", busy, waiting=9, concurrency=2, max_replicas=8)) == 6
    found = ordered(model("a", busy, replica("s", Phase.STANDBY), waiting=9, concurrency=2, max_replicas=8))
    assert found == [Wake("a", "s"), *[Restore("a")] * 4]
    assert ordered(model("a", busy, waiting=9, concurrency=2, max_replicas=2)) == [Restore("a")]
    # A cold start is done once; the others come from the golden that is made of it.
    assert ordered(model(waiting=9, concurrency=2, max_replicas=8, golden=Golden.NONE)) == [Start("a")]
    starting = replica("x", Phase.STARTING)
    assert ordered(model("a", starting, waiting=9, concurrency=2, max_replicas=8, golden=Golden.NONE)) == []


def test_after_failures_it_waits_before_it_tries_again() -> None:
    assert ordered(model(waiting=1, retry_at=NOW + 1)) == []
    assert ordered(model(waiting=1, golden=Golden.NONE, retry_at=NOW + 1)) == []
    assert ordered(model("a", replica("x", Phase.STANDBY), waiting=1, retry_at=NOW + 1)) == [Wake("a", "x")]


# ---------------------------------------------------------------------- room


def test_who_is_idle_the_longest_gives_way() -> None:
    idle = [model(f"b{n}", replica(f"r{n}", idle=n)) for n in (1, 3, 2)]
    assert ordered(model(waiting=1), *idle, memory=3 * GB) == [Stop("b3", "r3", "room")]
    # What is going is waited for.
    going = model("b3", replica("r3", Phase.STOPPING))
    assert ordered(model(waiting=1), idle[0], going, idle[2], memory=3 * GB) == []
    assert ordered(model(waiting=1), idle[0], idle[2], memory=3 * GB) == [Restore("a")]


def test_who_is_at_work_pinned_waited_for_or_more_important_does_not() -> None:
    for other in (
        model("b", replica("r", requests=1)),
        model("b", replica("r", idle=9), pin=Pin.HOT),
        model("b", replica("r", Phase.STANDBY, 9), pin=Pin.STANDBY),
        model("b", replica("r", idle=9), priority=1),
    ):
        assert ordered(model(waiting=1), other, memory=GB) == []
    assert ordered(model(waiting=1), model("b", replica("r"), waiting=1), memory=GB) == []


def test_a_minimum_gives_way_to_requests_but_last() -> None:
    kept = model("b", replica("r", Phase.STANDBY, 900), min_standby=1)
    spare = model("c", replica("s", idle=1))
    assert ordered(model(waiting=1), kept, spare, memory=2 * GB) == [Stop("c", "s", "room")]
    assert ordered(model(waiting=1), kept, memory=GB) == [Stop("b", "r", "room")]


def test_for_gpu_memory_a_frozen_one_is_enough() -> None:
    needy = model(waiting=1, gpus=on(0, 40))
    other = model("b", replica("r", idle=5, gpus=on(0, 40)), gpus=on(0, 40))
    assert ordered(needy, other, gpus=(60,)) == [Freeze("b", "r")]
    standby = model("b", replica("r", Phase.STANDBY, 5, gpus=on(0, 40)), gpus=on(0, 40))
    assert ordered(needy, standby, gpus=(60,)) == [Restore("a", gpus=on(0, 40))]
    # A standby of its own needs the GPU too.
    own = model("a", replica("x", Phase.STANDBY, gpus=on(0, 40)), waiting=1, gpus=on(0, 40))
    assert ordered(own, other, gpus=(60,)) == [Freeze("b", "r")]
    assert ordered(own, other, gpus=(90,)) == [Wake("a", "x", on(0, 40))]
    # What it holds now counts, not what its golden held.
    grown = model("a", replica("x", Phase.STANDBY, gpus=on(0, 60)), waiting=1, gpus=on(0, 40))
    assert ordered(grown, other, gpus=(90,)) == [Freeze("b", "r")]


def test_who_freezes_is_waited_for() -> None:
    needy = model(waiting=1, gpus=on(0, 40))
    freezing = model("b", replica("r", Phase.FREEZING, gpus=on(0, 40)), gpus=on(0, 40))
    hot = model("c", replica("s", idle=50, gpus=on(0, 20)), gpus=on(0, 20))
    assert ordered(needy, freezing, hot, gpus=(65,)) == []
    # What it does not give up of its GPU's memory will be the host's, and takes room there.
    heavy = model("b", replica("r", Phase.FREEZING, gpus=on(0, 40), carried=40 * GB), gpus=on(0, 40))
    assert ordered(needy, heavy, hot, gpus=(65,), memory=3 * GB) == [Stop("c", "s", "room")]


def test_memory_of_one_gpu_is_none_of_another_s() -> None:
    busy = [model(f"b{n}", replica(f"r{n}", requests=1, gpus=on(n, 50)), gpus=on(n, 50)) for n in (0, 1)]
    needy = model(waiting=1, gpus=on(0, 40))
    assert ordered(needy, *busy, gpus=(80, 80)) == []  # 60 of both, but 30 of each
    idle = [model(f"b{n}", replica(f"r{n}", idle=9 - n, gpus=on(n, 50)), gpus=on(n, 50)) for n in (0, 1)]
    assert ordered(needy, *idle, gpus=(80, 80)) == [Freeze("b0", "r0")]  # idle the longest; one is enough
    assert ordered(needy, busy[0], idle[1], gpus=(80, 80)) == [Freeze("b1", "r1")]
    # Who frees nothing where it is needed stays as it is.
    small = model("c", replica("s", idle=50, gpus=on(1, 5)), gpus=on(1, 5))
    assert ordered(needy, idle[0], small, busy[1], gpus=(80, 80)) == [Freeze("b0", "r0")]


def test_it_comes_back_to_where_it_was_or_to_another_of_its_type() -> None:
    other = model("b", replica("r", idle=9, gpus=on(0, 50)), gpus=on(0, 50))
    assert ordered(model(waiting=1, gpus=on(0, 40)), other, gpus=(80, 80)) == [Restore("a", gpus=on(1, 40))]
    assert ordered(model(waiting=1, gpus=on(0, 20)), other, gpus=(80, 80)) == [Restore("a", gpus=on(0, 20))]
    assert ordered(model(waiting=1, gpus=on(0, 40), fixed=True), other, gpus=(80, 80)) == [Freeze("b", "r")]
    # Of a type that is not here nothing can be counted; the restore says why it fails.
    assert ordered(model(waiting=1, gpus=on(0, 40, "A100")), other, gpus=(80, 80)) == [Restore("a")]
    # One that is coming takes room where it will be.
    coming = model("b", replica("r", Phase.RESTORING), gpus=on(0, 70), max_replicas=2)
    assert ordered(coming, model(waiting=1, gpus=on(0, 40)), gpus=(80, 80)) == [Restore("a", gpus=on(1, 40))]
    elsewhere = model("b", replica("r", Phase.RESTORING, gpus=on(1, 70)), gpus=on(0, 70), max_replicas=2)
    assert ordered(elsewhere, model(waiting=1, gpus=on(0, 40)), gpus=(80, 80)) == [Restore("a", gpus=on(0, 40))]
    assert ordered(coming, model(waiting=1, gpus=on(0, 40), fixed=True), gpus=(80, 80)) == []


def test_one_on_several_gpus_needs_room_on_each() -> None:
    both = (*on(0, 40), *on(1, 40))
    idle = [model(f"b{n}", replica(f"r{n}", idle=9 - n, gpus=on(n, 50)), gpus=on(n, 50)) for n in (0, 1)]
    found = ordered(model(waiting=1, gpus=both), *idle, gpus=(80, 80))
    assert found == [Freeze("b0", "r0"), Freeze("b1", "r1")]
    assert ordered(model(waiting=1, gpus=both), *idle, gpus=(80, 80, 80, 80)) == [
        Restore("a", gpus=(*on(2, 40), *on(3, 40)))
    ]
    assert never(model(waiting=1, gpus=both), gpus=(80,)) and not never(model(waiting=1, gpus=both), gpus=(80, 80))
    assert never(model(waiting=1, gpus=on(0, 80)), gpus=(80,))  # the driver takes some beside it


def test_a_cold_start_is_where_its_golden_was_made() -> None:
    other = model("b", replica("r", idle=9, gpus=on(0, 50)), gpus=on(0, 50))
    lost = model(waiting=1, gpus=on(0, 40), golden=Golden.NONE)
    assert ordered(lost, other, gpus=(80, 80)) == [Freeze("b", "r")]


def test_what_exceeds_a_limit_freezes_but_nobody_goes_for_what_others_have_taken() -> None:
    hot = model("b", replica("r", idle=9, gpus=on(0, 50)), gpus=on(0, 50))
    assert ordered(hot, gpus=(50,)) == [] and ordered(hot, gpus=(40,)) == [Freeze("b", "r")]
    assert ordered(hot, gpus=(80,), others=40) == []
    pinned = model("b", replica("r", idle=9, gpus=on(0, 50)), gpus=on(0, 50), pin=Pin.HOT)
    assert ordered(pinned, gpus=(40,)) == []


def test_others_on_a_gpu_may_go_so_that_nobody_is_refused_for_them() -> None:
    needy = model(waiting=1, gpus=on(0, 60))
    assert ordered(needy, gpus=(80,), others=40) == [] and not never(needy, gpus=(80,), others=40)
    assert ordered(needy, gpus=(80, 80), others=40) == [Restore("a", gpus=on(1, 60))]
    # What would be idle there is not enough, and stays.
    small = model("b", replica("r", idle=9, gpus=on(0, 15)), gpus=on(0, 15))
    assert ordered(needy, small, gpus=(80,), others=40) == []


def test_a_standby_that_has_no_room_any_more_gives_way_to_a_fresh_one() -> None:
    grown = replica("x", Phase.STANDBY, gpus=on(0, 75))
    fresh = Restore("a", gpus=on(0, 60))
    assert ordered(model("a", grown, waiting=1, gpus=on(0, 60)), gpus=(70,)) == [Stop("a", "x", "room"), fresh]
    # Where a fresh one has none either, nobody goes, and it is told when that will never change.
    large = model("a", grown, waiting=1, gpus=on(0, 75))
    assert ordered(large, gpus=(70,)) == [] and never(large, gpus=(70,))
    assert ordered(large, gpus=(80,), others=10) == [] and not never(large, gpus=(80,), others=10)


def test_nobody_goes_for_what_would_not_fit_even_so() -> None:
    # Its own replicas stay, whatever it wants.
    wide = model("a", replica("x", requests=8, gpus=on(0, 60)), waiting=4, max_replicas=2, gpus=on(0, 60))
    idle = model("b", replica("r", idle=9, gpus=on(0, 15)), gpus=on(0, 15))
    assert ordered(wide, idle, gpus=(80,)) == []
    # Others are at work on both: it waits, and what is idle beside them is not enough.
    busy = [model(f"z{n}", replica(f"z{n}", requests=1, gpus=on(n, 40)), gpus=on(n, 40)) for n in (0, 1)]
    assert ordered(model(waiting=1, gpus=on(0, 60)), *busy, idle, gpus=(80, 80)) == []


@pytest.mark.parametrize("rules", [{"min_standby": 1, "priority": 1}, {"pin": Pin.STANDBY}])
def test_what_is_kept_as_a_standby_keeps_no_gpu(rules: dict[str, Any]) -> None:
    kept = model("h", replica("r", idle=9, gpus=on(0, 60)), gpus=on(0, 60), **rules)
    needy = model(waiting=1, gpus=on(0, 40))
    state = State(NOW, (kept, needy), Budget(gpus=devices((80,))))
    assert not never_fits(state, needy) and decide(state) == ()  # it freezes when it has been idle for long enough
    frozen = model("h", replica("r", Phase.STANDBY, gpus=on(0, 60)), gpus=on(0, 60), **rules)
    assert ordered(frozen, needy, gpus=(80,)) == [Restore("a", gpus=on(0, 40))]


def test_requests_come_before_what_is_only_to_be_kept() -> None:
    scaled = [
        model(name, replica(name, Phase.STANDBY if name == "a" else Phase.HOT, gpus=on(0, 60)), gpus=on(0, 60), scale=1)
        for name in "ab"
    ]
    assert ordered(*scaled, gpus=(80,)) == []  # to and fro would serve nobody
    waits = model("c", waiting=1, gpus=on(0, 60), asked=NOW + 5)
    assert ordered(*scaled, waits, gpus=(80,)) == [Freeze("b", "b")]
    both_frozen = model("b", replica("b", Phase.STANDBY, gpus=on(0, 60)), gpus=on(0, 60), scale=1)
    assert ordered(scaled[0], both_frozen, waits, gpus=(80,)) == [Restore("c", gpus=on(0, 60))]


def test_a_minimum_is_restored_where_the_host_has_room_for_it_frozen() -> None:
    heavy = model(min_standby=1, gpus=on(0, 40), carried=40 * GB)
    assert ordered(heavy, gpus=(80,), memory=40 * GB) == []
    assert ordered(heavy, gpus=(80,), memory=41 * GB) == [Restore("a", standby=True, gpus=on(0, 40))]


def test_a_cold_start_makes_room_also_where_its_golden_never_was() -> None:
    imported = model(waiting=1, golden=Golden.QUARANTINED, gpus=on(9, 40))
    hot = model("b", replica("r", idle=9, gpus=on(0, 60)), gpus=on(0, 60))
    assert ordered(imported, hot, gpus=(80,)) == [Freeze("b", "r")]
    assert ordered(imported, gpus=(80,)) == [Start("a", on(0, 40))]


# ---------------------------------------------------------------------- down


def test_idle_it_sinks_tier_by_tier() -> None:
    hot = {"idle_freeze": 60.0, "idle_release": 600.0}
    assert ordered(model("a", replica("x", idle=59), **hot)) == []
    assert ordered(model("a", replica("x", idle=61), **hot)) == [Freeze("a", "x")]
    assert ordered(model("a", replica("x", idle=61, requests=1), **hot)) == []
    assert ordered(model("a", replica("x", Phase.STANDBY, 599), **hot)) == []
    assert ordered(model("a", replica("x", Phase.STANDBY, 601), **hot)) == [Stop("a", "x", "idle")]
    assert ordered(model("a", asked=NOW - 3601, idle_disk=3600.0)) == [Move("a", Golden.DISK, "idle")]
    assert ordered(model("a", asked=NOW - 3599, idle_disk=3600.0)) == []
    mapped = model("a", replica("x", Phase.STANDBY, 5), asked=NOW - 3601, idle_disk=3600.0)
    assert ordered(mapped) == []


@pytest.mark.parametrize(
    ("rules", "phase", "expected"),
    [
        ({"pin": Pin.HOT}, Phase.HOT, []),
        ({"pin": Pin.STANDBY}, Phase.HOT, [Freeze("a", "x")]),
        ({"pin": Pin.STANDBY}, Phase.STANDBY, []),
        ({"min_standby": 1}, Phase.STANDBY, []),
        ({"warm": True}, Phase.STANDBY, []),
        ({"pin": Pin.HOT}, Phase.STANDBY, [Wake("a", "x")]),
    ],
)
def test_what_is_kept(rules: dict[str, object], phase: Phase, expected: list[Action]) -> None:
    assert ordered(model("a", replica("x", phase, 5000), **rules)) == expected


def test_a_minimum_is_restored_where_there_is_room() -> None:
    assert ordered(model(min_standby=2)) == [Restore("a", standby=True)] * 2
    assert ordered(model("a", replica("x"), min_standby=2)) == [Restore("a", standby=True)]
    assert ordered(model(min_standby=2), memory=GB) == [Restore("a", standby=True)]
    assert ordered(model(min_standby=1), model("b", replica("r", idle=9)), memory=GB) == []
    assert ordered(model(min_standby=1, golden=Golden.NONE)) == [Start("a")]
    # The one that a request has restored counts.
    assert ordered(model(min_standby=1, waiting=1)) == [Restore("a")]


def test_goldens_leave_the_tmpfs_when_it_is_full_and_come_back_when_asked_for() -> None:
    old, new = model("old", asked=NOW - 100), model("new", asked=NOW - 1)
    assert ordered(old, new, store=4 * GB) == [Move("old", Golden.DISK, "room")]
    assert ordered(old, new, store=8 * GB) == []
    on_disk = model("d", replica("x"), golden=Golden.DISK)
    assert ordered(old, on_disk, store=8 * GB) == [Move("d", Golden.TMPFS, "asked")]
    # Where there is no room for it, what nobody uses makes room; it comes when that has gone.
    assert ordered(old, on_disk, store=7 * GB) == [Move("old", Golden.DISK, "room")]
    assert ordered(replace(old, golden=Golden.MOVING), on_disk, store=7 * GB) == []
    assert ordered(model("old", priority=1), on_disk, store=7 * GB) == []
    # And so it does for one that could not be made, of which is known how much it lacked.
    cramped = replace(model("n"), golden=Golden.NONE, cramped=4 * GB, retry_at=NOW + 1, make_at=NOW + 1)
    assert ordered(old, cramped, store=8 * GB) == [Move("old", Golden.DISK, "room")]


def test_no_golden_leaves_the_tmpfs_in_vain() -> None:
    old, newer = model("old", asked=NOW - 100), model("newer", asked=NOW - 50)
    cramped = replace(model("n"), golden=Golden.NONE, cramped=5 * GB, retry_at=NOW + 1, make_at=NOW + 1)
    assert ordered(old, cramped, store=8 * GB) == []  # that would not be enough
    both = [Move("old", Golden.DISK, "room"), Move("newer", Golden.DISK, "room")]
    assert ordered(old, newer, cramped, store=8 * GB) == both
    assert ordered(old, newer, replace(cramped, cramped=1), store=8 * GB) == both[:1]  # nor more than are needed
    # One after the other: what the first one leaves may be enough.
    assert ordered(replace(old, golden=Golden.MOVING), newer, cramped, store=8 * GB) == []
    # The same for one that exists, and is larger than all that could go.
    large = replace(model("d", replica("x"), golden=Golden.DISK), golden_bytes=9 * GB)
    assert ordered(old, large, store=8 * GB) == []
    # Idle replicas go for one that is asked for, and their goldens then.
    resting = model("r", replica("x", Phase.STANDBY, idle=1), replica("y", idle=1))
    asked = replace(cramped, waiting=1)
    assert ordered(resting, replace(asked, cramped=GB), store=5 * GB) == [
        Stop("r", "x", "room"),
        Stop("r", "y", "room"),
    ]
    assert ordered(resting, replace(cramped, cramped=GB), store=5 * GB) == []
    assert ordered(resting, asked, store=5 * GB) == []  # nor they in vain
    assert ordered(resting, old, replace(asked, cramped=GB), store=8 * GB) == both[:1]
    for busy in (
        model("r", replica("x", requests=1)),
        model("r", replica("x", Phase.STANDBY), min_standby=1),
        model("r", replica("x", Phase.STANDBY, idle=1), priority=1),
    ):
        assert ordered(busy, replace(asked, cramped=GB), store=5 * GB) == []
    # Who takes what is there already does not leave it to another.
    first, second = (model(name, replica(name), golden=Golden.DISK, asked=NOW - 1) for name in "de")
    assert ordered(old, first, second, store=11 * GB) == [both[0], Move("d", Golden.TMPFS, "asked")]


def test_one_golden_is_made_at_a_time_the_most_wanted_first() -> None:
    none = [model(name, golden=Golden.NONE, asked=NOW - age) for name, age in (("a", 9), ("b", 1), ("c", 5))]
    assert ordered(*none) == [Start("b")]
    assert ordered(*none, model("d", replica("x", Phase.STARTING), golden=Golden.NONE)) == []
    # But who is asked for does not wait for it.
    assert ordered(*none, model("d", golden=Golden.NONE, waiting=1)) == [Start("d")]
    assert ordered(model("a", replica("x", Phase.STARTING), golden=Golden.NONE), replace(none[1], waiting=1)) == [
        Start("b")
    ]
    assert ordered(none[0], memory=GB - 1) == []


def test_a_pool_that_drains_begins_nothing() -> None:
    assert decide(State(NOW, (model(waiting=5),), draining=True)) == ()


# ---------------------------------------------------------------------- what somebody has ordered


def test_a_scale_is_kept_whether_anybody_asks_or_not() -> None:
    assert ordered(model(max_replicas=3, scale=2)) == [Restore("a"), Restore("a")]
    idle = [replica("x", idle=1e6), replica("y", idle=1e6)]
    assert ordered(model("a", *idle, max_replicas=3, scale=2)) == []
    assert ordered(model("a", replica("x", Phase.STANDBY), max_replicas=3, scale=1)) == [Wake("a", "x")]


def test_a_smaller_scale_takes_what_is_more_than_that_at_once() -> None:
    several = (replica("x", requests=1), replica("y", idle=5), replica("z", Phase.STANDBY))
    assert ordered(model("a", *several, max_replicas=3, scale=2)) == [Stop("a", "z", "scale")]
    assert ordered(model("a", *several, max_replicas=3, scale=1)) == [Stop("a", "z", "scale"), Stop("a", "y", "scale")]


def test_replicas_that_have_grown_beyond_the_budget_make_those_that_are_idle_go() -> None:
    large, idle = model("a", replica("x", requests=1, memory=3 * GB)), model("b", replica("y"), priority=5)
    assert ordered(large, idle, memory=3 * GB) == [Stop("b", "y", "room")]
    assert ordered(large, idle, memory=4 * GB) == []


def test_of_several_that_nobody_knows_one_is_started_at_a_time() -> None:
    unknown = [replace(model(name, waiting=1), golden=Golden.NONE, memory=0) for name in "abc"]
    assert ordered(*unknown, memory=4 * GB) == [Start("a")]
    starting = replace(unknown[0], replicas=(replica("x", Phase.STARTING, memory=0),))
    assert ordered(starting, *unknown[1:], memory=4 * GB) == []


def test_a_scale_of_nothing_takes_what_is_idle_whatever_the_rules_keep() -> None:
    busy, idle = replica("x", requests=1), replica("y", Phase.STANDBY)
    assert ordered(model("a", busy, idle, max_replicas=3, min_standby=2, scale=0)) == [Stop("a", "y", "scale")]
    # A request is served all the same.
    assert ordered(model(scale=0, waiting=1)) == [Restore("a")]


def test_a_drained_model_gives_up_what_is_idle_and_gets_nothing() -> None:
    held = (replica("x", requests=1), replica("y"), replica("z", Phase.STANDBY))
    drained = model("a", *held, max_replicas=5, min_standby=5, pin=Pin.HOT, drained=True)
    assert ordered(drained) == [Stop("a", "z", "drained"), Stop("a", "y", "drained")]
    assert ordered(replace(model(drained=True), golden=Golden.NONE)) == []


def test_one_that_is_being_looked_at_neither_freezes_nor_goes() -> None:
    looked_at = replica("x", idle=1e6, checking=True)
    assert ordered(model("a", looked_at)) == []
    assert ordered(model("a", looked_at), model("b", waiting=1), memory=GB) == []


# ---------------------------------------------------------------------- containers made ahead


def test_containers_are_prepared_one_at_a_time_while_nothing_comes() -> None:
    a, b = model(max_replicas=2, prepare=None), model("b", max_replicas=1, prepare=None, priority=1)
    assert ordered(a, b) == [Prepare("b")]
    assert ordered(a, replace(b, prepared=1)) == [Prepare("a")]
    assert ordered(replace(a, preparing=True), b) == []
    assert ordered(replace(a, prepared=2), replace(b, prepared=1)) == []
    assert ordered(replace(a, waiting=1), b) == [Restore("a")]
    assert ordered(model("a", replica("x", Phase.RESTORING), prepare=None, max_replicas=2)) == []
    assert ordered(replace(a, prepare_at=NOW + 1)) == []
    assert ordered(model(max_replicas=4, prepare=1, prepared=1)) == []


def test_a_cold_start_needs_room_for_all_that_its_replicas_share() -> None:
    bad = replace(model(), golden=Golden.QUARANTINED, cold=4 * GB, waiting=1)
    assert ordered(bad, memory=4 * GB) == [Start("a")]
    idle = model("b", replica("y"))
    assert ordered(bad, idle, memory=4 * GB) == [Stop("b", "y", "room")]
    assert ordered(replace(bad, waiting=0), idle, memory=4 * GB) == []
    # While it is at work nobody else gets that room.
    started = replace(bad, waiting=0, replicas=(replica("x", Phase.STARTING, memory=0),))
    assert ordered(started, model("b", waiting=1), memory=4 * GB) == []


def test_what_never_fits_is_known() -> None:
    small, large = model(memory=GB), model("b", memory=5 * GB)
    state = State(NOW, (small, large), Budget(memory=4 * GB))
    assert never_fits(state, large) and not never_fits(state, small)
    pinned = model("c", replica("x"), memory=GB, pin=Pin.STANDBY)
    state = State(NOW, (pinned, model("d", memory=4 * GB)), Budget(memory=4 * GB))
    assert never_fits(state, state.models[1])


def test_a_move_that_has_failed_is_not_tried_at_once() -> None:
    late = replace(model(), move_at=NOW + 1)
    assert ordered(late, store=GB) == []
    assert ordered(replace(late, golden=Golden.DISK, waiting=1), store=9 * GB) == [Restore("a")]
