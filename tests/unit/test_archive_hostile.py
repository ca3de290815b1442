"""Hostile archives: nothing that leads astray ever becomes a golden, or is even read to its end."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt.errors import GpuckptError, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden.archive import Archive
from gpuckpt.manifest import FileRecord, Mount, Volume, dump
from gpuckpt.store import digests
from tests.archives import Store, archive, ours, theirs
from tests.fakes import sample_manifest

__all__ = ["archive", "ours", "theirs"]  # fixtures


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
