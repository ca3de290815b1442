"""Goldens as archive files: written with a digest, read back with distrust.

The format is a POSIX tar (pax headers for extended attributes), zstd-compressed on request, whose first member is
``manifest.json``. Whoever can make us restore an archive runs code as root on this machine, with the credentials and
capabilities that the archive's processes had: importing needs an explicit trust, and the bytes are compared with the
manifest's digests before the golden becomes visible. The manifest's own digest is what must be passed along by a
trusted way; ``export`` prints the digest of the whole file.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from blake3 import blake3

from gpuckpt import manifest as manifests
from gpuckpt.config import Settings
from gpuckpt.errors import (
    BusyError,
    NotFoundError,
    OutOfSpaceError,
    PreflightError,
    UsageError,
    VerificationError,
)
from gpuckpt.manifest import Manifest
from gpuckpt.store import digests, locks, seal
from gpuckpt.store.layout import Layout, check_name

_XATTR = "SCHILY.xattr."
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MANIFEST_LIMIT = 64 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Archive:
    """A written or read archive: the golden's name, the file, its size and blake3 digest (hex)."""

    name: str
    path: Path
    size: int
    digest: str


class _Hashing(io.RawIOBase):
    """A file that digests what passes through it, in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hasher = blake3()
        self.count = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self._hasher.update(view)
        self._file.write(view)
        self.count += view.nbytes
        return view.nbytes

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(view.nbytes)
        view[: len(data)] = data
        self._hasher.update(data)
        self.count += len(data)
        return len(data)

    def drain(self) -> None:
        """Read to the end, so that the digest is the whole file's."""
        while data := self._file.read(1 << 20):
            self._hasher.update(data)

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()


