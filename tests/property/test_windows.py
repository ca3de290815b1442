"""Any window of a schedule holds as long as it says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.pool.config import Window


@given(st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440))
def test_a_window_is_as_long_as_it_says(day: int, first: int, last: int) -> None:
    if first == last:
        return
    window = Window(frozenset({day}), first, last)
    minutes = sum(window.holds(one, minute) for one in range(7) for minute in range(1440))
    assert minutes == (last - first if first < last else 1440 - first + last)
