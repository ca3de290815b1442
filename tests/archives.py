"""Two stores between which archives go, a golden with everything in it, and all that must come back of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from gpuckpt.golden.archive import Archive, export_golden, import_golden
from gpuckpt.store import digests
from gpuckpt.store.layout import Layout
from tests.fakes import publish, settings_for


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


@pytest.fixture
def archive(ours: Store, tmp_path: Path) -> Archive:
    put(ours)
    return ours.export(tmp_path / "gold.tar")
