"""Weights that the host has carried to the device while this server was still being restored.

The memory into which a server reads its weights is only there once its processes and its context are back. So the
host reads the file (flat.py) meanwhile, header and all, into memory of the device that it can share, and sends the
open file that stands for that memory: its handle. What is left to do is a copy on the device, at its memory's speed.

Nothing depends on it. Memory that cannot be had, or that holds other bytes than the file, is left alone, and the file
is read as ever; the answer then tells why. And nothing of it stays, whatever happened: the driver does not checkpoint a
process that has memory of another one mapped.

A server on a CPU is handed a file in memory with the same bytes, and reads from that one (:func:`of_host`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from . import flat
from .flat import HostLane, Lanes, Region


@dataclass(frozen=True, slots=True)
class Source:
    """Carried memory that can be read from: the file's bytes at the file's offsets."""

    head: Callable[[int], bytes]  # its first bytes
    lanes: Lanes  # whose files do not matter: they read from here
    threads: int = 0  # as flat.stream has them
    chunk: int = 0


# Has the memory of a handle, which is to be of at least so many bytes; nothing of it is there afterwards.
Opened = Callable[[int, int], AbstractContextManager[Source]]


@dataclass(frozen=True, slots=True)
class Streamed:
    """Weights that are there. ``phase``: "copy" if they came from carried memory, "stream" if from the file."""

    bytes: int
    phase: str
    told: str = ""  # why it was not the carried memory


def stream(file: int, regions: Sequence[Region], lanes: Lanes, handle: int | None, opened: Opened) -> Streamed:
    """Have the file's bytes in the regions, from the memory of ``handle`` if there is one and it can be used.

    Raises what flat.stream raises.
    """
    told = ""
    if handle is not None:
        found = -1
        try:
            with opened(handle, os.fstat(file).st_size) as source:
                head = flat.head(regions)
                if source.head(len(head)) != head:
                    raise OSError("it holds other bytes than the file")
                found = flat.stream(file, regions, source.lanes, threads=source.threads, chunk=source.chunk)
        except Exception as error:  # whatever it is: the file is there
            told = unusable(error)
            if found >= 0:
                told = f"the weights on the device have been used, but not all of that could be undone: {_words(error)}"
        if found >= 0:
            return Streamed(found, "copy", told)
    return Streamed(flat.stream(file, regions, lanes), "stream", told)


def unusable(error: BaseException) -> str:
    """Say why the file was read, in one sentence."""
    return f"the weights that are on the device already could not be used, so the file was read: {_words(error)}"


def _words(error: BaseException) -> str:
    """What went wrong, and what did before that."""
    said = str(error) if isinstance(error, OSError | flat.FlatError) else f"{type(error).__name__}: {error}"
    before = None if error.__suppress_context__ else error.__context__
    return f"{_words(before)}; {said}" if before is not None else said


@contextmanager
def of_host(handle: int, size: int) -> Iterator[Source]:
    """A file in memory, on a CPU. Raises OSError if it is too small."""
    found = os.fstat(handle).st_size
    if found < size:
        raise OSError(f"it has {found} bytes of {size}")
    yield Source(lambda count: os.pread(handle, count, 0), lambda: _FileLane(handle))


class _FileLane(HostLane):
    """To the memory of this process, from a file of its own."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def read(self, file: int, offset: int, address: int, size: int) -> None:
        super().read(self._handle, offset, address, size)
