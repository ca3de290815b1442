"""Copy a golden's tree: files in parallel and digested on the way, holes, links, devices and attributes kept."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from gpuckpt.errors import PreflightError

_CHUNK = 4 << 20
_ZEROS = bytes(1 << 20)
_WORKERS = 8  # a disk is fastest with several requests under way; reading, hashing and writing need no Python


class _Stopped(Exception):
    """Another file failed, or the user interrupted: this copy is not wanted any more."""


@dataclass
class Copied:
    """Bytes of the files that were copied, and their digests (hex) by relative path."""

    bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)


def copy_tree(
    source: Path,
    target: Path,
    *,
    skip: Collection[str] = (),
    durable: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Copied:
    """Copy everything below the folder ``source`` to ``target``, which is made if need be; root only.

    Regular files named in ``skip`` (relative paths) are left out. ``durable``: every file and folder is on its disk
    when this returns. ``progress`` gets the bytes copied so far, in the caller's thread. A failure leaves a part
    behind, for the caller to remove.
    """
    files, names, folders = _lay_out(source, target, skip)
    stop, counter = threading.Event(), _Counter()
    done = Copied()
    with ThreadPoolExecutor(min(_WORKERS, max(len(files), 1)), "copy") as pool:
        try:
            # The largest first, so that none is left alone at the end.
            order = sorted(files, key=lambda one: files[one].st_size, reverse=True)
            copies = {
                pool.submit(_copy_file, source / one, target / one, files[one], stop, counter, durable): one
                for one in order
            }
            pending: set[Future[str]] = set(copies)
            while pending:
                finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                for future in finished:
                    done.digests[copies[future]] = future.result()
                progress(counter.value)
        except BaseException:
            stop.set()
            raise
    for again, first in names.items():
        os.link(target / first, target / again)
        done.digests[again] = done.digests[first]
    for folder in reversed(folders):  # what was made inside has moved their times
        _copy_metadata(source / folder, target / folder, (source / folder).lstat())
        if durable:
            sync(target / folder)
    done.bytes = counter.value
    return done


def sync(path: Path) -> None:
    """Have a file or folder on its disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allocated(folder: Path, skip: Collection[str] = ()) -> int:
    """Bytes that the files below a folder take, holes and second names not counted."""
    seen: dict[tuple[int, int], int] = {}
    for relative, status in _entries(folder):
        if relative not in skip:
            seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def _lay_out(
    source: Path, target: Path, skip: Collection[str]
) -> tuple[dict[str, os.stat_result], dict[str, str], list[str]]:
    """Make everything but regular files; returns these, further names of theirs with the first, and the folders."""
    files: dict[str, os.stat_result] = {}
    first: dict[tuple[int, int], str] = {}
    names: dict[str, str] = {}
    folders: list[str] = []
    for relative, status in _entries(source):
        path = target / relative
        if stat.S_ISDIR(status.st_mode):
            path.mkdir(mode=0o700, parents=not folders, exist_ok=True)
            folders.append(relative)
        elif stat.S_ISREG(status.st_mode):
            if relative in skip:
                continue
            earlier = first.setdefault((status.st_dev, status.st_ino), relative)
            if earlier == relative:
                files[relative] = status
            else:
                names[relative] = earlier
        else:
            if stat.S_ISLNK(status.st_mode):
                path.symlink_to(os.readlink(source / relative))
            else:  # a device (overlayfs' mark of a deleted file), a pipe or a socket
                os.mknod(path, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
            _copy_metadata(source / relative, path, status)
    return files, names, folders


def _entries(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The folder itself (".") and everything below it: relative path and lstat, parents first."""
    yield ".", folder.lstat()
    pending = [""]
    while pending:
        parent = pending.pop()
        with os.scandir(folder / parent) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                relative = os.path.join(parent, entry.name)
                status = entry.stat(follow_symlinks=False)
                yield relative, status
                if stat.S_ISDIR(status.st_mode):
                    pending.append(relative)


class _Counter:
    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.value += count


def _copy_file(
    source: Path, target: Path, status: os.stat_result, stop: threading.Event, counter: _Counter, durable: bool
) -> str:
    """Copy one file; returns the digest of what was written."""
    hasher = blake3(max_threads=blake3.AUTO)
    buffer = memoryview(bytearray(min(_CHUNK, max(status.st_size, 1))))
    reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            # The size first: a tmpfs with huge=within_size takes huge pages only inside it.
            os.ftruncate(writer, status.st_size)
            at = 0
            for begin, end in _data(reader, status.st_size):
                _hash_zeros(hasher, begin - at)
                at = begin
                while at < end:
                    if stop.is_set():
                        raise _Stopped
                    count = os.preadv(reader, [buffer[: min(len(buffer), end - at)]], at)
                    if not count:
                        break  # shorter than it was: the digest tells
                    hasher.update(buffer[:count])
                    written = 0
                    while written < count:
                        written += os.pwrite(writer, buffer[written:count], at + written)
                    at += count
                    counter.add(count)
            _hash_zeros(hasher, status.st_size - at)
            _copy_metadata(source, target, status)
            if durable:
                os.fsync(writer)
        finally:
            os.close(writer)
    finally:
        os.close(reader)
    return hasher.hexdigest()


def _data(file: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are no holes (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = min(os.lseek(file, begin, os.SEEK_HOLE), size)
        yield begin, end


def _hash_zeros(hasher: blake3, count: int) -> None:
    while count > 0:
        part = min(count, len(_ZEROS))
        hasher.update(_ZEROS[:part])
        count -= part


def _copy_metadata(source: Path, target: Path, status: os.stat_result) -> None:
    # The owner first: changing it takes set-user-id bits and file capabilities away.
    os.lchown(target, status.st_uid, status.st_gid)
    for attribute in os.listxattr(source, follow_symlinks=False):
        value = os.getxattr(source, attribute, follow_symlinks=False)
        try:
            os.setxattr(target, attribute, value, follow_symlinks=False)
        except OSError as error:
            raise PreflightError(f"{target.parent} cannot keep the attribute {attribute}", cause=str(error)) from error
    if not stat.S_ISLNK(status.st_mode):
        target.chmod(stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
