"""Weights that are on the device already, handed on by vLLM's API server to a worker that is another process."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hooks.gpuckpt_guest import carried, flat, handing, vllm_weights
from hooks.gpuckpt_guest.carried import Streamed
from hooks.gpuckpt_guest.control import ControlError
from hooks.gpuckpt_guest.flat import FlatError, HostLane, Region
from hooks.gpuckpt_guest.vllm_control import Orders
from tests.opened import left_open, opened
from tests.unit.test_guest_vllm import Pool, Worker, pool

SOCKET = "carried-"


# --- from memory, or from the file ----------------------------------------------------------------------------


class Weights:
    """Regions of this process, in a file and in another one that stands for memory of a device."""

    def __init__(self) -> None:
        self.held = pool()
        self.regions = [Region(f"{at:#x}", at, data.handle[1]) for at, data in self.held.pointer_to_data.items()]
        self.file, self.handle = os.memfd_create("weights"), os.memfd_create("carried")
        self.before = self.bytes
        flat.write(self.file, self.regions)
        os.sendfile(self.handle, self.file, 0, os.fstat(self.file).st_size)
        self.forget()

    @property
    def bytes(self) -> list[bytes]:
        return [bytes(flat.memory(region.address, region.bytes)) for region in self.regions]

    def forget(self) -> None:
        self.held.drop()
        for data in self.held.pointer_to_data.values():
            data.mapped = True

    def stream(self, handle: int | None, opened: carried.Opened = carried.of_host) -> Streamed:
        return carried.stream(self.file, self.regions, HostLane, handle, opened)


@pytest.fixture
def weights() -> Iterator[Weights]:
    made = Weights()
    yield made
    os.close(made.file)
    os.close(made.handle)


def test_from_the_memory(weights: Weights) -> None:
    os.pwrite(weights.file, bytes(99), flat.FIRST)
    found = weights.stream(weights.handle)
    assert (found.bytes, found.phase, found.told) == (sum(len(each) for each in weights.before), "copy", "")
    assert weights.bytes == weights.before


def test_from_the_file(weights: Weights) -> None:
    assert weights.stream(None).phase == "stream" and weights.bytes == weights.before


def test_a_file_of_others_is_refused_all_the_same(weights: Weights) -> None:
    os.pwrite(weights.file, b"x", 40)
    with pytest.raises(FlatError):
        weights.stream(weights.handle)


def test_memory_that_ends_while_it_is_copied(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    real = carried._FileLane.read

    def read(self: Any, file: int, offset: int, address: int, size: int) -> None:
        real(self, file, offset, address, size // 2)
        raise OSError(5, "of the device")

    monkeypatch.setattr(carried._FileLane, "read", read)
    found = weights.stream(weights.handle)
    assert found.phase == "stream" and found.told.endswith("so the file was read: [Errno 5] of the device")
    assert weights.bytes == weights.before


# --- an open file, from process to process --------------------------------------------------------------------


def test_a_file_is_handed_over_as_often_as_it_is_asked_for(tmp_path: Path) -> None:
    file = os.memfd_create("x")
    os.write(file, b"content")
    before = opened()
    with handing.offered(file, str(tmp_path)) as path:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and os.listdir(tmp_path) == [os.path.basename(path)]
        for _ in range(3):
            with handing.taken(path) as mine:
                assert mine != file and os.pread(mine, 9, 0) == b"content"
    assert os.listdir(tmp_path) == [] and not left_open(before)
    with pytest.raises(FileNotFoundError), handing.taken(path):
        raise AssertionError
    os.close(file)


def test_nobody_asks_and_what_was_left_by_one_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / f"{SOCKET}{os.getpid()}.sock").touch()

    def handing_over() -> int:
        return sum(thread.name == "gpuckpt-handing" for thread in threading.enumerate())

    with handing.offered(0, str(tmp_path)):
        assert handing_over() == 1
    assert handing_over() == 0
    assert os.listdir(tmp_path) == []


def test_one_that_hands_nothing_over_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "_PATIENCE", 0.1)
    monkeypatch.setattr(handing, "_hand", lambda listener, file: None)
    before = opened()
    with (
        handing.offered(0, str(tmp_path)) as path,
        pytest.raises(TimeoutError),
        handing.taken(path),
    ):
        raise AssertionError
    monkeypatch.setattr(handing, "_PATIENCE", 60)
    monkeypatch.setattr(handing, "_hand", lambda listener, file: listener.accept()[0].close())
    with handing.offered(0, str(tmp_path)) as path, pytest.raises(OSError, match="no file"), handing.taken(path):
        raise AssertionError
    assert not left_open(before)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), handing.offered(0, str(tmp_path / "absent")):
        raise AssertionError


# --- vLLM -----------------------------------------------------------------------------------------------------


def work(pipe: Connection) -> None:
    """A worker, in a process of its own: answers the methods that it is asked for."""
    module = ModuleType("vllm.device_allocator.cumem")
    module.CuMemAllocator = Pool  # type: ignore[attr-defined]
    sys.modules |= {"vllm": ModuleType("vllm"), "vllm.device_allocator": ModuleType("x"), module.__name__: module}
    vllm_weights._lanes = lambda: HostLane
    vllm_weights._opened = carried.of_host
    free = 70_301 + 4096
    vllm_weights._free = lambda: free
    Pool.instance = held = pool()
    worker = Worker(0, held)
    while (asked := pipe.recv()) is not None:
        method, args, kwargs = asked
        if method == "runtime":  # what vLLM maps again whatever it is told
            for data in held.pointer_to_data.values():
                data.mapped = data.mapped or data.tag == "runtime"
            pipe.send(None)
        elif method == "free":
            (free,) = args
            pipe.send(None)
        elif method == "content":
            pipe.send((held.bytes("weights"), len(os.listdir("/proc/self/fd"))))
        else:
            pipe.send(getattr(worker, method)(*args, **kwargs))


class Remote:
    """The engine's client; its worker is another process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,))
        self._process.start()
        theirs.close()
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.beats = 0
        parallel = {"world_size": 1, "data_parallel_size": 1, "worker_extension_cls": "x"}
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enable_sleep_mode=True), parallel_config=SimpleNamespace(**parallel)
        )

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._process.close()
        self._pipe.close()

    def do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._pipe.send((method, args, kwargs))
        assert self._pipe.poll(60)
        return self._pipe.recv()

    async def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> list[Any]:
        self.asked.append((method, args))
        asking = asyncio.ensure_future(asyncio.to_thread(self.do, method, *args, **(kwargs or {})))
        while not asking.done():  # the loop goes on meanwhile
            self.beats += 1
            await asyncio.sleep(0.001)
        return [await asking]

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        await self.collective_rpc("sleep", kwargs={"level": level})

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        await self.collective_rpc("wake_up", kwargs={"tags": tags})
        return True


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    monkeypatch.setenv("GPUCKPT_CONTROL", str(tmp_path / "control.sock"))
    made = Remote()
    yield made
    made.close()


