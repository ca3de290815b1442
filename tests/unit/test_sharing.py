"""Goldens that share memory files: a link or its removal leaves the other's seal whole, and hides no change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.store import digests, seal, sharing
from gpuckpt.store.layout import Layout
from gpuckpt.store.sharing import Sharing
from tests.fakes import publish, settings_for, tick

CONTENT = b"equal memory"
NAME = f"{digests.digest_bytes(CONTENT)[:40]}.extent"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout.of(settings_for(tmp_path))
    found.prepare()
    found.prepare_store()
    return found


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that a check of a seal reads."""
    found: list[str] = []
    original = digests.digest_file

    def digest(path: Path) -> str:
        found.append(path.name)
        return original(path)

    monkeypatch.setattr(seal, "digest_file", digest)
    return found


def golden(layout: Layout, name: str, content: bytes = CONTENT) -> Path:
    return publish(layout, name, {f"memory/{NAME}": content, "images/pages-1.img": b"pages"})


def broken(folder: Path) -> list[str]:
    return seal.broken(folder, manifests.read(folder))


def linked(layout: Layout, name: str) -> Path:
    """A golden that takes its memory from another."""
    folder = layout.staging / name
    (folder / "memory").mkdir(parents=True)
    made = Sharing(layout.goldens)
    assert made.link(NAME, len(CONTENT), folder / "memory" / NAME)
    made.settle()
    folder.rename(layout.goldens / name)
    return publish(layout, name, {})


def test_a_link_and_its_removal_cost_no_reading(layout: Layout, digested: list[str]) -> None:
    one = golden(layout, "one")
    two, three = linked(layout, "two"), linked(layout, "three")
    assert (one / "memory" / NAME).stat().st_nlink == 3
    assert [broken(folder) for folder in (one, two, three)] == [[], [], []]
    sharing.remove(layout.goldens, one)
    sharing.remove(layout.goldens, three)
    assert broken(two) == []
    assert digested == []


@pytest.mark.parametrize("when", ["before the link", "after the link", "between link and removal"])
def test_a_changed_byte_is_still_found(layout: Layout, when: str) -> None:
    one = golden(layout, "one")
    path = one / "memory" / NAME
    if when == "before the link":
        _change(path)
        assert not Sharing(layout.goldens).link(NAME, len(CONTENT), layout.staging / "two")
        other = golden(layout, "two")
        sharing.remove(layout.goldens, other)
    else:
        two = linked(layout, "two")
        _change(path)
        if when == "between link and removal":
            sharing.remove(layout.goldens, two)
    assert broken(one) == [f"memory/{NAME} has changed: its digest differs from the recorded one"]


def _change(path: Path) -> None:
    """A changed byte that hides as well as a program can: the time of the last write is put back."""
    tick(path)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"E")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_write_during_the_link_is_not_taken_for_it(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    one = golden(layout, "one")
    link = os.link

    def linking(source: Path, target: Path, **_: object) -> None:
        link(source, target)
        tick(source)
        with source.open("r+b") as file:
            file.write(b"E")

    monkeypatch.setattr(os, "link", linking)
    made = Sharing(layout.goldens)
    assert not made.link(NAME, len(CONTENT), layout.staging / "target"), "its bytes are not what its name says"
    assert not (layout.staging / "target").exists()
    made.settle()
    assert broken(one) != []


def test_a_fault_that_moved_no_time_does_not_spread(layout: Layout) -> None:
    """Of memory gone bad, or of a write through a shared mapping, a tmpfs notes nothing."""
    one = golden(layout, "one", b"EQUAL MEMORY")
    assert broken(one) == []
    made = Sharing(layout.goldens)
    assert not made.link(NAME, len(CONTENT), layout.staging / "target")
    made.settle()
    assert broken(one) == [] and (one / "memory" / NAME).stat().st_nlink == 1


def test_what_nobody_has(layout: Layout) -> None:
    golden(layout, "one")
    target = layout.staging / "target"
    assert not Sharing(layout.goldens).link("other.extent", len(CONTENT), target)
    assert not Sharing(layout.goldens).link(NAME, len(CONTENT) + 1, target)
    assert not target.exists()


def test_a_golden_that_goes_meanwhile(layout: Layout) -> None:
    one = golden(layout, "one")
    made = Sharing(layout.goldens)
    assert not made.link("other", 1, layout.staging / "x")  # has read the seals
    sharing.remove(layout.goldens, one)
    assert not made.link(NAME, len(CONTENT), layout.staging / "target")
    made.settle()


def test_a_seal_is_never_read_half(layout: Layout) -> None:
    one = golden(layout, "one")
    before = (one / "seal.json").stat().st_ino
    linked(layout, "two")
    assert (one / "seal.json").stat().st_ino != before, "written beside and renamed"
    assert not (one / "seal.json.new").exists()
    assert (one / "seal.json").stat().st_mode & 0o777 == 0o600
