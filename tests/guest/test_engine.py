"""The engine: what sessions write, alone, together, stopped, branched, cancelled, and when something fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpuckpt_guest.engine.breakpoints import Condition
from gpuckpt_guest.engine.engine import Variant
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.sampling import Sampling
from gpuckpt_guest.engine.session import Session, State
from gpuckpt_guest.engine.steering import Edit

from tests.guest.driving import LAYERS, VOCABULARY, Driver, Running, loaded, until

PROMPT = [5, 17, 3, 99, 42, 7, 7, 150]


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded()


@pytest.fixture
def driver(model: Any) -> Iterator[Driver]:
    made = Driver(model)
    yield made
    made.engine.stop()


def together(driver: Driver, sessions: list[Session], prompts: list[list[int]], tokens: int) -> list[Running]:
    """Generations that begin at one moment, however the threads are scheduled."""
    running: list[Running] = driver.do(
        lambda: [driver.launch(session, prompt, tokens) for session, prompt in zip(sessions, prompts, strict=True)]
    )
    return running


def test_a_session_writes_what_generate_writes(driver: Driver) -> None:
    wanted = driver.plain(PROMPT, 40)
    assert len(set(wanted)) > 10  # the model is lively, or the test would show nothing
    assert driver.write(PROMPT, 40) == wanted


@pytest.mark.parametrize("layer", range(LAYERS + 1))
@pytest.mark.parametrize("step", [0, 1, 5])
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(driver: Driver, layer: int, step: int) -> None:
    wanted = driver.plain(PROMPT)
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=layer, step=step, once=True)
    running = driver.begin(session, PROMPT)
    running.wait("paused")
    assert session.pause is not None
    assert (session.pause.layer, session.pause.step, session.pause.executed) == (layer, step, layer)
    before = driver.engine.scheduler.layers_run
    assert driver.write([9, 9, 4], 3) == driver.plain([9, 9, 4], 3)  # the device is free for others
    other = driver.engine.scheduler.layers_run - before
    assert other == 3 * LAYERS
    driver.resume(session)
    assert running.wait("done").generated == wanted
    # Exactly the layers that were left: each pass ran each layer once.
    assert driver.engine.scheduler.layers_run - before - other == LAYERS * (12 - step) - layer


def test_going_on_soon_needs_no_second_prologue(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the layers are kept for a while; a branch, and one that has waited longer, get new ones."""
    begun: list[Any] = []
    real = driver.loaded.stepper.begin

    def noted(*given: Any) -> Any:
        begun.append(given)
        return real(*given)

    monkeypatch.setattr(driver.loaded.stepper, "begin", noted)
    passes = driver.engine.scheduler.passes

    def stopped(prompt: list[int]) -> Session:
        session = driver.new()
        driver.do(driver.engine.stop_at, session, layer=2, once=True)
        driver.begin(session, prompt, 1).wait("paused")
        return session

    prompts = [[11, 12, index] for index in range(1, 20)]
    expected = [driver.write(prompt, 1) for prompt in prompts]
    sessions = [stopped(prompt) for prompt in prompts]
    assert len(passes._kept) == 16
    before = len(begun)
    # The last one: at once. Its branch, made before, has a cache of its own.
    (child,) = driver.do(driver.engine.branch, sessions[-1], [Variant()], resume=False)
    for session, more in ((sessions[-2], 0), (child, 1), (sessions[0], 2)):
        driver.resume(session).wait("done")
        assert len(begun) == before + more
    for session in sessions[1:]:
        if session.pause:
            driver.resume(session).wait("done")
    assert [session.tokens[-1:] for session in sessions] == expected
    assert child.tokens == sessions[-1].tokens
    assert not passes._kept
    # What goes without going on leaves nothing either.
    driver.do(driver.engine.delete, stopped([1, 2, 3]))
    driver.do(driver.engine.cancel, stopped([1, 2, 3]))
    assert not passes._kept


