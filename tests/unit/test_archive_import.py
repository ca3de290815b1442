"""Imports that are refused: without trust, of something else, and of what is damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gpuckpt.errors import BusyError, NotFoundError, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden.archive import Archive
from tests.archives import Store, archive, describe, ours, put, theirs

__all__ = ["archive", "ours", "theirs"]  # fixtures


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
