"""API keys: who may use the front."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.paths import read_regular

_MOST = 1 << 20  # bytes


class Keys:
    """The keys that are accepted. Only their digests are kept, so a core dump or a golden of ours tells none."""

    def __init__(self, keys: frozenset[bytes] = frozenset()) -> None:
        self._digests = frozenset(_digest(key) for key in keys)

    @classmethod
    def read(cls, file: Path) -> Self:
        """One key a line; blank lines and those that begin with ``#`` are none.

        Raises NotFoundError, and UsageError if it holds no key: a file that is meant to close must not open.
        """
        try:
            lines = [line.strip() for line in read_regular(file, _MOST).splitlines()]
        except OSError as error:
            remedy = "write one a line into it, or name another file: front.keys"
            raise NotFoundError(f"the API keys in {file} cannot be read", cause=str(error), remedy=remedy) from error
        keys = frozenset(line for line in lines if line and not line.startswith(b"#"))
        if not keys:
            raise UsageError(
                f"{file} holds no API key", remedy="write one a line, or take the file out of the configuration"
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request with these headers (names in lower case) may pass."""
        if not self._digests:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = headers.get(b"x-api-key", b"")
        # Digests are compared, whose bytes a guesser cannot choose: the time that it takes tells nothing.
        return _digest(key.strip()) in self._digests


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
