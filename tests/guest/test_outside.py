"""Weights outside of the process: saved, given back, taken again, and the engine in between."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpuckpt_guest import flat, outside
from gpuckpt_guest.__main__ import main
from gpuckpt_guest.control import Control, ControlError
from gpuckpt_guest.engine.engine import Variant
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.model import prepare
from gpuckpt_guest.engine.session import Session, Turn
from gpuckpt_guest.engine.sleep import handlers
from gpuckpt_guest.outside import HostRegion, OutsideWeights

from tests.guest import driving
from tests.guest.driving import LAYERS, WAIT, Driver, Letters
from tests.guest.test_control import Host
from tests.opened import left_open, opened

PROMPT = [5, 9, 2, 7, 7, 1]


def resident(weights: OutsideWeights) -> int:
    """Bytes of the weights' region that are in memory, as the kernel counts them (mincore(2))."""
    pages = -(-weights.bytes // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    at = ctypes.c_void_p(weights._memory.bytes.data_ptr())
    assert libc.mincore(at, ctypes.c_size_t(pages * mmap.PAGESIZE), seen) == 0
    return sum(page & 1 for page in seen) * mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[int]:
    made = os.memfd_create("weights")
    yield made
    os.close(made)


def away(model: Any, label: str = "tiny") -> tuple[Any, OutsideWeights]:
    weights = OutsideWeights(model, "cpu", label)
    return prepare(model, Letters(), name="tiny", identity="tiny", outside=weights), weights


@pytest.fixture
def driver() -> Iterator[Driver]:
    # Alone each: what shares a batch is not computed in the same order.
    made = Driver(away(driving.model())[0], max_batch=1)
    yield made
    made.close()


@pytest.fixture
def host(driver: Driver, tmp_path: Path) -> Iterator[Host]:
    path = tmp_path / "control.sock"
    served = Control(handlers(driver.engine), path=str(path))
    yield Host(path)
    served.close()


# ---------------------------------------------------------------------- the region


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_a_model_is_the_same_in_its_region(kind: str, inference: None) -> None:
    options = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4} if kind == "gpt2" else {}
    model = driving.model(kind, **options)
    twin = copy.deepcopy(model)
    weights = OutsideWeights(model, "cpu", "tiny")
    begin = weights._memory.bytes.data_ptr()
    for (name, own), (_, other) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(own, other) and own.stride() == other.stride(), name
        assert begin <= own.data_ptr() < begin + weights.bytes and own.data_ptr() % 64 == 0, name
    ids = torch.tensor([PROMPT])
    assert torch.equal(model(ids).logits, twin(ids).logits)


def test_what_is_shared_lies_there_once(inference: None) -> None:
    tied = driving.model(tie_word_embeddings=True)
    plain = driving.model(tie_word_embeddings=False)
    size = tied.get_input_embeddings().weight.nbytes
    weights = OutsideWeights(tied, "cpu", "tiny")
    assert OutsideWeights(plain, "cpu", "tiny").bytes - weights.bytes == -(-size // 256) * 256
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight


def test_views_of_one_storage_stay_views_of_one(inference: None) -> None:
    module = torch.nn.Module()
    whole = torch.arange(600, dtype=torch.float32)
    module.register_buffer("even", whole[::2])
    module.register_buffer("tail", whole[100:].view(20, 25).t())
    module.register_buffer("words", torch.tensor([1, 2, 3]))
    module.register_buffer("nothing", torch.empty(0))
    before = {name: (value.clone(), value.stride()) for name, value in module.named_buffers()}
    weights = OutsideWeights(module, "cpu", "x")
    assert weights.bytes == 2560 + 256
    for name, value in module.named_buffers():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1], name
    module.even[150] = -1.0
    assert module.tail.t().reshape(-1)[200] == -1.0


def test_pages_are_given_back_and_come_again(file: int) -> None:
    model = torch.nn.Linear(1500, 1500)
    weights = OutsideWeights(model, "cpu", "x")
    address, before = model.weight.data_ptr(), model.weight.clone()
    assert resident(weights) >= weights.bytes > 8 << 20
    end = weights.save(file)
    assert end == os.fstat(file).st_size
    assert weights.sleep() == weights.bytes and weights.sleep() == 0
    assert resident(weights) == 0
    woken = weights.wake(file)
    assert woken.bytes == weights.bytes and set(woken.phases) == {"map", "stream"} and woken.told == ""
    assert weights.wake(file).bytes == 0
    assert model.weight.data_ptr() == address and torch.equal(model.weight, before)


