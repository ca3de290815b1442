"""The few statistics that the benchmarks report, each defined here so that a number can be checked by hand.

Samples are small (five to a few hundred), so nothing assumes a distribution. Percentiles are by nearest rank: what is
reported as p95 is a time that really was measured, and of fewer than 20 samples it is the slowest one. (Linear
interpolation, numpy's default, would report for five samples a time that none of them took.)
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number of values the mean of the two in the middle.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("the median of no values is not defined")
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    # Not (a + b) / 2: the sum of two large values may overflow.
    return ordered[half - 1] + (ordered[half] - ordered[half - 1]) / 2


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` per cent of the values do not exceed (nearest rank).

    ``percent`` is from 0 (the smallest value) to 100 (the largest). Raises ValueError for no values.
    """
    if not values:
        raise ValueError("a percentile of no values is not defined")
    if not 0 <= percent <= 100:
        raise ValueError(f"a percentile is from 0 to 100, not {percent}")
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = median,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Where ``statistic`` lies with the given ``level`` of confidence: the percentile bootstrap.

    The same values give the same interval (``seed``). Of a handful of values it is little more than their range.
    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval of no values is not defined")
    if min(values) == max(values):  # whatever is drawn, it is these
        return statistic(values), statistic(values)
    chance = random.Random(seed)
    drawn = [statistic(chance.choices(values, k=len(values))) for _ in range(resamples)]
    tail = (1 - level) / 2 * 100
    return percentile(drawn, tail), percentile(drawn, 100 - tail)


def ratio_interval(
    above: Sequence[float],
    below: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Where the ratio of two medians lies: the percentile bootstrap, each side drawn on its own.

    Raises ValueError if a side has no values.
    """
    if not above or not below:
        raise ValueError("an interval of no values is not defined")
    chance = random.Random(seed)
    drawn = [
        median(chance.choices(above, k=len(above))) / median(chance.choices(below, k=len(below)))
        for _ in range(resamples)
    ]
    tail = (1 - level) / 2 * 100
    return percentile(drawn, tail), percentile(drawn, 100 - tail)


@functools.lru_cache(maxsize=4096)
def _interval(values: tuple[float, ...]) -> tuple[float, float]:
    # Results are computed anew after every sample, of which most series got none.
    return bootstrap_interval(values)


@dataclass(frozen=True)
class Summary:
    """Measured times in the order of measurement, and what is reported of them."""

    all: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.all)

    @property
    def p50(self) -> float:
        return median(self.all)

    @property
    def p95(self) -> float:
        return percentile(self.all, 95)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the median."""
        return _interval(self.all)

    def as_dict(self) -> dict[str, float | int | list[float]]:
        low, high = self.interval
        return {
            "p50": round(self.p50, 6),
            "p95": round(self.p95, 6),
            "n": self.n,
            "min": round(min(self.all), 6),
            "max": round(max(self.all), 6),
            "p50_interval95": [round(low, 6), round(high, 6)],
            "all": [round(value, 6) for value in self.all],
        }
