"""Whose layer runs next."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.guest.driving import LAYERS, Driver, Running, loaded


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
    prompt = [*range(1, 180), *range(1, 121)]  # too long to be read together with others
    sessions = [driver.new() for _ in range(5)]
    readers: list[Running] = []
    driver.begin(
        driver.new(), [1, 2], 120, at=(3, lambda: readers.extend(driver.launch(one, prompt, 1) for one in sessions))
    ).wait("done")
    for reader in readers:
        reader.wait("done")
    first = ran.index(299)
    last = len(ran) - ran[::-1].index(299)
    between = ran[first:last]
    # While prompts are being read and a token is under way, no two layers of prompts run in a row.
    assert between.count(299) == 5 * (LAYERS + 1)
    pairs = [pair for pair in itertools.pairwise(between) if pair == (299, 299)]
    assert not pairs


def test_sessions_that_become_ready_join_at_the_next_token(driver: Driver) -> None:
    sessions = [driver.new() for _ in range(3)]
    rest: list[Running] = []

    def begin() -> None:
        rest.extend(driver.launch(session, [4, 5, index], 40) for index, session in enumerate(sessions))

    driver.begin(driver.new(), [1, 2, 3], 60, at=(5, begin)).wait("done")
    for running in rest:
        running.wait("done")
    assert driver.engine.scheduler.largest_batch == 4


def test_short_prompts_of_one_length_are_read_together(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []  # how many sessions read how many tokens in one pass
    real = driver.engine.scheduler.passes.begin

    def noted(flight: Any) -> Any:
        read.append((len(flight.rows), flight.tokens))
        return real(flight)

    monkeypatch.setattr(driver.engine.scheduler.passes, "begin", noted)
    prompts = [[7, index, 3] for index in range(1, 5)] + [[9, 8, 7, 6, 5]]
    sessions = [driver.new() for _ in prompts]
    driver.do(driver.engine.stop_at, sessions[1], layer=2, phase="prefill", once=True)
    running = driver.do(
        lambda: [driver.launch(session, prompt, 6) for session, prompt in zip(sessions, prompts, strict=True)]
    )
    running[1].wait("paused")  # one of them stops; the others go on
    turns = [one.wait("done") for index, one in enumerate(running) if index != 1]
    assert read[:2] == [(4, 3), (1, 5)]
    turns.insert(1, driver.resume(sessions[1]).wait("done"))
    assert [turn.generated for turn in turns] == [driver.plain(prompt, 6) for prompt in prompts]
    assert [session.passes for session in sessions] == [6] * 5


def test_a_small_limit_on_the_batch_still_serves_all(driver: Driver) -> None:
    driver.engine.scheduler._max_batch = 2
    prompts = [[7, index] for index in range(1, 6)]
    sessions = [driver.new() for _ in prompts]
    running = driver.do(
        lambda: [driver.launch(session, prompt, 15) for session, prompt in zip(sessions, prompts, strict=True)]
    )
    assert [one.wait("done").generated for one in running] == [driver.plain(prompt, 15) for prompt in prompts]
    assert driver.engine.scheduler.largest_batch == 2


def test_an_engine_with_nothing_to_do_does_nothing(driver: Driver) -> None:
    driver.write([1, 2, 3], 4)
    before = driver.engine.scheduler.layers_run
    assert not driver.do(lambda: driver.engine.scheduler.busy)
    assert driver.engine.scheduler.layers_run == before
    assert not driver.do(lambda: len(driver.engine.scheduler.batches))
