"""What replicas hold and may hold of the host's memory and of GPUs."""

from __future__ import annotations

import pytest

from gpuckpt.cuda.driver import Gpu
from gpuckpt.manifest import Held
from gpuckpt.pool.space import Demand, Space, left_by_others, limited, total

GB = 1 << 30
A, B = "GPU-a", "GPU-b"


def gpu(uuid: str, size: float = 80, free: float | None = None, name: str = "H100") -> Gpu:
    return Gpu(uuid, name, int(size * GB), int((size if free is None else free) * GB))


def test_it_is_counted_for_each_gpu() -> None:
    one, other = Space(5, {A: 3}), Space(2, {A: 1, B: 7})
    assert one + other == Space(7, {A: 4, B: 7}) and one - other == Space(3, {A: 2, B: -7})
    assert total([one, other, Space(1)]) == Space(8, {A: 4, B: 7}) and total([]) == Space()
    assert one.lacks(other) == Space(0, {B: 7}) and one.lacks(Space(9, {A: 3})) == Space(4)
    assert Space(-3).lacks(Space(0, {A: 0})) == Space(3) and (one - other).lacks(Space(0, {A: 0, B: 0})) == Space(
        0, {B: 7}
    )
    assert one.is_on([B, A]) and not one.is_on([B]) and not Space(1, {A: 0}).is_on([A])
    assert one and Space(1) and not Space() and not Space(0, {A: 0})


def test_what_comes_is_placed_by_the_rule_of_restores() -> None:
    demand = Demand(5, (Held(A, "H100", 40 * GB),))
    free = Space(5, {A: 41 * GB, B: 79 * GB})
    here = (gpu(A), gpu(B))
    assert demand.placed(here, free) == demand and demand.space == Space(5, {A: 40 * GB + GB // 4})
    elsewhere = demand.placed(here, Space(5, {A: 40 * GB, B: 79 * GB}))
    assert elsewhere == Demand(5, (Held(B, "H100", 40 * GB),))
    assert demand.placed(here, Space(4, free.gpus)) is None
    fixed = Demand(5, demand.held, fixed=True)
    assert fixed.placed(here, free) == fixed and fixed.placed(here, Space(5, {A: 40 * GB, B: 79 * GB})) is None
    # Of a type that is not here nothing is counted, nor where nobody knows which there are.
    other = Demand(5, (Held(A, "A100", 40 * GB),))
    assert other.placed(here, Space(5)) == Demand(5) and demand.placed((), Space(5)) == Demand(5)
    assert Demand(0, (Held(A, "H100", 80 * GB),)).placed(here, free) is None  # the driver takes some


def test_a_limit_is_for_replicas_and_what_the_driver_takes_comes_on_top() -> None:
    found = limited((gpu(A), gpu(B, free=10)), 40 * GB)
    assert [(one.memory / GB, one.free / GB) for one in found] == [(40.25, 40.25), (40.25, 10)]
    assert limited((gpu(A),), 90 * GB) == limited((gpu(A),), None) == (gpu(A),)


@pytest.mark.parametrize(
    ("free", "least", "most", "known", "left"),
    [
        (80, 0, 0, None, 80),
        (30, 40, 40, None, 70),  # others hold 10
        (30, 40, 40, 50, 70),  # they were more
        (30, 0, 40, 75, 70),  # one comes: it may have its memory, or not
        (30, 0, 40, 50, 50),
        (30, 0, 40, 20, 30),
        (79, 40, 40, None, 80),  # never more than there is
    ],
)
def test_others_have_what_is_neither_free_nor_ours(
    free: float, least: int, most: int, known: int | None, left: float
) -> None:
    before = {} if known is None else {A: known * GB}
    (found,) = left_by_others((gpu(A, free=free),), {A: least * GB}, {A: most * GB}, before)
    assert (found.memory / GB, found.free / GB) == (80, left)
