"""vLLM's side of the control socket, with an engine, workers and a pool of memory that only look like vLLM's."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hooks.gpuckpt_guest import flat, lifecycle, nvml, vllm_caches, vllm_control, vllm_weights
from hooks.gpuckpt_guest.control import ControlError
from hooks.gpuckpt_guest.lifecycle import Identity
from hooks.gpuckpt_guest.vllm_control import Orders
from hooks.gpuckpt_guest.vllm_weights import WeightsExtension


class Pool:
    """CuMemAllocator: allocations with tags, whose content is lost asleep."""

    instance: Any = None

    def __init__(self, *sizes: tuple[str, int]) -> None:
        self.pointer_to_data: dict[int, Any] = {}
        self._held: list[Any] = []
        for tag, size in reversed(sizes):
            made: Any = ctypes.create_string_buffer(random.randbytes(size), size)
            self._held.append(made)
            at = ctypes.addressof(made)
            self.pointer_to_data[at] = SimpleNamespace(handle=(0, size, at, 0), tag=tag, mapped=True)
        self.caches: list[Any] = [
            tensor(at, data.handle[1]) for at, data in self.pointer_to_data.items() if data.tag == "kv_cache"
        ]

    def drop(self) -> None:
        for at, data in self.pointer_to_data.items():
            assert data.mapped, "unmapped twice"
            ctypes.memset(at, 0xEE, data.handle[1])
            data.mapped = False

    def map(self, tags: Sequence[str] | None) -> None:
        for data in self.pointer_to_data.values():
            if tags is None or data.tag in tags:
                assert not data.mapped, "mapped twice"
                data.mapped = True

    def bytes(self, tag: str) -> list[bytes]:
        held = sorted(self.pointer_to_data.items())
        return [ctypes.string_at(at, data.handle[1]) for at, data in held if data.tag == tag]


def tensor(at: int, size: int) -> Any:
    """What is seen of one: the memory behind it."""
    storage = SimpleNamespace(data_ptr=lambda: at, nbytes=lambda: size)
    return SimpleNamespace(untyped_storage=lambda: storage)


class Base:
    """What a worker of vLLM does."""

    def __init__(self, rank: int, pool: Pool) -> None:
        self.rank, self.pool = rank, pool
        self.model_runner = SimpleNamespace(kv_caches=pool.caches)

    def sleep(self, level: int = 1) -> None:
        assert level == 2
        self.pool.drop()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        self.pool.map(tags)


class Worker(Base, WeightsExtension):
    """With the extension, as vLLM puts them together."""


class Client:
    """The engine's client, and the engine behind it."""

    def __init__(self, *pools: Pool, **config: Any) -> None:
        self.workers = [Worker(rank, pool) for rank, pool in enumerate(pools)]
        self.asked: list[str] = []
        parallel = {
            "world_size": len(pools),
            "data_parallel_size": 1,
            "worker_extension_cls": "gpuckpt_guest.vllm_weights.WeightsExtension",
        }
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enable_sleep_mode=config.pop("sleeps", True)),
            parallel_config=SimpleNamespace(**(parallel | config)),
        )

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        assert timeout is None
        self.asked.append(method)
        previous = Pool.instance
        answers = []
        for worker in self.workers:
            Pool.instance = worker.pool  # each is a process of its own
            answers.append(getattr(worker, method)(*args, **(kwargs or {})))
        Pool.instance = previous
        return answers

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert mode == "wait"
        if level:
            await self.collective_rpc("sleep", kwargs={"level": level})
        else:
            self.asked.append("level 0")

    async def reset_mm_cache(self) -> None:
        self.asked.append("inputs")

    async def reset_encoder_cache(self) -> None:
        self.asked.append("encoder")

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        assert not reset_running_requests
        self.asked.append("outside too" if reset_connector else "prefixes")
        return True

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        if tags == ["scheduling"]:
            self.asked.append("resume")
        else:
            await self.collective_rpc("wake_up", kwargs={"tags": tags})
        return True


class Checkpointing(Client):
    """With communicators that can be told."""

    async def checkpoint_prepare(self) -> None:
        self.asked.append("prepare")

    async def checkpoint_restore(self) -> None:
        self.asked.append("restore")


