"""Sessions in files: each appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from gpuckpt.errors import NotFoundError, VerificationError
from gpuckpt.sessions.tensors import extent, head


def write_whole(target: Path, pieces: Iterable[bytes]) -> int:
    """Write the pieces of a safetensors file to ``target``, readable by its owner alone; returns how many bytes.

    It gets its name, and replaces what had it, by one rename, once it is on its disk and known to be complete. Raises
    NotFoundError for a missing folder, VerificationError if the pieces are no safetensors file, and what they raise.
    """
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no folder {target.parent}") from None
    temporary = f".{target.name[:200]}.{secrets.token_hex(4)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, 0o600, dir_fd=folder), "w+b") as file:
            for piece in pieces:
                file.write(piece)
            total = file.tell()
            _check(file, total)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        with suppress(FileNotFoundError):  # renamed
            os.unlink(temporary, dir_fd=folder)
        os.close(folder)
    return total


def _check(file: IO[bytes], total: int) -> None:
    file.seek(0)
    begin = file.read(8)
    header, start = head(begin + file.read(min(int.from_bytes(begin, "little"), total)))
    if start + extent(header) != total:
        raise VerificationError("the session did not come whole", cause=f"{total} bytes came")
