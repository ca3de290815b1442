"""Locks: who holds them is said, whoever dies lets go, and who only asks keeps nobody out."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuckpt.errors import BusyError
from gpuckpt.store import locks
from tests.leftovers import held_elsewhere


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, "golden", "gold") as child:
        with pytest.raises(BusyError) as caught, locks.exclusive(tmp_path, "golden", "gold"):
            pass
        assert str(child.pid) in str(caught.value.cause)
        with pytest.raises(BusyError), locks.shared(tmp_path, "golden", "gold"):
            pass
        assert not locks.is_free(tmp_path, "golden", "gold")
        assert locks.is_free(tmp_path, "golden", "silver") and locks.is_free(tmp_path, "replica", "gold")
    assert locks.is_free(tmp_path, "golden", "gold")


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, "golden", "gold") as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert locks.is_free(tmp_path, "golden", "gold")


def test_readers_share_and_keep_a_writer_out(tmp_path: Path) -> None:
    with locks.shared(tmp_path, "golden", "gold"), locks.shared(tmp_path, "golden", "gold"):
        assert locks.is_free(tmp_path, "golden", "gold"), "what lies half-made beside readers is nobody's"
        with pytest.raises(BusyError), locks.exclusive(tmp_path, "golden", "gold"):
            pass


def test_two_may_ask_at_once(tmp_path: Path) -> None:
    """Each would otherwise take the other for a living transaction, and both leave the orphan."""
    together = threading.Barrier(2)

    def ask(_: int) -> list[bool]:
        together.wait()
        return [locks.is_free(tmp_path, "golden", "gold") for _ in range(500)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(answers) for answers in pool.map(ask, range(2)))


def test_somebody_who_only_asks_does_not_keep_a_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = locks.shared(tmp_path, "golden", "gold")
    asks.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: asks.__exit__(None, None, None))  # gone the next moment
    with locks.exclusive(tmp_path, "golden", "gold"):
        assert not locks.is_free(tmp_path, "golden", "gold")


def test_a_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.exclusive(tmp_path, "golden", "gold"):
        raise ZeroDivisionError
    assert locks.is_free(tmp_path, "golden", "gold")


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "golden-gold.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), locks.exclusive(tmp_path, "golden", "gold"):
        pass
    assert not (tmp_path / "victim").exists()
