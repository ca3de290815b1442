"""Where blocks lie that have been taken out of the arena: slots of host memory, and files.

Host memory is one piece, pinned where the device is a GPU: pinning takes far longer than the copy, so it is done once.
A file holds one block. Its digest is kept by who wrote it: what was cut short or changed is found out when it is read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import mmap
import os
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_PAUSE = 5.0  # seconds after which a disk that was full may have room again


class LostError(Exception):
    """A block's file is not what was written."""


class HostMemoryPool:
    """Slots of ``size`` bytes in host memory. For use by one thread, the slots' contents by others."""

    def __init__(self, budget: int, size: int, *, pinned: bool) -> None:
        self.size = size
        self.slots = budget // size
        self._slots = (pinned_pages if pinned else pages)(self.slots * size).view(self.slots, size)
        self._free = list(range(self.slots))  # a heap: neighbours are taken together

    @property
    def free(self) -> int:
        """Slots that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A slot; there must be a free one."""
        return heapq.heappop(self._free)

    def give(self, slot: int) -> None:
        """Nobody uses the slot any more."""
        heapq.heappush(self._free, slot)

    def bytes(self, slot: int) -> Any:
        """What lies in the slot, as a tensor."""
        return self._slots[slot]

    def run(self, slot: int, count: int) -> Any:
        """What lies in slots side by side [count, size]."""
        return self._slots.narrow(0, slot, count)


def pages(size: int) -> Any:
    """Host memory as a tensor of bytes; its pages are taken from the machine when they are first used.

    It begins where a page does, as files must be read to for O_DIRECT.
    """
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    made = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large ones: the first copy into them takes a quarter of the time
        made.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(made, dtype=torch.uint8)


def pinned_pages(size: int) -> Any:
    """The same, that a GPU copies from and to by itself; torch's own way takes powers of two. Raises RuntimeError."""
    made = pages(size)
    if size:
        runtime, at = torch.cuda.cudart(), made.data_ptr()
        torch.cuda.check_error(int(runtime.cudaHostRegister(at, size, 0)))
        weakref.finalize(made.untyped_storage(), runtime.cudaHostUnregister, at)
    return made


class File:
    """A block in a file. ``users``: the block itself, and what is to outlive a restart."""

    __slots__ = ("digest", "path", "users")

    def __init__(self, path: Path, digest: str, users: int = 1) -> None:
        self.path = path
        self.digest = digest
        self.users = users

    def drop(self) -> None:
        """One of the users is done with it."""
        self.users -= 1
        if not self.users:
            with suppress(OSError):
                self.path.unlink()


class BlockFiles:
    """Files of blocks in a folder, up to ``budget`` bytes. Its methods may be called by any thread."""

    SUFFIX = ".block"

    def __init__(self, folder: Path, budget: int, size: int, *, direct: bool = True) -> None:
        """``direct``: past the page cache where the file system can.

        Raises OSError, BlockingIOError if another process uses the folder.
        """
        self.folder = folder
        self.budget = budget
        self.size = size
        self.error = ""  # why the last write failed
        self._again = 0.0  # when to try it once more
        self._direct = getattr(os, "O_DIRECT", 0) if direct else 0
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.written = 0  # blocks on the disk or about to be
        self.pending: set[Path] = set()  # files of these that nobody has been told of yet

    @property
    def free(self) -> int:
        """Blocks that may still be written; none for a while after a write has failed."""
        if self.error and time.monotonic() < self._again:
            return 0
        return max(0, self.budget // self.size - self.written)

    @property
    def pause(self) -> float:
        """Seconds until a write may be tried again."""
        return max(0.0, self._again - time.monotonic())

    def failed(self, error: Exception) -> None:
        """A write has failed."""
        self.error, self._again = str(error), time.monotonic() + _PAUSE

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write(self, content: Any) -> File:
        """Write a block into a file of its own, ``pending`` from then on. Raises OSError; nothing is left then."""
        view = content.numpy()
        path = self.folder / f"{uuid.uuid4().hex}{self.SUFFIX}"
        self.pending.add(path)
        try:
            with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self._direct) as file:
                _all(lambda at: os.pwrite(file, view[at:], at), len(view))
                os.fdatasync(file)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            self.pending.discard(path)
            raise
        return File(path, hashlib.blake2b(view, digest_size=16).hexdigest())

    def read(self, file: File, into: Any) -> None:
        """Read a block. Raises LostError."""
        view = into.numpy()
        try:
            with _opened(file.path, os.O_RDONLY, self._direct) as opened:
                _all(lambda at: os.preadv(opened, [view[at:]], at), len(view))
        except OSError as error:
            raise LostError(f"a block of its keys and values cannot be read: {error}") from error
        if hashlib.blake2b(view, digest_size=16).hexdigest() != file.digest:
            raise LostError(f"a block of its keys and values was damaged on the disk ({file.path.name})")

    def found(self) -> Iterator[Path]:
        """All files of blocks in the folder."""
        return self.folder.glob(f"*{self.SUFFIX}")

    def bounce(self) -> Any:
        """Memory to read a block into."""
        return pages(self.size)


class _opened:
    """A file descriptor, opened past the page cache if that is wanted and possible."""

    def __init__(self, path: Path, flags: int, direct: int) -> None:
        self._path, self._flags, self._direct = path, flags | os.O_CLOEXEC, direct

    def __enter__(self) -> int:
        try:
            self._file = os.open(self._path, self._flags | self._direct, 0o600)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            with suppress(OSError):  # some file systems have made it before they say no
                if self._flags & os.O_CREAT:
                    self._path.unlink()
            self._file = os.open(self._path, self._flags, 0o600)
        return self._file

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _all(part: Any, size: int) -> None:
    done = 0
    while done < size:
        count = part(done)
        if not count:
            raise OSError(errno.EIO, "the file ends too early")
        done += count


class Home:
    """The copies of a block outside of the arena: a slot of host memory, a file, or both."""

    __slots__ = ("file", "pool", "slot")

    def __init__(self, pool: HostMemoryPool, slot: int = -1, file: File | None = None) -> None:
        self.pool = pool
        self.slot = slot
        self.file = file

    def vacate(self) -> None:
        """Let go of the slot."""
        if self.slot >= 0:
            self.pool.give(self.slot)
            self.slot = -1

    def release(self) -> None:
        """Nobody needs the copies any more."""
        self.vacate()
        if self.file is not None:
            self.file.drop()
            self.file = None


def publish(target: Path, content: bytes) -> None:
    """Write a file, all of it or nothing, to the disk. Raises OSError."""
    draft = target.with_suffix(".tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(folder: Path) -> None:
    """What was put into the folder is to be on the disk. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
