"""Seals: know in microseconds that a golden's bytes are those that were verified.

Reading gigabytes back before every restore would cost more than the restore. The kernel keeps a change time (ctime)
for every file, which any write moves and no program can set. A seal notes inode, size and times of every file when
its digest was last true; a file whose note still holds has not been written since, and only others are read again.

Making or removing a hard link moves the ctime too, without a change of content: :mod:`gpuckpt.store.sharing` tells the
seals of what it did.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gpuckpt.manifest import Manifest
from gpuckpt.store.digests import OWN, differences, digest_bytes, digest_file, key, walk

_SEAL, _FRESH = "seal.json", "seal.json.new"
assert {_SEAL, _FRESH} <= set(OWN)

Note = tuple[int, ...]


def note(status: os.stat_result) -> Note:
    """What is noted of a file: device, inode, size, and the times (ns) of its last write and its last change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write(folder: Path) -> None:
    """Seal a golden whose files were just digested or verified."""
    with _held(folder) as handle:
        notes = {key(relative): note(status) for relative, status in walk(folder)}
        _save(handle, notes, digest_bytes((folder / "manifest.json").read_bytes()))


def notes_of(folder: Path) -> dict[str, Note]:
    """The notes of a golden by path; none where the seal is missing or is none."""
    return _parse(_text(folder))[0]


def renew(folder: Path, moved: Mapping[Note, Note]) -> None:
    """Take over what became of files by links that were made or removed: ``moved`` leads from a note to the next.

    Only a note that held just before is followed, and only to what the file is now.
    """
    with _held(folder) as handle:
        notes, sealed = _parse(_text_in(handle))
        changed = False
        for relative, before in notes.items():
            after = before
            while after in moved:
                after = moved[after]
            if after != before and sealed is not None and note((folder / relative).lstat()) == after:
                notes[relative] = after
                changed = True
        if changed and sealed is not None:
            _save(handle, notes, sealed)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[int]:
    """The golden's folder, opened and locked for a change of its seal.

    By the handle, not by its path: the name may get another golden in the meantime (create --replace).
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _save(handle: int, notes: Mapping[str, Note], manifest: str) -> None:
    # A reader sees the old seal or the new one, never half of it.
    fresh = os.open(_FRESH, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=handle)
    with os.fdopen(fresh, "w") as file:
        json.dump({"files": notes, "manifest": manifest}, file)
    os.rename(_FRESH, _SEAL, src_dir_fd=handle, dst_dir_fd=handle)


def _text(folder: Path) -> str:
    try:
        return (folder / _SEAL).read_text()
    except OSError:
        return ""


def _text_in(handle: int) -> str:
    try:
        with os.fdopen(os.open(_SEAL, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=handle)) as file:
            return file.read()
    except OSError:
        return ""


def _parse(text: str) -> tuple[dict[str, Note], str | None]:
    """The notes and the manifest's digest; nothing where the seal is missing or is none."""
    try:
        seal = json.loads(text)
        return {relative: tuple(noted) for relative, noted in seal["files"].items()}, str(seal["manifest"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, None


def fits(folder: Path) -> bool:
    """Whether the manifest is the one that was sealed; a golden without a seal is taken at its word."""
    _, sealed = _parse(_text(folder))
    return sealed is None or digest_bytes((folder / "manifest.json").read_bytes()) == sealed


def broken(folder: Path, golden: Manifest, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """What has changed in a golden since it was sealed, one sentence each; empty if nothing has.

    Files whose notes differ are read and compared with their digests; if these are right the seal is renewed.
    """
    notes = notes_of(folder)
    if not fits(folder):
        return ["manifest.json has changed since the golden was sealed"]
    found = differences(folder, golden.files, golden.links, contents=False, attributes_blake3=golden.attributes_blake3)
    stale = [relative for relative, status in walk(folder) if notes.get(key(relative)) != note(status)]
    done = 0
    for relative in stale:
        expected = golden.files.get(key(relative))
        if expected and digest_file(folder / relative) != expected.blake3:
            found.append(f"{relative} has changed: its digest differs from the recorded one")
        done += expected.size if expected else 0
        progress(done)
    if stale and not found:
        write(folder)
    return found
