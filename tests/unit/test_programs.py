"""What programs said of themselves is remembered for as long as it is true, and not a moment longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt import proc, programs
from gpuckpt.programs import ask
from tests.fakes import tick


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A script that notes every start, and starts another file."""
    (tmp_path / "real").write_text("echo version 1\n")
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\necho >>{tmp_path}/starts\n. {tmp_path}/real\n")
    script.chmod(0o755)
    return script


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def starts(program: Path) -> int:
    file = program.with_name("starts")
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_program_is_asked_once(program: Path, cache: Path) -> None:
    answers = [ask([program, "--version"], timeout=60, cache=cache) for _ in range(3)]
    assert answers == ["version 1\n"] * 3
    assert starts(program) == 1
    assert [file.name for file in cache.iterdir()] == ["programs.json"]
    assert (cache / "programs.json").stat().st_mode & 0o777 == 0o600


def test_each_question_has_its_own_answer(program: Path, cache: Path) -> None:
    program.with_name("real").write_text("echo $1\n")
    for _ in range(2):
        assert [ask([program, word], timeout=60, cache=cache) for word in ("a", "b")] == ["a\n", "b\n"]
    assert starts(program) == 2


def test_without_a_folder_it_is_asked_every_time(program: Path, cache: Path) -> None:
    ask([program], timeout=60, cache=cache)
    ask([program], timeout=60)
    assert starts(program) == 2
    ask([program], timeout=60, cache=cache / "absent")
    assert starts(program) == 3 and not (cache / "absent").exists()


def test_a_program_that_changed_is_asked_again(program: Path, cache: Path) -> None:
    ask([program], timeout=60, cache=cache)
    tick(program)
    times = program.stat()
    program.write_text(program.read_text().replace(">>", ">> "))
    os.utime(program, ns=(times.st_atime_ns, times.st_mtime_ns))
    ask([program], timeout=60, cache=cache)
    assert starts(program) == 2


def test_what_a_wrapper_starts_counts_too(program: Path, cache: Path) -> None:
    ask([program], timeout=60, cache=cache)
    tick(program.with_name("real"))
    program.with_name("real").write_text("echo version 2\n")
    assert ask([program], timeout=60, cache=cache) == "version 2\n"


def test_a_link_to_another_program_is_another_program(program: Path, cache: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(program)
    ask([link], timeout=60, cache=cache)
    other.write_text("#!/bin/sh\necho other\n")
    other.chmod(0o755)
    link.unlink()
    link.symlink_to(other)
    assert ask([link], timeout=60, cache=cache) == "other\n"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"PROGRAM": 5}', '{"PROGRAM": []}', "\udcff", "[" * 100_000])
def test_a_damaged_file_is_as_none(program: Path, cache: Path, text: str) -> None:
    file = cache / "programs.json"
    file.write_bytes(text.replace("PROGRAM", str(program)).encode("utf-8", "surrogateescape"))
    for _ in range(2):
        assert ask([program], timeout=60, cache=cache) == "version 1\n"
    assert starts(program) == 1


def test_a_file_that_others_may_write_or_a_link_is_not_believed(program: Path, cache: Path) -> None:
    ask([program], timeout=60, cache=cache)
    file = cache / "programs.json"
    file.chmod(0o666)
    ask([program], timeout=60, cache=cache)
    assert starts(program) == 2 and file.stat().st_mode & 0o777 == 0o600
    file.symlink_to(file.rename(cache / "elsewhere"))
    ask([program], timeout=60, cache=cache)
    assert starts(program) == 3 and not file.is_symlink()


def test_a_failure_is_told_and_not_remembered(program: Path, cache: Path) -> None:
    program.with_name("real").write_text("exit 3\n")
    for _ in range(2):
        with pytest.raises(proc.CommandError):
            ask([program], timeout=60, cache=cache)
    assert starts(program) == 2


def test_what_cannot_be_kept_is_no_failure(program: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, known: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs, "_write", full)
    assert ask([program], timeout=60, cache=cache) == "version 1\n"
