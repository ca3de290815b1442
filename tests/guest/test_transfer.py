"""A stopped session as a file: it goes on elsewhere as it would have here, and a file that is not right is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gpuckpt_guest import transfer
from gpuckpt_guest.engine.breakpoints import Condition
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.sampling import Sampling
from gpuckpt_guest.engine.session import Session, State
from gpuckpt_guest.engine.steering import Edit

from tests.guest.driving import LAYERS, Driver, loaded

PROMPT = [5, 17, 3, 99, 42, 7, 7, 150, 61, 8, 12]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 8},  # some layers forget
    "gemma3n_text": {  # layers hand keys and values on to others within a pass
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 199,
        "laurel_rank": 4,
        "intermediate_size": [64] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "qwen3_next": {  # layers with a recurrent state
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Driver, Driver]]:
    made = (
        Driver(loaded(request.param, **KINDS[request.param])),
        Driver(loaded(request.param, **KINDS[request.param])),
    )
    yield made
    for driver in made:
        driver.engine.stop()


def stopped(driver: Driver, layer: int, step: int, **options: Any) -> Session:
    session = driver.new(edits=[Edit("scale", 1, 0.9, first=3)])
    driver.do(driver.engine.stop_at, session, layer=layer, step=step, once=True)
    driver.begin(session, PROMPT, sampling=Sampling(temperature=1.0), seed=4, top_scores=2, **options).wait("paused")
    return session


def filed(driver: Driver, session: Session) -> bytes:
    tensors, metadata, snapshot = driver.do(transfer.export, driver.engine, session)
    made = transfer.pack_session(tensors, metadata, snapshot)
    driver.do(snapshot.release)
    return made


def written(data: bytes) -> tuple[Any, dict[str, Any]]:
    """A file's content, but for the session's name, in a form that can be compared."""
    tensors, metadata = transfer.unpack(data)
    facts = metadata["gpuckpt_session"]
    del facts["id"], facts["digest"]
    return facts, {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()}


def test_it_goes_on_elsewhere(pair: tuple[Driver, Driver]) -> None:
    here, there = pair
    for layer, step in ((0, 0), (2, 0), (LAYERS, 0), (1, 4), (3, 4)):
        session = stopped(here, layer, step)
        here.do(here.engine.steer, session, [Edit("scale", layer, 1.1)], standing=False)
        here.do(here.engine.stop_at, session, layer=2, phase="decode", condition=Condition(norm_above=1e9))
        data = filed(here, session)
        moved = there.do(transfer.load, there.engine, transfer.unpack(data), f"moved-{layer}-{step}")
        assert moved.state is State.PAUSED and list(moved.breakpoints) == list(session.breakpoints)
        assert written(filed(there, moved)) == written(data)
        wanted, got = here.resume(session).wait("done"), there.resume(moved).wait("done")
        assert got.generated == wanted.generated and len(got.generated) == 12
        assert got.scores == wanted.scores
        again = [driver.begin(one, [8, 9], 6).wait("done") for driver, one in ((here, session), (there, moved))]
        assert again[0].generated == again[1].generated


def test_an_idle_session_moves_too(pair: tuple[Driver, Driver]) -> None:
    here, there = pair
    session = here.new()
    here.begin(session, PROMPT, 5).wait("done")
    moved = there.do(transfer.load, there.engine, transfer.unpack(filed(here, session)), "idle")
    assert moved.state is State.IDLE and moved.tokens == session.tokens
    wanted, got = (
        driver.begin(one, [8], 6).wait("done").generated for driver, one in ((here, session), (there, moved))
    )
    assert got == wanted


def test_files_that_are_not_right(pair: tuple[Driver, Driver]) -> None:
    here, there = pair
    data = filed(here, stopped(here, 2, 3))
    tensors, metadata = transfer.unpack(data)
    facts = metadata["gpuckpt_session"]

    def changed(change: Any) -> bytes:
        copied, held = json.loads(json.dumps(facts)), dict(tensors)
        change(copied, held)
        return transfer.pack(held, {"gpuckpt_session": copied})

    def put(*path: Any) -> Any:
        def change(copied: Any, _: Any) -> None:
            *way, last, value = path
            for step in way:
                copied = copied[step]
            copied[last] = value

        return change

    wrong = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "noise": b"\x10\x00\x00\x00\x00\x00\x00\x00{{{{{{{{{{{{{{{{",
        "huge header": b"\xff" * 8 + data[8:],
        "no session": transfer.pack({"x": tensors["random"]}, {}),
        "version": changed(put("version", 99)),
        "model": changed(put("model", "another")),
        "tokens": changed(put("tokens", 0, 10**6)),
        "no tokens": changed(put("tokens", None)),
        "length": changed(put("length", 3)),
        "layers": changed(put("cache", [])),
        "layer": changed(put("pause", "layer", 77)),
        "executed": changed(put("pause", "executed", 0)),
        "position": changed(put("pause", "position", 0)),
        "span": changed(put("pause", "tokens", 9)),
        "no turn": changed(put("turn", None)),
        "edit": changed(put("edits", 0, "kind", "explode")),
        "no cache": changed(lambda _, held: held.pop(next(key for key in held if key.startswith("cache.1.")))),
        "hidden": changed(lambda _, held: held.update(hidden=held["hidden"][..., :3])),
        "infinite length": changed(put("length", float("inf"))),
        "a word for a position": changed(put("pause", "position", "a")),
        "temperature": changed(put("turn", "sampling", "temperature", "x")),
        "top_k": changed(put("turn", "sampling", "top_k", -1)),
        "max_tokens": changed(put("turn", "max_tokens", "x")),
        "breakpoint": changed(put("breakpoints", [{"id": "../x"}])),
        "pending": changed(put("cache", 1, "pending", 7)),
        "rule": changed(put("edits", 0, "name", "../x")),
        "random": changed(lambda _, held: held.update(random=held["hidden"])),
    }
    before = there.do(lambda: set(there.engine.sessions))
    for name, file in wrong.items():
        try:
            there.do(transfer.load, there.engine, transfer.unpack(file), f"wrong-{name.replace(' ', '-')}")
            pytest.fail(f"a file was taken whose fault is: {name}")
        except EngineError:
            pass
        assert there.do(lambda: set(there.engine.sessions)) == before, name
    assert there.write(PROMPT, 4) == there.plain(PROMPT, 4)
