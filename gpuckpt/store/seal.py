"""Seals: know in microseconds that a golden's bytes are those that were verified.

Reading gigabytes back before every restore would cost more than the restore. The kernel keeps a change time (ctime)
for every file, which any write moves and no program can set. A seal notes inode, size and times of every file when
its digest was last true; a file whose note still holds has not been written since, and only others are read again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from gpuckpt.manifest import Manifest
from gpuckpt.store.digests import OWN, differences, digest_bytes, digest_file, key, walk

_SEAL = "seal.json"
assert _SEAL in OWN


def _note(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def write(folder: Path) -> None:
    """Seal a golden whose files were just digested or verified."""
    notes = {key(relative): _note(status) for relative, status in walk(folder)}
    manifest = folder / "manifest.json"
    seal = {"files": notes, "manifest": digest_bytes(manifest.read_bytes())}
    path = folder / _SEAL
    path.touch(mode=0o600)
    path.write_text(json.dumps(seal))


def _read(folder: Path) -> tuple[dict[str, list[int]], str | None]:
    """The notes and the manifest's digest; nothing where the seal is missing or is none."""
    try:
        seal = json.loads((folder / _SEAL).read_text())
        return dict(seal["files"]), str(seal["manifest"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


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
    stale = [relative for relative, status in walk(folder) if notes.get(key(relative)) != _note(status)]
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
