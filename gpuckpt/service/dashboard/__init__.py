"""The dashboard: a page about the pool, made of the static files beside this module.

Whoever serves it answers

- ``GET /dashboard`` with ``files()["index.html"]``, and ``GET /dashboard/NAME`` with ``files()[NAME]``,
- ``GET /dashboard/state`` with the :class:`~gpuckpt.service.view.PoolView`,
- ``GET /dashboard/events`` with server-sent events, ``data: {PoolView}``, at least every five seconds.

The files tell nothing of the pool and need no key. The page asks for one when the last two answer 401, and sends it as
``Authorization: Bearer KEY``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from msgspec import Struct

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Nothing is loaded from anywhere else, nothing can be sent anywhere but to the service itself, and nobody shows the
# page in a frame of theirs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class File(Struct, frozen=True):
    """One static file; ``etag`` with its quotes."""

    kind: str
    body: bytes
    etag: str

    @property
    def headers(self) -> dict[str, str]:
        """All of the answer's. Browsers keep the file but ask each time: after an upgrade all files are new ones."""
        return {
            "Content-Type": self.kind,
            "Content-Length": str(len(self.body)),
            "ETag": self.etag,
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }

    def known(self, if_none_match: str | None) -> bool:
        """Whether the client has it already (its ``If-None-Match``): the answer is then 304, without a body."""
        tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
        return self.etag in tags or "*" in tags


@functools.cache
def files() -> Mapping[str, File]:
    """The static files by name, read once."""
    found = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if kind := _TYPES.get(path.suffix):
            body = path.read_bytes()
            found[path.name] = File(kind, body, f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"')
    return MappingProxyType(found)
