"""The GPU's driver, for what torch has no words for: addresses and the physical memory behind them, apart.

Written from the driver's documentation (CUDA driver API, virtual memory management); it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def driver() -> Any:
    """Its functions, under their names in C. Raises OSError if the package that has them is missing."""
    try:
        from cuda.bindings import driver as found
    except ImportError as error:
        raise OSError(
            "caches and weights on a GPU need the package cuda-bindings (pip install cuda-bindings) beside torch"
        ) from error
    return found


def checked(answer: Any) -> Any:
    """The driver's results, without the status; raises OSError with its words."""
    status, *results = answer
    if status != driver().CUresult.CUDA_SUCCESS:
        _, words = driver().cuGetErrorString(status)
        raise OSError(f"the GPU's driver: {words.decode() if isinstance(words, bytes) else words}")
    return results[0] if len(results) == 1 else tuple(results)


def properties(device: torch.device) -> Any:
    """What physical memory of the device is, for who creates it."""
    made = driver().CUmemAllocationProp()
    made.type = driver().CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = driver().CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = device.index or 0
    return made


def access(device: torch.device) -> Any:
    """What is mapped may be read and written by the device."""
    made = driver().CUmemAccessDesc()
    made.location = properties(device).location
    made.flags = driver().CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return made


def tensor_at(address: int, size: int, device: torch.device) -> Any:
    """The bytes at an address as a tensor, which owns nothing.

    torch has not allocated them, and the public ways ask the driver what lies there, which may be nothing yet.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
