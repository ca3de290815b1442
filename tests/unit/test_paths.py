"""Folders that nobody else may change, and the way to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt.errors import PreflightError
from gpuckpt.paths import private_folder, refuse_untrusted


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own folders as another user")
def test_what_leads_to_a_private_folder_counts_too(tmp_path: Path) -> None:
    way = tmp_path / "way"
    way.mkdir()
    os.chown(way, 1000, 1000)
    with pytest.raises(PreflightError, match="folder that is not root's"):
        private_folder(way / "state")
    os.chown(way, 0, 0)
    way.chmod(0o777)
    with pytest.raises(PreflightError, match="others than root may change"):
        private_folder(way / "state")
    way.chmod(0o1777)  # as /tmp
    assert private_folder(way / "state").stat().st_mode & 0o777 == 0o700
    os.chown(way / "state", 1000, 1000)
    with pytest.raises(PreflightError, match="not root's"):
        private_folder(way / "state")


def test_a_private_folder_is_private_with_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700 and made.parent.stat().st_mode & 0o777 == 0o755


def test_a_path_that_is_not_absolute_is_refused() -> None:
    with pytest.raises(PreflightError, match="the store's path a/b is not absolute"):
        refuse_untrusted(Path("a/b"), what="the store's path")


def test_what_does_not_exist_yet_is_fine(tmp_path: Path) -> None:
    refuse_untrusted(tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_root_s_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user who runs us will do for a test, but not where root is going to write."""
    (tmp_path / "own").mkdir()
    if os.geteuid() == 0:
        os.chown(tmp_path / "own", 1000, 1000)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refuse_untrusted(tmp_path / "own" / "state")
    with pytest.raises(PreflightError, match="not root's"):
        refuse_untrusted(tmp_path / "own" / "state", owners=(0,))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's folder")
def test_a_user_is_told_to_use_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PreflightError, match="must run as root") as caught:
        private_folder(tmp_path)
    assert "sudo" in str(caught.value.remedy)
