"""Who leaves the device, and when they come back: decisions without a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpuckpt_guest.kv import policy
from gpuckpt_guest.kv.policy import Candidate, Choice, Costs
from hypothesis import given
from hypothesis import strategies as st

MB = 1 << 20
COSTS = Costs(out=1e9, into=1e9, pass_s=0.05, token_s=0.001)


def one(key: int, **what: float | int | None) -> Candidate:
    given = {"bytes": 100 * MB, "copied": 100 * MB, "idle": 1.0} | what
    return Candidate(key, **given)


def order(*candidates: Candidate) -> list[int]:
    """In which order they would go."""
    return [found.key for found in sorted(candidates, key=lambda each: policy.score(each, COSTS))]


def test_the_longest_idle_goes_first() -> None:
    assert order(one(1, idle=3), one(2, idle=50), one(3, idle=0.1)) == [2, 1, 3]


def test_what_a_client_has_said_counts_for_more() -> None:
    # The first has been idle for long, but comes back in a moment; of the second it is known that it will not.
    assert order(one(1, idle=50, expected=0.5), one(2, idle=0.1, expected=600)) == [2, 1]
    # What was expected and has not come is as unknown as others.
    assert policy.wait(one(1, idle=9, expected=-3)) == 9


def test_what_need_not_be_copied_goes_first() -> None:
    assert order(one(1), one(2, copied=0)) == [2, 1]


def test_no_more_leave_than_are_needed() -> None:
    crowd = [one(key, bytes=10 * MB, copied=10 * MB, idle=key + 1) for key in range(5)]
    assert policy.leaving(crowd, 25 * MB, COSTS, 1 << 40) == [Choice(4, False), Choice(3, False), Choice(2, False)]
    # Small ones that a large one makes needless stay.
    assert policy.leaving([one(0, bytes=MB, copied=MB, idle=99), one(1)], 50 * MB, COSTS, 1 << 40) == [Choice(1, False)]


def test_computing_again_is_chosen_where_it_is_cheaper() -> None:
    slow = replace(COSTS, out=1e6, into=1e6)
    again = one(1, replay=0.5)
    assert policy.leaving([again], MB, COSTS, 1 << 40) == [Choice(1, False)]
    assert policy.leaving([again], MB, slow, 1 << 40) == [Choice(1, True)]
    # Never if that gives other bits.
    assert policy.leaving([one(1)], MB, slow, 1 << 40) == [Choice(1, False)]


def test_where_nothing_can_be_copied_only_what_can_be_computed_again_goes() -> None:
    crowd = [one(1), one(2, replay=9.0), one(3, copied=0)]
    assert policy.leaving(crowd, 1 << 40, COSTS, 0) == [Choice(3, False), Choice(2, True)]


@pytest.mark.parametrize("passes", [1, 100])
def test_the_price_of_computing_again(passes: int) -> None:
    assert COSTS.replay(passes, 1000) == pytest.approx(passes * 0.05 + 1.0)


def test_times_go_with_bytes() -> None:
    assert policy.early(1_000_000_000, COSTS) == pytest.approx(2.0)
    assert policy.tenure(1_000_000_000, COSTS) == pytest.approx(8.0)
    assert policy.tenure(0, COSTS) == 0.1


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        key=st.integers(0, 1000),
        bytes=st.integers(1, 1 << 30),
        copied=st.integers(0, 1 << 30),
        idle=st.floats(0, 1e6),
        expected=st.none() | st.floats(-1e6, 1e6),
        replay=st.none() | st.floats(0, 1e4),
    ),
    unique_by=lambda each: each.key,
    max_size=12,
)


@given(candidates=CANDIDATES, needed=st.integers(0, 1 << 33), space=st.integers(0, 1 << 32))
def test_whatever_there_is(candidates: list[Candidate], needed: int, space: int) -> None:
    known = {each.key: each for each in candidates}
    chosen = policy.leaving(candidates, needed, COSTS, space)
    assert len({choice.key for choice in chosen}) == len(chosen)
    assert sum(known[choice.key].copied for choice in chosen if not choice.drop) <= space
    assert all(known[choice.key].replay is not None for choice in chosen if choice.drop)
    freed = sum(known[choice.key].bytes for choice in chosen)
    # Nobody goes in vain, and if there is too little everybody goes who can.
    assert all(freed - known[choice.key].bytes < needed for choice in chosen)
    if freed < needed:
        left = [each for each in candidates if each.key not in {choice.key for choice in chosen}]
        assert all(each.replay is None and each.copied > 0 for each in left)
