"""Archives: what goes out comes back equal, and nothing that is not so ever becomes a golden."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden.archive import Archive, export_golden, import_golden
from gpuckpt.manifest import FileRecord, Mount, Volume, dump
from gpuckpt.store import digests, seal
from gpuckpt.store.layout import Layout
from tests.fakes import publish, sample_manifest, settings_for


class Store:
    """A store in a folder, with the transactions on it."""

    def __init__(self, folder: Path) -> None:
        self.settings = settings_for(folder)
        self.layout = Layout.of(self.settings)
        self.layout.prepare()
        self.layout.prepare_store()

    def export(self, target: Path, *, zstd: bool = False) -> Archive:
        return export_golden(self.settings, "gold", target, zstd=zstd)

    def take(self, source: Path, **options: Any) -> Archive:
        """Import with the digest of the file as it is, unless another is given."""
        if "digest" not in options:
            options["digest"] = blake3(source.read_bytes()).hexdigest() if source.is_file() else "0" * 64
        return import_golden(self.settings, source, **({"name": None, "trust": True} | options))

    @property
    def empty(self) -> bool:
        return not self.layout.names() and not list(self.layout.staging.iterdir())


@pytest.fixture
def ours(tmp_path: Path) -> Store:
    return Store(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Store:
    return Store(tmp_path / "theirs")


def describe(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below ``folder`` that a golden must keep: kind, rights, owner, content, target, attributes."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        relative = str(path.relative_to(folder))
        if relative in digests.OWN:
            continue
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        attributes = {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
        mode = None if stat.S_ISLNK(status.st_mode) else status.st_mode
        found[relative] = (mode, status.st_uid, status.st_gid, status.st_rdev, content, attributes)
    return found


def furnish(folder: Path) -> None:
    """A writable layer with everything that servers leave in theirs, and as much of the rest as this user may make."""
    layer = folder / "rootfs"
    (layer / "srv" / "empty folder").mkdir(parents=True)
    (layer / "srv" / "file").write_bytes(b"content")
    (layer / "srv" / "file").chmod(0o4755)
    (layer / "srv" / "empty").touch()
    os.link(layer / "srv" / "file", layer / "srv" / "second name")
    (layer / "srv" / ("long" * 60)).write_bytes(b"long")
    (layer / "srv" / "größe ☃").write_bytes(b"unicode")
    (layer / "to-file").symlink_to("srv/file")
    (layer / "to-folder").symlink_to("srv")
    (layer / "to-outside").symlink_to("/etc/passwd")
    (layer / "to-far").symlink_to("x" * 200)
    os.mkfifo(layer / "pipe")
    os.mknod(layer / "socket", stat.S_IFSOCK | 0o660)
    (layer / os.fsdecode(b"no utf-8 \xff")).write_bytes(b"latin")
    (layer / os.fsdecode(b"link \xff")).symlink_to(os.fsdecode(b"no utf-8 \xff"))
    with (layer / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 20)
    (layer / "srv").chmod(0o750)


def put(store: Store, furniture: Callable[[Path], None] = furnish) -> Path:
    folder = publish(store.layout)
    furniture(folder)
    return publish(store.layout, contents={})


@pytest.mark.parametrize("zstd", [False, True])
def test_a_golden_comes_back_equal(ours: Store, theirs: Store, tmp_path: Path, zstd: bool) -> None:
    folder = put(ours)
    archive = ours.export(tmp_path / "gold.tar", zstd=zstd)
    imported = theirs.take(archive.path, digest=archive.digest)
    assert imported == archive
    copy = theirs.layout.golden("gold")
    assert describe(copy) == describe(folder)
    assert manifests.read(copy) == manifests.read(folder)
    golden = manifests.read(copy)
    assert seal.broken(copy, golden) == []
    assert copy.stat().st_mode & 0o077 == 0 and (copy / "manifest.json").stat().st_mode & 0o077 == 0
    assert not list(theirs.layout.staging.iterdir())


def test_the_digest_is_the_file_s_and_the_file_private(ours: Store, tmp_path: Path) -> None:
    put(ours)
    archive = ours.export(tmp_path / "gold.tar")
    assert archive.digest == blake3(archive.path.read_bytes()).hexdigest()
    assert archive.size == archive.path.stat().st_size
    assert archive.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir() if "gold.tar" in path.name] == ["gold.tar"]


def test_two_archives_of_a_golden_are_equal(ours: Store, tmp_path: Path) -> None:
    put(ours)
    assert ours.export(tmp_path / "a").digest == ours.export(tmp_path / "b").digest


def test_compression_makes_it_smaller(ours: Store, tmp_path: Path) -> None:
    put(ours)
    assert ours.export(tmp_path / "z", zstd=True).size < ours.export(tmp_path / "p").size / 10


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_files_that_the_server_deleted_stay_deleted(ours: Store, theirs: Store, tmp_path: Path) -> None:
    def whiteout(folder: Path) -> None:
        (folder / "rootfs").mkdir()
        os.mknod(folder / "rootfs" / "deleted", stat.S_IFCHR | 0o600, os.makedev(0, 0))

    folder = put(ours, whiteout)
    theirs.take(ours.export(tmp_path / "gold.tar").path)
    copy = theirs.layout.golden("gold")
    assert describe(copy) == describe(folder)
    assert stat.S_ISCHR((copy / "rootfs" / "deleted").lstat().st_mode)


def test_extended_attributes(ours: Store, theirs: Store, tmp_path: Path) -> None:
    def marked(folder: Path) -> None:
        (folder / "rootfs" / "opaque").mkdir(parents=True)
        (folder / "rootfs" / "file").touch()
        values = {"user.text": "größe".encode(), "user.bytes": b"\x00\xff\n=\xfe", "user.empty": b""}
        try:
            for name, value in values.items():
                os.setxattr(folder / "rootfs" / "opaque", name, value)
                os.setxattr(folder / "rootfs" / "file", name, value)
        except OSError:
            pytest.skip("this file system keeps no extended attributes")

    folder = put(ours, marked)
    theirs.take(ours.export(tmp_path / "gold.tar").path)
    assert describe(theirs.layout.golden("gold")) == describe(folder)
    assert os.getxattr(theirs.layout.golden("gold") / "rootfs/file", "user.bytes") == b"\x00\xff\n=\xfe"


def test_times_of_files_come_back(ours: Store, theirs: Store, tmp_path: Path) -> None:
    """Python compares a source's time with the one in its .pyc; a server would compile everything anew."""

    def dated(folder: Path) -> None:
        (folder / "rootfs").mkdir()
        (folder / "rootfs" / "file").touch()
        os.utime(folder / "rootfs" / "file", (1_000_000_000, 1_000_000_000))

    put(ours, dated)
    theirs.take(ours.export(tmp_path / "gold.tar").path)
    assert (theirs.layout.golden("gold") / "rootfs" / "file").stat().st_mtime == 1_000_000_000


