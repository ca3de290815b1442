"""Read an archive with distrust and publish what it holds as a golden."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.config import Settings, parse_name
from gpuckpt.errors import BusyError, NotFoundError, OutOfSpaceError, PreflightError, UsageError, VerificationError
from gpuckpt.golden.archive_format import SOCKET, XATTR, ZSTD_MAGIC, Archive, Hashing, Progress, private
from gpuckpt.manifest import Manifest
from gpuckpt.store import digests, locks, seal, sharing
from gpuckpt.store.layout import Layout, check_name

_MANIFEST_LIMIT = 64 << 20


def _plain(path: str) -> None:
    if not path.startswith("/") or ".." in path.split("/") or any(ord(letter) < 32 for letter in path):
        raise ValueError("is not a plain absolute path")


def _refuse_astray(manifest: Manifest, source: Path) -> None:
    """What of a manifest becomes a name or path on the host: in somebody else's, nothing that leads astray."""
    launch = manifest.launch
    names, paths = [("name", manifest.name)], [("launch.rootfs", "/" if launch.rootfs is None else launch.rootfs)]
    for index, mount in enumerate(launch.mounts):
        paths.append((f"launch.mounts.{index}.source", mount.source))
        paths.append((f"launch.mounts.{index}.destination", mount.destination))
    for index, volume in enumerate(launch.volumes):
        names.append((f"launch.volumes.{index}.name", volume.name))
        paths.append((f"launch.volumes.{index}.destination", volume.destination))
    for check, entries in ((parse_name, names), (_plain, paths)):
        for where, text in entries:
            try:
                check(text)
            except ValueError as error:
                raise VerificationError(
                    f"the manifest in {source} names what no golden of ours would",
                    cause=f"{where}: {error} ({text!r})",
                    remedy="do not use this archive",
                ) from error