def unmap(handle: tuple[int, int, int, int]) -> None:
    data = Pool.instance.pointer_to_data[handle[2]]
    assert data.mapped, "unmapped twice"
    ctypes.memset(handle[2], 0xEE, handle[1])
    data.mapped = False


def create(handle: tuple[int, int, int, int]) -> None:
    data = Pool.instance.pointer_to_data[handle[2]]
    assert not data.mapped, "mapped twice"
    data.mapped = True


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("vllm.device_allocator.cumem")
    module.CuMemAllocator = Pool  # type: ignore[attr-defined]
    module.unmap_and_release = unmap  # type: ignore[attr-defined]
    module.create_and_map = create  # type: ignore[attr-defined]
    module.libcudart = SimpleNamespace(  # type: ignore[attr-defined]
        cudaMemcpy=ctypes.memmove, cudaMemset=ctypes.memset
    )
    for name in ("vllm", "vllm.device_allocator"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_weights, "_lanes", lambda: flat.HostLane)
    monkeypatch.setattr(vllm_caches, "_synchronize", lambda: None)
    monkeypatch.setattr(vllm_caches, "_tidy", lambda: None)
    monkeypatch.setattr(vllm_caches, "_free", lambda: 1 << 30)
    yield
    assert Pool.instance is None


def pool(seed: int = 1) -> Pool:
    random.seed(seed)
    return Pool(("weights", 70_001), ("kv_cache", 4096), ("weights", 300), ("runtime", 10))


@pytest.fixture
def files() -> Iterator[Callable[[int], list[int]]]:
    made: list[int] = []

    def some(count: int) -> list[int]:
        made.extend(found := [os.memfd_create("weights") for _ in range(count)])
        return found

    yield some
    for file in made:
        os.close(file)


def ask(orders: Orders, do: str, files: Sequence[int] = (), **more: Any) -> Any:
    return asyncio.run(orders.handlers()[do]({"do": do} | more, files))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", [Client, Checkpointing])
def test_there_and_back(ranks: int, kind: type[Client], files: Any) -> None:
    client = kind(*(pool(seed) for seed in range(ranks)))
    orders, held = Orders(client), files(ranks)
    before = [worker.pool.bytes("weights") for worker in client.workers]
    assert ask(orders, "ranks") == {"ranks": ranks}
    assert ask(orders, "state") == {"asleep": False}
    assert ask(orders, "save", held) == {"bytes": [os.fstat(file).st_size for file in held]}
    assert ask(orders, "sleep") == {"released": ranks * (70_001 + 4096 + 300)}
    assert ask(orders, "state") == {"asleep": True}
    assert ask(orders, "sleep") == {"released": 0}
    assert not any(data.mapped for worker in client.workers for data in worker.pool.pointer_to_data.values())
    for worker in client.workers:  # what vLLM maps again whatever it is told
        for data in worker.pool.pointer_to_data.values():
            data.mapped = data.tag == "runtime"

    told = ask(orders, "wake", held)
    assert told["bytes"] == ranks * 70_301 and set(told["phases"]) == {"map", "stream", "kv"}
    assert [worker.pool.bytes("weights") for worker in client.workers] == before
    assert all(data.mapped for worker in client.workers for data in worker.pool.pointer_to_data.values())
    assert ask(orders, "state") == {"asleep": False}
    assert ask(orders, "wake", held)["bytes"] == 0
    # The engine learns that it is awake when everything is there, and has nothing left to do.
    wanted = ["gpuckpt_save", "gpuckpt_held", "sleep", "gpuckpt_check", "gpuckpt_wake", "wake_up"]
    if kind is Checkpointing:
        wanted.insert(3, "prepare")
        wanted.insert(-2, "restore")
    assert [one for one in client.asked if one != "gpuckpt_quiet"] == wanted
    # And once more: the second time is as the first.
    ask(orders, "sleep")
    for worker in client.workers:
        for data in worker.pool.pointer_to_data.values():
            data.mapped = data.tag == "runtime"
    ask(orders, "wake", held)
    assert [worker.pool.bytes("weights") for worker in client.workers] == before


