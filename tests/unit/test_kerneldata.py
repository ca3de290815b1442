"""CRIU's notes of what the kernel can do: made once a boot, thrown away after it, never in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from gpuckpt import proc
from gpuckpt.criu import kerneldata
from gpuckpt.criu.binary import Criu
from gpuckpt.errors import DeadlineError, GpuckptError

CRIU = Criu(Path("/opt/criu"), "4.2.1")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that were run; they print notes."""
    found: list[tuple[str, ...]] = []

    def run(argv: list[object], **_: object) -> proc.Result:
        words = tuple(map(str, argv))
        found.append(words)
        return proc.Result(words, 0, "bm90ZXM=\n", "")

    monkeypatch.setattr(proc, "run", run)
    return found


def test_notes_are_of_this_boot_or_not_known(tmp_path: Path) -> None:
    notes = tmp_path / "criu.kdat"
    assert not kerneldata.known(notes)
    notes.write_bytes(b"notes")
    assert kerneldata.known(notes)
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    os.utime(notes, (boot - 60, boot - 60))
    assert not kerneldata.known(notes)


def test_notes_are_made_in_a_namespace_of_their_own(tmp_path: Path, ran: list[tuple[str, ...]]) -> None:
    notes = tmp_path / "criu.kdat"
    notes.write_bytes(b"of another boot")
    (tmp_path / "criu.kdat.tmp").write_bytes(b"")
    kerneldata.make(CRIU, notes)
    assert notes.read_bytes() == b"notes" and notes.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["criu.kdat"]
    assert ran[0][:4] == ("unshare", "--mount", "--propagation", "private") and "/opt/criu" in ran[0]


@pytest.mark.parametrize("error", [proc.CommandError("no"), DeadlineError("late")])
def test_without_notes_criu_goes_on_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: GpuckptError
) -> None:
    def run(*_: object, **__: object) -> proc.Result:
        raise error

    monkeypatch.setattr(proc, "run", run)
    kerneldata.make(CRIU, tmp_path / "criu.kdat")
    assert list(tmp_path.iterdir()) == []


def test_empty_notes_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "run", lambda argv, **_: proc.Result((), 0, "", ""))
    kerneldata.make(CRIU, tmp_path / "criu.kdat")
    assert list(tmp_path.iterdir()) == []
