"""Weights that the host has carried to a GPU (carried.py): memory of another process, mapped for as long as it is read.

The host's process has created it to be shared, as an open file (CUDA driver API, virtual memory management). It is
imported, mapped to be read, copied from by the device itself, and unmapped, released, its addresses freed: each step
that was taken is taken back, also if another one fails. The open file is who called's to close; until then it keeps
the memory.

Written from the driver's documentation; it has not run on a GPU yet, only with a driver that keeps account of calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from . import cuda_driver
from .carried import Source
from .cuda_driver import checked


@contextmanager
def mapped(handle: int, size: int, number: int) -> Iterator[Source]:
    """The memory that ``handle`` stands for, on the device ``number``, to which the weights go.

    Raises OSError if the driver does not give it, if it is another device's, or not as large as the host makes it for
    a file of ``size`` bytes.
    """
    cuda = cuda_driver.driver()
    with ExitStack() as stack:
        stack.enter_context(_context(number))
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        memory = checked(cuda.cuMemImportFromShareableHandle(handle, kind))
        stack.callback(lambda: checked(cuda.cuMemRelease(memory)))
        properties = checked(cuda.cuMemGetAllocationPropertiesFromHandle(memory))
        place = properties.location
        if place.type != cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE or place.id != number:
            raise OSError(f"it is memory of device {place.id}, and the weights are on device {number}")
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granule = int(checked(cuda.cuMemGetAllocationGranularity(properties, minimum)))
        # The host has rounded up the same way. Nobody can be asked how much it is: more than that is not mapped.
        room = -(-size // granule) * granule
        base = int(checked(cuda.cuMemAddressReserve(room, 0, 0, 0)))
        stack.callback(lambda: checked(cuda.cuMemAddressFree(base, room)))
        checked(cuda.cuMemMap(base, room, 0, memory, 0))
        stack.callback(lambda: checked(cuda.cuMemUnmap(base, room)))
        access = cuda.CUmemAccessDesc()
        access.location = place
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        checked(cuda.cuMemSetAccess(base, room, [access], 1))
        # What the server has yet under way may still write where the weights go.
        checked(cuda.cuCtxSynchronize())

        def head(count: int) -> bytes:
            found = ctypes.create_string_buffer(min(count, room))
            checked(cuda.cuMemcpyDtoH(ctypes.addressof(found), base, len(found)))
            return found.raw

        # One thread gives a device enough to do, and one copy for each region.
        yield Source(head, lambda: _DeviceLane(base, number), threads=1, chunk=1 << 62)


@contextmanager
def _context(number: int) -> Iterator[None]:
    """Have this thread's calls be for the context that torch uses on the device too."""
    cuda = cuda_driver.driver()
    with ExitStack() as stack:
        device = checked(cuda.cuDeviceGet(number))
        context = checked(cuda.cuDevicePrimaryCtxRetain(device))
        stack.callback(lambda: checked(cuda.cuDevicePrimaryCtxRelease(device)))
        checked(cuda.cuCtxPushCurrent(context))
        stack.callback(lambda: checked(cuda.cuCtxPopCurrent()))
        yield


class _DeviceLane:
    """From the mapped memory to the regions', on a stream. For use by the thread that made it."""

    def __init__(self, base: int, number: int) -> None:
        self._base = base
        self._cuda = cuda = cuda_driver.driver()
        with ExitStack() as stack:
            stack.enter_context(_context(number))
            stream = checked(cuda.cuStreamCreate(0))
            stack.callback(lambda: checked(cuda.cuStreamDestroy(stream)))
            self._stream: Any = stream
            stack.callback(self.finish)  # also when something failed: what is being read must not be unmapped
            self._held = stack.pop_all()

    def read(self, file: int, offset: int, address: int, size: int) -> None:
        checked(self._cuda.cuMemcpyDtoDAsync(address, self._base + offset, size, self._stream))

    def write(self, file: int, offset: int, address: int, size: int) -> None:
        raise OSError("carried memory is only read")

    def finish(self) -> None:
        checked(self._cuda.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        self._held.close()
