"""CRIU's notes of what the kernel can do, where CRIU does not keep them itself.

CRIU tries out what the kernel can do at every start, 25 to 45 ms of iptables and sockets, unless it finds the notes of
an earlier run in /run/criu.kdat. It writes them only where /run is a tmpfs, so that they end with the boot that they
are true for. Where it is not (some virtual machines and containers), the notes are made here in a mount namespace
whose /run is one, and are thrown away once they are older than the boot. CRIU itself refuses notes of another version.
"""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

from gpuckpt import proc
from gpuckpt.criu.binary import Criu
from gpuckpt.errors import GpuckptError

NOTES = Path("/run/criu.kdat")
_MAKE = 'mount -t tmpfs -o mode=0755 gpuckpt-kerneldata "$2" && "$1" check >&2; base64 "$3"'


def known(notes: Path = NOTES) -> bool:
    """Whether there are notes of this boot."""
    try:
        made = notes.lstat().st_mtime
    except FileNotFoundError:
        return False
    return made > time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def make(criu: Criu, notes: Path = NOTES) -> None:
    """Make the notes with ``criu``; where that fails they stay away, and CRIU tries everything out as before.

    Only to be called where the folder of ``notes`` is not a tmpfs.
    """
    # Those of another boot are no use, nor is what a CRIU left that was killed while it wrote: it keeps others from it.
    for path in (notes, notes.with_name(f"{notes.name}.tmp")):
        path.unlink(missing_ok=True)
    folder = notes.parent
    try:
        command: list[str | Path] = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            _MAKE,
            "sh",
            criu.path,
            folder,
            notes,
        ]
        data = base64.b64decode(proc.run(command, timeout=30).stdout)
    except GpuckptError:
        return
    if not data:
        return
    fresh = notes.with_name(f"{notes.name}.{os.getpid()}")
    try:
        fresh.touch(mode=0o600)
        fresh.write_bytes(data)
        fresh.replace(notes)
    finally:
        fresh.unlink(missing_ok=True)