def asleep(client: Client, held: Sequence[int]) -> Orders:
    orders = Orders(client)
    ask(orders, "save", held)
    ask(orders, "sleep")
    return orders


def test_a_file_of_other_weights_is_refused_before_anything_is_mapped(files: Any) -> None:
    client, held = Checkpointing(pool(), pool(2)), files(2)
    orders = asleep(client, held)
    with pytest.raises(ControlError) as caught:
        ask(orders, "wake", [held[1], held[0]])
    assert "rank 0" in caught.value.cause and "of other weights" in caught.value.cause
    os.ftruncate(held[1], 3 << 20 >> 1)
    with pytest.raises(ControlError, match="cannot wake up"):
        ask(orders, "wake", held)
    with pytest.raises(ControlError, match="1 files"):
        ask(orders, "wake", held[:1])
    assert not any(data.mapped for worker in client.workers for data in worker.pool.pointer_to_data.values())
    assert ask(orders, "state") == {"asleep": True}
    assert "restore" not in client.asked


def test_one_rank_that_fails_half_way_puts_all_to_sleep_again(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, held = Checkpointing(pool(), pool(2)), files(2)
    before = [worker.pool.bytes("weights") for worker in client.workers]
    orders = asleep(client, held)

    def runtime() -> None:
        for worker in client.workers:
            for data in worker.pool.pointer_to_data.values():
                data.mapped = data.mapped or data.tag == "runtime"

    real, calls = flat.stream, []

    def failing(*given: Any) -> int:
        calls.append(given)
        if len(calls) == 2:
            raise OSError(5, "of the machine")
        return real(*given)

    runtime()
    with monkeypatch.context() as patch:
        patch.setattr(flat, "stream", failing)
        with pytest.raises(ControlError) as caught:
            ask(orders, "wake", held)
    assert "rank 1" in caught.value.cause and "of the machine" in caught.value.cause
    assert not any(data.mapped for worker in client.workers for data in worker.pool.pointer_to_data.values())
    assert ask(orders, "state") == {"asleep": True}
    assert client.asked[-2:] == ["gpuckpt_back", "prepare"]
    runtime()
    ask(orders, "wake", held)
    assert [worker.pool.bytes("weights") for worker in client.workers] == before
    assert client.asked[-1] == "wake_up"


def test_asleep_there_is_nothing_to_save(files: Any) -> None:
    held = files(1)
    orders = asleep(Client(pool()), held)
    with pytest.raises(ControlError) as caught:
        ask(orders, "save", held)
    assert "asleep" in caught.value.cause


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"sleeps": False}, "--enable-sleep-mode"),
        ({"worker_extension_cls": ""}, "--worker-extension-cls gpuckpt_guest.vllm_weights.WeightsExtension"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
    ],
)
@pytest.mark.parametrize("do", ["save", "sleep", "wake"])
def test_a_server_that_was_not_started_for_it(config: dict[str, Any], cause: str, do: str) -> None:
    client = Client(pool(), **config)
    with pytest.raises(ControlError) as caught:
        ask(Orders(client), do)
    assert cause in caught.value.cause
    assert ask(Orders(client), "ranks") == {"ranks": 1} and ask(Orders(client), "state") == {"asleep": False}
    assert client.asked == []


def test_a_pool_that_is_not_there(files: Any) -> None:
    assert "sleep mode is off" in Worker(0, pool()).gpuckpt_held()["error"]


def test_the_extension_takes_no_name_of_a_worker() -> None:
    """vLLM refuses one that does."""
    names = [name for name in dir(WeightsExtension) if not name.startswith("__")]
    assert names and all(name.startswith("gpuckpt_") for name in names)
    module, _, name = vllm_control._EXTENSION.rpartition(".")
    assert module == vllm_weights.__name__.removeprefix("hooks.") and hasattr(vllm_weights, name)


class Snapshots(Client):
    """An engine that knows snapshots itself."""

    async def suspend(self, mode: str = "wait") -> None:
        self.asked.append("suspend")

    async def device_unlock(self) -> None:
        self.asked.append("device_unlock")

    async def resume(self) -> None:
        self.asked.append("resume")


