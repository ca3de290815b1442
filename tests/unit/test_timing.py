"""Phase tables add up to the wall time, whatever was measured."""

from __future__ import annotations

import time

import pytest

from gpuckpt import timing
from gpuckpt.timing import UNACCOUNTED, PhaseTable

S = 1_000_000_000


def table(*spans: tuple[str, float, float], wall: float) -> PhaseTable:
    made = PhaseTable(started_ns=0, ended_ns=int(wall * S))
    for name, begin, end in spans:
        made.add(name, int(begin * S), int(end * S))
    return made


def rows(made: PhaseTable) -> list[tuple[str, float]]:
    return [(row.name, round(row.seconds, 9)) for row in made.rows()]


def test_what_no_phase_claims_is_the_last_row() -> None:
    assert rows(table(("b", 3, 4), ("a", 0, 2), wall=10)) == [("a", 2), ("b", 1), (UNACCOUNTED, 7)]


def test_phases_of_one_name_are_one_row() -> None:
    assert rows(table(("a", 0, 1), ("b", 1, 2), ("a", 2, 4), wall=4)) == [("a", 3), ("b", 1), (UNACCOUNTED, 0)]


def test_a_phase_that_ends_before_it_began_took_no_time() -> None:
    assert rows(table(("a", 2, 1), wall=3)) == [("a", 0), (UNACCOUNTED, 3)]


def test_splitting_keeps_the_sum() -> None:
    made = table(("a", 0, 1), ("dump", 1, 5), ("b", 5, 6), wall=6)
    made.split("dump", [("second", 4 * S), ("first", 2 * S)])
    assert rows(made) == [("a", 1), ("dump", 1), ("first", 2), ("second", 1), ("b", 1), (UNACCOUNTED, 0)]


def test_marks_outside_of_a_phase_are_pressed_to_its_edge() -> None:
    made = table(("dump", 1, 5), wall=5)
    made.split("dump", [("early", 0), ("late", 9 * S)])
    assert rows(made) == [("dump", 0), ("early", 4), ("late", 0), (UNACCOUNTED, 1)]


def test_splitting_what_is_not_there_changes_nothing() -> None:
    made = table(("dump", 0, 1), wall=1)
    made.split("absent", [("x", 1)])
    made.split("dump", [])
    assert rows(made) == [("dump", 1), (UNACCOUNTED, 0)]


def test_a_phase_that_raises_is_timed_too() -> None:
    made = PhaseTable()
    with pytest.raises(ZeroDivisionError), made.phase("broken"):
        raise ZeroDivisionError
    assert [row.name for row in made.rows()] == ["broken", UNACCOUNTED]


def test_stopping_ends_it_once() -> None:
    made = PhaseTable()
    made.stop()
    ended = made.ended_ns
    made.stop()
    assert made.ended_ns == ended and made.wall_seconds == made.wall_seconds


def test_a_real_table_adds_up() -> None:
    made = PhaseTable()
    with made.phase("a"):
        time.sleep(0.002)
    with made.phase("b"):
        pass
    made.stop()
    listed = made.as_list()
    assert [row["name"] for row in listed] == ["a", "b", UNACCOUNTED]
    assert sum(float(row["seconds"]) for row in listed) == pytest.approx(made.wall_seconds, abs=1e-5)
    assert float(listed[0]["seconds"]) >= 0.002


def test_this_process_began_before_now_and_not_long_ago() -> None:
    age = (timing.now_ns() - timing.process_started_ns()) / 1e9
    assert 0 <= age < 24 * 3600
    # Who is kept waiting between the two clocks' readings finds a later time: some of many are not.
    once, again = (min(timing.process_started_ns() for _ in range(50)) for _ in range(2))
    assert abs(once - again) < 0.02 * S