def test_many_breakpoints_in_one_request(driver: Driver) -> None:
    session = driver.new()
    for layer in (1, 2, 4):
        driver.do(driver.engine.stop_at, session, layer=layer)
    running = driver.begin(session, PROMPT, 3)
    seen = []
    for count in range(1, 10):
        running.wait("paused", count)
        assert session.pause is not None
        seen.append((session.pause.step, session.pause.layer))
        running.turn = driver.do(lambda: session.turn)
        driver.do(driver.engine.resume, session)
    turn = running.wait("done")
    assert seen == [(step, layer) for step in range(3) for layer in (1, 2, 4)]
    assert turn.generated == driver.plain(PROMPT, 3)


def test_a_breakpoint_at_any_layer_steps(driver: Driver) -> None:
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=None, phase="decode")
    running = driver.begin(session, PROMPT, 2)
    for layer in range(LAYERS + 1):
        running.wait("paused", layer + 1)
        assert session.pause is not None and session.pause.layer == layer
        driver.do(driver.engine.resume, session)
    assert running.wait("done").generated == driver.plain(PROMPT, 2)


def test_conditions(driver: Driver) -> None:
    wanted = driver.plain(PROMPT, 20)
    token = wanted[6]
    first = wanted.index(token)
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=2, condition=Condition(tokens=frozenset({token})), once=True)
    running = driver.begin(session, PROMPT, 20)
    running.wait("paused")
    assert session.pause is not None and session.pause.step == first + 1  # the pass that reads it
    norm = session.pause.norms[-1][1]
    assert norm == pytest.approx(float(session.pause.checkpoint.wait()[0, -1].norm()))
    driver.do(driver.engine.stop_at, session, layer=3, condition=Condition(norm_above=1e9))
    driver.do(driver.engine.stop_at, session, layer=3, condition=Condition(entropy_below=-1.0))
    driver.resume(session)
    assert running.wait("done").generated == wanted
    # At the last layer the lens is the model's own answer.
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=LAYERS, condition=Condition(entropy_above=0.0), once=True)
    running = driver.begin(session, PROMPT, 20)
    running.wait("paused")
    assert driver.do(driver.engine.lens, session, 3)[0][0] == wanted[0]
    position = driver.new()
    driver.do(driver.engine.stop_at, position, layer=1, position=len(PROMPT) + 4, once=True)
    driver.begin(position, PROMPT, 20).wait("paused")
    assert position.pause is not None and position.pause.position == len(PROMPT) + 4


def test_turns_go_on_without_reading_again(driver: Driver) -> None:
    session = driver.new()
    first = driver.begin(session, PROMPT, 6).wait("done").generated
    turn = driver.begin(session, [11, 12], 6).wait("done")
    assert turn.prompt_tokens == 3  # the last token written, and what is new
    assert turn.generated == driver.plain([*PROMPT, *first, 11, 12], 6)


def test_together_each_writes_what_it_writes_alone(driver: Driver) -> None:
    prompts = [PROMPT[: 2 + index] for index in range(6)]
    alone = [driver.plain(prompt, 20) for prompt in prompts]
    sessions = [driver.new() for _ in prompts]
    running = together(driver, sessions, prompts, 20)
    assert [one.wait("done").generated for one in running] == alone
    assert driver.engine.scheduler.largest_batch == 6
    # Their caches came home from the lanes.
    again = [driver.begin(session, [1], 5).wait("done").generated for session in sessions]
    assert again == [driver.plain([*p, *a, 1], 5) for p, a in zip(prompts, alone, strict=True)]


