"""The order of calls to the GPU's driver, with one that only keeps account: what is created is released, once."""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpuckpt_guest import cuda_driver, flat_cuda
from gpuckpt_guest.flat import HostLane
from gpuckpt_guest.outside import CudaRegion, OutsideWeights

GRANULE = 2 << 20


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Driver:
    """Addresses are memory of this process; what is unmapped is overwritten."""

    CUresult = Result
    CUmemAllocationProp = CUmemAccessDesc = staticmethod(lambda: SimpleNamespace(location=SimpleNamespace()))
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)

    def __init__(self) -> None:
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.usable: set[int] = set()
        self.fail = ""
        self._held: list[Any] = []
        self._next = 0

    def _answer(self, name: str, *results: Any) -> tuple[Any, ...]:
        if self.fail == name:
            return (Result.CUDA_ERROR_OUT_OF_MEMORY,)
        return (Result.CUDA_SUCCESS, *results)

    def cuGetErrorString(self, status: Result) -> tuple[Any, bytes]:
        return Result.CUDA_SUCCESS, b"out of memory"

    def cuMemGetAllocationGranularity(self, kind: Any, flag: int) -> tuple[Any, ...]:
        return self._answer("granularity", GRANULE)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, ...]:
        assert size % GRANULE == 0
        self._held.append((ctypes.c_char * size)())
        return self._answer("reserve", ctypes.addressof(self._held[-1]))

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple[Any, ...]:
        assert size % GRANULE == 0
        if self.fail != "create":
            self._next += 1
            self.handles[self._next] = size
        return self._answer("create", self._next)

    def cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any, ...]:
        assert at not in self.mapped and self.handles[handle] == size and offset == 0
        if self.fail != "map":
            self.mapped[at] = size, handle
        return self._answer("map")

    def cuMemSetAccess(self, at: int, size: int, access: list[Any], count: int) -> tuple[Any, ...]:
        assert self.mapped[at][0] == size and len(access) == count == 1
        if self.fail != "access":
            self.usable.add(at)
        return self._answer("access")

    def cuMemUnmap(self, at: int, size: int) -> tuple[Any, ...]:
        assert self.mapped.pop(at)[0] == size
        self.usable.discard(at)
        ctypes.memset(at, 0xEE, size)
        return self._answer("unmap")

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        del self.handles[handle]
        assert handle not in [one for _, one in self.mapped.values()]
        return self._answer("release")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    install(made, monkeypatch)
    return made


def install(made: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it take the place of the real one, and of what torch does with a device."""

    def tensor_at(address: int, size: int, device: Any) -> Any:
        assert device.index == 0
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)

    monkeypatch.setattr(cuda_driver, "driver", lambda: made)
    monkeypatch.setattr(cuda_driver, "tensor_at", tensor_at)
    monkeypatch.setattr(flat_cuda, "lanes", lambda device: HostLane)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)


def test_there_and_back(driver: Driver) -> None:
    model = torch.nn.Linear(900, 900)
    before = model.weight.clone()
    weights = OutsideWeights(model, "cuda", "x")
    assert len(driver.handles) == len(driver.usable) == 1
    address = model.weight.data_ptr()
    file = os.memfd_create("weights")
    try:
        weights.save(file)
        for _ in range(2):
            assert weights.sleep() == weights.bytes
            assert not driver.handles and not driver.mapped
            weights.wake(file)
            assert len(driver.handles) == len(driver.usable) == 1
            assert torch.equal(model.weight, before) and model.weight.data_ptr() == address
        weights.sleep()
        for fail in ("create", "map", "access"):
            driver.fail = fail
            with pytest.raises(OSError, match="out of memory"):
                weights.wake(file)
            assert weights.asleep and not driver.handles and not driver.mapped
        driver.fail = ""
        weights.wake(file)
        assert torch.equal(model.weight, before)
    finally:
        os.close(file)


def test_a_device_without_a_number_is_the_current_one(driver: Driver) -> None:
    assert CudaRegion(torch.device("cuda"), 1).bytes.numel() == GRANULE
