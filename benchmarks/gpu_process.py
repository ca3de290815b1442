"""A process that holds memory and can say what is in it: what the acceptance on a GPU suspends, dumps and brings back.

    python gpu_process.py FOLDER BYTES LIBRARY SEED WATCHED

It needs nothing but Python, and PyTorch or NVIDIA's driver: it is also started by interpreters without gpuckpt.
LIBRARY: `torch` and `driver` (libcuda by itself) hold device memory, `host` holds memory of its own, for what is to be
tried without a device. When the bytes are there, `ready.json` appears in FOLDER. SIGUSR1 asks for the sum of them:
`sum-1.json`, `sum-2.json` … SIGTERM ends it, and so does the end of the process WATCHED.

The bytes are drawn from SEED: neither the driver nor CRIU can leave them out as they do with zeros. It opens no pipe,
no socket and no terminal, so that CRIU has nothing to ask about.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import zlib
from pathlib import Path
from typing import Any, Protocol

_CHUNK = 64 << 20  # bytes of one allocation, and of what summing needs besides
_BLOCK = 1 << 20
_MASK = (1 << 64) - 1


class Memory(Protocol):
    """So many bytes somewhere."""

    def sum(self) -> int:
        """A number that depends on every byte and its place."""
        ...


class Torch:
    """Device memory of PyTorch; summed by the device itself."""

    def __init__(self, count: int, seed: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda")
        generator = torch.Generator(self._device).manual_seed(seed)
        self._chunks = [
            torch.randint(-(2**62), 2**62, (size // 8,), generator=generator, device=self._device)
            for size in _sizes(count)
        ]
        torch.cuda.synchronize()

    def sum(self) -> int:
        torch = self._torch
        ramp = torch.arange(1, _CHUNK // 8 + 1, device=self._device)
        total = 0
        for number, chunk in enumerate(self._chunks, start=1):
            total += number * int((chunk * ramp[: chunk.numel()]).sum())
        del ramp
        torch.cuda.empty_cache()
        return total & _MASK


class Driver:
    """Device memory of the driver itself, without any package; summed here, from copies of it."""

    def __init__(self, count: int, seed: int) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        chance = random.Random(seed)
        self._chunks = []
        for size in _sizes(count):
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
            block = chance.randbytes(_BLOCK)
            for at in range(0, size, _BLOCK):
                part = min(_BLOCK, size - at)
                self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer.value + at), block, ctypes.c_size_t(part))
            self._chunks.append((pointer.value, size))

    def sum(self) -> int:
        landing = ctypes.create_string_buffer(_CHUNK)
        total = 0
        for pointer, size in self._chunks:
            self._call("cuMemcpyDtoH_v2", landing, ctypes.c_uint64(pointer), ctypes.c_size_t(size))
            total = zlib.crc32(memoryview(landing)[:size], total)
        return total

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise OSError(f"{name} failed with CUDA's error {code}")


class Host:
    """Memory of the process itself; no device has a part in it."""

    def __init__(self, count: int, seed: int) -> None:
        chance = random.Random(seed)
        self._blocks = [chance.randbytes(min(_BLOCK, count - at)) for at in range(0, count, _BLOCK)]

    def sum(self) -> int:
        total = 0
        for block in self._blocks:
            total = zlib.crc32(block, total)
        return total


LIBRARIES: dict[str, type[Torch] | type[Driver] | type[Host]] = {"torch": Torch, "driver": Driver, "host": Host}


def _sizes(count: int) -> list[int]:
    """Sizes of the allocations that come to ``count`` bytes, each of whole words."""
    whole, rest = divmod(count, _CHUNK)
    return [_CHUNK] * whole + ([rest - rest % 8] if rest >= 8 else [])


def main() -> int:
    folder, count, library, seed, watched = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    wanted = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)  # before there are threads, which all inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory: Memory = LIBRARIES[library](count, int(seed))
    _write(folder / "ready.json", {"pid": os.getpid(), "sum": memory.sum()})
    answered = 0
    while True:
        got = signal.sigtimedwait(wanted, 2.0)
        if got is None:
            try:
                os.kill(int(watched), 0)
            except ProcessLookupError:
                return 0
            continue
        if got.si_signo == signal.SIGTERM:
            return 0
        answered += 1
        _write(folder / f"sum-{answered}.json", {"sum": memory.sum()})


def _write(file: Path, document: dict[str, Any]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(document))
    temporary.replace(file)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