def test_a_file_that_fails_half_way_leaves_them_asleep(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1500, 1500)
    before = model.weight.clone()
    weights = OutsideWeights(model, "cpu", "x")
    weights.save(file)
    weights.sleep()
    with monkeypatch.context() as patch:

        def failing(*given: Any) -> None:
            if given[2] > 4 << 20:
                raise OSError(5, "of the machine")
            real(*given)

        real = flat._read_all
        patch.setattr(flat, "_read_all", failing)
        patch.setattr(flat, "CHUNK", 1 << 20)
        with pytest.raises(OSError, match="of the machine"):
            weights.wake(file)
    assert weights.asleep and resident(weights) == 0
    weights.wake(file)
    assert torch.equal(model.weight, before)


def test_a_region_begins_where_a_large_page_does() -> None:
    assert HostRegion(5 << 20).bytes.data_ptr() % (2 << 20) == 0


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="MiB for the weights"):
        outside._map(None, 1 << 62)


# ---------------------------------------------------------------------- the engine


def written(driver: Driver, prompt: list[int], session: Session | None = None) -> tuple[list[int], Any, Any]:
    """Tokens, log-probabilities, and the last step's logits."""
    return bits(driver.begin(session or driver.new(), prompt, 8, top_scores=3, keep_logits=True).wait("done"))


def bits(turn: Turn) -> tuple[list[int], Any, Any]:
    return turn.generated, turn.scores, turn.logits.tolist()


def test_what_is_asked_asleep_waits_and_is_answered_with_the_same_bits(driver: Driver, host: Host, file: int) -> None:
    weights = driver.loaded.outside
    assert weights is not None
    wanted = written(driver, PROMPT)
    rested = driver.new()
    driver.begin(rested, PROMPT, 4).wait("done")
    wanted_more = written(driver, [3, 1], driver.do(driver.engine.branch, rested, [Variant()], resume=False)[0])
    stopped = driver.new()
    driver.do(driver.engine.stop_at, stopped, layer=2, step=1, once=True)
    running = driver.begin(stopped, PROMPT, 8, top_scores=3, keep_logits=True)
    running.wait("paused")
    seen = driver.do(driver.engine.lens, stopped, 5)

    assert host.ask({"do": "state"}) == {"asleep": False}
    assert host.ask({"do": "ranks"}) == {"ranks": 1}
    (size,) = host.ask({"do": "save"}, [file])["bytes"]
    assert size == os.fstat(file).st_size > weights.bytes
    assert resident(weights) > 0
    assert host.ask({"do": "sleep"})["released"] >= weights.bytes
    assert host.ask({"do": "sleep"}) == {"released": 0}
    assert host.ask({"do": "state"}) == {"asleep": True}
    assert resident(weights) == 0
    assert "asleep" in host.ask({"do": "save"}, [file])["error"]["cause"]

    asked = driver.begin(driver.new(), PROMPT, 8, top_scores=3, keep_logits=True)
    more = driver.begin(rested, [3, 1], 8, top_scores=3, keep_logits=True)
    looked = driver.engine.do(driver.engine.lens, stopped, 5)
    driver.resume(stopped)
    time.sleep(0.3)
    driver.do(lambda: None)  # what /health asks is answered
    assert not looked.done() and not asked.events and not more.events
    assert resident(weights) == 0

    told = host.ask({"do": "wake"}, [file])
    assert told["bytes"] == weights.bytes and set(told["phases"]) == {"map", "stream", "kv"}
    assert bits(asked.wait("done")) == wanted
    assert bits(more.wait("done")) == wanted_more
    assert bits(running.wait("done")) == wanted
    assert isinstance(looked.exception(WAIT), EngineError)  # it has gone on meanwhile: as when asked awake
    assert host.ask({"do": "wake"}, [file])["bytes"] == 0
    assert host.ask({"do": "state"}) == {"asleep": False}
    assert written(driver, PROMPT) == wanted and seen


def test_a_look_that_needs_weights_waits(driver: Driver, host: Host, file: int) -> None:
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=2, once=True)
    driver.begin(session, PROMPT, 8).wait("paused")
    seen = driver.do(driver.engine.lens, session, 5)
    host.ask({"do": "save"}, [file])
    host.ask({"do": "sleep"})
    looked = driver.engine.do(driver.engine.lens, session, 5)
    driver.do(lambda: None)
    assert not looked.done()
    host.ask({"do": "wake"}, [file])
    assert looked.result(WAIT) == seen


def test_a_pass_that_is_on_its_way_goes_on(driver: Driver, host: Host, file: int) -> None:
    wanted = driver.write(PROMPT, 200)
    host.ask({"do": "save"}, [file])
    running = driver.begin(driver.new(), PROMPT, 200)
    for count in range(1, 4):
        running.wait("token", count * 20)
        host.ask({"do": "sleep"})
        layers = driver.do(lambda: driver.engine.scheduler.layers_run)
        time.sleep(0.02)
        assert driver.do(lambda: driver.engine.scheduler.layers_run) == layers
        host.ask({"do": "wake"}, [file])
    assert running.wait("done").generated == wanted


