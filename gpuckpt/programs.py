"""What programs say of themselves (``--version``, ``features``), remembered as long as they do not change.

Starting one takes 10 to 30 ms, which a restore has no room for. What was said is kept in one file of the run folder,
with inode, size and times of the program that said it: the kernel's change time (ctime) moves with every write.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from gpuckpt import proc

_FILE = "programs.json"
_LARGEST = 1 << 20  # bytes of that file
_LARGEST_SCRIPT = 1 << 14  # bytes of a wrapper


def ask(argv: Sequence[str | Path], *, timeout: float, cache: Path | None = None) -> str:
    """What ``argv`` prints on its standard output; raises as :func:`gpuckpt.proc.run` does.

    ``cache`` is the folder of the file that remembers; without it, or where it holds nothing that is true of the
    program as it is now, the program is asked. Only an answer with status 0 is remembered.
    """
    question = " ".join(map(str, argv))
    program = _note(Path(argv[0])) if cache else []
    if cache and program:
        known = _read(cache).get(question)
        if isinstance(known, list) and known[:-1] == program and isinstance(known[-1], str):
            return known[-1]
    answer = proc.run(argv, timeout=timeout).stdout
    if cache and program:
        # One that cannot be kept (no folder yet, no space) is asked for again.
        with contextlib.suppress(OSError):
            _write(cache, {**_read(cache), question: [*program, answer]})
    return answer


def _note(program: Path) -> list[list[str | int]]:
    """The program's file as it is now; of a script also the files that it names, one of which is what it starts."""
    try:
        path = program.resolve(strict=True)
        with path.open("rb") as file:
            script = file.read(_LARGEST_SCRIPT) if file.read(2) == b"#!" else b""
        named = [Path(os.fsdecode(word)) for word in re.split(rb"[\s:\"']+", script) if word.startswith(b"/")]
        files = [path, *(one for one in named if one.is_file())]
        return [[str(one), *_marks(one.stat())] for one in files]
    except (OSError, ValueError):
        return []


def _marks(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(folder: Path) -> dict[str, object]:
    """What is remembered; nothing if the file is missing, damaged or not ours alone to write."""
    try:
        with open(os.open(folder / _FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return {}
            found = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(folder: Path, known: dict[str, object]) -> None:
    temporary = folder / f"{_FILE}.{os.getpid()}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(known, file)
        temporary.replace(folder / _FILE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