def ask(orders: Orders, do: str, files: Sequence[int] = (), **more: Any) -> Any:
    return asyncio.run(orders.handlers()[do]({"do": do} | more, files))


@pytest.fixture
def held(client: Remote) -> Iterator[tuple[Orders, int, int]]:
    """Orders to a server that is asleep, its file, and what stands for memory of the device."""
    orders: Orders = Orders(client)
    file, handle = os.memfd_create("weights"), os.memfd_create("carried")
    ask(orders, "save", [file])
    os.sendfile(handle, file, 0, os.fstat(file).st_size)
    os.pwrite(file, bytes(70_000), flat.FIRST)  # who read the file would have other weights
    yield orders, file, handle
    os.close(file)
    os.close(handle)


def asleep(orders: Orders, client: Remote) -> None:
    ask(orders, "sleep")
    client.do("runtime")


def test_a_handle_reaches_the_worker(client: Remote, held: tuple[Orders, int, int], tmp_path: Path) -> None:
    orders, file, handle = held
    before, files = client.do("content")
    for _ in range(2):
        asleep(orders, client)
        mine = opened()
        told = ask(orders, "wake", [file, handle], carried=1)
        assert told["bytes"] == 70_301 and list(told["phases"]) == ["map", "kv", "copy"] and "told" not in told
        assert client.do("content") == (before, files)
        assert not left_open(mine) and os.listdir(tmp_path) == []
    (offer,) = {args[2] for method, args in client.asked if method == "gpuckpt_wake"}
    assert Path(offer).parent == tmp_path
    assert ask(orders, "state") == {"asleep": False}
    assert ask(orders, "wake", [file, handle], carried=1) == {"bytes": 0, "phases": {"map": 0, "stream": 0, "kv": 0}}


