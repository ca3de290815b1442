"""CRIU's own words about a failure: the lines of its log that matter, and what they mean."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

# What a line of CRIU's log says → why, and what to do. Sources: CRIU's messages as met in practice.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"No space left on device|Can't write .*: No space|Unable to write|can't write page",
        "the images did not fit where they were written",
        "free memory, or enlarge the store (store.size); gpuckpt df shows what is in it",
    ),
    (
        r"Cannot allocate memory|Can't allocate|ENOMEM",
        "there was not enough memory",
        "free memory; gpuckpt doctor shows how much there is",
    ),
    (
        r"io_uring|anon_inode:\[io_uring\]",
        "the server holds an io_uring, which CRIU cannot dump",
        "run it under gpuckpt's seccomp profile (the default), which makes io_uring unavailable",
    ),
    (
        r"Connected TCP socket|tcp-established",
        "the server holds an open TCP connection",
        "close it before the dump, or create with --tcp-established",
    ),
    (
        r"External socket is used|external unix socket|Unix socket .* without peer",
        "the server is connected to a Unix socket outside the container",
        "close that connection before the dump",
    ),
    (
        r"Can't bind inet socket|Can't bind|Cannot assign requested address",
        "an address or port that the server had bound is not free here",
        "stop what uses it, or restore on the address that the golden records",
    ),
    (
        r"bad (size|mode)|has bad|build-id|File .* has bad",
        "a file that the server had open has changed since the golden was made",
        "put the file back, or create the golden anew",
    ),
    (
        r"Can't open file|No such file or directory.*(open|mmap)|Can't open .* on restore",
        "a file that the server had open is missing",
        "put the file back, or create the golden anew",
    ),
    (
        r"vdso|vDSO|vvar",
        "this CRIU does not know this kernel's vDSO",
        "use a newer CRIU: make setup, or --criu PATH",
    ),
    (
        r"file.?lock|Some file locks are hold",
        "the server holds a file lock that CRIU cannot carry",
        "let it release the lock before the dump",
    ),
    (
        r"fsnotify|Can't dump that handle|inotify",
        "the server watches a file that CRIU cannot find again by its handle (inotify on an overlay)",
        "switch its file watching off",
    ),
    (r"Unable to convert uid", "the server made a user namespace of its own", "run it without"),
    (r"Pid \d+ do not match expected|can't fork.*pid", "a process id was taken", "try again"),
    (
        r"Magic doesn't match|image .* corrupt|Unexpected EOF|Can't read|unpack",
        "an image file is damaged or of another CRIU",
        "gpuckpt verify NAME",
    ),
)


class Diagnosis(Struct, frozen=True):
    """The key lines of a log, and, where they are known, their meaning and remedy."""

    lines: tuple[str, ...]
    cause: str | None
    remedy: str | None
    no_space: bool


def diagnose(log: Path) -> Diagnosis:
    """Read a dump.log or restore.log; an absent or empty one gives an empty diagnosis.

    CRIU marks errors by ``Error (file:line):`` after its timestamp; the first tells the cause, the rest the fall-out.
    """
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return Diagnosis((), None, None, False)
    # Without CAP_SYS_RESOURCE CRIU cannot raise its own limits; it says so each time and goes on.
    errors = [line for line in text.splitlines() if "Error (" in line and "Can't setup RLIMIT_NOFILE" not in line]
    joined = "\n".join(errors)
    no_space = bool(re.search(_KNOWN[0][0], joined))
    for pattern, cause, remedy in _KNOWN:
        if re.search(pattern, joined):
            return Diagnosis(tuple(errors[:10]), cause, remedy, no_space)
    return Diagnosis(tuple(errors[:10]), None, None, False)
