"""Whose layer runs next."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.guest.driving import LAYERS, Driver, loaded


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Driver(loaded())
    yield made
    made.engine.stop()


def test_long_prompts_hold_a_token_up_by_one_layer_at_most(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []  # how many tokens the pass read that had this turn
    real = driver.engine.scheduler._advance

    def noted(flight: Any) -> bool:
        ran.append(flight.tokens)
        return real(flight)

    monkeypatch.setattr(driver.engine.scheduler, "_advance", noted)
    writer = driver.begin(driver.new(), [1, 2], 120)
    writer.wait("token", 3)
    readers = [driver.begin(driver.new(), list(range(1, 180)), 1) for _ in range(5)]
    for reader in readers:
        reader.wait("done")
    writer.wait("done")
    first = ran.index(179)
    last = len(ran) - ran[::-1].index(179)
    between = ran[first:last]
    # While prompts are being read and a token is under way, no two layers of prompts run in a row.
    assert between.count(179) == 5 * (LAYERS + 1)
    pairs = [pair for pair in itertools.pairwise(between) if pair == (179, 179)]
    assert not pairs


def test_sessions_that_become_ready_join_at_the_next_token(driver: Driver) -> None:
    first = driver.begin(driver.new(), [1, 2, 3], 60)
    first.wait("token", 5)
    rest = [driver.begin(driver.new(), [4, 5, index], 40) for index in range(3)]
    for running in (first, *rest):
        running.wait("done")
    assert driver.engine.scheduler.largest_batch == 4


def test_a_small_limit_on_the_batch_still_serves_all(driver: Driver) -> None:
    driver.engine.scheduler._max_batch = 2
    prompts = [[7, index] for index in range(1, 6)]
    running = [driver.begin(driver.new(), prompt, 15) for prompt in prompts]
    assert [one.wait("done").generated for one in running] == [driver.plain(prompt, 15) for prompt in prompts]
    assert driver.engine.scheduler.largest_batch == 2


def test_an_engine_with_nothing_to_do_does_nothing(driver: Driver) -> None:
    driver.write([1, 2, 3], 4)
    before = driver.engine.scheduler.layers_run
    assert not driver.do(lambda: driver.engine.scheduler.busy)
    assert driver.engine.scheduler.layers_run == before
    assert not driver.do(lambda: len(driver.engine.scheduler.batches))
