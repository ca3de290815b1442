"""Digests of a golden's files: made when it is published, read back when it is verified."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from blake3 import blake3
from msgspec import Struct

from gpuckpt.manifest import FileRecord

_CHUNK, _LEAST = 8 << 20, 64 << 10
OWN = ("manifest.json", "seal.json", "seal.json.new")  # written by the store itself, after the digests


def digest_file(path: Path) -> str:
    """The blake3 digest (hex) of a file; reads it in pieces, hashes on all cores."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb", buffering=0) as file:
        # No larger than it need be: clearing 8 MiB takes a millisecond, reading most files does not.
        buffer = bytearray(min(_CHUNK, max(os.fstat(file.fileno()).st_size, _LEAST)))
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.hexdigest()


def digest_bytes(data: bytes) -> str:
    return blake3(data).hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below ``folder`` but folders and the store's own files: relative path and its lstat, sorted."""
    # With text and os.scandir, not Path and os.walk: this is done before every restore, and takes 3 ms, not 20.
    yield from _walk(os.fspath(folder), "")


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        relative = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{relative}/")
        elif relative not in OWN:
            yield relative, entry.stat(follow_symlinks=False)


def entries(folder: Path) -> dict[str, tuple[str, os.stat_result]]:
    """What :func:`walk` finds: relative path and lstat by the key that a manifest has for it."""
    return {key(relative): (relative, status) for relative, status in walk(folder)}


class Contents(Struct, frozen=True):
    """A golden's content as its manifest records it: files with digests, links with targets, and one digest of all
    else that makes up the written layers (folders, devices, owners, modes, extended attributes)."""

    files: dict[str, FileRecord]
    links: dict[str, str]
    attributes: str


def key(relative: str) -> str:
    """A path, or a link's target, as text that JSON can hold: bytes that are no UTF-8 are written ``\\xNN``.

    A backslash is written twice, so that two names never become one.
    """
    return os.fsencode(relative).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def record(
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
    *,
    known: Mapping[str, str] | None = None,
) -> Contents:
    """Digest everything below ``folder``; ``progress`` gets the bytes done so far.

    ``known`` are digests, by path, that were made while files were written; these files are not read again.
    """
    files: dict[str, FileRecord] = {}
    links: dict[str, str] = {}
    done = 0
    for relative, status in walk(folder):
        if stat.S_ISLNK(status.st_mode):
            links[key(relative)] = key(os.readlink(folder / relative))
        elif stat.S_ISREG(status.st_mode):
            digest = (known or {}).get(relative) or digest_file(folder / relative)
            files[key(relative)] = FileRecord(size=status.st_size, blake3=digest)
            done += status.st_size
            progress(done)
    return Contents(files, links, attributes(folder))


def attributes(folder: Path) -> str:
    """One digest of what the written layers (all but ``images`` and ``memory``) are besides the bytes of their files.

    Overlayfs marks a deleted file by a character device 0:0 and a replaced folder by an extended attribute: a layer
    without its marks would show the base's files again.
    """
    hasher = blake3()
    for layer in ("rootfs", "volumes"):
        for root, folders, files in os.walk(folder / layer):
            folders.sort()
            for name in ("", *folders, *sorted(files)):
                path = os.path.join(root, name) if name else root
                status = os.lstat(path)
                if stat.S_ISSOCK(status.st_mode):
                    continue  # its server makes it again, and archives do not carry it
                words = [
                    os.path.relpath(path, folder),
                    f"{status.st_mode:o}",
                    status.st_uid,
                    status.st_gid,
                    status.st_rdev,
                ]
                for attribute in sorted(os.listxattr(path, follow_symlinks=False)):
                    words += [attribute, os.getxattr(path, attribute, follow_symlinks=False).hex()]
                hasher.update(os.fsencode("\0".join(map(str, words)) + "\n"))
    return hasher.hexdigest()


def differences(
    folder: Path,
    files: Mapping[str, FileRecord],
    links: Mapping[str, str],
    *,
    contents: bool,
    attributes_blake3: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
    here: Mapping[str, tuple[str, os.stat_result]] | None = None,
) -> list[str]:
    """What differs between ``folder`` and its record, one sentence each; empty when nothing does.

    Without ``contents`` only presence and sizes are compared (microseconds a file), with it every byte is read.
    ``here`` is what :func:`entries` found, if it was asked already.
    """
    found: list[str] = []
    seen = dict(here) if here is not None else entries(folder)
    done = 0
    for name, expected in files.items():
        relative, status = seen.pop(name, ("", None))
        if status is None or not stat.S_ISREG(status.st_mode):
            found.append(f"{name} is missing")
        elif status.st_size != expected.size:
            found.append(f"{name} has {status.st_size} bytes, {expected.size} were recorded")
        elif name.startswith("memory/") and stat.S_IMODE(status.st_mode) != 0o400:
            found.append(f"{name} has mode {stat.S_IMODE(status.st_mode):04o}, 0400 was recorded")  # CRIU compares it
        elif contents and digest_file(folder / relative) != expected.blake3:
            found.append(f"{name} has changed: its digest differs from the recorded one")
        done += expected.size
        progress(done)
    for name, target in links.items():
        relative, status = seen.pop(name, ("", None))
        if status is None or not stat.S_ISLNK(status.st_mode) or key(os.readlink(folder / relative)) != target:
            found.append(f"the link {name} is missing or points elsewhere")
    found.extend(
        f"{name} was not there when the golden was made"
        for name, (_, status) in seen.items()
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)
    )
    if attributes_blake3 is not None and attributes(folder) != attributes_blake3:
        found.append("owners, modes or marks of the written files (rootfs, volumes) have changed")
    return found
