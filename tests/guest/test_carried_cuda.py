"""Memory of another process on a GPU, with a driver that only keeps account: nothing of it stays, whatever fails."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpuckpt_guest import flat
from gpuckpt_guest.outside import OutsideWeights

from .test_outside_cuda import GRANULE, Driver, Result, install

HANDLE = 77  # the open file that stands for what the host has carried


class Sharing(Driver):
    """With memory of another process; its copies are made when somebody waits for them."""

    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3, CU_MEM_ACCESS_FLAGS_PROT_READ=1)

    def __init__(self) -> None:
        super().__init__()
        self.content = b""
        self.device = 0
        self.failed: set[str] = set()
        self.imported: set[int] = set()
        self.reserved: dict[int, int] = {}
        self.retained = 0
        self.contexts: dict[int, int] = {}  # of a thread, how many it has pushed
        self.streams: dict[int, list[tuple[int, int, int]]] = {}
        self.calls: list[str] = []

    def _answer(self, name: str, *results: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        if self.fail == name:
            self.failed.add(name)
        return super()._answer(name, *results)

    @property
    def left(self) -> tuple[Any, ...]:
        """What of an import is still there."""
        own = {at for at in self.reserved if at in self.mapped and self.mapped[at][1] not in self.imported}
        reserved = {at for at in self.reserved if at not in own}
        mapped = {at for at, (_, handle) in self.mapped.items() if handle in self.imported}
        pushed = {thread for thread, count in self.contexts.items() if count}
        return self.imported & set(self.handles), mapped, reserved, self.retained, pushed, self.streams

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        answer = super().cuMemAddressReserve(size, alignment, address, flags)
        if len(answer) > 1:
            self.reserved[answer[1]] = size
        return answer

    def cuMemAddressFree(self, at: int, size: int) -> tuple[Any, ...]:
        assert self.reserved.pop(at) == size and at not in self.mapped
        return self._answer("free")

    def cuMemImportFromShareableHandle(self, handle: int, kind: int) -> tuple[Any, ...]:
        assert handle == HANDLE and kind == 1
        if self.fail != "import":
            self._next += 1
            self.handles[self._next] = -(-len(self.content) // GRANULE) * GRANULE
            self.imported.add(self._next)
        return self._answer("import", self._next)

    def cuMemGetAllocationPropertiesFromHandle(self, handle: int) -> tuple[Any, ...]:
        assert handle in self.imported
        return self._answer("properties", SimpleNamespace(location=SimpleNamespace(type=1, id=self.device)))

    def cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        if handle not in self.imported:
            return super().cuMemMap(at, size, offset, handle, flags)
        assert self.reserved[at] == size and offset == flags == 0
        if self.handles[handle] < size:
            self.calls.append("import map")
            return (Result.CUDA_ERROR_OUT_OF_MEMORY,)
        if self.fail != "import map":
            self.mapped[at] = size, handle
            ctypes.memmove(at, self.content, min(size, len(self.content)))
        return self._answer("import map")

    def cuMemSetAccess(self, at: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        if self.mapped[at][1] not in self.imported:
            return super().cuMemSetAccess(at, size, access, count)
        assert self.mapped[at][0] == size and count == 1 and access[0].flags == 1 and access[0].location.id == 0
        if self.fail != "import access":
            self.usable.add(at)
        return self._answer("import access")

    def cuMemUnmap(self, at: int, size: int) -> tuple[Any, ...]:
        own = self.mapped[at][1] not in self.imported
        assert own or not any(self.streams.values()), "unmapped while something is read there"
        answer = super().cuMemUnmap(at, size)
        return answer if own else self._answer("import unmap")

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        answer = super().cuMemRelease(handle)
        return answer if handle not in self.imported else self._answer("import release")

    def cuDeviceGet(self, number: int) -> tuple[Any, ...]:
        return self._answer("device", f"device {number}")

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:
        assert device == "device 0"
        self.retained += self.fail != "retain"
        return self._answer("retain", "context")

    def cuDevicePrimaryCtxRelease(self, device: str) -> tuple[Any, ...]:
        assert self.retained and device == "device 0"
        self.retained -= 1
        return self._answer("let go")

    def cuCtxPushCurrent(self, context: str) -> tuple[Any, ...]:
        assert context == "context" and self.retained
        me = threading.get_ident()
        self.contexts[me] = self.contexts.get(me, 0) + (self.fail != "push")
        return self._answer("push")

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        self._current()
        self.contexts[threading.get_ident()] -= 1
        return self._answer("pop", "context")

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        self._current()
        return self._answer("synchronize")

    def cuMemcpyDtoH(self, target: int, source: int, size: int) -> tuple[Any, ...]:
        self._current()
        assert source in self.usable
        ctypes.memmove(target, source, size)
        return self._answer("head")

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        self._current()
        if self.fail != "stream":
            self._next += 1
            self.streams[self._next] = []
        return self._answer("stream", self._next)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:
        self._current()
        for at, writes in ((target, True), (source, False)):
            (inside,) = [base for base, (room, _) in self.mapped.items() if base <= at < base + room]
            assert inside in self.usable and (self.mapped[inside][1] in self.imported) != writes
        if self.fail != "copy":
            self.streams[stream].append((target, source, size))
        return self._answer("copy")

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._current()
        for copy in self.streams[stream]:
            ctypes.memmove(*copy)
        self.streams[stream] = []
        return self._answer("wait")

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self._current()
        assert self.streams.pop(stream) == []
        return self._answer("destroy")

    def _current(self) -> None:
        assert self.contexts[threading.get_ident()] > 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    made = Sharing()
    install(made, monkeypatch)
    return made


@pytest.fixture
def file() -> Iterator[int]:
    made = os.memfd_create("weights")
    yield made
    os.close(made)


class Model:
    """One whose weights are in the file and on the device."""

    def __init__(self, driver: Sharing, file: int) -> None:
        self.linear = torch.nn.Linear(900, 900)
        self.before = self.linear.weight.clone()
        self.weights = OutsideWeights(self.linear, "cuda", "x")
        self._file = file
        size = self.weights.save(file)
        driver.content = os.pread(file, size, 0)
        self.weights.sleep()

    def wake(self) -> Any:
        return self.weights.wake(self._file, HANDLE)

    @property
    def same(self) -> bool:
        return torch.equal(self.linear.weight, self.before)


def test_it_is_copied_and_given_back(driver: Sharing, file: int) -> None:
    model = Model(driver, file)
    left = driver.left
    os.pwrite(file, bytes(1 << 20), flat.FIRST)  # it is not read
    for _ in range(2):
        driver.calls.clear()
        woken = model.wake()
        assert list(woken.phases) == ["map", "copy"] and woken.told == "" and woken.bytes == model.weights.bytes
        assert model.same and len(driver.handles) == len(driver.usable) == 1
        context = ["device", "retain", "push"]
        assert driver.calls == [
            *("create", "map", "access"),
            *context,
            *("import", "properties", "granularity", "reserve", "import map", "import access", "synchronize", "head"),
            *(*context, "stream", "copy", "wait", "wait", "destroy", "pop", "let go"),
            *("unmap", "import unmap", "free", "release", "import release", "pop", "let go"),
        ]
        model.weights.sleep()
        assert driver.left == left


_BEFORE = ["device", "retain", "push", "import", "properties", "granularity", "reserve", "import map", "import access"]
_DURING = ["synchronize", "head", "stream", "copy", "wait", "destroy", "pop", "let go"]
_AFTER = ["import unmap", "free", "import release"]


@pytest.mark.parametrize("step", [*_BEFORE, *_DURING, *_AFTER])
def test_whatever_fails_nothing_is_left(step: str, driver: Sharing, file: int) -> None:
    model = Model(driver, file)
    left = driver.left
    driver.fail = step
    woken = model.wake()
    assert driver.failed == {step} and "out of memory" in woken.told
    assert list(woken.phases)[1] == ("copy" if step in _AFTER else "stream")
    assert ("so the file was read" in woken.told) == (step not in _AFTER)
    assert model.same and len(driver.handles) == len(driver.usable) == 1
    model.weights.sleep()
    assert driver.left == left
    driver.fail = ""
    assert model.wake().told == "" and model.same


def test_what_failed_first_is_told_too(driver: Sharing, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(driver, file)
    driver.device = 3
    driver.fail = "import release"
    told = model.wake().told
    assert "memory of device 3, and the weights are on device 0; the GPU's driver: out of memory" in told
    assert model.same


@pytest.mark.parametrize(
    ("device", "content", "said"),
    [
        (1, None, "it is memory of device 1, and the weights are on device 0"),
        (0, b"short", "out of memory"),
        (0, b"", "out of memory"),
        (0, bytes(8 << 20), "other bytes than the file"),
    ],
)
def test_memory_of_something_else(device: int, content: bytes | None, said: str, driver: Sharing, file: int) -> None:
    model = Model(driver, file)
    left = driver.left
    driver.device = device
    driver.content = driver.content if content is None else content
    woken = model.wake()
    assert said in woken.told and list(woken.phases) == ["map", "stream"] and model.same
    model.weights.sleep()
    assert driver.left == left


def test_a_file_of_others_is_refused_before_anything_is_imported(driver: Sharing, file: int) -> None:
    model = Model(driver, file)
    driver.calls.clear()
    os.pwrite(file, b"x", 40)
    with pytest.raises(flat.FlatError):
        model.wake()
    assert driver.calls == [] and model.weights.asleep


def test_no_package_for_the_driver(driver: Sharing, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one without a function: the file is there."""
    model = Model(driver, file)
    monkeypatch.delattr(Sharing, "cuMemImportFromShareableHandle")
    woken = model.wake()
    assert "AttributeError" in woken.told and "stream" in woken.phases and model.same
