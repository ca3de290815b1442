"""What the writer and the reader of archives share: the format's constants, and a file that digests what passes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blake3 import blake3

XATTR = "SCHILY.xattr."
SOCKET = "GPUCKPT.socket"  # marks a pipe that is a socket: tar knows none, and a layer must come back as it was
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Archive:
    """A written or read archive: the golden's name, the file, its size and blake3 digest (hex)."""

    name: str
    path: Path
    size: int
    digest: str


def private(path: str, flags: int) -> int:
    """An opener for ``open`` that makes files readable by their owner alone."""
    return os.open(path, flags, 0o600)


class Hashing(io.RawIOBase):
    """A file that digests what passes through it, in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hasher = blake3()
        self.count = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self._hasher.update(view)
        self._file.write(view)
        self.count += view.nbytes
        return view.nbytes

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._file.read(view.nbytes)
        view[: len(data)] = data
        self._hasher.update(data)
        self.count += len(data)
        return len(data)

    def drain(self) -> None:
        """Read to the end, so that the digest is the whole file's."""
        while data := self._file.read(1 << 20):
            self._hasher.update(data)
            self.count += len(data)

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()
