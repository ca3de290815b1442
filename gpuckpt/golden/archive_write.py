"""Write a golden to an archive file."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from gpuckpt import manifest as manifests
from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, NotFoundError, OutOfSpaceError, VerificationError
from gpuckpt.golden.archive_format import SOCKET, XATTR, Archive, Hashing, Progress
from gpuckpt.manifest import Manifest
from gpuckpt.store import digests, locks, seal
from gpuckpt.store.layout import Layout


def export_golden(
    settings: Settings, name: str, target: Path, *, zstd: bool = False, progress: Progress = lambda done, total: None
) -> Archive:
    """Write golden ``name`` to the file ``target``, which appears whole or not at all.

    Raises NotFoundError, VerificationError (the golden's bytes are not those recorded), BusyError (the file exists),
    OutOfSpaceError.
    """
    layout = Layout.of(settings)
    folder = layout.golden(name)
    if os.path.lexists(target):
        raise _exists(target)
    if not target.parent.is_dir():
        raise NotFoundError(f"there is no folder {target.parent}", remedy="create it, or choose another")
    with locks.shared(layout.golden_locks, "golden", name):
        manifest = manifests.read(folder)
        if found := seal.broken(folder, manifest):
            raise VerificationError(f"golden {name} is damaged and was not exported", cause="; ".join(found[:5]))
        try:
            with _appearing(target) as file:
                hashing = Hashing(file)
                with _compressed(hashing, zstd) as output, _tar_writer(output) as tar:
                    _add(tar, folder, manifest, progress)
                size, digest = hashing.count, hashing.digest
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OutOfSpaceError(
                    f"{target.parent} is full",
                    cause=f"the golden has {manifest.sizes.total >> 20} MiB",
                    remedy="choose another folder, or add --zstd",
                ) from error
            raise
    return Archive(name, target, size, digest)


def _exists(target: Path) -> BusyError:
    return BusyError(f"{target} exists already", remedy="choose another file, or remove it first")


@contextmanager
def _appearing(target: Path) -> Iterator[IO[bytes]]:
    """A file without a name, which gets ``target``'s at the end of the ``with``, unless that is taken by then.

    The kernel removes it if we are killed before.
    """
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary: str | None = None
    try:
        try:
            handle = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as error:
            # NFS, FAT and others know no nameless files (EISDIR: not even the flag). Here a kill leaves the temporary
            # file, and nobody sweeps it: the folder is the user's own.
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            temporary = f".{target.name[:200]}.{secrets.token_hex(4)}"
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
            source = temporary or f"/proc/self/fd/{handle}"
            try:
                # Naming dst_dir_fd makes Python use linkat(2), which follows the link in /proc to the file itself.
                os.link(source, target.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=temporary is None)
            except FileExistsError:
                raise _exists(target) from None
            except OSError:
                if temporary is None or os.path.lexists(target):
                    raise
                os.rename(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)  # no hard links either
        os.fsync(folder)
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):  # renamed
                os.unlink(temporary, dir_fd=folder)
        os.close(folder)


@contextmanager
def _compressed(file: IO[bytes] | io.RawIOBase, zstd: bool) -> Iterator[IO[bytes]]:
    if not zstd:
        yield file  # type: ignore[misc]
        return
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3, threads=-1)
    with compressor.stream_writer(file, closefd=False) as output:  # type: ignore[arg-type]
        yield output


def _tar_writer(output: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=output, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20)


def _add(tar: tarfile.TarFile, folder: Path, manifest: Manifest, progress: Progress) -> None:
    total = sum(record.size for record in manifest.files.values())
    done = 0
    _add_one(tar, folder, "manifest.json")
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*folders, *files]):
            relative = os.path.relpath(os.path.join(root, name), folder)
            if relative in digests.OWN:
                continue
            _add_one(tar, folder, relative)
            if record := manifest.files.get(digests.key(relative)):
                done += record.size
                progress(done, total)


def _add_one(tar: tarfile.TarFile, folder: Path, relative: str) -> None:
    path = folder / relative
    member = tar.gettarinfo(str(path), arcname=relative)
    if socket := member is None:  # Python's way to say that the format has no sockets
        member = _pipe(path, relative)
    if member.islnk():
        # tarfile folds a second name of a file into a link to the first; here every name carries its bytes.
        member.type, member.linkname = tarfile.REGTYPE, ""
        member.size = path.lstat().st_size
    member.pax_headers = {
        XATTR + attribute: os.getxattr(path, attribute, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for attribute in os.listxattr(path, follow_symlinks=False)
    }
    if socket:
        member.pax_headers = {**member.pax_headers, SOCKET: "1"}
    if member.isreg():
        with path.open("rb") as content:
            tar.addfile(member, content)
    else:
        tar.addfile(member)


def _pipe(path: Path, relative: str) -> tarfile.TarInfo:
    status = path.lstat()
    member = tarfile.TarInfo(relative)
    member.type, member.mode, member.mtime = tarfile.FIFOTYPE, stat.S_IMODE(status.st_mode), status.st_mtime
    member.uid, member.gid = status.st_uid, status.st_gid
    return member
