"""Digests of goldens: content, links, owners and attributes; and what differs is named."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuckpt.store import digests


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a file, an empty one, one in a folder, links to a file, a folder and nothing, and a pipe."""
    folder = tmp_path / "tree"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "file").write_bytes(b"content")
    (folder / "empty").touch()
    (folder / "deep" / "er" / "file").write_bytes(b"deep")
    (folder / "to-file").symlink_to("file")
    (folder / "to-folder").symlink_to("deep")
    (folder / "to-nothing").symlink_to("/nonexistent")
    os.mkfifo(folder / "pipe")
    for name in digests.OWN:
        (folder / name).write_text("{}")
    return folder


def test_digests_are_blake3_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"  # of blake3's own test vectors
    assert digests.digest_file(tmp_path / "file") == digests.digest_bytes(b"abc") == known


def test_files_and_links_are_recorded(tree: Path) -> None:
    seen: list[int] = []
    found = digests.record(tree, seen.append)
    assert {name: record.size for name, record in found.files.items()} == {"file": 7, "empty": 0, "deep/er/file": 4}
    assert found.links == {"to-file": "file", "to-folder": "deep", "to-nothing": "/nonexistent"}
    assert seen[-1] == 11
    assert digests.differences(tree, found.files, found.links, contents=True) == []


def test_known_digests_are_not_made_again(tree: Path) -> None:
    found = digests.record(tree, known={"file": "made before"})
    assert found.files["file"].blake3 == "made before" and found.files["empty"].blake3 == digests.digest_bytes(b"")


def test_names_are_kept_as_text_that_tells_them_apart() -> None:
    """JSON holds text only; the kernel's names are bytes."""
    names = [b"plain", "größe ☃".encode(), b"\xff", b"\\xff", b"\\\xff", b"\xc3\x28", b"\\", b"a\nb"]
    keys = [digests.key(os.fsdecode(name)) for name in names]
    assert keys[:2] == ["plain", "größe ☃"]
    assert len(set(keys)) == len(names), "two names must not become one"
    for text in keys:
        assert json.loads(json.dumps(text).encode()) == text


def test_files_whose_names_are_not_utf8(tree: Path) -> None:
    (tree / os.fsdecode(b"\xff")).write_bytes(b"odd")
    (tree / r"\xff").write_bytes(b"even")
    (tree / os.fsdecode(b"link\xfe")).symlink_to(os.fsdecode(b"\xfe"))
    found = digests.record(tree)
    assert found.links["link\\xfe"] == "\\xfe"
    assert {record.size for record in found.files.values()} >= {3, 4}
    assert digests.differences(tree, found.files, found.links, contents=True) == []
    (tree / os.fsdecode(b"\xff")).write_bytes(b"ODD")
    assert len(digests.differences(tree, found.files, found.links, contents=True)) == 1


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A golden's folder with a written layer: a file, a mark of a deleted one, and a replaced folder."""
    folder = tmp_path / "tree"
    (folder / "rootfs" / "opaque").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "volumes" / "data").mkdir(parents=True)
    (folder / "rootfs" / "file").write_bytes(b"content")
    os.mkfifo(folder / "rootfs" / "mark")
    return folder


def recreate_as(kind: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "rootfs" / "mark").unlink()
        os.mknod(folder / "rootfs" / "mark", kind | 0o644, os.makedev(0, 0))

    return change


def set_attribute(folder: Path) -> None:
    try:
        os.setxattr(folder / "rootfs" / "opaque", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("this file system keeps no extended attributes")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "rootfs" / "mark").unlink(),
        recreate_as(stat.S_IFREG),
        lambda folder: (folder / "rootfs" / "file").chmod(0o4755),
        lambda folder: (folder / "rootfs" / "opaque").rmdir(),
        lambda folder: (folder / "rootfs" / "opaque").chmod(0o777),
        lambda folder: (folder / "rootfs").chmod(0o700),
        lambda folder: (folder / "rootfs" / "more").mkdir(),
        lambda folder: (folder / "volumes" / "data").chmod(0o700),
        lambda folder: (folder / "rootfs" / "mark").rename(folder / "rootfs" / "marked"),
        set_attribute,
    ],
)
def test_attributes_tell_what_digests_do_not(layer: Path, change: Callable[[Path], object]) -> None:
    before = digests.attributes(layer)
    assert digests.attributes(layer) == before
    change(layer)
    assert digests.attributes(layer) != before
    found = digests.differences(layer, digests.record(layer).files, {}, contents=True, attributes_blake3=before)
    assert found == ["owners, modes or marks of the written files (rootfs, volumes) have changed"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and gives files away")
def test_owners_and_overlayfs_s_marks_are_attributes(layer: Path) -> None:
    seen = {digests.attributes(layer)}
    recreate_as(stat.S_IFCHR)(layer)
    seen.add(digests.attributes(layer))
    os.chown(layer / "rootfs" / "file", 1000, 0)
    seen.add(digests.attributes(layer))
    os.chown(layer / "rootfs" / "file", 0, 1000)
    seen.add(digests.attributes(layer))
    os.setxattr(layer / "rootfs" / "opaque", "trusted.overlay.opaque", b"y")
    seen.add(digests.attributes(layer))
    os.setxattr(layer / "rootfs" / "opaque", "trusted.overlay.opaque", b"n")
    seen.add(digests.attributes(layer))
    assert len(seen) == 6


def test_what_is_no_attribute(layer: Path) -> None:
    """Bytes have digests; times change by themselves; CRIU's images and sockets have nothing to do with the layer."""
    before = digests.attributes(layer)
    (layer / "rootfs" / "file").write_bytes(b"other")
    os.utime(layer / "rootfs" / "file", ns=(1, 1))
    (layer / "images" / "more").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(layer / "rootfs" / "socket"))
        assert digests.attributes(layer) == before, "a server makes its sockets again; archives do not carry them"


def flip(path: Path) -> None:
    path.write_bytes(b"C" + path.read_bytes()[1:])


def test_differences_are_named(tree: Path) -> None:
    recorded = digests.record(tree)

    def found(*, contents: bool = True) -> list[str]:
        return digests.differences(tree, recorded.files, recorded.links, contents=contents)

    flip(tree / "file")
    assert found(contents=False) == []
    assert found() == ["file has changed: its digest differs from the recorded one"]
    (tree / "file").write_bytes(b"conten")
    assert found(contents=False) == ["file has 6 bytes, 7 were recorded"]
    (tree / "file").unlink()
    assert found() == ["file is missing"]
    (tree / "file").symlink_to("deep/er/file")
    assert found() == ["file is missing"]
    (tree / "file").unlink()
    (tree / "file").write_bytes(b"content")
    assert found() == []
    (tree / "to-file").unlink()
    (tree / "to-file").symlink_to("elsewhere")
    assert found() == ["the link to-file is missing or points elsewhere"]
    (tree / "to-file").unlink()
    (tree / "to-file").symlink_to("file")
    (tree / "deep" / "extra").touch()
    (tree / "deep" / "link").symlink_to("extra")
    assert sorted(found()) == [
        "deep/extra was not there when the golden was made",
        "deep/link was not there when the golden was made",
    ]