def test_without_a_handle_the_file_is_read(client: Remote, held: tuple[Orders, int, int]) -> None:
    orders, file, _ = held
    before, _ = client.do("content")
    asleep(orders, client)
    told = ask(orders, "wake", [file], carried=0)
    assert list(told["phases"]) == ["map", "kv", "stream"] and "told" not in told
    assert [len(args) for method, args in client.asked if method == "gpuckpt_wake"] == [2]
    assert client.do("content")[0] != before


def test_a_handle_that_is_no_use(client: Remote, held: tuple[Orders, int, int], tmp_path: Path) -> None:
    orders, file, handle = held
    os.ftruncate(handle, 4096)
    asleep(orders, client)
    _, files = client.do("content")
    told = ask(orders, "wake", [file, handle], carried=1)
    assert "stream" in told["phases"] and "it has 4096 bytes of" in told["told"]
    assert client.do("content")[1] == files and os.listdir(tmp_path) == []


def test_no_room_beside_it(client: Remote, held: tuple[Orders, int, int], tmp_path: Path) -> None:
    orders, file, handle = held
    asleep(orders, client)
    before = client.do("content")
    client.do("free", 70_301 + 4095)
    with pytest.raises(ControlError) as caught:
        ask(orders, "wake", [file, handle], carried=1)
    assert "beside the weights that the host has brought to the device" in caught.value.cause
    assert ask(orders, "state") == {"asleep": True}
    assert client.do("content") == before and os.listdir(tmp_path) == []
    assert "stream" in ask(orders, "wake", [file])["phases"]


def test_nowhere_to_hand_it_on(
    client: Remote, held: tuple[Orders, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, file, handle = held
    asleep(orders, client)
    monkeypatch.setenv("GPUCKPT_CONTROL", str(tmp_path / "absent" / "control.sock"))
    told = ask(orders, "wake", [file, handle], carried=1)
    assert "stream" in told["phases"] and "No such file" in told["told"]


def test_an_offer_that_is_gone(client: Remote, held: tuple[Orders, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    orders, file, handle = held
    asleep(orders, client)
    monkeypatch.setattr(handing, "_hand", lambda listener, file: listener.accept()[0].close())
    told = ask(orders, "wake", [file, handle], carried=1)
    assert "stream" in told["phases"] and "no file was handed over" in told["told"]


def test_the_loop_goes_on_meanwhile(
    client: Remote, held: tuple[Orders, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, file, handle = held
    asleep(orders, client)
    real = handing._hand

    def late(*given: Any) -> None:
        end = time.monotonic() + 8  # the other side's patience is longer
        while client.beats <= 20 and time.monotonic() < end:
            time.sleep(0.001)
        real(*given)

    monkeypatch.setattr(handing, "_hand", late)
    client.beats = 0
    assert "copy" in ask(orders, "wake", [file, handle], carried=1)["phases"]
    assert client.beats > 20


def test_what_is_not_understood_leaves_it_asleep(client: Remote, held: tuple[Orders, int, int]) -> None:
    orders, file, handle = held
    asleep(orders, client)
    asked = len(client.asked)
    for files, more, said in (
        ([file], {"carried": 1}, "1 files"),
        ([file, handle], {}, "2 files"),
        ([file, handle, handle], {"carried": 2}, "'carried' is 2"),
        ([file], {"fast": True}, "no 'fast'"),
    ):
        with pytest.raises(ControlError, match=said):
            ask(orders, "wake", files, **more)
    assert ask(orders, "state") == {"asleep": True} and len(client.asked) == asked


def test_a_file_of_others_leaves_it_asleep_and_nothing_offered(
    client: Remote, held: tuple[Orders, int, int], tmp_path: Path
) -> None:
    orders, file, handle = held
    asleep(orders, client)
    os.pwrite(file, b"x", 40)
    with pytest.raises(ControlError, match="cannot wake up"):
        ask(orders, "wake", [file, handle], carried=1)
    assert client.asked[-1][0] == "gpuckpt_check" and os.listdir(tmp_path) == []