@pytest.mark.parametrize(("clone", "call"), [(True, "resume"), (False, "device_unlock")])
def test_an_engine_that_knows_snapshots_itself(clone: bool, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Snapshots(pool(), sleeps=False)
    client.vllm_config.snapshot_config = SimpleNamespace(snapshot_metadata=None)
    orders = Orders(client)
    assert ask(orders, "ranks") == {"ranks": 0} and ask(orders, "save") == {"bytes": []}
    assert ask(orders, "sleep") == {"released": 0} == ask(orders, "sleep")
    assert ask(orders, "state") == {"asleep": True}
    if clone:
        monkeypatch.setattr(lifecycle, "identity", lambda: Identity("r", "g", bytes(32)))
    assert ask(orders, "wake")["bytes"] == 0 == ask(orders, "wake")["bytes"]
    assert client.asked == ["suspend", call] and ask(orders, "state") == {"asleep": False}


def test_a_protocol_that_asks_for_more_is_not_guessed() -> None:
    class Asking(Snapshots):
        async def suspend(self, where: str, mode: str = "wait") -> None:  # type: ignore[override]
            raise AssertionError

    client = Asking(pool())
    client.vllm_config.snapshot_config = object()
    with pytest.raises(ControlError) as caught:
        ask(Orders(client), "sleep")
    assert caught.value.cause.endswith("what gpuckpt does not know: where")
    assert ask(Orders(client), "state") == {"asleep": False}


def test_it_must_have_been_told_to(files: Any) -> None:
    client = Snapshots(pool())
    client.vllm_config.snapshot_config = None
    asleep(client, files(1))
    assert "suspend" not in client.asked


# --- caches alone ---------------------------------------------------------------------------------------------


def mapped(client: Client, tag: str) -> list[bool]:
    data = (one for worker in client.workers for one in worker.pool.pointer_to_data.values())
    return [one.mapped for one in data if one.tag == tag]


RELEASE, TAKE = "gpuckpt_release_caches", "gpuckpt_take_caches"
EMPTIED = ["level 0", "inputs", "encoder", "prefixes"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("kind", "down", "up"),
    [
        (Client, [*EMPTIED, RELEASE], [TAKE, "resume"]),
        (Checkpointing, [*EMPTIED, RELEASE, "prepare"], ["restore", TAKE, "resume"]),
    ],
)
def test_caches_go_and_weights_stay(ranks: int, kind: type[Client], down: list[str], up: list[str]) -> None:
    client = kind(*(pool(seed) for seed in range(ranks)))
    orders = Orders(client)
    weights = [worker.pool.bytes("weights") for worker in client.workers]
    for _ in range(2):
        client.asked.clear()
        assert ask(orders, "sleep", caches=1) == {"released": ranks * 4096}
        assert ask(orders, "state") == {"asleep": True}
        assert not any(mapped(client, "kv_cache")) and all(mapped(client, "weights") + mapped(client, "runtime"))
        assert ask(orders, "sleep", caches=1) == {"released": 0}
        assert client.asked == down + (["gpuckpt_quiet"] if ranks == 1 else [])
        client.asked.clear()
        told = ask(orders, "wake", caches=1)
        assert told["bytes"] == 0 and told["phases"] == {"map": 0.0, "stream": 0.0, "kv": told["phases"]["kv"]}
        assert ask(orders, "state") == {"asleep": False}
        assert ask(orders, "wake", caches=1) == {"bytes": 0, "phases": {"map": 0.0, "stream": 0.0, "kv": 0.0}}
        assert client.asked == up
        assert all(mapped(client, "kv_cache"))
        assert [worker.pool.bytes("kv_cache") for worker in client.workers] == [[bytes(4096)]] * ranks
    assert [worker.pool.bytes("weights") for worker in client.workers] == weights


def test_what_older_versions_keep_beside_the_cache_outlives_it() -> None:
    made = Pool(("kv_cache", 4096), ("kv_cache", 512), ("kv_cache", 2048), ("weights", 300))
    tagged = sorted((at, data) for at, data in made.pointer_to_data.items() if data.tag == "kv_cache")
    (cached, one), (tables, two), (shared, three) = sorted(tagged, key=lambda each: (4096, 512, 2048).index(size(each)))
    # Layers that share memory, a list for one layer, a layer without any; the end of an allocation is nobody's.
    made.caches[:] = [tensor(cached, 4000), tensor(cached, 1000), [tensor(shared + 100, 900), tensor(shared + 1500, 8)]]
    made.caches.append(None)
    ctypes.memset(cached + 4000, 0, 96)
    was, beside = ctypes.string_at(tables, 512), ctypes.string_at(shared, 2048)
    client = Checkpointing(made)
    orders = Orders(client)
    assert ask(orders, "sleep", caches=1) == {"released": 4096 + 2048}
    assert (one.mapped, two.mapped, three.mapped) == (False, True, False)
    assert [at for given in vars(client.workers[0])["gpuckpt_caches"]._given.values() for at, _ in given.beside] == [
        shared,
        shared + 1000,
        shared + 1508,
    ]
    ask(orders, "wake", caches=1)
    assert ctypes.string_at(tables, 512) == was and ctypes.string_at(cached, 4096) == bytes(4096)
    wanted = beside[:100] + bytes(900) + beside[1000:1500] + bytes(8) + beside[1508:]
    assert ctypes.string_at(shared, 2048) == wanted


def size(each: tuple[int, Any]) -> int:
    return int(each[1].handle[1])


def test_vllm_s_own_notes_are_kept_right() -> None:
    client = Checkpointing(pool())
    data = list(client.workers[0].pool.pointer_to_data.values())
    for each in data:
        each.is_asleep = False
    orders = Orders(client)
    ask(orders, "sleep", caches=1)
    assert [each.is_asleep for each in data] == [each.tag == "kv_cache" for each in data]
    ask(orders, "wake", caches=1)
    assert not any(each.is_asleep for each in data)


def test_a_model_without_such_a_cache() -> None:
    client = Checkpointing(Pool(("weights", 300), ("kv_cache", 64)))
    client.workers[0].pool.caches.clear()
    orders = Orders(client)
    assert ask(orders, "sleep", caches=1) == {"released": 0} and ask(orders, "state") == {"asleep": True}
    assert ask(orders, "wake", caches=1)["bytes"] == 0 and all(mapped(client, "kv_cache"))


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        (Client, "sleep"),
        (Client, "reset_mm_cache"),
        (Client, "reset_encoder_cache"),
        (Client, "reset_prefix_cache"),
        (Checkpointing, "release"),
    ],
)
def test_caches_that_cannot_be_given_back_are_had_again(
    kind: type[Client], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = kind(pool(), pool(2))
    orders = Orders(client)

    async def fail(**_: Any) -> None:
        raise OSError("broken")

    def fail_on_rank_1(handle: tuple[int, int, int, int]) -> None:
        if Pool.instance is client.workers[1].pool:
            raise RuntimeError("CUDA Error: broken")
        unmap(handle)

    with monkeypatch.context() as patch:
        if step == "release":
            patch.setattr(sys.modules["vllm.device_allocator.cumem"], "unmap_and_release", fail_on_rank_1)
        else:
            patch.setattr(client, step, fail)
        with pytest.raises((ControlError, OSError)) as caught:
            ask(orders, "sleep", caches=1)
    assert "broken" in f"{caught.value} {getattr(caught.value, 'cause', '')}"
    assert ask(orders, "state") == {"asleep": False} and all(mapped(client, "kv_cache"))
    assert client.asked[-2:] == [TAKE, "resume"] and "prepare" not in client.asked
    assert ask(orders, "sleep", caches=1) == {"released": 2 * 4096}


def test_a_prefix_cache_that_is_in_use() -> None:
    class Busy(Client):
        async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
            return False

    client = Busy(pool())
    with pytest.raises(ControlError) as caught:
        ask(Orders(client), "sleep", caches=1)
    assert caught.value.cause == "the prefix cache could not be emptied"
    assert client.asked == [*EMPTIED[:-1], TAKE, "resume"] and all(mapped(client, "kv_cache"))


def test_what_is_kept_outside_of_the_engine_goes_with_its_caches() -> None:
    client = Client(pool())
    client.vllm_config.kv_transfer_config = SimpleNamespace()
    ask(Orders(client), "sleep", caches=1)
    assert client.asked[3] == "outside too"


@pytest.mark.parametrize("step", ["checkpoint_prepare", "gpuckpt_quiet"])
def test_a_sleep_that_fails_without_its_caches_is_one(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Checkpointing(pool())
    orders = Orders(client)

    async def fail() -> None:
        raise OSError("broken")

    with monkeypatch.context() as patch:
        if step == "gpuckpt_quiet":
            patch.setattr(client.workers[0], step, lambda: {"error": "broken"})
        else:
            patch.setattr(client, step, fail)
        with pytest.raises((ControlError, OSError)):
            ask(orders, "sleep", caches=1)
    assert ask(orders, "state") == {"asleep": True} and not any(mapped(client, "kv_cache"))
    ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": False} and all(mapped(client, "kv_cache"))


def test_caches_that_cannot_be_had_at_all_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be given back on one device may not come back on another."""
    client = Checkpointing(pool(), pool(2))
    orders = Orders(client)

    def fail_on_rank_1(handle: tuple[int, int, int, int]) -> None:
        if Pool.instance is client.workers[1].pool:
            raise RuntimeError("CUDA Error: broken")
        unmap(handle)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["vllm.device_allocator.cumem"], "unmap_and_release", fail_on_rank_1)
        patch.setattr(vllm_caches, "_free", lambda: 0)
        with pytest.raises(ControlError, match="cannot sleep") as caught:
            ask(orders, "sleep", caches=1)
    assert "0 MiB are free" in caught.value.cause and "resume" not in client.asked
    assert ask(orders, "state") == {"asleep": True} and mapped(client, "kv_cache") == [False, True]
    ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": False} and all(mapped(client, "kv_cache"))


@pytest.mark.parametrize("step", ["checkpoint_restore", "room", "map", "zero"])
def test_caches_that_cannot_be_had_again_stay_away(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(seed: int) -> Pool:
        random.seed(seed)
        return Pool(("weights", 300), ("kv_cache", 4096), ("kv_cache", 1024))

    client = Checkpointing(both(1), both(2))
    orders = Orders(client)
    ask(orders, "sleep", caches=1)
    cumem, calls = sys.modules["vllm.device_allocator.cumem"], []

    async def fail() -> None:
        raise OSError("broken")

    def fail_on_the_fourth(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> None:
            calls.append(given)
            if len(calls) == 4:
                raise RuntimeError("CUDA Error: broken")
            real(*given)

        return call

    with monkeypatch.context() as patch:
        if step == "checkpoint_restore":
            patch.setattr(client, step, fail)
        elif step == "room":
            patch.setattr(vllm_caches, "_free", lambda: 5119 if Pool.instance is client.workers[1].pool else 5120)
        elif step == "map":
            patch.setattr(cumem, "create_and_map", fail_on_the_fourth(create))
        else:
            patch.setattr(cumem.libcudart, "cudaMemset", fail_on_the_fourth(ctypes.memset))
        with pytest.raises((ControlError, OSError)):
            ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": True} and not any(mapped(client, "kv_cache"))
    if step != "checkpoint_restore":
        assert client.asked[-2:] == [RELEASE, "prepare"]
    assert "resume" not in client.asked
    ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": False} and all(mapped(client, "kv_cache"))
    assert client.asked[-1] == "resume"


def test_requests_that_cannot_be_let_run_are_when_it_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Checkpointing(pool())
    orders = Orders(client)
    ask(orders, "sleep", caches=1)

    async def fail(tags: Any) -> None:
        raise OSError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(client, "wake_up", fail)
        with pytest.raises(OSError, match="broken"):
            ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": True} and all(mapped(client, "kv_cache"))
    ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": False} and client.asked.count("restore") == 1


def test_it_wakes_up_from_what_it_was_put_to_sleep_by(files: Any) -> None:
    client, held = Checkpointing(pool()), files(1)
    orders = asleep(client, held)
    for do in ("sleep", "wake"):
        with pytest.raises(ControlError, match="the server cannot") as caught:
            ask(orders, do, caches=1)
        assert "without its weights" in caught.value.cause
    assert ask(orders, "state") == {"asleep": True} and not any(mapped(client, "weights"))
    for data in client.workers[0].pool.pointer_to_data.values():
        data.mapped = data.tag == "runtime"
    ask(orders, "wake", held)

    ask(orders, "sleep", caches=1)
    for do, with_files in (("sleep", []), ("wake", held), ("wake", [])):
        with pytest.raises(ControlError, match="the server cannot") as caught:
            ask(orders, do, with_files)
        assert 'only "caches": 1 wakes it' in caught.value.cause
    assert ask(orders, "state") == {"asleep": True} and not any(mapped(client, "kv_cache"))
    with pytest.raises(ControlError, match="cannot be saved"):
        ask(orders, "save", held)
    ask(orders, "wake", caches=1)
    assert ask(orders, "state") == {"asleep": False}


@pytest.mark.parametrize("config", [{"sleeps": False}, {"worker_extension_cls": ""}, {"data_parallel_size": 2}])
def test_caches_of_a_server_that_was_not_started_for_it(config: dict[str, Any]) -> None:
    client = Checkpointing(pool(), **config)
    for do in ("sleep", "wake"):
        with pytest.raises(ControlError):
            ask(Orders(client), do, caches=1)
    assert client.asked == []


def test_caches_without_a_pool() -> None:
    assert "sleep mode is off" in Worker(0, pool()).gpuckpt_release_caches()["error"]
    assert set(Worker(0, pool()).gpuckpt_take_caches()) == {"seconds"}


def test_caches_of_an_engine_that_knows_snapshots_itself() -> None:
    client = Snapshots(pool(), sleeps=False)
    client.vllm_config.snapshot_config = SimpleNamespace(snapshot_metadata=None)
    orders = Orders(client)
    assert ask(orders, "sleep", caches=1) == {"released": 0}
    with pytest.raises(ControlError):
        ask(orders, "wake")
    assert ask(orders, "wake", caches=1)["bytes"] == 0
    assert client.asked == ["suspend", "device_unlock"] and ask(orders, "state") == {"asleep": False}


# --- the plugin's socket --------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GPUCKPT_CONTROL", str(tmp_path / "control.sock"))
    yield tmp_path / "control.sock"
    while vllm_control._serving:
        if control := vllm_control._serving.pop():
            control.close()


def told(path: Path, do: str) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(json.dumps({"do": do}).encode() + b"\n")
        with connection.makefile("rb") as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found


def test_served_once_the_engine_is_there(path: Path) -> None:
    async def main() -> None:
        state = SimpleNamespace()
        vllm_control.serve(None)
        vllm_control.serve(state)
        assert not path.exists()
        state.engine_client = Client(pool(), pool(), sleeps=False)
        vllm_control.serve(state)
        vllm_control.serve(state)
        assert await asyncio.to_thread(told, path, "ranks") == {"ranks": 2}
        error = (await asyncio.to_thread(told, path, "sleep"))["error"]
        assert error["message"] == "the server cannot sleep" and "--enable-sleep-mode" in error["cause"]

    asyncio.run(main())


def test_of_several_api_servers_the_first_one_serves(path: Path) -> None:
    async def main() -> None:
        vllm_control.serve(SimpleNamespace(engine_client=Client(pool(), _api_process_rank=1)))

    asyncio.run(main())
    assert not path.exists()


def test_where_there_is_no_place_for_it_the_server_serves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        vllm_control.serve(SimpleNamespace(engine_client=Client(pool())))

    monkeypatch.setenv("GPUCKPT_CONTROL", str(path / "absent" / "control.sock"))
    asyncio.run(main())
    assert vllm_control._serving == [None]


def test_a_socket_that_is_taken(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        vllm_control.serve(SimpleNamespace(engine_client=Client(pool())))

    path.mkdir()
    asyncio.run(main())
    assert "no orders can be taken at" in caplog.text


# --- NVML -----------------------------------------------------------------------------------------------------


def test_a_library_that_nobody_has_loaded_is_left_alone() -> None:
    assert nvml.let_go("libnvidia-ml-of-nowhere.so.1") == 0


def test_it_is_closed_as_often_as_it_was_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [0, 0, 0, 1]
    library = SimpleNamespace(nvmlShutdown=lambda: left.pop(0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: library)
    assert nvml.let_go() == 3
