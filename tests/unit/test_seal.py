"""Seals: what nobody has touched is not read again, and whatever was touched is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.store import digests, seal
from gpuckpt.store.layout import Layout
from tests.fakes import publish


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    layout.prepare()
    layout.prepare_store()
    folder = publish(layout, contents={"images/pages-1.img": bytes(8192), "rootfs/a": b"a"})
    (folder / "rootfs" / "link").symlink_to("a")
    return publish(layout, contents={})


def broken(folder: Path) -> list[str]:
    return seal.broken(folder, manifests.read(folder))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read to compare their digests."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return digests.digest_file(path)

    monkeypatch.setattr(seal, "digest_file", digest)
    return names


def test_an_untouched_golden_is_not_read(golden: Path, read: list[str]) -> None:
    assert broken(golden) == []
    assert read == []


def test_a_file_that_was_written_is_read_again_once(golden: Path, read: list[str]) -> None:
    path = golden / "rootfs" / "a"
    path.write_bytes(b"a")
    assert broken(golden) == [] and read == ["a"]
    assert broken(golden) == [] and read == ["a"], "the seal was renewed"


def test_a_time_stamp_that_was_put_back_does_not_hide_a_write(golden: Path) -> None:
    path = golden / "images" / "pages-1.img"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert broken(golden) == ["images/pages-1.img has changed: its digest differs from the recorded one"]
    assert broken(golden) != [], "a broken golden must not be sealed"


def test_truncated_missing_and_extra_files(golden: Path) -> None:
    os.truncate(golden / "images" / "pages-1.img", 4096)
    assert "4096 bytes, 8192 were recorded" in " ".join(broken(golden))
    (golden / "images" / "pages-1.img").unlink()
    assert broken(golden) == ["images/pages-1.img is missing"]
    (golden / "images" / "pages-1.img").write_bytes(bytes(8192))
    assert broken(golden) == []
    (golden / "images" / "more").touch()
    assert broken(golden) == ["images/more was not there when the golden was made"]


def test_a_changed_manifest_breaks_the_seal(golden: Path) -> None:
    recorded = manifests.read(golden)
    launch = replace(recorded.launch, argv=("evil",))
    replace(recorded, launch=launch).write(golden)
    assert broken(golden) == ["manifest.json has changed since the golden was sealed"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": 5, "manifest": 7}', '{"files": {}}'])
def test_without_a_usable_seal_everything_is_read(golden: Path, read: list[str], text: str | None) -> None:
    path = golden / "seal.json"
    path.unlink() if text is None else path.write_text(text)
    assert broken(golden) == []
    assert sorted(read) == ["a", "pages-1.img"]
    assert broken(golden) == [] and len(read) == 2


def test_a_copied_golden_is_read_again(golden: Path, read: list[str]) -> None:
    copy = golden.with_name("copy")
    subprocess.run(["cp", "-a", golden, copy], check=True)
    assert broken(copy) == []
    assert sorted(read) == ["a", "pages-1.img"]
