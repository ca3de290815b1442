"""Seals: know in microseconds that a golden's bytes are those that were verified.

Reading gigabytes back before every restore would cost more than the restore. The kernel keeps a change time (ctime)
for every file, which any write moves and no program can set. A seal notes inode, size and times of every file when
its digest was last true; a file whose note still holds has not been written since, and only others are read again.

Inodes and times mean something only in the file system that they were read from. A disk's device number may be
another one after a reboot, so the seal names the file system by its own id (statvfs(3), f_fsid): ext4 and btrfs make
it of their UUID, tmpfs draws one for each mount. Where it is made of the device number (XFS) and that changes, or
where there is none, the golden is read once more; nothing else is lost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpuckpt.manifest import Manifest
from gpuckpt.store.digests import OWN, differences, digest_bytes, digest_file, key, walk

_SEAL, _NEW = "seal.json", "seal.json.new"
assert _SEAL in OWN and _NEW in OWN

Note = list[int]


def _file_system(folder: Path) -> str:
    known = os.statvfs(folder).f_fsid
    return f"id {known:x}" if known else f"device {folder.lstat().st_dev:x}"


def _note(status: os.stat_result, device: int) -> Note:
    """``device`` is that of the golden's folder: a file on another one must not pass for one on this."""
    foreign = 0 if status.st_dev == device else status.st_dev
    return [foreign, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _notes(folder: Path) -> dict[str, Note]:
    device = folder.lstat().st_dev
    return {key(relative): _note(status, device) for relative, status in walk(folder)}


def write(folder: Path) -> None:
    """Seal a golden whose files were just digested or verified."""
    _save(folder, _notes(folder), digest_bytes((folder / "manifest.json").read_bytes()))


def _save(folder: Path, notes: dict[str, Note], manifest: str) -> None:
    fresh = folder / _NEW
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps({"file_system": _file_system(folder), "files": notes, "manifest": manifest}))
    fresh.replace(folder / _SEAL)


def _read(folder: Path) -> tuple[dict[str, Note], str | None]:
    """The notes and the manifest's digest; nothing where the seal is missing or is none.

    No notes either if they were taken in another file system.
    """
    try:
        seal = json.loads((folder / _SEAL).read_text())
        notes, manifest = dict(seal["files"]), str(seal["manifest"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None
    return notes if seal.get("file_system") == _file_system(folder) else {}, manifest


def fits(folder: Path) -> bool:
    """Whether the manifest is the one that was sealed; a golden without a seal is taken at its word."""
    _, sealed = _read(folder)
    return sealed is None or digest_bytes((folder / "manifest.json").read_bytes()) == sealed


def broken(folder: Path, golden: Manifest, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """What has changed in a golden since it was sealed, one sentence each; empty if nothing has.

    Files whose notes differ are read and compared with their digests; if these are right the seal is renewed.
    """
    notes, _ = _read(folder)
    if not fits(folder):
        return ["manifest.json has changed since the golden was sealed"]
    found = differences(folder, golden.files, golden.links, contents=False, attributes_blake3=golden.attributes_blake3)
    device = folder.lstat().st_dev
    stale = [relative for relative, status in walk(folder) if notes.get(key(relative)) != _note(status, device)]
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


def intact(folder: Path) -> set[str]:
    """The files of a golden that are as they were when their digests were last true, by their keys."""
    notes, _ = _read(folder)
    return {name for name, note in _notes(folder).items() if notes.get(name) == note}


@contextmanager
def linking(folders: Iterable[Path]) -> Iterator[None]:
    """Keep the goldens' seals while hard links to their memory files come and go inside the ``with``.

    A link moves the change time of the file it leads to. The notes of files that were as sealed before, and differ
    in nothing but that time afterwards, are taken anew. Whoever else writes a file meanwhile moves its modification
    time too; a short ``with`` leaves no room for more.
    """
    before = [(folder, *_read(folder), _notes(folder)) for folder in folders]
    try:
        yield
    finally:
        for folder, sealed, manifest, then in before:
            if manifest is None or not folder.is_dir():
                continue
            now = _notes(folder)
            moved = {
                name: now[name]
                for name, note in then.items()
                if sealed.get(name) == note and name in now and now[name] != note and now[name][:4] == note[:4]
            }
            if moved:
                _save(folder, sealed | moved, manifest)
