"""Goldens as archive files: written with a digest, read back with distrust.

The format is a POSIX tar (pax headers for extended attributes), zstd-compressed on request, whose first member is
``manifest.json``. Whoever can make us restore an archive runs code as root on this machine, with the credentials and
capabilities that the archive's processes had: importing needs an explicit trust and the digest of the whole
file, which ``export`` prints and which must be passed along by a trusted way; and the bytes are compared with the
manifest's digests before the golden becomes visible.
"""

from __future__ import annotations

from gpuckpt.golden.archive_format import Archive, Progress
from gpuckpt.golden.archive_read import import_golden, require_trust
from gpuckpt.golden.archive_write import export_golden

__all__ = ["Archive", "Progress", "export_golden", "import_golden", "require_trust"]