def test_another_model_s_file_is_refused(driver: Driver, host: Host, file: int) -> None:
    wanted = driver.write(PROMPT)
    host.ask({"do": "save"}, [file])
    host.ask({"do": "sleep"})
    foreign = os.memfd_create("foreign")
    try:
        _, other = away(driving.model(), "another of its shape")
        other.save(foreign)
        for bad, said in (([foreign], "of other weights"), ([], "0 files"), ([file, file], "2 files")):
            told = host.ask({"do": "wake"}, bad)["error"]
            assert said in told["message"] + told["cause"]
        os.ftruncate(foreign, 4096)
        assert "error" in host.ask({"do": "wake"}, [foreign])
    finally:
        os.close(foreign)
    assert host.ask({"do": "state"}) == {"asleep": True}
    weights = driver.loaded.outside
    assert weights is not None and resident(weights) == 0
    host.ask({"do": "wake"}, [file])
    assert driver.write(PROMPT) == wanted


def copied(file: int) -> int:
    """A file in memory with the same bytes: what a CPU has for memory that the host has carried to the device."""
    made = os.memfd_create("carried")
    size = os.fstat(file).st_size
    assert os.sendfile(made, file, 0, size) == size
    return made


def other(handle: int) -> None:
    """No file at all in its place."""
    made = os.eventfd(0)
    os.dup2(made, handle)
    os.close(made)


def test_weights_that_are_on_the_device_already(driver: Driver, host: Host, file: int) -> None:
    weights = driver.loaded.outside
    assert weights is not None
    wanted = written(driver, PROMPT)
    host.ask({"do": "save"}, [file])
    handle = copied(file)
    try:
        # Not the header: who read this file would notice nothing, and compute something else.
        os.pwrite(file, bytes(weights.bytes), 2 << 20)
        before = opened()
        for _ in range(2):
            host.ask({"do": "sleep"})
            told = host.ask({"do": "wake", "carried": 1}, [file, handle])
            assert told["bytes"] == weights.bytes and list(told["phases"]) == ["map", "copy", "kv"]
            assert "told" not in told
            assert written(driver, PROMPT) == wanted
        assert host.ask({"do": "wake", "carried": 1}, [file, handle])["bytes"] == 0
        assert not left_open(before)
        host.ask({"do": "sleep"})
        assert set(host.ask({"do": "wake", "carried": 0}, [file])["phases"]) == {"map", "stream", "kv"}
        assert written(driver, PROMPT) != wanted
    finally:
        os.close(handle)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda handle: os.ftruncate(handle, os.fstat(handle).st_size - 1), "bytes of"),
        (lambda handle: os.ftruncate(handle, 0), "it has 0 bytes of"),
        (lambda handle: os.pwrite(handle, b"x", 40), "other bytes than the file"),
        (other, "it has 0 bytes of"),
    ],
)
def test_where_the_device_has_something_else_the_file_is_read(
    spoil: Any, said: str, driver: Driver, host: Host, file: int
) -> None:
    wanted = written(driver, PROMPT)
    host.ask({"do": "save"}, [file])
    handle = copied(file)
    try:
        spoil(handle)
        before = opened()
        host.ask({"do": "sleep"})
        told = host.ask({"do": "wake", "carried": 1}, [file, handle])
        assert set(told["phases"]) == {"map", "stream", "kv"} and said in told["told"]
        assert written(driver, PROMPT) == wanted
        assert not left_open(before)
    finally:
        os.close(handle)


def test_a_wake_that_is_not_understood(driver: Driver, host: Host, file: int) -> None:
    wanted = driver.write(PROMPT)
    host.ask({"do": "save"}, [file])
    host.ask({"do": "sleep"})
    for more, files, said in (
        ({"carried": 1}, [file], "1 files came"),
        ({"carried": 1}, [file] * 3, "3 files came"),
        ({"carried": 1}, [], "0 files came"),
        ({}, [file] * 2, "2 files came"),
        ({"carried": 0}, [file] * 2, "2 files came"),
        ({"carried": 2}, [file] * 3, "'carried' is 2"),
        ({"carried": -1}, [file], "'carried' is -1"),
        ({"carried": True}, [file] * 2, "'carried' is True"),
        ({"carried": "1"}, [file] * 2, "'carried' is '1'"),
        ({"carried": None}, [file], "'carried' is None"),
        ({"carry": 1, "by": 2}, [file] * 2, "no 'by', 'carry'"),
    ):
        assert said in host.ask({"do": "wake"} | more, files)["error"]["message"]
        assert host.ask({"do": "state"}) == {"asleep": True}
    host.ask({"do": "wake"}, [file])
    assert driver.write(PROMPT) == wanted


