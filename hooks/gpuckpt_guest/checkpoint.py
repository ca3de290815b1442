"""Activation checkpoints: a tensor's bytes go to host memory while the device goes on with other work.

The host memory is a ring that is allocated, and pinned where the device is a GPU, once at the start: pinning takes
milliseconds per megabyte, far longer than the copy. A checkpoint stays in the ring until newer ones need its place and
is then moved to ordinary memory; a thousand paused sessions do not need a ring for a thousand.

On a GPU the copy runs on a stream of its own, behind what the computing stream had queued when it was dispatched. On a
CPU a thread makes it, outside of the interpreter's lock, or the caller itself where handing it over would cost more.
Both report the same times, each apart:

``dispatch_us``   what the caller waited
``complete_us``   from the dispatch until the bytes had landed, of which
``copy_us``       the copy alone
``restore_us``    from host memory back to a tensor on the device
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# On a CPU, copies of less are made at once: to wake a thread costs as much as to copy this.
_AT_ONCE = 256 << 10
# Places in the ring begin at multiples of this: a cache line, and what copy engines like.
_ALIGN = 256


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A tensor on its way to, or in, host memory."""

    shape: Sequence[int]
    dtype: Any
    bytes: int
    dispatch_us: float = 0.0
    copy_us: float | None = None  # the copy alone
    users: int = 1  # pauses that hold it: branches share their parent's
    _memory: Any = None  # the ring's
    _source: Any = None  # held until the copy is complete: the device may not reuse the memory before
    _host: Any = None
    _place: int = -1  # offset in the ring, or -1
    _landed: Any = None
    _error: Exception | None = None
    _began: int = 0
    _complete_us: float | None = None

    def home(self) -> Any:
        """Where the bytes are to land: in the ring, or in memory of their own if they are more than it can hold."""
        if self._place < 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return self._memory[self._place : self._place + self.bytes].view(self.dtype).view(self.shape)

    def wait(self) -> Any:
        """Wait until the bytes have landed; returns them as a tensor in host memory."""
        self._landed.wait()
        if self._error is not None:
            raise self._error
        return self._host

    @property
    def done(self) -> bool:
        """Whether the bytes have landed, and the device's memory is free again."""
        return bool(self._landed.done())

    @property
    def complete_us(self) -> float | None:
        """Microseconds from the dispatch until the bytes had landed; None while they have not."""
        return self._complete_us

    @property
    def pinned(self) -> bool:
        """Whether it is in the ring."""
        return self._place >= 0


