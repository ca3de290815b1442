"""Who works on a name right now: flock'd files, which the kernel releases even when the holder is killed."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from gpuckpt.errors import BusyError

Kind = Literal["golden", "copy", "replica", "service", "volume", "pool"]
"""``copy``: who brings a golden into another tier, while others may restore it from the one where it lies."""
Locks = Path | tuple[Path, ...]
"""A folder of lock files, or several: then a name is held in all of them, taken in this order."""


def _open(locks: Path, kind: Kind, name: str) -> int:
    locks.mkdir(mode=0o700, exist_ok=True)
    return os.open(locks / f"{kind}-{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _acquire(handle: int) -> None:
    """Take the lock for ourselves alone; a moment's patience for those who only ask whether it is free."""
    for _ in range(5):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def exclusive(locks: Locks, kind: Kind, name: str) -> Iterator[None]:
    """Hold the name for the length of a ``with``; raise BusyError at once if another process holds it.

    The file stays: removing it would let two holders lock two files of the same name.
    """
    with _opened(locks, kind, name) as handles:
        for handle in handles:
            try:
                _acquire(handle)
            except BlockingIOError:
                holder = os.pread(handle, 64, 0).decode(errors="replace").strip()
                raise BusyError(
                    f"another command is working on {'golden' if kind == 'copy' else kind} {name}",
                    cause=f"process {holder} holds it" if holder and Path("/proc", holder).exists() else None,
                    remedy="wait for it to end, or choose another name",
                ) from None
            with suppress(OSError):  # a full disk: who holds it is only a courtesy
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        try:
            yield
        finally:
            for handle in handles:
                with suppress(OSError):
                    os.ftruncate(handle, 0)  # who takes it next may write no name: readers do not


@contextmanager
def shared(locks: Locks, kind: Kind, name: str) -> Iterator[None]:
    """Keep others from taking the name exclusively (several restores may read one golden)."""
    with _opened(locks, kind, name) as handles:
        for handle in handles:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"{kind} {name} is being made or removed by another command", remedy="wait for it to end"
                ) from None
        yield


@contextmanager
def waiting(locks: Locks, kind: Kind, name: str) -> Iterator[None]:
    """Hold the name for the length of a ``with``, after those who hold it now."""
    with _opened(locks, kind, name) as handles:
        for handle in handles:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def held(path: Path) -> bool:
    """Whether some process has locked the file, whose own it is; False if it is not there."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def _opened(locks: Locks, kind: Kind, name: str) -> Iterator[list[int]]:
    with ExitStack() as stack:
        handles = []
        for folder in (locks,) if isinstance(locks, Path) else locks:
            handles.append(_open(folder, kind, name))
            stack.callback(os.close, handles[-1])
        yield handles


def is_free(locks: Locks, kind: Kind, name: str) -> bool:
    """Whether nobody holds the name for himself alone: what a transaction left behind then belongs to nobody.

    Asks with a shared lock, and only for a moment: two who ask do not disturb each other.
    """
    try:
        with shared(locks, kind, name):
            return True
    except BusyError:
        return False