def test_one_of_a_batch_stops_and_the_others_go_on(driver: Driver) -> None:
    prompts = [PROMPT[: 3 + index] for index in range(4)]
    alone = [driver.plain(prompt, 20) for prompt in prompts]
    sessions = [driver.new() for _ in prompts]
    driver.do(driver.engine.stop_at, sessions[1], layer=2, step=6, once=True)
    running = together(driver, sessions, prompts, 20)
    assert [running[index].wait("done").generated for index in (0, 2, 3)] == [alone[index] for index in (0, 2, 3)]
    running[1].wait("paused")
    driver.resume(sessions[1])
    assert running[1].wait("done").generated == alone[1]


def test_sampling_is_the_seed_s_whoever_shares_the_batch(driver: Driver) -> None:
    how = Sampling(temperature=1.0, top_p=0.9)
    alone = driver.write(PROMPT, 16, sampling=how, seed=7)
    assert alone != driver.write(PROMPT, 16, sampling=how, seed=8)
    sessions = [driver.new() for _ in range(3)]
    running = driver.do(
        lambda: [
            driver.launch(session, PROMPT, 16, sampling=how, seed=seed)
            for session, seed in zip(sessions, (7, 8, 7), strict=True)
        ]
    )
    written = [one.wait("done").generated for one in running]
    assert written[0] == written[2] == alone != written[1]


def test_steering_changes_what_comes_and_can_be_taken_back(driver: Driver) -> None:
    wanted = driver.plain(PROMPT)
    steered = driver.new(edits=[Edit("scale", 2, 0.5, name="half")])
    changed = driver.begin(steered, PROMPT).wait("done").generated
    assert changed != wanted
    again = driver.new(edits=[Edit("scale", 2, 0.5)])
    assert driver.begin(again, PROMPT).wait("done").generated == changed
    # At the stop, by hand: the same edit for the prompt alone.
    once = driver.new(edits=[Edit("scale", 2, 0.5, last=len(PROMPT))])
    expected = driver.begin(once, PROMPT).wait("done").generated
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=2, step=0, once=True)
    running = driver.begin(session, PROMPT)
    running.wait("paused")
    driver.do(driver.engine.steer, session, [Edit("scale", 2, 0.5)], standing=False)
    driver.resume(session)
    assert running.wait("done").generated == expected
    # Or uploaded.
    uploaded = driver.new()
    driver.do(driver.engine.stop_at, uploaded, layer=2, step=0, once=True)
    running = driver.begin(uploaded, PROMPT)
    running.wait("paused")
    state = driver.do(driver.engine.activation, uploaded)
    driver.do(driver.engine.set_activation, uploaded, state * 0.5)
    driver.resume(uploaded)
    assert running.wait("done").generated == expected
    # Scaled by one it is what it was.
    same = driver.new(edits=[Edit("scale", 2, 1.0)])
    assert driver.begin(same, PROMPT).wait("done").generated == wanted


@pytest.mark.parametrize("step", [0, 3])
def test_branches_share_what_was_read_and_go_their_own_ways(driver: Driver, step: int) -> None:
    session = driver.new("parent")
    driver.do(driver.engine.stop_at, session, layer=2, step=step, once=True)
    running = driver.begin(session, PROMPT)
    running.wait("paused")
    factors = (1.0, 0.0, -1.0)
    variants = [Variant(edits=(Edit("scale", 2, factor),)) for factor in factors]
    before = session.cache.bytes()
    children = driver.do(driver.engine.branch, session, variants, resume=True)
    until(driver, lambda: not any(child.turn for child in children))
    written = [child.tokens[len(PROMPT) :] for child in children]
    assert written[0] == driver.plain(PROMPT)
    assert len({tuple(tokens) for tokens in written}) == 3
    for factor, tokens in zip(factors, written, strict=True):
        # The same as a run of its own with that edit there.
        first = len(PROMPT) + step - 1 if step else 0
        last = len(PROMPT) + step
        alone = driver.new(edits=[Edit("scale", 2, factor, first=first, last=last)])
        assert driver.begin(alone, PROMPT).wait("done").generated == tokens
    # The parent has not moved, and goes on as it would have.
    assert session.state is State.PAUSED and session.cache.bytes() == before
    driver.resume(session)
    assert running.wait("done").generated == driver.plain(PROMPT)
    assert [child.parent for child in children] == ["parent"] * 3


