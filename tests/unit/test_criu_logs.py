"""CRIU's logs: the lines that matter, and what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuckpt.criu.logs import Diagnosis, diagnose

NOTHING = Diagnosis((), None, None, False)


def said(tmp_path: Path, *lines: str) -> Diagnosis:
    log = tmp_path / "dump.log"
    log.write_text("\n".join(["(00.000001) Version: 4.2", "(00.000100) Warn  (criu/kerndat.c:1): odd", *lines]))
    return diagnose(log)


def test_no_log_or_an_empty_one_says_nothing(tmp_path: Path) -> None:
    assert diagnose(tmp_path / "absent") == NOTHING
    (tmp_path / "empty").touch()
    assert diagnose(tmp_path / "empty") == NOTHING
    (tmp_path / "folder").mkdir()
    assert diagnose(tmp_path / "folder") == NOTHING


def test_a_log_without_errors_says_nothing(tmp_path: Path) -> None:
    assert said(tmp_path, "(00.1) Dumping finished successfully: No space left on device was not said") == NOTHING


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("(00.1) Error (criu/page-xfer.c:30): Can't write pages: No space left on device", "did not fit"),
        ("(00.1) Error (criu/mem.c:9): Can't allocate 4096: Cannot allocate memory", "not enough memory"),
        (
            "(00.1) Error (criu/files-ext.c:96): Can't dump file 7 of that type [600] (anon_inode:[io_uring])",
            "io_uring",
        ),
        ("(00.1) Error (criu/sk-inet.c:188): inet: Connected TCP socket, consider using --tcp-established", "TCP"),
        ("(00.1) Error (criu/sk-unix.c:864): unix: External socket is used. Consider using --ext-unix-sk", "outside"),
        ("(00.1) Error (criu/sk-inet.c:1025): inet: Can't bind inet socket (id 3): Address already in use", "not free"),
        ("(00.1) Error (criu/files-reg.c:2143): File usr/lib/libc.so has bad size 1 (expect 2)", "has changed"),
        ("(00.1) Error (criu/files-reg.c:2200): File usr/lib/libc.so has bad build-ID", "has changed"),
        ("(00.1) Error (criu/files-reg.c:2080): Can't open file a/b on restore: No such file or directory", "missing"),
        ("(00.1) Error (criu/vdso.c:1): vdso: Can't find symbols", "vDSO"),
        ("(00.1) Error (criu/cr-restore.c:1): Pid 7 do not match expected 8", "process id"),
        ("(00.1) Error (criu/image.c:1): Magic doesn't match for pstree.img", "damaged"),
        ("(00.1) Error (criu/protobuf.c:1): Unexpected EOF on pstree.img", "damaged"),
    ],
)
def test_known_messages_are_explained(tmp_path: Path, line: str, word: str) -> None:
    found = said(tmp_path, line, "(00.2) Error (criu/cr-dump.c:2): Dumping FAILED.")
    assert word in str(found.cause) and found.remedy
    assert found.lines == (line, "(00.2) Error (criu/cr-dump.c:2): Dumping FAILED.")
    assert found.no_space is ("No space" in line)


def test_unknown_errors_are_shown_without_a_guess(tmp_path: Path) -> None:
    found = said(tmp_path, "(00.1) Error (criu/strange.c:1): Strange", "(00.2) fine")
    assert found == Diagnosis(("(00.1) Error (criu/strange.c:1): Strange",), None, None, False)


def test_the_first_errors_are_kept(tmp_path: Path) -> None:
    found = said(tmp_path, *(f"(00.{i}) Error (criu/a.c:{i}): {i}" for i in range(30)))
    assert len(found.lines) == 10 and found.lines[0].endswith(": 0")


def test_a_log_may_hold_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\xff\xfe (00.1) Error (criu/a.c:1): \xff\n")
    assert len(diagnose(tmp_path / "log").lines) == 1
