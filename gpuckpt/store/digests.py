"""Digests of a golden's files: made when it is published, read back when it is verified."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from gpuckpt.manifest import FileRecord

_CHUNK = 8 << 20
OWN = ("manifest.json", "seal.json")  # written by the store itself, after the digests


def digest_file(path: Path) -> str:
    """The blake3 digest (hex) of a file; reads it in pieces, hashes on all cores."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_CHUNK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def digest_bytes(data: bytes) -> str:
    return blake3(data).hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below ``folder`` but folders and the store's own files: relative path and its lstat, sorted."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        # A link to a folder is listed among the folders, but is an entry of its own.
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        for name in sorted([*files, *links]):
            path = Path(root, name)
            relative = str(path.relative_to(folder))
            if relative not in OWN:
                yield relative, path.lstat()


def record(
    folder: Path, progress: Callable[[int], None] = lambda done: None
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Digest every regular file below ``folder`` and read every link; ``progress`` gets the bytes done so far.

    Other kinds (overlay whiteouts are character devices 0:0) carry no bytes and are not recorded.
    """
    files: dict[str, FileRecord] = {}
    links: dict[str, str] = {}
    done = 0
    for relative, status in walk(folder):
        if stat.S_ISLNK(status.st_mode):
            links[relative] = os.readlink(folder / relative)
        elif stat.S_ISREG(status.st_mode):
            files[relative] = FileRecord(size=status.st_size, blake3=digest_file(folder / relative))
            done += status.st_size
            progress(done)
    return files, links


def differences(
    folder: Path,
    files: dict[str, FileRecord],
    links: dict[str, str],
    *,
    contents: bool,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What differs between ``folder`` and its record, one sentence each; empty when nothing does.

    Without ``contents`` only presence and sizes are compared (microseconds a file), with it every byte is read.
    """
    found: list[str] = []
    seen = dict(walk(folder))
    done = 0
    for relative, expected in files.items():
        status = seen.pop(relative, None)
        if status is None or not stat.S_ISREG(status.st_mode):
            found.append(f"{relative} is missing")
        elif status.st_size != expected.size:
            found.append(f"{relative} has {status.st_size} bytes, {expected.size} were recorded")
        elif contents and digest_file(folder / relative) != expected.blake3:
            found.append(f"{relative} has changed: its digest differs from the recorded one")
        done += expected.size
        progress(done)
    for relative, target in links.items():
        status = seen.pop(relative, None)
        if status is None or not stat.S_ISLNK(status.st_mode) or os.readlink(folder / relative) != target:
            found.append(f"the link {relative} is missing or points elsewhere")
    found.extend(
        f"{relative} was not there when the golden was made"
        for relative, status in seen.items()
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
    )
    return found
