"""Memory files: the files that a rewritten dump's memory is mapped from, hashed and written by several threads.

An *extent* holds a run that begins at a multiple of 2 MiB: file offset and address are congruent, so the kernel can map
it by huge pages. It is named by the digest of its content and cut where its content says so, not where it happens to
lie, so equal runs of other processes and goldens are the same file, stored once. What is left of a run before, between
and after goes page by page into one *small file* a process.

Where the time goes: hashing 4 GB/s a core; writing 4 GB/s into memory that the machine holds, but 0.6 GB/s where a
host takes free memory back and every page must be had from it again. All three let go of Python's lock, so a thread
for each core is worth it. Sources are read through their mapping: no byte is copied on the way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from blake3 import blake3

from gpuckpt.criu.images import PAGE
from gpuckpt.criu.pages import HUGE, Piece, content

# A content-defined cut comes every 16 blocks of 2 MiB on average, and no extent is longer than 64.
_CUT_ONE_IN = 16
_LONGEST = 64 * HUGE
_THREADS = 4
AT_ONCE = _THREADS * _LONGEST
"""Most bytes that the threads write after one of them was told that there is room for its own."""

Link = Callable[[str, int, Path], bool]
Room = Callable[[int], None]


@dataclass(frozen=True)
class Segment:
    """A part of a mapping, [start, end), and where its bytes are: a file's name, once it is known, and an offset."""

    start: int
    end: int
    file: Future[str]
    offset: int


class Small:
    """The file of a process' shorter runs, page after page; written when all of them are known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.parts: list[tuple[Piece, int, int]] = []
        self.file: Future[str] = Future()
        self.file.set_result(path.name)

    def append(self, piece: Piece, start: int, end: int) -> Segment:
        segment = Segment(start, end, self.file, self.size)
        self.parts.append((piece, start, end))
        self.size += end - start
        return segment


class MemoryFiles:
    """Writes memory files into the folder ``memory`` while a ``with`` lasts; :meth:`finish` waits for all of them.

    ``link`` is asked for an extent before it is written (its name, size and path): True if it made the path a link to
    the same bytes. ``room`` is told how many bytes are about to be written and raises if there is no room for them.
    ``progress`` gets the bytes done so far, in the calling thread. Every file is read-only when it is done.
    """

    def __init__(self, memory: Path, *, link: Link, room: Room, progress: Callable[[int], None]) -> None:
        self._memory = memory
        self._link = link
        self._room = room
        self._progress = progress
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "memory-files")
        self._tasks: list[tuple[Future[str], int]] = []
        self.digests: dict[str, str] = {}
        self.shared = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def store(self, piece: Piece, pages: memoryview, small: Small) -> list[Segment]:
        """Have a piece stored; returns the parts it becomes."""
        body = -(-piece.start // HUGE) * HUGE
        body_end = piece.end // HUGE * HUGE
        if body >= body_end:
            return [small.append(piece, piece.start, piece.end)]
        parts: list[Segment] = []
        if piece.start < body:
            parts.append(small.append(piece, piece.start, body))
        parts += self._extents(piece, body, body_end, pages)
        if body_end < piece.end:
            parts.append(small.append(piece, body_end, piece.end))
        return parts

    def write_small(self, small: Small, pages: memoryview) -> None:
        """Have a process' small file written, now that all of its parts are known."""
        if small.size:
            self._submit(small.size, self._write_small, small, pages)

    def finish(self) -> None:
        """Wait until everything is written; raises what a thread raised (OSError: no space left)."""
        done = 0
        for task, size in self._tasks:
            task.result()
            done += size
            self._progress(done)

    def _submit(self, size: int, work: Callable[..., str], *arguments: object) -> Future[str]:
        task = self._threads.submit(work, *arguments)
        self._tasks.append((task, size))
        return task

    def _extents(self, piece: Piece, start: int, end: int, pages: memoryview) -> Iterator[Segment]:
        begin = start
        for at in range(start, end, HUGE):
            after = at + HUGE
            # The last page of a block decides whether an extent ends with it: content, not position, makes the cut.
            mark = blake3(content(piece, after - PAGE, after, pages)).digest()[0]
            if after == end or after - begin >= _LONGEST or mark % _CUT_ONE_IN == 0:
                yield Segment(begin, after, self._submit(after - begin, self._extent, piece, begin, after, pages), 0)
                begin = after

    def _extent(self, piece: Piece, start: int, end: int, pages: memoryview) -> str:
        hasher = blake3()
        for at in range(start, end, HUGE):
            hasher.update(content(piece, at, at + HUGE, pages))
        digest = hasher.hexdigest()
        name = f"{digest[:40]}.extent"
        with self._lock:
            if name in self.digests:  # another thread has written it, or is about to
                self.shared += end - start
                return name
            self.digests[name] = digest
        path = self._memory / name
        if self._link(name, end - start, path):
            with self._lock:
                self.shared += end - start
            return name
        self._room(end - start)
        with path.open("xb", buffering=0) as file:
            for at in range(start, end, HUGE):
                # Whole blocks: a tmpfs with huge=within_size then takes a huge page for each.
                _write(file.fileno(), content(piece, at, at + HUGE, pages))
        path.chmod(0o400)
        return name

    def _write_small(self, small: Small, pages: memoryview) -> str:
        self._room(small.size)
        hasher = blake3()
        with small.path.open("xb", buffering=0) as file:
            for part, start, end in small.parts:
                for at in range(start, end, HUGE):
                    data = content(part, at, min(at + HUGE, end), pages)
                    hasher.update(data)
                    _write(file.fileno(), data)
        small.path.chmod(0o400)
        with self._lock:
            self.digests[small.path.name] = hasher.hexdigest()
        return small.path.name


def _write(handle: int, data: memoryview | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