def test_a_branch_of_an_idle_session(driver: Driver) -> None:
    session = driver.new()
    first = driver.begin(session, PROMPT, 5).wait("done").generated
    (child,) = driver.do(driver.engine.branch, session, [Variant()], resume=True)
    for one, extra in ((session, 8), (child, 9)):
        got = driver.begin(one, [extra], 5).wait("done").generated
        assert got == driver.plain([*PROMPT, *first, extra], 5)


def test_cancelled_a_session_keeps_what_it_has(driver: Driver) -> None:
    session = driver.new()
    turn = driver.begin(session, PROMPT, 400, at=(5, lambda: driver.engine.cancel(session))).wait("done")
    assert turn.reason == "cancelled" and len(turn.generated) == 5
    assert session.state is State.IDLE
    read = list(session.tokens)
    assert driver.begin(session, [4], 6).wait("done").generated == driver.plain([*read, 4], 6)
    # One that is stopped half-way gives the pass up.
    stopped = driver.new()
    driver.do(driver.engine.stop_at, stopped, layer=3, step=2, once=True)
    driver.begin(stopped, PROMPT).wait("paused")
    driver.do(driver.engine.cancel, stopped)
    read = list(stopped.tokens)
    assert stopped.state is State.IDLE and stopped.pause is None
    assert driver.begin(stopped, [4], 6).wait("done").generated == driver.plain([*read, 4], 6)


def test_deleted_in_every_state(driver: Driver) -> None:
    idle, running, stopped, other = (driver.new(name) for name in ("idle", "running", "stopped", "other"))
    driver.do(driver.engine.stop_at, stopped, layer=1, step=1)
    driver.begin(stopped, PROMPT).wait("paused")

    def delete() -> None:
        for session in (idle, running, stopped):
            driver.engine.delete(session)

    def begin() -> tuple[Running, Running]:
        return driver.launch(running, PROMPT, 400, at=(3, delete)), driver.launch(other, PROMPT, 60)

    work, beside = driver.do(begin)
    assert work.wait("done").reason == "cancelled"
    assert beside.wait("done").generated == driver.plain(PROMPT, 60)
    assert list(driver.do(lambda: dict(driver.engine.sessions))) == ["other"]


def test_suspended_and_brought_back(driver: Driver) -> None:
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=2, step=3, once=True)
    running = driver.begin(session, PROMPT)
    running.wait("paused")
    driver.do(driver.engine.suspend, session)
    with pytest.raises(EngineError, match="suspended"):
        driver.do(driver.engine.lens, session, 1)
    driver.do(driver.engine.resume, session)
    assert running.wait("done").generated == driver.plain(PROMPT)


def test_what_cannot_be_asked(driver: Driver) -> None:
    session = driver.new("one")
    engine = driver.engine
    for wrong, words in (
        (lambda: engine.create("one"), "already"),
        (lambda: engine.create("../x"), "no name"),
        (lambda: engine.session("none"), "no session"),
        (lambda: engine.stop_at(session, layer=LAYERS + 1), "no layer"),
        (lambda: engine.resume(session), "not paused"),
        (lambda: engine.activation(session), "not paused"),
        (lambda: engine.steer(session, [Edit("scale", 99)], standing=True), "no layer"),
        (lambda: engine.steer(session, [Edit("add", 1)], standing=True), "needs a vector"),
        (lambda: engine.steer(session, [Edit("add", 1, vector=torch.ones(3))], standing=True), "numbers"),
        (lambda: engine.steer(session, [Edit("project", 1, vector=torch.zeros(32))], standing=True), "no direction"),
    ):
        with pytest.raises(EngineError, match=words):
            driver.do(wrong)
    with pytest.raises(EngineError, match="no token"):
        driver.begin(session, [VOCABULARY], 1)
    with pytest.raises(EngineError, match="nothing to read"):
        driver.begin(session, [], 1)
    with pytest.raises(EngineError, match="leave no room"):
        driver.begin(session, [1] * 600, 1)
    driver.do(engine.stop_at, session, layer=1)
    driver.begin(session, PROMPT).wait("paused")
    for tensor, words in (
        (torch.zeros(1, 3, 32), "shape"),
        (torch.zeros(1, len(PROMPT), 32, dtype=torch.bfloat16), "bfloat16"),
        (torch.full((1, len(PROMPT), 32), float("nan")), "finite"),
    ):
        with pytest.raises(EngineError, match=words):
            driver.do(engine.set_activation, session, tensor)
    with pytest.raises(EngineError, match="resume or delete"):
        driver.begin(session, PROMPT)
    assert driver.write(PROMPT) == driver.plain(PROMPT)