def require_trust(source: Path, *, trust: bool, digest: str | None) -> str:
    """The digest that the archive must have, in hex; raises UsageError unless both trust and digest are given."""
    if not trust:
        raise UsageError(
            f"{source} was not imported: its processes would run as root here",
            cause="a golden is a privileged program with its memory; whoever made the archive decides what it does",
            remedy="if you trust where it comes from, add --trust and --digest, as `gpuckpt export` printed it",
        )
    if digest is None:
        raise UsageError(
            f"{source} was not imported: --trust needs the --digest of the archive that is trusted",
            cause="without it, whoever can change the file on its way decides what runs as root here",
            remedy="take it from where the archive was made: `gpuckpt export` printed it as “blake3 …”",
        )
    wanted = digest.strip().lower().removeprefix("blake3:")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise UsageError(
            f"“{digest}” is not a blake3 digest", remedy="it has 64 hexadecimal digits; `gpuckpt export` printed it"
        )
    return wanted


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

    ``trust`` must be given, because the archive's processes will run as root, and so must ``digest``, the blake3
    digest of the whole file. Nothing becomes visible before every byte was compared with both the digest and the
    manifest. Raises UsageError (no trust, no digest), VerificationError (a digest differs, or a member leaves the
    archive's folder or is of a kind that no golden holds), BusyError (the name is taken), NotFoundError,
    OutOfSpaceError.
    """
    wanted = require_trust(source, trust=trust, digest=digest)
    if not source.is_file():
        raise NotFoundError(f"there is no archive {source}", remedy="correct the path")
    layout = Layout.of(settings)
    with source.open("rb") as file:
        hashing = Hashing(file)
        try:
            with _decompressed(hashing) as stream, tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
                manifest = _first(tar, source)
                chosen = check_name(name or manifest.name)
                with locks.exclusive(layout.golden_locks, "golden", chosen):
                    _unpack(layout, tar, manifest, chosen, hashing, wanted, progress)
        except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise VerificationError(
                f"{source} is not a whole archive of a golden",
                cause=f"{type(error).__name__}: {error}",
                remedy="copy it again",
            ) from error
    return Archive(chosen, source, hashing.count, hashing.digest)


@contextmanager
def _decompressed(file: Hashing) -> Iterator[IO[bytes]]:
    buffered = io.BufferedReader(file, 1 << 20)
    if buffered.peek(4)[:4] != ZSTD_MAGIC:
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
    manifest = manifests.parse(content.read(), source.name)
    _refuse_astray(manifest, source)
    return manifest


def _unpack(
    layout: Layout,
    tar: tarfile.TarFile,
    manifest: Manifest,
    name: str,
    hashing: Hashing,
    digest: str,
    progress: Progress,
) -> None:
    if layout.tiers(name):
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
    sharing.remove(layout.goldens, staging, ignore_errors=True)  # a killed command's, whose lock we now hold
    staging.mkdir(mode=0o700)
    try:
        done = 0
        while (member := tar.next()) is not None:
            try:
                _extract(tar, member, staging, manifest)
            except (OSError, ValueError, OverflowError) as error:
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise
                raise VerificationError(
                    f"the archive's member {member.name!r} cannot be unpacked", cause=str(error)
                ) from error
            done += member.size
            progress(done, total)
        hashing.drain()
        if digest != hashing.digest:
            raise VerificationError(
                "the archive's digest differs from the one given",
                cause=f"it is {hashing.digest}",
                remedy="copy the archive again, or check the digest; do not import it otherwise",
            )
        found = digests.differences(
            staging, manifest.files, manifest.links, contents=True, attributes_blake3=manifest.attributes_blake3
        )
        # Goldens share extents by their names, so a name must be what it says: the begin of the content's digest.
        found += [
            f"{path} is not named by its content"
            for path, record in manifest.files.items()
            if path.startswith("memory/") and path.endswith(".extent") and Path(path).stem != record.blake3[:40]
        ]
        if found:
            raise VerificationError("the archive's content differs from its manifest", cause="; ".join(found[:5]))
        structs.replace(manifest, name=name).write(staging)
        seal.write(staging)
        staging.rename(layout.goldens / name)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutOfSpaceError("the store became full while the archive was read", remedy="gpuckpt df") from error
        raise
    finally:
        sharing.remove(layout.goldens, staging, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, staging: Path, manifest: Manifest) -> None:
    """Write one member below ``staging``; refuse any that could reach outside, or that a golden never holds.

    Parents must be folders that were unpacked before, never links, so no path can leave through one.
    """
    path = PurePosixPath(member.name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or not path.parts
        or path.parts[0] not in ("images", "memory", "rootfs", "volumes")
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
        expected = manifest.files.get(digests.key(member.name))
        if expected is None or expected.size != member.size:
            raise VerificationError(f"the archive's member {member.name!r} is not in its manifest")
        content = tar.extractfile(member)
        assert content is not None
        with open(target, "xb", opener=private) as output:
            shutil.copyfileobj(content, output, 1 << 20)
    elif member.issym() and _is_listed(member, manifest) and path.parts[0] in ("rootfs", "volumes"):
        # Links inside the writable layer are followed in the container only; nothing here ever follows them.
        target.symlink_to(member.linkname)
    elif member.ischr() and (member.devmajor, member.devminor) == (0, 0) and path.parts[0] == "rootfs":
        os.mknod(target, stat.S_IFCHR | 0o600, os.makedev(0, 0))  # overlayfs' mark of a deleted file
    elif member.isfifo() and path.parts[0] in ("rootfs", "volumes"):
        os.mknod(target, (stat.S_IFSOCK if SOCKET in member.pax_headers else stat.S_IFIFO) | 0o600)
    else:
        raise VerificationError(
            f"the archive's member {member.name!r} is a link or device", remedy="do not use this archive"
        )
    if path.parts[0] in ("images", "memory"):
        _fix_metadata(target, path)
    else:
        _restore_metadata(target, member)


def _is_listed(link: tarfile.TarInfo, manifest: Manifest) -> bool:
    return manifest.links.get(digests.key(link.name)) == digests.key(link.linkname)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _fix_metadata(target: Path, path: PurePosixPath) -> None:
    """CRIU's images are root's alone, memory files are seen by the server and changed by nobody, whatever is said."""
    memory = path.parts[0] == "memory"
    if memory and len(path.parts) > 1 and not re.fullmatch(r"[0-9a-f]{40}\.extent|[0-9]+\.small", path.name):
        raise VerificationError(
            f"the archive's member {str(path)!r} is no memory file", remedy="do not use this archive"
        )
    os.chown(target, 0, 0)
    if target.is_dir():
        target.chmod(0o755 if memory else 0o700)
    else:
        target.chmod(0o400 if memory else 0o600)


def _restore_metadata(target: Path, member: tarfile.TarInfo) -> None:
    os.lchown(target, member.uid, member.gid)
    for key, value in member.pax_headers.items():
        if key.startswith(XATTR):
            try:
                os.setxattr(target, key[len(XATTR) :], value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
            except OSError as error:
                raise PreflightError(
                    f"the store cannot keep the attribute {key[len(XATTR) :]}", cause=str(error)
                ) from error
    if not member.issym():
        target.chmod(member.mode & 0o7777)
    with suppress(NotImplementedError):
        os.utime(target, ns=(int(member.mtime * 1e9), int(member.mtime * 1e9)), follow_symlinks=False)
