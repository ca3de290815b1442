"""The store: names, private folders, what counts as a golden, and the exchange of two folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt.errors import NotFoundError, PreflightError, UsageError
from gpuckpt.paths import private_folder
from gpuckpt.store.layout import Layout, check_name, exchange


@pytest.mark.parametrize("name", ["a", "7", "qwen-0.5b", "A_b.c-d", "x" * 40])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", ".a", "a.", "-a", "a-", "a b", "a\n", "a\0b", "ä", "x" * 41, "a:b"]
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_a_private_folder_is_made_and_closed(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    assert private_folder(made).stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PreflightError, match="must run as root") as caught:
        private_folder(tmp_path)
    assert "belongs to user" in str(caught.value.cause)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(PreflightError, match="is not a folder"):
        private_folder(tmp_path / "store")


@pytest.mark.parametrize("inside", ["link", "link/store"])
def test_links_count_by_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if os.geteuid() == 0:
        private_folder(tmp_path / inside)  # root's own link
        os.lchown(tmp_path / "link", 1000, 1000)
    with pytest.raises(PreflightError, match="symbolic link that is not root's"):
        private_folder(tmp_path / inside)


def test_the_layout_lists_whole_goldens_only(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    assert layout.names() == []
    layout.prepare()
    assert not layout.store.exists(), "before its tmpfs is mounted, folders would be made below it"
    layout.prepare_store()
    for folder in (layout.goldens / "b", layout.goldens / "a", layout.staging / "half"):
        folder.mkdir()
    (layout.goldens / "file").touch()
    (layout.goldens / "link").symlink_to(layout.goldens / "a")
    assert layout.names() == ["a", "b"]
    for name in ("link", "file", "half"):
        with pytest.raises(NotFoundError, match=name):
            layout.golden(name)
    with pytest.raises(UsageError):
        layout.golden("../staging/half")


def test_exchange(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1").touch()
    (tmp_path / "other").mkdir()
    exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other" / "1").exists() and not list((tmp_path / "one").iterdir())
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "absent")