def test_a_pass_that_fails_harms_nobody_else(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, other = driver.new(), driver.new()
    layer = driver.engine.loaded.stepper.layers[2]
    real = layer.forward.forward

    def failing(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1] == 3:
            raise RuntimeError("out of memory, say")
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(layer.forward, "forward", failing)
    beside = driver.begin(other, PROMPT, 30)
    turn = driver.begin(victim, [1, 2, 3], 5).wait("done")
    assert turn.reason == "error" and "out of memory, say" in turn.error
    assert beside.wait("done").generated == driver.plain(PROMPT, 30)
    # What it was to read is still to be read.
    monkeypatch.undo()
    assert driver.begin(victim, [4], 5).wait("done").generated == driver.plain([1, 2, 3, 4], 5)


def test_an_edit_that_breaks_the_numbers_is_an_error_of_that_generation(driver: Driver) -> None:
    session = driver.new(edits=[Edit("scale", 2, 3e38), Edit("scale", 3, 3e38)])
    turn = driver.begin(session, PROMPT).wait("done")
    assert turn.reason == "error" and "not finite" in turn.error
    assert driver.write(PROMPT) == driver.plain(PROMPT)


def test_numbers_that_went_wrong_do_not_stay(driver: Driver) -> None:
    """Alone and in a batch: when the edit is gone, the session goes on as if it had never been."""
    alone, begun = driver.plain(PROMPT, 40), driver.plain(PROMPT, 3)
    after = driver.plain([*PROMPT, *begun, 9, 8], 5)
    for others in (0, 2):
        beside = [driver.new() for _ in range(others)]
        running = [driver.begin(one, PROMPT, 40) for one in beside]
        session = driver.new()
        assert driver.begin(session, PROMPT, 3).wait("done").generated == begun
        driver.do(driver.engine.steer, session, [Edit("scale", 2, 3e38), Edit("scale", 3, 3e38)], standing=True)
        assert driver.begin(session, [9], 5).wait("done").reason == "error"
        driver.do(session.edits.clear)
        assert driver.begin(session, [8], 5).wait("done").generated == after
        for one in running:
            assert one.wait("done").generated == alone


@pytest.mark.parametrize("how", ["delete", "cancel"])
def test_taken_out_of_a_batch_with_a_breakpoint_ahead(driver: Driver, how: str) -> None:
    alone = driver.plain(PROMPT, 200)
    victim, other = driver.new("victim"), driver.new()

    def at_the_last_moment() -> None:
        driver.engine.stop_at(victim, layer=LAYERS)  # would be hit at the end of this very pass
        (driver.engine.delete if how == "delete" else driver.engine.cancel)(victim)

    def begin() -> tuple[Running, Running]:
        return driver.launch(other, PROMPT, 200), driver.launch(victim, PROMPT, 200, at=(5, at_the_last_moment))

    beside, running = driver.do(begin)
    assert running.wait("done").reason == "cancelled"
    assert beside.wait("done").generated == alone
    assert ("victim" in driver.do(lambda: dict(driver.engine.sessions))) == (how == "cancel")
    assert victim.pause is None


def test_a_pause_that_came_too_late_is_not_for_the_next_generation(driver: Driver) -> None:
    session = driver.new()

    def ask() -> None:
        driver.engine.pause(session, LAYERS)
        driver.engine.cancel(session)

    assert driver.begin(session, PROMPT, 50, at=(2, ask)).wait("done").reason == "cancelled"
    assert not session.breakpoints
    assert driver.begin(session, [1], 3).wait("done").reason == "length"


def test_sampling_that_goes_to_an_extreme_harms_nobody_else(driver: Driver) -> None:
    alone = driver.plain(PROMPT, 20)
    cold, other = driver.new(), driver.new()
    beside = driver.begin(other, PROMPT, 20)
    turn = driver.begin(cold, PROMPT, 5, sampling=Sampling(temperature=1e-308)).wait("done")
    assert turn.generated == alone[:5]  # as good as greedy
    assert beside.wait("done").generated == alone


def test_a_draw_that_fails_ends_that_generation_only(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise RuntimeError("no luck")

    monkeypatch.setattr("gpuckpt_guest.engine.sampling.draw", broken)
    victim, other = driver.new(), driver.new()
    beside = driver.begin(other, PROMPT, 20)
    turn = driver.begin(victim, PROMPT, 5, sampling=Sampling(temperature=1.0)).wait("done")
    assert turn.reason == "error" and "no luck" in turn.error
    assert beside.wait("done").generated == driver.plain(PROMPT, 20)


def test_what_batches_hold_is_handed_back_when_all_is_idle(driver: Driver) -> None:
    sessions = [driver.new() for _ in range(3)]
    for running in together(driver, sessions, [PROMPT[: 3 + i] for i in range(3)], 10):
        running.wait("done")
    assert driver.engine.scheduler.largest_batch == 3
    assert not driver.do(lambda: len(driver.engine.scheduler.batches))


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_a_prompt_of_one_token_beside_others_of_a_recurrent_model(kind: str) -> None:
    more = {
        "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
        "qwen3_next": {
            "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
        },
    }[kind]  # fmt: skip
    made = Driver(loaded(kind, **more))
    assert made.loaded.verdict.batching and made.loaded.verdict.recurrent
    wanted = made.plain([5], 10), made.plain([6], 10), made.plain(PROMPT, 30)
    early, first, late = (made.new() for _ in range(3))  # the early one begins behind the first, and leads the batch
    joined: list[Running] = []
    beside = made.begin(
        first, PROMPT, 30, at=(4, lambda: joined.extend([made.launch(early, [5], 10), made.launch(late, [6], 10)]))
    ).wait("done")
    assert (*(running.wait("done").generated for running in joined), beside.generated) == wanted
    assert made.engine.scheduler.largest_batch == 3
    made.engine.stop()


def test_every_future_is_answered_when_the_engine_stops(model: Any) -> None:
    made = Driver(model)
    made.engine.stop()
    with pytest.raises(EngineError, match="stopped"):
        made.do(lambda: None)


def test_a_layer_that_did_not_run_stops_the_engine(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Driver(model)
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # the engine's thread is meant to end

    def lazy(forward: Any) -> None:
        forward.layer += 1

    monkeypatch.setattr(made.engine.loaded.stepper, "step", lazy)
    turn = made.begin(made.new(), PROMPT).wait("done")
    assert not turn.generated
    with pytest.raises(EngineError, match="layers ran"):
        made.do(lambda: None)
    made.engine.stop()  # before the hook is what it was: the thread may only now be about to end


def test_more_sessions_than_allowed(model: Any) -> None:
    made = Driver(model, max_sessions=2)
    made.new(), made.new()
    with pytest.raises(EngineError) as caught:
        made.new()
    assert caught.value.status == 429
    made.engine.stop()
