"""Archives: what goes out comes back equal; and exports that are refused."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from gpuckpt import manifest as manifests
from gpuckpt.errors import BusyError, NotFoundError, VerificationError
from gpuckpt.golden.archive import export_golden
from gpuckpt.store import seal
from tests.archives import Store, describe, ours, put, theirs

__all__ = ["ours", "theirs"]  # fixtures


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
