"""The daemon's log: structured entries in systemd's journal, or readable lines where there is no journal.

    log.info("replica restored", extra=fields("restored", model="qwen", replica="qwen.1", GPUCKPT_SECONDS=0.42))

is found again by ``journalctl GPUCKPT_EVENT=restored GPUCKPT_MODEL=qwen``. Journal entries go by journald's own
protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL), because lines on standard error carry no fields.
"""

from __future__ import annotations

import array
import contextlib
import errno
import faulthandler
import fcntl
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "gpuckpt-pool"
# syslog(3): 0 and 1 are for what makes the whole machine unusable.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))
_FIELD = re.compile(r"[A-Z][A-Z0-9_]{0,63}")  # journald drops others; those with _ in front are its own
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_PATIENCE = 1.0  # seconds that an entry may hold up the daemon's loop when journald is stuck


def fields(
    event: str | None = None,
    *,
    model: str | None = None,
    replica: str | None = None,
    tier: str | None = None,
    **more: object,
) -> dict[str, Any]:
    """The ``extra=`` of a logging call: what the entry is about. ``more``: fields by their full names."""
    named = {"EVENT": event, "MODEL": model, "REPLICA": replica, "TIER": tier}
    found = {f"GPUCKPT_{name}": value for name, value in named.items() if value is not None}
    return {"fields": {**found, **{name: value for name, value in more.items() if value is not None}}}


def set_up(level: int | str = logging.INFO) -> logging.Handler:
    """Let everything that logs, warnings too, write where standard error leads: to the journal, or as lines.

    Can be called again, with another level. A crash of the interpreter, and the watchdog's SIGABRT, leave a traceback
    of every thread on standard error, which the journal keeps.
    """
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, JournalHandler | _Lines)]:
        root.removeHandler(old)
        old.close()
    made: logging.Handler
    if connected():
        made = JournalHandler()
    else:
        made = _Lines(sys.stderr)
        made.setFormatter(LineFormatter())
    root.addHandler(made)
    root.setLevel(level)
    logging.captureWarnings(True)
    with contextlib.suppress(ValueError, OSError):  # standard error is a test's, or closed
        faulthandler.enable()
    return made


def connected(environ: Mapping[str, str] = os.environ, *, descriptor: int = 2) -> bool:
    """Whether the descriptor is the stream to the journal that systemd has opened for us.

    The variable alone says nothing: it is inherited, and standard error may since have been redirected to a file.
    """
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


class JournalHandler(logging.Handler):
    """Writes each record as one entry. Logging never fails: an entry that journald does not take is dropped."""

    def __init__(self, path: Path = SOCKET, *, identifier: str = IDENTIFIER) -> None:
        super().__init__()
        self._path = str(path)
        self._identifier = identifier
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(_PATIENCE)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(b"".join(_encoded(name, value) for name, value in self._entry(record).items()))
        except OSError:
            pass  # journald is gone or stuck; standard error leads there too
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _entry(self, record: logging.LogRecord) -> dict[str, object]:
        entry: dict[str, object] = {
            "MESSAGE": self.format(record),  # with the traceback, if the record has one
            "PRIORITY": next(number for level, number in _PRIORITIES if record.levelno >= level),
            "SYSLOG_IDENTIFIER": self._identifier,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            "LOGGER": record.name,
            "THREAD_NAME": record.threadName,
        }
        return entry | {name: value for name, value in _fields_of(record).items() if _FIELD.fullmatch(name)}

    def _send(self, entry: bytes) -> None:
        try:
            # By its path each time: journald may have been restarted.
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        """What is too large for a datagram travels as a file in memory; sealed, or journald would not read it."""
        handle = os.memfd_create("gpuckpt-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(handle, "wb", closefd=False) as file:
                file.write(entry)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [handle]))]
            self._socket.sendmsg([b""], passed, 0, self._path)
        finally:
            os.close(handle)


class LineFormatter(logging.Formatter):
    """``2026-11-21 16:00:00 warning  replica lost  model=qwen replica=qwen.1``, with a traceback's lines below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s  %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = f"{record.asctime} {record.levelname.lower():<7}  {record.message}"
        pairs = [f"{_short(name)}={_quoted(value)}" for name, value in _fields_of(record).items()]
        return "  ".join([text, " ".join(pairs)] if pairs else [text])


class _Lines(logging.StreamHandler[Any]):
    """Ours, to be found again by :func:`set_up`."""


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    found = getattr(record, "fields", None)
    return dict(found) if isinstance(found, Mapping) else {}


def _encoded(name: str, value: object) -> bytes:
    data = value if isinstance(value, bytes) else str(value).encode(errors="surrogateescape")
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    # With a line break in it: the name alone, then the length in 64 bits, little-endian, then the bytes.
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _short(name: str) -> str:
    return name.removeprefix("GPUCKPT_").lower()


def _quoted(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if re.fullmatch(r"[^\s\"=]+", text) else '"' + text.replace('"', "'").replace("\n", "⏎") + '"'
