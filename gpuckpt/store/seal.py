"""Seals: know in microseconds that a golden's bytes are those that were verified.

Reading gigabytes back before every restore would cost more than the restore. The kernel keeps a change time (ctime)
for every file, which write(2), truncate(2) and the like move and no program can set. A seal notes inode, size and times
of every file when its digest was last true; only files whose note does not hold are read again. What it cannot see are
faults of the memory, and writes through a shared mapping of a file on tmpfs (root's alone: the files are read-only):
``gpuckpt verify`` reads every byte.

Inodes and times mean something only in the file system that they were read from. A disk's device number may be
another one after a reboot, so the seal names the file system by its own id (statvfs(3), f_fsid): ext4 and btrfs make
it of their UUID, tmpfs draws one for each mount. Where it is made of the device number (XFS) and that changes, or
where there is none, the golden is read once more; nothing else is lost.

Making or removing a hard link moves the ctime too, without a change of content: :mod:`gpuckpt.store.sharing` tells the
seals of what it did.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gpuckpt.manifest import Manifest
from gpuckpt.store.digests import OWN, differences, digest_bytes, digest_file, entries, key, walk

_SEAL, _FRESH = "seal.json", "seal.json.new"
assert {_SEAL, _FRESH} <= set(OWN)

Note = tuple[int, ...]


def note(status: os.stat_result, device: int) -> Note:
    """What is noted of a file: inode, size, and the times (ns) of its last write and its last change.

    ``device`` is that of the golden's folder: a file on another one must not pass for one on this.
    """
    foreign = 0 if status.st_dev == device else status.st_dev
    return foreign, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _file_system(folder: int | Path) -> str:
    known = os.statvfs(folder).f_fsid
    return f"id {known:x}" if known else f"device {os.stat(folder).st_dev:x}"


def write(folder: Path) -> None:
    """Seal a golden whose files were just digested or verified."""
    with _held(folder) as handle:
        device = os.fstat(handle).st_dev
        notes = {key(relative): note(status, device) for relative, status in walk(folder)}
        _save(handle, notes, digest_bytes((folder / "manifest.json").read_bytes()))


def distrust(folder: Path) -> None:
    """Have every file of a golden read again at its next use: it was found damaged."""
    with _held(folder) as handle:
        _, sealed = _parse(_text_in(handle), _file_system(handle))
        _save(handle, {}, sealed if sealed is not None else digest_bytes((folder / "manifest.json").read_bytes()))


def notes_of(folder: Path) -> dict[str, Note]:
    """The notes of a golden by path; none where the seal is missing, is none, or is of another file system."""
    return _read(folder)[0]


def renew(folder: Path, moved: Mapping[Note, Note]) -> None:
    """Take over what became of files by links that were made or removed: ``moved`` leads from a note to the next.

    Only a note that held just before is followed, and only to what the file is now.
    """
    with _held(folder) as handle:
        notes, sealed = _parse(_text_in(handle), _file_system(handle))
        device = os.fstat(handle).st_dev
        changed = False
        for relative, before in notes.items():
            after = before
            while after in moved:
                after = moved[after]
            if after != before and sealed is not None and note((folder / relative).lstat(), device) == after:
                notes[relative] = after
                changed = True
        if changed and sealed is not None:
            _save(handle, notes, sealed)


@contextmanager
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
        json.dump({"file_system": _file_system(handle), "files": notes, "manifest": manifest}, file)
    os.rename(_FRESH, _SEAL, src_dir_fd=handle, dst_dir_fd=handle)


def _text_in(handle: int) -> str:
    try:
        with os.fdopen(os.open(_SEAL, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=handle)) as file:
            return file.read()
    except OSError:
        return ""


def _read(folder: Path) -> tuple[dict[str, Note], str | None]:
    try:
        text = (folder / _SEAL).read_text()
    except OSError:
        return {}, None
    return _parse(text, _file_system(folder))


def _parse(text: str, file_system: str) -> tuple[dict[str, Note], str | None]:
    """The notes and the manifest's digest; nothing where there is no seal, no notes if they are of elsewhere."""
    try:
        seal = json.loads(text)
        notes = {relative: tuple(noted) for relative, noted in seal["files"].items()}
        manifest = str(seal["manifest"])
        return (notes if seal.get("file_system") == file_system else {}), manifest
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, None


def fits(folder: Path) -> bool:
    """Whether the manifest is the one that was sealed; a golden without a seal is taken at its word."""
    _, sealed = _read(folder)
    return sealed is None or digest_bytes((folder / "manifest.json").read_bytes()) == sealed


def changed(folder: Path, golden: Manifest, names: Sequence[str]) -> list[str]:
    """What has changed in some files since the golden was sealed, one sentence each.

    Those whose notes differ are read and compared with their digests; if these are right their notes are renewed.
    """
    (notes, sealed), device = _read(folder), os.stat(folder).st_dev
    found = []
    fresh: dict[str, Note] = {}
    for name in names:
        path, expected = folder / name, golden.files.get(name)
        try:
            status = path.lstat()
        except FileNotFoundError:
            found.append(f"{name} is missing")
            continue
        if notes.get(name) == note(status, device):
            continue
        if not stat.S_ISREG(status.st_mode) or expected is None or digest_file(path) != expected.blake3:
            found.append(f"{name} has changed: its digest differs from the recorded one")
        else:
            fresh[name] = note(status, device)
    if fresh and sealed is not None:
        with suppress(OSError), _held(folder) as handle:  # without room for a seal they are read again
            notes, sealed = _parse(_text_in(handle), _file_system(handle))
            if sealed is not None:
                _save(handle, notes | fresh, sealed)
    return found


def broken(folder: Path, golden: Manifest, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """What has changed in a golden since it was sealed, one sentence each; empty if nothing has.

    Files whose notes differ are read and compared with their digests; if these are right the seal is renewed.
    """
    notes, sealed = _read(folder)
    if sealed is not None and digest_bytes((folder / "manifest.json").read_bytes()) != sealed:
        return ["manifest.json has changed since the golden was sealed"]
    here = entries(folder)
    found = differences(
        folder, golden.files, golden.links, contents=False, attributes_blake3=golden.attributes_blake3, here=here
    )
    device = os.stat(folder).st_dev
    stale = [(name, path) for name, (path, status) in here.items() if notes.get(name) != note(status, device)]
    done = 0
    for name, path in stale:
        expected = golden.files.get(name)
        if expected and digest_file(folder / path) != expected.blake3:
            found.append(f"{name} has changed: its digest differs from the recorded one")
        done += expected.size if expected else 0
        progress(done)
    if stale and not found:
        # What was seen before the bytes were read: a change since then is found by the next one who looks.
        fresh = {name: note(status, device) for name, (_, status) in here.items()}
        with suppress(OSError), _held(folder) as handle:  # without room for a seal they are read again
            _save(handle, fresh, digest_bytes((folder / "manifest.json").read_bytes()))
    return found
