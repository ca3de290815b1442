"""What runs inside the containers: one reseeding per identity, and what vLLM's processes are made to check."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hooks.gpuckpt_guest import lifecycle, nvml, vllm_plugin
from hooks.gpuckpt_guest.lifecycle import Identity, Watcher

HOOKS = Path(__file__).resolve().parents[2] / "hooks"
SEED_A, SEED_B = "a" * 64, "b" * 64


def write(path: Path, seed: str, replica: str = "r") -> None:
    """As the host writes it: whole, by a rename."""
    new = path.with_name("new")
    new.write_text(json.dumps({"replica": replica, "golden": "g", "seed": seed}))
    new.rename(path)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    state = random.getstate()
    yield tmp_path / "identity"
    random.setstate(state)


@pytest.fixture
def watcher(path: Path) -> Watcher:
    return Watcher(str(path))


# --- reseeding ------------------------------------------------------------------------------------------------


def test_nothing_happens_without_an_identity(watcher: Watcher) -> None:
    before = random.getstate()
    assert not watcher.check()
    assert watcher.identity() is None
    assert random.getstate() == before


def test_once_for_each_identity(watcher: Watcher, path: Path) -> None:
    seen: list[str] = []
    watcher.on_restore(lambda identity: seen.append(identity.replica))
    for replica, seed in (("a", SEED_A), ("b", SEED_B), ("a", SEED_A)):
        write(path, seed, replica)
        assert watcher.check()
        after = random.getstate()
        assert not watcher.check() and random.getstate() == after
    assert seen == ["a", "b", "a"]


def test_the_same_seed_is_the_same_stream(watcher: Watcher, path: Path) -> None:
    drawn = []
    for seed in (SEED_A, SEED_B, SEED_A):
        write(path, seed)
        watcher.check()
        drawn.append([random.random() for _ in range(4)])
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_golden_of_a_replica(watcher: Watcher, path: Path) -> None:
    """Its clones carry the earlier identity in their memory; a check with no file leaves it."""
    write(path, SEED_A, "first")
    watcher.check()
    path.unlink()
    assert not watcher.check()
    write(path, SEED_B, "second")
    assert watcher.check()
    assert watcher.identity() == Identity("second", "g", bytes.fromhex(SEED_B))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"replica": "r", "golden": "g", "seed": "ab"}', '{"seed": 7}', '{"seed": "xy"}']
)
def test_a_file_that_is_no_identity(watcher: Watcher, path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(text)
    before = random.getstate()
    assert not watcher.check() and not watcher.check()
    assert watcher.identity() is None
    assert random.getstate() == before
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(path) in record.getMessage()
    write(path, SEED_A)
    assert watcher.check()


def test_the_path_is_in_the_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCKPT_IDENTITY", str(path))
    write(path, SEED_A, "here")
    found = Watcher().identity()
    assert found is not None and found.replica == "here"


def test_it_is_cheap(watcher: Watcher, path: Path) -> None:
    write(path, SEED_A)
    watcher.check()
    best = min(_time(watcher) for _ in range(20))
    assert best < 20_000, f"{best} ns"


def _time(watcher: Watcher) -> float:
    started = time.perf_counter_ns()
    for _ in range(100):
        watcher.check()
    return (time.perf_counter_ns() - started) / 100


def test_the_seed_is_not_shown() -> None:
    assert "seed" not in repr(Identity("r", "g", b"secret" * 5))


def test_derived_bytes() -> None:
    a, b = (Identity("r", "g", bytes.fromhex(seed)) for seed in (SEED_A, SEED_B))
    assert a.derive("x") == a.derive("x") != a.derive("y")
    assert a.derive("x") != b.derive("x")
    assert len(a.derive("x", 64)) == 64


# --- groups, listeners, threads -------------------------------------------------------------------------------


def test_processes_draw_different_numbers_unless_they_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, SEED_A)

    def drawn(pid: int, group: str | None) -> float:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        watcher = Watcher(str(path))
        if group:
            watcher.share(group)
        assert watcher.check()
        return random.random()

    assert drawn(1, None) == drawn(1, None) != drawn(2, None)
    assert drawn(1, "engine 0") == drawn(2, "engine 0") != drawn(2, "engine 1")


def test_a_group_named_late_counts_all_the_same(watcher: Watcher, path: Path) -> None:
    write(path, SEED_A)
    watcher.check()
    watcher.share("x")
    assert watcher.check()
    watcher.share("x")
    assert not watcher.check()


def test_listeners_come_after_reseeding_and_do_not_hinder_one_another(
    watcher: Watcher, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[float] = []

    @watcher.on_restore
    def failing(identity: Identity) -> None:
        raise RuntimeError("of its own")

    @watcher.on_restore
    def drawing(identity: Identity) -> None:
        assert not watcher.check()  # in the midst of it
        assert watcher.identity() == identity
        drawn.append(random.random())

    for _ in range(2):
        write(path, SEED_A)
        assert watcher.check()
    assert drawn[0] == drawn[1]
    assert "of its own" in caplog.text


def test_threads_wait_for_the_one_that_reseeds(watcher: Watcher, path: Path) -> None:
    began, finish = threading.Event(), threading.Event()
    done: list[bool] = []

    @watcher.on_restore
    def slow(identity: Identity) -> None:
        began.set()
        assert finish.wait(60)
        done.append(True)

    answers: list[tuple[bool, bool]] = []

    def ask() -> None:
        result = watcher.check()
        answers.append((result, bool(done)))

    write(path, SEED_A)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads[0].start()
    assert began.wait(60)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.05)
    assert answers == []
    finish.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [(False, True)] * 3 + [(True, True)]
    assert done == [True]


# --- as any server uses it ------------------------------------------------------------------------------------


def in_a_process(code: str, path: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(HOOKS), "GPUCKPT_IDENTITY": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_it_needs_nothing_but_python(path: Path) -> None:
    write(path, SEED_A, "here")
    code = (
        "from gpuckpt_guest import lifecycle; import sys, random\n"
        "loaded = [m for m in sys.modules if m.partition('.')[0] in ('gpuckpt', 'numpy', 'torch')]\n"
        "print(lifecycle.identity().replica, loaded, lifecycle.check())"
    )
    assert in_a_process(code, path) == "here [] False\n"


def test_the_entry_point_is_found_where_the_folder_is_on_the_path(path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "(found,) = (e for e in entry_points(group='vllm.general_plugins') if e.name == 'gpuckpt')\n"
        "print(found.load().__qualname__)"
    )
    assert in_a_process(code, path) == "register\n"


class _Recorder(ModuleType):
    """Stands for numpy.random or torch."""

    def __init__(self, function: str) -> None:
        super().__init__("recorder")
        self.seeds: list[Any] = []
        setattr(self, function, self.seeds.append)


def test_numpy_and_torch_if_they_are_loaded(watcher: Watcher, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy, torch = _Recorder("seed"), _Recorder("manual_seed")
    monkeypatch.setitem(sys.modules, "numpy.random", numpy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for seed in (SEED_A, SEED_B, SEED_A):
        write(path, seed)
        watcher.check()
    for module in (numpy, torch):
        assert module.seeds[0] == module.seeds[2] != module.seeds[1]
    assert all(0 <= word < 1 << 32 for word in numpy.seeds[0]) and len(numpy.seeds[0]) == 8
    assert all(0 <= seed < 1 << 63 for seed in torch.seeds)


# --- vLLM's plugin --------------------------------------------------------------------------------------------

WORKER_BASE = """
class WorkerBase:
    def __init__(self, vllm_config):
        self.vllm_config = vllm_config