def export_golden(
    settings: Settings, name: str, target: Path, *, zstd: bool = False, progress: Progress = lambda done, total: None
) -> Archive:
    """Write golden ``name`` to the file ``target``, which appears whole or not at all.

    Raises NotFoundError, VerificationError (the golden's bytes are not those recorded), BusyError (the file exists),
    OutOfSpaceError.
    """
    layout = Layout.of(settings)
    folder = layout.golden(name)
    if target.exists():
        raise BusyError(f"{target} exists already", remedy="choose another file, or remove it first")
    if not target.parent.is_dir():
        raise NotFoundError(f"there is no folder {target.parent}", remedy="create it, or choose another")
    with locks.shared(layout.locks, "golden", name):
        manifest = manifests.read(folder)
        if found := seal.broken(folder, manifest.files, manifest.links):
            raise VerificationError(f"golden {name} is damaged and was not exported", cause="; ".join(found[:5]))
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(temporary, "xb", opener=_private) as file:
                hashing = _Hashing(file)
                with _compressed(hashing, zstd) as output, _tar_writer(output) as tar:
                    _add(tar, folder, manifest, progress)
                size, digest = hashing.count, hashing.digest
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(target)
        except OSError as error:
            if error.errno == 28:  # ENOSPC
                raise OutOfSpaceError(
                    f"{target.parent} is full",
                    cause=f"the golden has {manifest.sizes.total >> 20} MiB",
                    remedy="choose another folder, or add --zstd",
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
    return Archive(name, target, size, digest)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
            if relative in manifest.files:
                done += manifest.files[relative].size
                progress(done, total)


def _add_one(tar: tarfile.TarFile, folder: Path, relative: str) -> None:
    path = folder / relative
    member = tar.gettarinfo(str(path), arcname=relative)
    if member is None:
        return  # a socket: nothing to carry, its server makes it again
    if member.islnk():
        # tarfile folds a second name of a file into a link to the first; here every name carries its bytes.
        member.type, member.linkname = tarfile.REGTYPE, ""
        member.size = path.lstat().st_size
    member.pax_headers = {
        _XATTR + attribute: os.getxattr(path, attribute, follow_symlinks=False).decode("utf-8", "surrogateescape")
        for attribute in os.listxattr(path, follow_symlinks=False)
    }
    if member.isreg():
        with path.open("rb") as content:
            tar.addfile(member, content)
    else:
        tar.addfile(member)


def import_golden(
    settings: Settings,
    source: Path,
    *,
    name: str | None,
    trust: bool,
    digest: str | None,
    progress: Progress = lambda done, total: None,
) -> Archive:
    """Read the archive ``source`` and publish it as a golden (``name``, or its own name).

    ``trust`` must be given: the archive's processes will run as root. ``digest`` is compared with the blake3 digest
    of the whole file if given. Nothing becomes visible before every byte was compared with the manifest. Raises
    UsageError (no trust), VerificationError (a digest differs, or a member leaves the archive's folder or is of a
    kind that no golden holds), BusyError (the name is taken), NotFoundError, OutOfSpaceError.
    """
    if not trust:
        raise UsageError(
            f"{source} was not imported: its processes would run as root here",
            cause="a golden is a privileged program with its memory; whoever made the archive decides what it does",
            remedy="if you trust where it comes from, add --trust (and --digest, as `gpuckpt export` printed it)",
        )
    if not source.is_file():
        raise NotFoundError(f"there is no archive {source}", remedy="correct the path")
    layout = Layout.of(settings)
    with source.open("rb") as file:
        hashing = _Hashing(file)
        try:
            with _decompressed(hashing) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
                manifest = _first(tar, source)
                chosen = check_name(name or manifest.name)
                with locks.exclusive(layout.locks, "golden", chosen):
                    _unpack(layout, tar, manifest, chosen, hashing, digest, progress)
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise VerificationError(
                f"{source} is not a whole archive of a golden",
                cause=f"{type(error).__name__}: {error}",
                remedy="copy it again",
            ) from error
    return Archive(chosen, source, source.stat().st_size, hashing.digest)


@contextmanager
def _decompressed(file: _Hashing) -> Iterator[IO[bytes]]:
    buffered = io.BufferedReader(file, 1 << 20)
    if buffered.peek(4)[:4] != _ZSTD_MAGIC:
        yield buffered
        return
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(buffered, closefd=False) as stream:
            yield stream
    except zstandard.ZstdError as error:
        raise VerificationError("the archive's compression is damaged", cause=str(error)) from error


def _first(tar: tarfile.TarFile, source: Path) -> Manifest:
    member = tar.next()
    content = tar.extractfile(member) if member and member.isreg() and member.name == "manifest.json" else None
    if member is None or content is None or member.size > _MANIFEST_LIMIT:
        raise VerificationError(
            f"{source} is not an archive of a golden", cause="its first member is not manifest.json"
        )
    return manifests.parse(content.read(), source.name)


def _unpack(
    layout: Layout,
    tar: tarfile.TarFile,
    manifest: Manifest,
    name: str,
    hashing: _Hashing,
    digest: str | None,
    progress: Progress,
) -> None:
    if (layout.goldens / name).exists():
        raise BusyError(
            f"a golden named {name} exists already", remedy=f"give another --name, or remove it: gpuckpt rm {name}"
        )
    total = sum(record.size for record in manifest.files.values())
    free = shutil.disk_usage(layout.store).free
    if total > free:
        raise OutOfSpaceError(
            f"the archive needs {total >> 20} MiB, the store has {free >> 20} MiB free",
            remedy="remove goldens (gpuckpt df, gpuckpt rm), or enlarge store.size",
        )
    staging = layout.staging / name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(mode=0o700)
    try:
        done = 0
        while (member := tar.next()) is not None:
            try:
                _extract(tar, member, staging, manifest)
            except (OSError, ValueError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno == 28:  # ENOSPC
                    raise
                raise VerificationError(
                    f"the archive's member {member.name!r} cannot be unpacked", cause=str(error)
                ) from error
            done += member.size
            progress(done, total)
        hashing.drain()
        if digest is not None and digest.lower().removeprefix("blake3:") != hashing.digest:
            raise VerificationError(
                "the archive's digest differs from the one given",
                cause=f"it is {hashing.digest}",
                remedy="copy the archive again, or check the digest; do not import it otherwise",
            )
        found = digests.differences(staging, manifest.files, manifest.links, contents=True)
        if found:
            raise VerificationError("the archive's content differs from its manifest", cause="; ".join(found[:5]))
        manifest.model_copy(update={"name": name}).write(staging)
        seal.write(staging)
        staging.rename(layout.goldens / name)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise OutOfSpaceError("the store became full while the archive was read", remedy="gpuckpt df") from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, staging: Path, manifest: Manifest) -> None:
    """Write one member below ``staging``; refuse any that could reach outside, or that a golden never holds.

    Parents must be folders that were unpacked before, never links, so no path can leave through one.
    """
    path = PurePosixPath(member.name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or path.parts[0] not in ("images", "rootfs", "volumes")
    ):
        raise VerificationError(
            f"the archive's member {member.name!r} leaves its folder", remedy="do not use this archive"
        )
    if len(path.parts) < (3 if path.parts[0] == "volumes" else 2) and not member.isdir():
        # These paths are handed to mount(2) and copied from on the host, where a link would be followed.
        raise VerificationError(
            f"the archive's member {member.name!r} is not a folder", remedy="do not use this archive"
        )
    target = staging / path
    for parent in path.parents:
        if str(parent) != "." and not stat.S_ISDIR(_mode(staging / parent)):
            raise VerificationError(
                f"the archive's member {member.name!r} lies below something that is not a folder",
                remedy="do not use this archive",
            )
    if member.isdir():
        target.mkdir(mode=0o700)
    elif member.isreg():
        expected = manifest.files.get(member.name)
        if expected is None or expected.size != member.size:
            raise VerificationError(f"the archive's member {member.name!r} is not in its manifest")
        content = tar.extractfile(member)
        assert content is not None
        with open(target, "xb", opener=_private) as output:
            shutil.copyfileobj(content, output, 1 << 20)
    elif member.issym() and manifest.links.get(member.name) == member.linkname and path.parts[0] != "images":
        # Links inside the writable layer are followed in the container only; nothing here ever follows them.
        target.symlink_to(member.linkname)
    elif member.ischr() and (member.devmajor, member.devminor) == (0, 0) and path.parts[0] == "rootfs":
        os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(0, 0))  # overlayfs' mark of a deleted file
    elif member.isfifo() and path.parts[0] != "images":
        os.mkfifo(target)
    else:
        raise VerificationError(
            f"the archive's member {member.name!r} is a link or device", remedy="do not use this archive"
        )
    _restore_metadata(target, member)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _restore_metadata(target: Path, member: tarfile.TarInfo) -> None:
    os.lchown(target, member.uid, member.gid)
    for key, value in member.pax_headers.items():
        if key.startswith(_XATTR):
            try:
                os.setxattr(target, key[len(_XATTR) :], value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
            except OSError as error:
                raise PreflightError(
                    f"the store cannot keep the attribute {key[len(_XATTR) :]}", cause=str(error)
                ) from error
    if not member.issym():
        target.chmod(member.mode & 0o7777)
    with suppress(NotImplementedError):
        os.utime(target, ns=(int(member.mtime * 1e9), int(member.mtime * 1e9)), follow_symlinks=False)