def test_another_name(ours: Store, theirs: Store, tmp_path: Path) -> None:
    put(ours)
    assert theirs.take(ours.export(tmp_path / "gold.tar").path, name="silver").name == "silver"
    assert theirs.layout.names() == ["silver"]
    assert manifests.read(theirs.layout.golden("silver")).name == "silver"
    golden = manifests.read(theirs.layout.golden("silver"))
    assert seal.broken(theirs.layout.golden("silver"), golden) == []


# --- export that is refused -----------------------------------------------------------------------------------


def test_export_does_not_overwrite(ours: Store, tmp_path: Path) -> None:
    put(ours)
    (tmp_path / "gold.tar").write_text("precious")
    with pytest.raises(BusyError):
        ours.export(tmp_path / "gold.tar")
    assert (tmp_path / "gold.tar").read_text() == "precious"


def test_export_needs_a_folder_and_a_golden(ours: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no golden"):
        ours.export(tmp_path / "gold.tar")
    put(ours)
    with pytest.raises(NotFoundError, match="no folder"):
        ours.export(tmp_path / "absent" / "gold.tar")


def test_a_file_that_appears_meanwhile_is_not_overwritten(ours: Store, tmp_path: Path) -> None:
    put(ours)
    target = tmp_path / "gold.tar"

    def appear(done: int, total: int) -> None:
        target.write_text("precious")

    with pytest.raises(BusyError):
        export_golden(ours.settings, "gold", target, progress=appear)
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir() if "gold.tar" in path.name] == ["gold.tar"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_system_without_nameless_files(
    ours: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    put(ours)
    real = os.open

    def refuse(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no nameless files")
        return real(path, flags, mode, **more)

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "open", refuse)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    folder = tmp_path / "out"
    folder.mkdir()
    archive = ours.export(folder / "gold.tar")
    assert archive.digest == blake3(archive.path.read_bytes()).hexdigest()
    assert archive.path.stat().st_mode & 0o077 == 0
    with pytest.raises(BusyError):
        ours.export(folder / "gold.tar")
    assert [path.name for path in folder.iterdir()] == ["gold.tar"]


KILLED = """
import os, sys
from pathlib import Path
from gpuckpt.golden.archive import export_golden
from tests.fakes import settings_for
target = Path(sys.argv[2])
export_golden(settings_for(Path(sys.argv[1])), "gold", target, progress=lambda *_: os.kill(os.getpid(), 9))
"""


def test_a_killed_export_leaves_nothing(ours: Store, tmp_path: Path) -> None:
    put(ours)
    folder = tmp_path / "out"
    folder.mkdir()
    # No fork of this process: blake3's threads would be missing in it, and waited for.
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "ours"), str(folder / "gold.tar")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == -9
    assert not list(folder.iterdir())


def test_a_damaged_golden_is_not_exported(ours: Store, tmp_path: Path) -> None:
    (put(ours) / "images" / "pages-1.img").write_bytes(bytes(8191))
    with pytest.raises(VerificationError):
        ours.export(tmp_path / "gold.tar")
    assert not [path for path in tmp_path.iterdir() if "gold.tar" in path.name]


@pytest.mark.parametrize("honest", [True, False])
def test_memory_that_goldens_share_is_named_by_its_content(
    ours: Store, theirs: Store, tmp_path: Path, honest: bool
) -> None:
    """A name that is not the content's could put foreign bytes into other goldens."""
    content = b"memory" * 100
    name = blake3(content if honest else b"what another golden has").hexdigest()[:40]

    def memory(folder: Path) -> None:
        (folder / "memory").mkdir(exist_ok=True)
        (folder / "memory" / f"{name}.extent").write_bytes(content)
        (folder / "memory" / f"{name}.extent").chmod(0o400)

    put(ours, memory)
    ours.export(tmp_path / "gold.tar")
    if honest:
        theirs.take(tmp_path / "gold.tar")
        return
    with pytest.raises(VerificationError, match="content"):
        theirs.take(tmp_path / "gold.tar")
    assert theirs.empty


# --- import that is refused -----------------------------------------------------------------------------------


@pytest.fixture
def archive(ours: Store, tmp_path: Path) -> Archive:
    put(ours)
    return ours.export(tmp_path / "gold.tar")


def test_without_trust_nothing_is_imported(theirs: Store, archive: Archive) -> None:
    with pytest.raises(UsageError) as caught:
        theirs.take(archive.path, trust=False)
    assert caught.value.exit_code == 2 and "--trust" in str(caught.value.remedy)
    assert theirs.empty


@pytest.mark.parametrize("digest", [None, "", "none", "0" * 63, "g" * 64, "sha256:" + "0" * 64])
def test_trust_needs_the_digest_of_what_is_trusted(theirs: Store, archive: Archive, digest: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        theirs.take(archive.path, digest=digest)
    assert "gpuckpt export" in str(caught.value.remedy)
    assert theirs.empty


def test_another_digest(theirs: Store, archive: Archive) -> None:
    with pytest.raises(VerificationError, match="digest differs") as caught:
        theirs.take(archive.path, digest="0" * 64)
    assert archive.digest in str(caught.value.cause)
    assert theirs.empty
    theirs.take(archive.path, digest=f"blake3:{archive.digest.upper()}")


def test_bytes_after_the_end_count_for_the_digest(theirs: Store, archive: Archive) -> None:
    with archive.path.open("ab") as file:
        file.write(b"appendix")
    with pytest.raises(VerificationError, match="digest differs"):
        theirs.take(archive.path, digest=archive.digest)
    assert theirs.empty


def test_a_name_that_is_taken(ours: Store, archive: Archive) -> None:
    before = describe(ours.layout.golden("gold"))
    with pytest.raises(BusyError):
        ours.take(archive.path)
    assert describe(ours.layout.golden("gold")) == before


def test_no_such_archive(theirs: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        theirs.take(tmp_path / "absent")


def test_no_space(theirs: Store, archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(archive.path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8191))
    with pytest.raises(OutOfSpaceError):
        theirs.take(archive.path)
    assert theirs.empty


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.6])
def test_a_truncated_archive(ours: Store, theirs: Store, tmp_path: Path, share: float, zstd: bool) -> None:
    put(ours)
    path = ours.export(tmp_path / "gold.tar", zstd=zstd).path
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(VerificationError):
        theirs.take(path)
    assert theirs.empty


@pytest.mark.parametrize("zstd", [False, True])
def test_a_flipped_bit_in_the_content(ours: Store, theirs: Store, tmp_path: Path, zstd: bool) -> None:
    put(ours)
    archive = ours.export(tmp_path / "gold.tar", zstd=zstd)
    path = archive.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if zstd else data.index(b"inventory\0") + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerificationError):
        theirs.take(path, **({"digest": archive.digest} if zstd else {}))
    assert theirs.empty


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"not an archive", b"\x28\xb5\x2f\xfdnot zstd", b"x" * 20000])
def test_what_is_no_archive(theirs: Store, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(VerificationError):
        theirs.take(tmp_path / "file")
    assert theirs.empty


# --- hostile archives -----------------------------------------------------------------------------------------

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, len(content), 0o700
    info.uid, info.gid = os.geteuid(), os.getegid()
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def manifest_for(members: Iterable[Member], **changes: Any) -> bytes:
    """A manifest that agrees with whatever the members hold, so that only their shape can be refused."""
    files = {
        info.name: FileRecord(size=len(content), blake3=digests.digest_bytes(content))
        for info, content in members
        if info.isreg()
    }
    links = {info.name: info.linkname for info, _ in members if info.issym()}
    return dump(sample_manifest(**{"files": files, "links": links, **changes}))


def build(path: Path, members: list[Member], *, manifest: bytes | None = None) -> Path:
    """Write an archive by hand."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        first = member("manifest.json", manifest_for(members) if manifest is None else manifest)
        for info, content in [first, *members]:
            tar.addfile(info, io.BytesIO(content))
    return path


def folder(name: str) -> Member:
    return member(name, kind=tarfile.DIRTYPE)


IMAGES = folder("images")
ROOTFS = folder("rootfs")
MEMORY = folder("memory")


def test_the_archives_built_here_are_sound_but_for_what_is_wrong(
    theirs: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Owners and modes of archives built by hand are not what their manifest says; all else of them is.
    monkeypatch.setattr(digests, "attributes", lambda folder: digests.digest_bytes(b""))
    members = [
        IMAGES,
        member("images/a", b"a"),
        ROOTFS,
        member("rootfs/link", kind=tarfile.SYMTYPE, link="/etc"),
        folder("rootfs/deep"),
        member("rootfs/deep/file", b"f"),
    ]
    theirs.take(build(tmp_path / "good.tar", members))
    assert theirs.layout.names() == ["gold"]


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([member("/outside", b"evil")], id="absolute path"),
        pytest.param([IMAGES, member("/images/outside", b"evil")], id="absolute path into images"),
        pytest.param([IMAGES, member("images/../../outside", b"evil")], id="dot dot"),
        pytest.param([member("../outside", b"evil")], id="leading dot dot"),
        pytest.param([member("other/file", b"evil")], id="another folder"),
        pytest.param([member("seal.json", b"{}")], id="a seal of its own"),
        pytest.param([member("manifest.json", b"{}")], id="a second manifest"),
        pytest.param([member("images", b"evil")], id="a file called images"),
        pytest.param([member("images/file", b"evil")], id="no parent"),
        pytest.param(
            [ROOTFS, member("rootfs/a", kind=tarfile.SYMTYPE, link="{outside}"), member("rootfs/a/outside", b"evil")],
            id="file below a link",
        ),
        pytest.param(
            [ROOTFS, member("rootfs/a", kind=tarfile.SYMTYPE, link="{outside}/outside"), member("rootfs/a", b"evil")],
            id="file through a link of the same name",
        ),
        pytest.param(
            [ROOTFS, member("rootfs/a", kind=tarfile.SYMTYPE, link="{outside}"), folder("rootfs/a/b")],
            id="folder below a link",
        ),
        pytest.param(
            [member("rootfs", kind=tarfile.SYMTYPE, link="{outside}"), member("rootfs/outside", b"evil")],
            id="file below the layer as a link",
        ),
        pytest.param([member("rootfs", kind=tarfile.SYMTYPE, link="{outside}")], id="the layer as a link"),
        pytest.param([member("volumes", kind=tarfile.SYMTYPE, link="{outside}")], id="the volumes as a link"),
        pytest.param(
            [folder("volumes"), member("volumes/data", kind=tarfile.SYMTYPE, link="{outside}")], id="a volume as a link"
        ),
        pytest.param([IMAGES, member("images/a", kind=tarfile.SYMTYPE, link="/etc/passwd")], id="link among images"),
        pytest.param([ROOTFS, member("rootfs/a", kind=tarfile.LNKTYPE, link="/etc/passwd")], id="hard link"),
        pytest.param(
            [ROOTFS, member("rootfs/a", b"a"), member("rootfs/b", kind=tarfile.LNKTYPE, link="rootfs/a")],
            id="hard link inside",
        ),
        pytest.param([ROOTFS, member("rootfs/sda", kind=tarfile.BLKTYPE, devmajor=8)], id="block device"),
        pytest.param([ROOTFS, member("rootfs/mem", kind=tarfile.CHRTYPE, devmajor=1, devminor=1)], id="device"),
        pytest.param([IMAGES, member("images/w", kind=tarfile.CHRTYPE)], id="whiteout among images"),
        pytest.param([IMAGES, member("images/p", kind=tarfile.FIFOTYPE)], id="pipe among images"),
        pytest.param([IMAGES, member("images/a", b"a"), member("images/a", b"a")], id="file twice"),
        pytest.param([IMAGES, IMAGES], id="folder twice"),
        pytest.param([IMAGES, member("images/a", b"a"), member("images/a/b/c", b"a")], id="below a file"),
        pytest.param([IMAGES, member("images/" + "x" * 300, b"a")], id="name too long"),
        pytest.param([IMAGES, member("images/a\0b", b"a", pax_headers={"path": "images/a\0b"})], id="zero in a name"),
        pytest.param([ROOTFS, member("rootfs/a", b"a", uid=1 << 40)], id="owner out of range"),
        pytest.param(
            [ROOTFS, member("rootfs/a", b"a", pax_headers={"SCHILY.xattr.user.a\0b": "1"})], id="zero in an attribute"
        ),
        pytest.param([MEMORY, member("memory/libc.so", b"a")], id="no memory file"),
        pytest.param([IMAGES, member("images/./a", b"a"), member("images//a", b"a")], id="one file, two names"),
    ],
)
def test_hostile_members(theirs: Store, tmp_path: Path, members: list[Member]) -> None:
    outside = tmp_path / "outside-folder"
    outside.mkdir()
    for info, _ in members:
        info.linkname = info.linkname.format(outside=outside)
    path = build(tmp_path / "evil.tar", members)
    with pytest.raises((VerificationError, UsageError)):
        theirs.take(path)
    assert theirs.empty
    assert not list(outside.iterdir())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["evil.tar", "outside-folder", "theirs"]
    assert sorted(entry.name for entry in theirs.layout.store.iterdir()) == ["goldens", "locks", "staging"]


A = [IMAGES, member("images/a", b"a")]


@pytest.mark.parametrize(
    ("members", "manifest"),
    [
        pytest.param(A, manifest_for([]), id="member not in the manifest"),
        pytest.param(A, manifest_for([*A, member("images/b", b"b")]), id="member missing"),
        pytest.param(A, manifest_for([member("images/a", b"b")]), id="other content"),
        pytest.param(A, manifest_for([member("images/a", b"aa")]), id="other size"),
        pytest.param(
            [ROOTFS, member("rootfs/a", kind=tarfile.SYMTYPE, link="/etc/shadow")],
            manifest_for([member("rootfs/a", kind=tarfile.SYMTYPE, link="file")]),
            id="link elsewhere",
        ),
        pytest.param(A, manifest_for(A, name="../gold"), id="slash in the name"),
        pytest.param(A, manifest_for(A, name=""), id="no name"),
        pytest.param(A, manifest_for(A, name=".."), id="dots for a name"),
        pytest.param(A, b"{", id="manifest that is no JSON"),
        pytest.param(A, b'{"format": 1}', id="manifest with parts missing"),
        pytest.param(A, manifest_for([*A, member("../../outside", b"x")]), id="manifest that names files outside"),
    ],
)
def test_members_that_are_not_the_manifest_s(
    theirs: Store, tmp_path: Path, members: list[Member], manifest: bytes
) -> None:
    with pytest.raises((VerificationError, UsageError)):
        theirs.take(build(tmp_path / "evil.tar", members, manifest=manifest))
    assert theirs.empty


def launched(**changes: Any) -> bytes:
    return manifest_for(A, launch=replace(sample_manifest().launch, **changes))


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(launched(volumes=(Volume(name="../data", destination="/d"),)), id="volume elsewhere"),
        pytest.param(launched(volumes=(Volume(name="a\nHOOKS=/tmp", destination="/d"),)), id="line in a volume"),
        pytest.param(launched(volumes=(Volume(name="data", destination="d"),)), id="relative destination"),
        pytest.param(launched(mounts=(Mount(source="etc", destination="/d"),)), id="relative source"),
        pytest.param(launched(mounts=(Mount(source="/srv/../etc", destination="/d"),)), id="dots in a source"),
        pytest.param(launched(mounts=(Mount(source="/srv", destination="/d/../../e"),)), id="dots in a destination"),
        pytest.param(launched(image=None, rootfs="srv"), id="relative root"),
        pytest.param(manifest_for(A, name="a" * 41), id="long name"),
    ],
)
def test_names_that_lead_astray(theirs: Store, tmp_path: Path, manifest: bytes) -> None:
    with pytest.raises(VerificationError, match="names what no golden") as caught:
        theirs.take(build(tmp_path / "evil.tar", A, manifest=manifest), name="gold")
    assert caught.value.cause
    assert theirs.empty


def test_the_manifest_comes_first(theirs: Store, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for info, content in [*A, member("manifest.json", manifest_for(A))]:
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(VerificationError, match="not an archive of a golden"):
        theirs.take(tmp_path / "evil.tar")
    assert theirs.empty


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_manifest_that_is_no_file(theirs: Store, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(member("manifest.json", kind=kind, link="/etc/passwd")[0])
    with pytest.raises(VerificationError):
        theirs.take(tmp_path / "evil.tar")
    assert theirs.empty


def test_a_huge_manifest_is_not_read(theirs: Store, tmp_path: Path) -> None:
    info, _ = member("manifest.json")
    info.size = 1 << 40
    (tmp_path / "evil.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises(VerificationError, match="not an archive of a golden"):
        theirs.take(tmp_path / "evil.tar")
    assert theirs.empty


def test_a_member_that_claims_to_be_huge(theirs: Store, tmp_path: Path) -> None:
    info, _ = member("images/a")
    info.size = 1 << 40
    huge = FileRecord(size=1 << 40, blake3="0" * 64)
    first, content = member("manifest.json", dump(sample_manifest(files={"images/a": huge})))
    data = first.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)
    (tmp_path / "evil.tar").write_bytes(data + IMAGES[0].tobuf() + info.tobuf(tarfile.PAX_FORMAT) + bytes(10240))
    with pytest.raises((OutOfSpaceError, VerificationError)):
        theirs.take(tmp_path / "evil.tar")
    assert theirs.empty


def test_an_error_while_reading_leaves_nothing(
    theirs: Store, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuckpt.store.digests.differences", lambda *_, **__: ["something differs"])
    with pytest.raises(GpuckptError):
        theirs.take(archive.path)
    assert theirs.empty
