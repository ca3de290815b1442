"""Whatever was measured and however it is split: a phase table adds up to the wall time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.timing import UNACCOUNTED, PhaseTable

TIMES = st.integers(0, 10**12)
NAMES = st.sampled_from("abc")


@given(
    durations=st.lists(st.tuples(NAMES, TIMES, TIMES), max_size=8),
    marks=st.lists(st.tuples(st.sampled_from("xyz"), TIMES), max_size=6),
    split=NAMES,
)
def test_consecutive_phases_add_up_also_when_split(
    durations: list[tuple[str, int, int]], marks: list[tuple[str, int]], split: str
) -> None:
    table = PhaseTable(started_ns=1)
    at = 1
    for name, gap, length in durations:
        table.add(name, at + gap, at + gap + length)
        at += gap + length
    before = {row.name: row.seconds for row in _ended(table, at).rows()}
    table.split(split, marks)
    rows = table.rows()
    tolerance = 1e-9 * (at / 1e9 + 1)
    assert abs(sum(row.seconds for row in rows) - table.wall_seconds) <= tolerance
    assert all(row.seconds >= -tolerance for row in rows)
    assert rows[-1].name == UNACCOUNTED
    assert abs(rows[-1].seconds - before[UNACCOUNTED]) <= tolerance, "a split moves nothing in or out of the table"
    assert len({row.name for row in rows}) == len(rows)


def _ended(table: PhaseTable, at: int) -> PhaseTable:
    table.ended_ns = at
    return table
