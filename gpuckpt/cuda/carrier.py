"""Weights on their way to the device while CRIU still works.

The memory into which a server reads its weights is only there once its processes and its context are back, most of a
second after the begin. So the helper reads the file meanwhile, into device memory of its own making that can be shared
(CUDA driver API, virtual memory management), and the server then copies it on the device, at its memory's speed. The
memory lives as long as the open file that stands for it: whoever ends, however, it is free again.

Reading: threads take chunks of the file in turns, each into pinned slots of its own, from which the device fetches
while the next chunk is read; pinned memory is what a device fetches from at the bus' full speed, and to pin a whole
file takes longer than to read it.

Written from the driver's documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

CHUNK = 8 << 20  # bytes read and fetched at a time
_SLOTS = 2  # for each thread: one is filled while the other is fetched
_THREADS = 8  # as many as read some 40 GB/s from memory


class Call(Protocol):
    """Calls a function of the driver; its result, or DriverError."""

    def __call__(self, function: Any, *arguments: Any) -> Any: ...


def carry(cuda: Any, call: Call, file: int, device: Any) -> int:
    """Read an open file into memory of ``device``; returns an open file that stands for that memory.

    ``cuda`` is ``cuda.bindings.driver``. The file is rounded up to the device's granularity; what follows its end is
    undefined. Raises DriverError, OSError.
    """
    with ExitStack() as stack:
        context = call(cuda.cuDevicePrimaryCtxRetain, device)
        # It holds some hundred megabytes of the device: nothing of ours stays there.
        stack.callback(call, cuda.cuDevicePrimaryCtxRelease, device)
        call(cuda.cuCtxSetCurrent, context)
        size = os.fstat(file).st_size
        properties = _shareable(cuda, device)
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granule = int(call(cuda.cuMemGetAllocationGranularity, properties, minimum))
        room = -(-size // granule) * granule
        handle = call(cuda.cuMemCreate, room, properties, 0)
        stack.callback(call, cuda.cuMemRelease, handle)
        with _mapped(cuda, call, handle, room, properties) as address:
            _read(cuda, call, context, file, size, int(address))
        kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return int(call(cuda.cuMemExportToShareableHandle, handle, kind, 0))


def _shareable(cuda: Any, device: Any) -> Any:
    made = cuda.CUmemAllocationProp()
    made.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = int(device)
    made.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return made


@contextmanager
def _mapped(cuda: Any, call: Call, handle: Any, room: int, properties: Any) -> Iterator[Any]:
    with ExitStack() as stack:
        address = call(cuda.cuMemAddressReserve, room, 0, 0, 0)
        stack.callback(call, cuda.cuMemAddressFree, address, room)
        call(cuda.cuMemMap, address, room, 0, handle, 0)
        stack.callback(call, cuda.cuMemUnmap, address, room)
        access = cuda.CUmemAccessDesc()
        access.location = properties.location
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        call(cuda.cuMemSetAccess, address, room, [access], 1)
        yield address


def _read(cuda: Any, call: Call, context: Any, file: int, size: int, address: int) -> None:
    """Have threads read the file into device memory; returns when all of it is there."""
    offsets = iter(range(0, size, CHUNK))
    taking = threading.Lock()

    def take() -> int | None:
        with taking:
            return next(offsets, None)

    threads = min(_THREADS, os.cpu_count() or 1, -(-size // CHUNK))
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="gpuckpt-carry") as pool:
        running = [pool.submit(_Lane(cuda, call, context, file, size, address).run, take) for _ in range(threads)]
        for one in running:
            one.result()


class _Lane:
    """One thread's way: a stream of the device, and pinned slots that it fetches from in turns."""

    def __init__(self, cuda: Any, call: Call, context: Any, file: int, size: int, address: int) -> None:
        self._cuda = cuda
        self._call = call
        self._context = context
        self._file = file
        self._size = size
        self._address = address

    def run(self, take: Any) -> None:
        cuda, call = self._cuda, self._call
        call(cuda.cuCtxSetCurrent, self._context)
        with ExitStack() as stack:
            stream = call(cuda.cuStreamCreate, 0)
            stack.callback(call, cuda.cuStreamDestroy, stream)
            pinned = int(call(cuda.cuMemHostAlloc, _SLOTS * CHUNK, 0))
            stack.callback(call, cuda.cuMemFreeHost, pinned)
            events = [call(cuda.cuEventCreate, 0) for _ in range(_SLOTS)]
            for event in events:
                stack.callback(call, cuda.cuEventDestroy, event)
            stack.callback(call, cuda.cuStreamSynchronize, stream)  # first of all, also when something failed
            turn = 0
            while (offset := take()) is not None:
                call(cuda.cuEventSynchronize, events[turn])  # what was in this slot has been fetched
                slot = pinned + turn * CHUNK
                count = min(CHUNK, self._size - offset)
                self._fill(slot, count, offset)
                call(cuda.cuMemcpyHtoDAsync, self._address + offset, slot, count, stream)
                call(cuda.cuEventRecord, events[turn], stream)
                turn = (turn + 1) % _SLOTS

    def _fill(self, slot: int, count: int, offset: int) -> None:
        view = memoryview((ctypes.c_char * count).from_address(slot)).cast("B")
        done = 0
        while done < count:
            got = os.preadv(self._file, [view[done:]], offset + done)
            if got == 0:
                raise OSError(f"the file with the weights ends at {offset + done} of {self._size} bytes")
            done += got