class Worker(WorkerBase):
    def __init__(self, vllm_config):
        super().__init__(vllm_config=vllm_config)
class WorkerWrapperBase:
    def execute_model(self, scheduled):
        return scheduled
"""
MODULES = {
    "vllm/v1/worker/worker_base.py": WORKER_BASE,
    "vllm/v1/sample/sampler.py": "class Sampler:\n    def forward(self, logits): return logits",
    "vllm/v1/worker/gpu/sample/states.py": "class SamplingStates:\n    def add_request(self, i): return i",
    "vllm/v1/engine/core.py": """
class EngineCore:
    def add_request(self, request):
        return request
    def sleep(self, level=1):
        return level
""",
    "vllm/distributed/device_communicators/shm_broadcast.py": """
class SpinCondition:
    def __init__(self):
        self.last_read, self.busy_loop_s, self.waits = 100.0, 1.0, []
    def wait(self, timeout_ms=None):
        self.waits.append((self.busy_loop_s, timeout_ms))
""",
    "vllm/platforms/__init__.py": """
class current_platform:
    @staticmethod
    def is_cpu():
        return True
""",
    "fastapi/applications.py": "class FastAPI:\n    async def __call__(self, scope, receive, send): return scope",
}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A vLLM of its outlines, and what is asked of lifecycle."""
    for name, text in MODULES.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for folder in file.relative_to(tmp_path / "site").parents:
            (tmp_path / "site" / folder / "__init__.py").touch()
    vllm_plugin._on_processors.cache_clear()
    before, finders = set(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.import_module("vllm")
    made: list[str] = []
    monkeypatch.setattr(lifecycle, "check", lambda: made.append("check"))
    monkeypatch.setattr(lifecycle, "share", made.append)
    monkeypatch.setattr(lifecycle, "on_restore", lambda listener: made.append(listener.__name__))
    yield made
    sys.meta_path[:] = finders
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("vllm", "fastapi"):
            del sys.modules[name]


def module(name: str) -> Any:
    return importlib.import_module(name)


def test_nothing_is_imported_for_the_plugin_s_sake(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    vllm_plugin.register()
    assert not [name for name in sys.modules if name.startswith(("vllm.", "fastapi"))]
    assert caplog.records == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_way_to_random_numbers_is_checked(calls: list[str], when: str) -> None:
    if when == "before":
        module("vllm.v1.worker.worker_base")
    vllm_plugin.register()
    vllm_plugin.register()
    assert calls == ["_forget_names"]
    assert module("vllm.v1.worker.worker_base").WorkerWrapperBase().execute_model(scheduled=1) == 1
    assert module("vllm.v1.sample.sampler").Sampler().forward(2) == 2
    assert module("vllm.v1.worker.gpu.sample.states").SamplingStates().add_request(3) == 3
    assert module("vllm.v1.engine.core").EngineCore().add_request(4) == 4
    assert calls[1:] == ["check"] * 4


def test_an_application_still_looks_like_one(calls: list[str]) -> None:
    """uvicorn tells ASGI 3 from 2, and an application from a factory, by these two."""
    vllm_plugin.register()
    application = module("fastapi.applications").FastAPI()
    assert inspect.iscoroutinefunction(application.__call__)
    with pytest.raises(TypeError):
        application()
    assert asyncio.run(application({"path": "/"}, None, None)) == {"path": "/"}
    assert calls[1:] == ["check"]


def test_an_engine_that_sleeps_lets_go_of_the_management_library(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the scheduling process, too, which no order of ours reaches."""
    monkeypatch.setattr(nvml, "let_go", lambda: calls.append("let go"))
    vllm_plugin.register()
    assert module("vllm.v1.engine.core").EngineCore().sleep(level=2) == 2
    assert calls[1:] == ["let go"]


def waits(monkeypatch: pytest.MonkeyPatch, *looks: tuple[float, int | None]) -> list[tuple[float, int | None]]:
    """How vLLM waits for a message when it is asked to at these times; the last one came at 100."""
    vllm_plugin.register()
    reader = module("vllm.distributed.device_communicators.shm_broadcast").SpinCondition()
    for now, timeout in looks:
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        reader.wait(timeout_ms=timeout)
        assert reader.busy_loop_s == 1.0
    found: list[tuple[float, int | None]] = reader.waits
    return found


LOOKS: tuple[tuple[float, int | None], ...] = (
    (100.05, None),  # it begins to wait
    (100.052, None),
    (100.06, None),
    (100.9, 4),
    (100.9, 60_000),
    (101.1, 60_000),
    (102.0, None),
)


def test_who_waits_for_a_message_leaves_the_processors_to_others(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a moment, and so that one that it was not told of is found all the same."""
    soon = [(1.0, None), (1.0, None), (-1.0, 10), (-1.0, 4), (-1.0, 10)]
    assert waits(monkeypatch, *LOOKS) == [*soon, (1.0, 60_000), (1.0, None)]


def test_after_each_message_it_looks_for_a_moment_first(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_plugin.register()
    reader = module("vllm.distributed.device_communicators.shm_broadcast").SpinCondition()
    for now, came in ((100.05, 100.0), (100.06, 100.0), (100.1, 100.07), (100.11, 100.07)):
        reader.last_read = came
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        reader.wait()
    assert reader.waits == [(1.0, None), (-1.0, 10), (1.0, None), (-1.0, 10)]


def test_on_a_gpu_it_waits_as_ever(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("vllm.platforms").current_platform, "is_cpu", lambda: False)
    assert waits(monkeypatch, *LOOKS) == [(1.0, timeout) for _, timeout in LOOKS]


@pytest.mark.parametrize(
    ("parallel", "group"),
    [
        ({"data_parallel_index": 2, "data_parallel_rank": 0}, "vllm engine 2"),
        ({"data_parallel_rank": 1}, "vllm engine 1"),
    ],
)
def test_the_ranks_of_an_engine_draw_alike(calls: list[str], parallel: dict[str, int], group: str) -> None:
    vllm_plugin.register()
    config = SimpleNamespace(parallel_config=SimpleNamespace(**parallel))
    module("vllm.v1.worker.worker_base").Worker(config)
    assert calls[1:] == [group]


def test_what_this_vllm_does_not_have_is_named(
    calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "site/vllm/v1/engine/core.py").write_text("class EngineCore: pass")
    (tmp_path / "site/vllm/v1/sample/sampler.py").write_text("")
    (tmp_path / "site/vllm/v1/worker/gpu/sample/states.py").unlink()
    vllm_plugin.register()
    module("vllm.v1.engine.core")
    module("vllm.v1.sample.sampler")
    named = [record.getMessage().split()[4].rstrip(":") for record in caplog.records]
    assert named == [
        "vllm.v1.worker.gpu.sample.states",
        "vllm.v1.engine.core.EngineCore.add_request",
        "vllm.v1.engine.core.EngineCore.sleep",
        "vllm.v1.sample.sampler.Sampler.forward",
    ]
    assert module("vllm.v1.worker.worker_base").WorkerWrapperBase().execute_model(1) == 1


def test_offloading_threads_draw_their_names_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("io")
    stand_in._thread_local = before = threading.local()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.tiering.fs.io", stand_in)
    vllm_plugin._forget_names(Identity("r", "g", bytes(32)))
    assert stand_in._thread_local is not before
