"""vLLM's weights as they lie on a GPU: an extension of its workers (``--worker-extension-cls``).

In sleep mode vLLM allocates weights from a pool of its own (CuMemAllocator), whose memory it can give back and map
again at the same addresses. What is saved and read here are that pool's allocations as they are, in the order of their
addresses: no names, no shapes, no loader. So every architecture and quantisation comes back exact, and what kernels
have repacked after loading need not be repacked.

vLLM itself keeps copies of buffers while it sleeps at level 2, and writes them back when it wakes up. Some of its
versions then set the scales of an 8-bit KV cache to 1. Both lie in the pool as well; what is read here is read after
that, and is right. Its engine is told that it is awake only when all of this is done: some versions let waiting
requests run as soon as a part of the memory is there. So the worker wakes up by itself, and when the engine then has
it wake up there is nothing left to do.

What the host has carried to the device (carried.py) is there twice until it has been copied, and the KV cache is mapped
before that. So it is found out first whether there is room for all of it: half of a pool's memory mapped is nothing
that vLLM comes back from.

Caches alone are given back by other means (vllm_caches.py).

Nothing here raises: where several workers answer, vLLM reads no further than the first exception, and would take what
the others have answered for answers to its next call.

Written from the source of vLLM 0.33; it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from . import carried, flat, handing, nvml
from .carried import Source
from .flat import Lanes, Region
from .vllm_caches import CACHES, Caches

# With CACHES, what vLLM calls the pools that it gives back at level 2 without a copy.
_WEIGHTS = "weights"
_Method = TypeVar("_Method", bound=Callable[..., dict[str, Any]])


def _answering(method: _Method) -> _Method:
    """Return what went wrong instead of raising it."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    return call  # type: ignore[return-value]


class WeightsExtension:
    """What vLLM's workers can do more, called by collective_rpc. vLLM makes it a base of their class.

    ``process`` and ``files``: the API server's process id and its descriptors, one for each rank; all of them are in
    one container, and run as the same user.
    """

    rank: int
    model_runner: Any
    wake_up: Callable[..., Any]
    sleep: Callable[..., Any]

    @_answering
    def gpuckpt_held(self) -> dict[str, Any]:
        """How much memory a sleep gives back."""
        return {"bytes": sum(size for _, size, tag in _allocations() if tag in (_WEIGHTS, CACHES))}

    @_answering
    def gpuckpt_save(self, process: int, files: Sequence[int]) -> dict[str, Any]:
        """Write the weights into this rank's file."""
        with _Opened(process, files[self.rank], os.O_RDWR) as file:
            return {"bytes": flat.write(file, _regions(self.rank), _lanes())}

    @_answering
    def gpuckpt_check(self, process: int, files: Sequence[int]) -> dict[str, Any]:
        """Whether this rank's file is its weights'."""
        with _Opened(process, files[self.rank], os.O_RDONLY) as file:
            flat.check(file, _regions(self.rank))
        return {}

    @_answering
    def gpuckpt_wake(self, process: int, files: Sequence[int], offer: str | None = None) -> dict[str, Any]:
        """Have memory again, and the weights from this rank's file; asleep as before if that fails.

        ``offer``: where the handle of memory of the device is to be had that holds the same bytes (handing.py).
        """
        handle, told = None, ""
        with ExitStack() as stack:
            file = stack.enter_context(_Opened(process, files[self.rank], os.O_RDONLY))
            if offer is not None:
                try:
                    handle = stack.enter_context(handing.taken(offer))
                except OSError as error:
                    told = carried.unusable(error)
                else:
                    _make_sure_of_room()
            times = [time.perf_counter()]
            try:
                self.wake_up(tags=[_WEIGHTS])
                times.append(time.perf_counter())
                self.wake_up(tags=[CACHES])
                times.append(time.perf_counter())
                found = carried.stream(file, _regions(self.rank), _lanes(), handle, _opened)
            except Exception:
                self.sleep(level=2)  # what was mapped already is given back, and the rest is left alone
                raise
            times.append(time.perf_counter())

        def awake(tags: list[str] | None = None) -> None:
            del self.__dict__["wake_up"]

        self.__dict__["wake_up"] = awake  # instead of the class', once
        names = "map", "kv", found.phase
        phases = {name: end - begin for name, begin, end in zip(names, times, times[1:], strict=False)}
        return {"bytes": found.bytes, "phases": phases, "told": told or found.told}

    @_answering
    def gpuckpt_back(self) -> dict[str, Any]:
        """Asleep again, if it has woken up: another rank could not."""
        if self.__dict__.pop("wake_up", None) is not None:
            self.sleep(level=2)
        return {}

    @_answering
    def gpuckpt_release_caches(self) -> dict[str, Any]:
        """Give the KV cache's memory back; what another call has given back stays so."""
        return {"bytes": self.__dict__.setdefault("gpuckpt_caches", Caches()).release(self.model_runner.kv_caches)}

    @_answering
    def gpuckpt_take_caches(self) -> dict[str, Any]:
        """Have all memory of the KV cache again, empty; without it as before if that fails."""
        begin = time.perf_counter()
        self.__dict__.setdefault("gpuckpt_caches", Caches()).take()
        return {"seconds": time.perf_counter() - begin}

    @_answering
    def gpuckpt_quiet(self) -> dict[str, Any]:
        """Close what a dump cannot carry and is opened again when it is needed."""
        return {"closed": nvml.let_go()}


class _Opened:
    """A file that another process of the container has open, opened anew: its offset and mode are this one's own."""

    def __init__(self, process: int, file: int, flags: int) -> None:
        self._path, self._flags = f"/proc/{process}/fd/{file}", flags
        self._file = -1

    def __enter__(self) -> int:
        self._file = os.open(self._path, self._flags | os.O_CLOEXEC)
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _allocations() -> list[tuple[int, int, str]]:
    """(address, bytes, tag) of all that vLLM's pools hold, in the order of addresses."""
    from vllm.device_allocator.cumem import CuMemAllocator

    pools = CuMemAllocator.instance
    if pools is None:
        raise RuntimeError("vLLM has allocated nothing that it could give back: sleep mode is off")
    return sorted((address, int(data.handle[1]), str(data.tag)) for address, data in pools.pointer_to_data.items())


def _make_sure_of_room() -> None:
    """Raise MemoryError if there is too little to wake up."""
    wanted, free = sum(size for _, size, tag in _allocations() if tag in (_WEIGHTS, CACHES)), _free()
    if free < wanted:
        raise MemoryError(
            f"beside the weights that the host has brought to the device there are {free >> 20} MiB, and "
            f"{wanted >> 20} MiB are wanted: let go of them, and have the file read instead"
        )


def _free() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _regions(rank: int) -> list[Region]:
    # By their order: the same weights are the same file, wherever another golden's server has them.
    mine = [(address, size) for address, size, tag in _allocations() if tag == _WEIGHTS]
    return [Region(f"{rank}.{number}", address, size) for number, (address, size) in enumerate(mine)]


def _lanes() -> Lanes:
    import torch

    from .flat_cuda import lanes

    torch.cuda.synchronize()  # what vLLM has begun to write there, on its own streams, comes before what is read
    return lanes(torch.device("cuda", torch.cuda.current_device()))


def _opened(handle: int, size: int) -> AbstractContextManager[Source]:
    """What the host has carried to this worker's device."""
    import torch

    from .carried_cuda import mapped

    return mapped(handle, size, torch.cuda.current_device())