class Ring:
    """Host memory for checkpoints of tensors on ``device``. For use by one thread."""

    def __init__(self, size: int, device: Any) -> None:
        self.device = torch.device(device)
        self.size = size
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self._memory.zero_()  # the pages are there from now on, not from the first checkpoint on
        self._held: OrderedDict[Checkpoint, None] = OrderedDict()  # in the order of their places
        self._next = 0
        self.spilled = 0
        self._copier: _Copier | _Stream
        self._copier = _Stream(self.device) if self.device.type == "cuda" else _Copier()

    def save(self, tensor: Any) -> Checkpoint:
        """Begin to copy ``tensor`` to host memory; the caller may drop it but must not write to it."""
        began = time.perf_counter_ns()
        source = tensor if tensor.is_contiguous() else tensor.contiguous()
        made = Checkpoint(source.shape, source.dtype, source.nbytes, _source=source, _memory=self._memory, _began=began)
        made._place = self._room(made.bytes)
        if made._place >= 0:
            self._held[made] = None
        self._copier.start(made)
        made.dispatch_us = (time.perf_counter_ns() - began) / 1000
        return made

    def restore(self, checkpoint: Checkpoint) -> tuple[Any, float]:
        """The tensor on the device again, and how many microseconds that took; the checkpoint stays."""
        host = checkpoint.wait()
        began = time.perf_counter_ns()
        if self.device.type == "cuda":
            made = host.to(self.device, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
        else:
            made = host.clone()
        return made, (time.perf_counter_ns() - began) / 1000

    def release(self, checkpoint: Checkpoint) -> None:
        """One of its users does not need the checkpoint any more; the last one's drops it."""
        checkpoint.users -= 1
        if checkpoint.users == 0:
            self.drop(checkpoint)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Nobody needs the checkpoint any more."""
        checkpoint._landed.wait()
        if checkpoint.pinned:
            # At once, not when it has become the oldest: behind one that stays, thousands would.
            del self._held[checkpoint]
            checkpoint._place = -1
        checkpoint._host = None

    def adopt(self, tensor: Any) -> Checkpoint:
        """A checkpoint of a tensor that is in host memory already."""
        made = Checkpoint(tuple(tensor.shape), tensor.dtype, int(tensor.nbytes), _complete_us=0.0)
        made._host, made._landed = tensor.contiguous().clone(), _Landed()
        return made

    def _room(self, wanted: int) -> int:
        """A place of ``wanted`` bytes, moving the oldest checkpoints out of the ring; -1 if there can be none."""
        wanted = -(-wanted // _ALIGN) * _ALIGN
        if wanted > self.size:
            return -1
        if self._next + wanted > self.size:
            self._clear(self._next, self.size)
            self._next = 0
        place = self._next
        self._clear(place, place + wanted)
        self._next = place + wanted
        return place

    def _clear(self, low: int, high: int) -> None:
        while self._held:
            oldest = next(iter(self._held))
            if oldest._place >= high or oldest._place + oldest.bytes <= low:
                return
            oldest._host = oldest.wait().clone()
            del self._held[oldest]
            oldest._place = -1
            self.spilled += 1


class _Landed:
    def wait(self) -> None: ...

    def done(self) -> bool:
        return True


class _Stream:
    """Copies on a stream of the GPU."""

    def __init__(self, device: Any) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, checkpoint: Checkpoint) -> None:
        ready = torch.cuda.Event(enable_timing=True)
        ready.record(torch.cuda.current_stream(self._stream.device))
        checkpoint._host = checkpoint.home()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            begin.record()
            checkpoint._host.copy_(checkpoint._source, non_blocking=True)
            end.record()
        # The allocator must not hand the memory out again before the copy is through.
        checkpoint._source.record_stream(self._stream)
        checkpoint._source = None
        checkpoint._landed = _DeviceLanded(checkpoint, ready, begin, end)


@dataclass(slots=True)
class _DeviceLanded:
    checkpoint: Checkpoint
    ready: Any
    begin: Any
    end: Any

    def wait(self) -> None:
        self.end.synchronize()
        self._note()

    def done(self) -> bool:
        if not self.end.query():
            return False
        self._note()
        return True

    def _note(self) -> None:
        if self.checkpoint._complete_us is None:
            # From when the computing stream had come to it; what that still had to compute is not the checkpoint's.
            self.checkpoint._complete_us = self.checkpoint.dispatch_us + self.ready.elapsed_time(self.end) * 1000
            self.checkpoint.copy_us = self.begin.elapsed_time(self.end) * 1000


class _Copier:
    """Copies by a thread."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Checkpoint] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="gpuckpt-checkpoint", daemon=True).start()

    def start(self, checkpoint: Checkpoint) -> None:
        if checkpoint.bytes <= _AT_ONCE:
            checkpoint._landed = _Landed()
            _copy(checkpoint)
        else:
            checkpoint._landed = _ThreadLanded(checkpoint)
            self._work.put(checkpoint)

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                checkpoint = self._work.get()
                _copy(checkpoint)
                checkpoint._landed.gate.release()
                del checkpoint


def _copy(checkpoint: Checkpoint) -> None:
    began = time.perf_counter_ns()
    try:
        host = checkpoint.home()
        host.copy_(checkpoint._source)
        checkpoint._host = host
    except Exception as error:  # out of memory, say: told to who waits for it
        checkpoint._error = error
    checkpoint._source = None
    ended = time.perf_counter_ns()
    checkpoint.copy_us = (ended - began) / 1000
    checkpoint._complete_us = (ended - checkpoint._began) / 1000


class _ThreadLanded:
    # A bare lock, held until the bytes are there: an Event costs the caller more than all the rest of a dispatch.
    __slots__ = ("checkpoint", "gate")

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.gate = threading.Lock()
        self.gate.acquire()

    def wait(self) -> None:
        if not self.done():
            with self.gate:
                pass

    def done(self) -> bool:
        return self.checkpoint._complete_us is not None