def test_a_file_of_others_is_refused_whatever_is_on_the_device(driver: Driver, host: Host, file: int) -> None:
    host.ask({"do": "save"}, [file])
    handle = copied(file)
    try:
        host.ask({"do": "sleep"})
        os.pwrite(file, b"x", 40)
        assert "error" in host.ask({"do": "wake", "carried": 1}, [file, handle])
        assert host.ask({"do": "state"}) == {"asleep": True}
    finally:
        os.close(handle)


def test_a_file_that_cannot_be_written(driver: Driver, host: Host, tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    only = os.open(tmp_path / "weights", os.O_RDONLY)
    try:
        assert "cannot be saved" in host.ask({"do": "save"}, [only])["error"]["message"]
    finally:
        os.close(only)


def test_free_blocks_are_given_back(driver: Driver, host: Host, file: int) -> None:
    memory = driver.engine.memory.arena.memory
    session = driver.new()
    driver.begin(session, [7] * 300, 4).wait("done")
    driver.do(driver.engine.delete, session)
    assert driver.do(lambda: memory.held) > 0
    weights = driver.loaded.outside
    assert weights is not None
    host.ask({"do": "save"}, [file])
    assert host.ask({"do": "sleep"})["released"] > weights.bytes
    assert driver.do(lambda: memory.held) == 0


def test_caches_go_and_weights_stay(driver: Driver, host: Host, file: int) -> None:
    memory, weights = driver.engine.memory.arena.memory, driver.loaded.outside
    assert weights is not None
    wanted = driver.write([7] * 300, 30)
    session = driver.new()
    driver.begin(session, [7] * 300, 4).wait("done")
    driver.do(driver.engine.delete, session)
    held, there = driver.do(lambda: memory.held), resident(weights)
    assert host.ask({"do": "save"}, [file])["bytes"]
    assert host.ask({"do": "sleep", "caches": 1}) == {"released": held - driver.do(lambda: memory.held)}
    assert driver.do(lambda: memory.held) < held and resident(weights) == there > 0
    assert host.ask({"do": "sleep", "caches": 1}) == {"released": 0}
    assert host.ask({"do": "state"}) == {"asleep": True}
    asked = driver.begin(driver.new(), [7] * 300, 30)
    for request, files in (({"do": "sleep"}, []), ({"do": "wake"}, [file])):
        assert 'only "caches": 1 wakes it' in host.ask(request, files)["error"]["cause"]
    assert "0 files came" in host.ask({"do": "wake"})["error"]["message"]
    assert "1 files came" in host.ask({"do": "wake", "caches": 1}, [file])["error"]["message"]
    assert "asleep" in host.ask({"do": "save"}, [file])["error"]["cause"]
    time.sleep(0.2)
    assert not asked.events and host.ask({"do": "state"}) == {"asleep": True}

    nothing = {"bytes": 0, "phases": {"map": 0.0, "stream": 0.0, "kv": 0.0}}
    assert host.ask({"do": "wake", "caches": 1}) == nothing
    assert asked.wait("done").generated == wanted
    assert host.ask({"do": "state"}) == {"asleep": False}
    assert host.ask({"do": "wake", "caches": 1}) == nothing

    host.ask({"do": "sleep"})
    for do in ("sleep", "wake"):
        assert "without its weights" in host.ask({"do": do, "caches": 1})["error"]["cause"]
    assert resident(weights) == 0 and host.ask({"do": "state"}) == {"asleep": True}
    host.ask({"do": "wake"}, [file])
    assert driver.write([7] * 300, 30) == wanted


def test_an_engine_that_is_stopped_asleep_answers_everybody(file: int) -> None:
    driver = Driver(away(driving.model())[0])
    session = driver.new()
    driver.do(driver.engine.stop_at, session, layer=2, once=True)
    driver.begin(session, PROMPT, 8).wait("paused")
    driver.do(driver.engine.sleep.save, file)
    driver.do(driver.engine.sleep.sleep)
    looked = driver.engine.do(driver.engine.lens, session, 5)
    asked = driver.begin(driver.new(), PROMPT)
    driver.close()
    with pytest.raises(EngineError, match="stopped"):
        looked.result(WAIT)
    assert asked.wait("done").reason == "error"


def test_an_engine_whose_weights_stay(file: int) -> None:
    driver = Driver(driving.loaded())
    try:
        for order in (driver.engine.sleep.sleep, lambda: driver.engine.sleep.save(file)):
            with pytest.raises(ControlError) as caught:
                driver.do(order)
            assert "--weights-outside" in caught.value.cause
        assert not driver.do(lambda: driver.engine.sleep.asleep)
    finally:
        driver.close()


def test_weights_in_turns_cannot_be_outside() -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--model", "x", "--weights-outside", "--weights-mib", "5"])
