"""The log: journald's own protocol over a real socket, and lines."""

from __future__ import annotations

import array
import io
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuckpt.service import journal
from gpuckpt.service.journal import JournalHandler, LineFormatter, fields


@pytest.fixture
def journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("journal")
        made.settimeout(60)
        yield made


@pytest.fixture
def log(journald: socket.socket) -> Iterator[logging.Logger]:
    handler = JournalHandler(Path("journal"))
    made = logging.getLogger("gpuckpt.test")
    made.setLevel(logging.DEBUG)
    made.propagate = False
    made.addHandler(handler)
    yield made
    made.removeHandler(handler)
    made.propagate = True
    made.setLevel(logging.NOTSET)
    handler.close()


def received(journald: socket.socket) -> dict[str, bytes]:
    """The next entry as journald reads it."""
    data, passed, *_ = journald.recvmsg(1 << 20, socket.CMSG_SPACE(4))
    if passed:
        assert not data
        (handle,) = array.array("i", passed[0][2])
        with open(handle, "rb") as file:
            data = os.pread(file.fileno(), 1 << 30, 0)
    entry = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        entry[name.decode()] = value
    return entry


def test_an_entry(journald: socket.socket, log: logging.Logger) -> None:
    log.info("replica %s restored", "qwen.1", extra=fields("restored", model="qwen", replica="qwen.1", GPUCKPT_MS=420))
    entry = received(journald)
    assert entry["MESSAGE"] == b"replica qwen.1 restored"
    assert entry["PRIORITY"] == b"6" and entry["SYSLOG_IDENTIFIER"] == b"gpuckpt-pool"
    assert entry["CODE_FILE"].endswith(b"test_service_journal.py") and int(entry["CODE_LINE"]) > 0
    assert entry["CODE_FUNC"] == b"test_an_entry" and entry["LOGGER"] == b"gpuckpt.test"
    assert (entry["GPUCKPT_EVENT"], entry["GPUCKPT_MODEL"]) == (b"restored", b"qwen")
    assert (entry["GPUCKPT_REPLICA"], entry["GPUCKPT_MS"]) == (b"qwen.1", b"420")
    assert "GPUCKPT_TIER" not in entry


def test_priorities(journald: socket.socket, log: logging.Logger) -> None:
    for level, number in (("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)):
        getattr(log, level)("x")
        assert received(journald)["PRIORITY"] == b"%d" % number


def test_line_breaks_and_tracebacks(journald: socket.socket, log: logging.Logger) -> None:
    try:
        raise ValueError("no\nluck")
    except ValueError:
        log.exception("it failed", extra=fields(GPUCKPT_TEXT="a\nMESSAGE=forged"))
    entry = received(journald)
    assert entry["MESSAGE"].startswith(b"it failed\nTraceback") and entry["MESSAGE"].endswith(b"luck")
    assert entry["GPUCKPT_TEXT"] == b"a\nMESSAGE=forged"


def test_names_that_journald_would_drop_are_left_out(journald: socket.socket, log: logging.Logger) -> None:
    log.info("x", extra={"fields": {"lower": 1, "_PID": 1, "A=B\nC": 1, "X" * 65: 1, "GOOD_1": b"\xff"}})
    entry = received(journald)
    assert entry["GOOD_1"] == b"\xff"
    assert not {"lower", "_PID", "X" * 65} & entry.keys() and len(entry) == 9


def test_a_large_entry_travels_as_a_file(journald: socket.socket, log: logging.Logger) -> None:
    text = "long " * 1_000_000
    log.info("%s", text)
    assert received(journald)["MESSAGE"].decode() == text


def test_no_journald_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = JournalHandler(tmp_path / "gone")
    handler.handle(logging.LogRecord("x", logging.INFO, "f", 1, "text", (), None))
    handler.close()
    assert capsys.readouterr().err == ""


def test_connected(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream:
        status = os.fstat(stream.fileno())
        said = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert journal.connected(said, descriptor=stream.fileno())
        assert not journal.connected({"JOURNAL_STREAM": f"{status.st_dev}:1"}, descriptor=stream.fileno())
        assert not journal.connected({}, descriptor=stream.fileno())
    assert not journal.connected(said, descriptor=987654)


def test_lines() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "replica %s lost", ("qwen.1",), None)
    record.fields = {"GPUCKPT_MODEL": "qwen", "GPUCKPT_WHY": 'said "no"\nand left', "OTHER": 3}
    line = LineFormatter().format(record)
    assert line.endswith(" warning  replica qwen.1 lost  model=qwen why=\"said 'no'⏎and left\" other=3")
    record = logging.LogRecord("x", logging.INFO, "f", 1, "ready", (), None)
    assert LineFormatter().format(record).endswith(" info     ready")


def test_set_up_writes_lines_where_there_is_no_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    level = root.level
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    handler = journal.set_up("DEBUG")
    again = journal.set_up("INFO")
    try:
        assert handler not in root.handlers, "called again it replaces, and does not add"
        logging.getLogger("gpuckpt.test").info("hello", extra=fields("started"))
        logging.getLogger("gpuckpt.test").debug("unheard")
        assert output.getvalue().count("\n") == 1 and "hello  event=started" in output.getvalue()
    finally:
        root.removeHandler(again)
        root.setLevel(level)
        logging.captureWarnings(False)
        assert root.handlers == before
