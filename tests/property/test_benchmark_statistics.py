"""The benchmarks' arithmetic: what holds of any samples."""

from __future__ import annotations

import statistics as reference

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import density
from benchmarks.sessions_common import paired
from benchmarks.sessions_resume import cuts
from benchmarks.statistics import bootstrap_interval, median, percentile, ratio_interval
from benchmarks.suite import orders

times = st.lists(st.floats(min_value=0.001, max_value=1e6), min_size=1, max_size=60)


@given(times)
def test_median_is_the_standard_librarys(values: list[float]) -> None:
    assert median(values) == pytest.approx(reference.median(values))


@given(times, st.floats(min_value=0, max_value=100))
def test_percentile_is_a_measured_value_with_enough_below_it(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100
    assert sum(value < found for value in values) < max(len(values) * percent / 100, 1)


@given(times, st.floats(min_value=0, max_value=100), st.floats(min_value=0, max_value=100))
def test_percentile_grows_with_the_per_cent(values: list[float], one: float, other: float) -> None:
    assert percentile(values, min(one, other)) <= percentile(values, max(one, other))


@given(times)
def test_bootstrap_interval_lies_within_the_values_and_repeats(values: list[float]) -> None:
    low, high = bootstrap_interval(values, resamples=50)
    assert min(values) <= low <= high <= max(values)
    assert (low, high) == bootstrap_interval(values, resamples=50)


positive = st.lists(st.floats(min_value=0.01, max_value=1e4), min_size=1, max_size=30)


@given(positive, positive)
def test_interval_of_a_ratio_lies_within_what_is_possible(above: list[float], below: list[float]) -> None:
    low, high = ratio_interval(above, below, resamples=50)
    assert min(above) / max(below) * 0.999 <= low <= high <= max(above) / min(below) * 1.001


@given(st.floats(min_value=1e6, max_value=1e9), st.floats(min_value=0, max_value=1e9))
def test_memory_of_a_further_replica_is_the_slope(slope: float, base: float) -> None:
    samples = [{"replicas": count, "bytes": base + slope * count} for count in (1, 2, 4, 8, 16) for _ in range(3)]
    assert density.per_extra(samples, "bytes") == pytest.approx(slope, rel=1e-6)
    assert density.per_extra(samples[:3], "bytes") is None


@given(st.integers(min_value=0, max_value=99))
def test_orders_are_the_same_for_a_seed_and_hold_every_method(seed: int) -> None:
    methods = list("abcdef")
    once, twice = (list(orders(methods, 8, seed)) for _ in range(2))
    assert once == twice
    assert all(sorted(order) == methods for order in once)


pairs = st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0.01, 1e4)), min_size=1, max_size=30)


@settings(max_examples=25)  # three intervals each, of which other tests try hundreds
@given(pairs)
def test_a_paired_ratio_is_the_median_of_the_pairs_own(found: list[tuple[float, float]]) -> None:
    above, below = [one for one, _ in found], [other for _, other in found]
    made = paired(above, below)
    assert made["value"] == pytest.approx(median([a / b for a, b in found]), abs=1e-6)
    assert made["interval"][0] <= made["value"] <= made["interval"][1]
    assert made["n"] == made["above"]["n"] == made["below"]["n"] == len(found)


@given(st.integers(1, 100))
def test_cuts_are_layers_and_end_with_the_last(layers: int) -> None:
    made = cuts(layers)
    assert made[0] == 1 and made[-1] == layers and made == sorted(set(made))
