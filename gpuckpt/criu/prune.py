"""Spare a restore the archives of empty tmpfs mounts.

CRIU keeps the content of every private tmpfs (podman's masked folders, /dev/shm) as an archive, and a restore runs tar
and gzip for each, about 3.5 ms. It insists on an archive for each mount that its images call tmpfs (tmpfs_restore() in
criu/filesystems.c), but they may also name a mount's kind by ``fsname`` alone (FSTYPE__AUTO): then it mounts what is
named, with the recorded options, and restores no content.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpuckpt.criu.images import load_exactly, save
from gpuckpt.errors import IncompatibleError, VerificationError

_TMPFS, _AUTO = 5, 16  # enum fstype of images/mnt.proto


def drop_empty_archives(images: Path) -> int:
    """Have empty tmpfs mounts restored without their archives; returns how many archives went.

    Only where mounting gives the same folder: nothing in it, and owner and mode those of the mount's options (its times
    are new). What is not understood stays as it is. Can be interrupted at any moment: an archive that no mount asks
    for is not looked at.
    """
    dropped = 0
    for path in images.glob("mountpoints-*.img"):
        try:
            image = load_exactly(path)
        except (IncompatibleError, VerificationError):
            continue
        mounts = image["entries"]
        # Of a tmpfs that is seen at several places (a bind mount) each mount must be of the same kind.
        seen = Counter(mount["root_dev"] for mount in mounts)
        archives = []
        for mount in mounts:
            archive = images / f"tmpfs-dev-{mount['root_dev']}.tar.gz.img"
            if mount["fstype"] == _TMPFS and seen[mount["root_dev"]] == 1 and _is_as_mounted(archive, mount):
                mount["fstype"], mount["fsname"] = _AUTO, "tmpfs"
                archives.append(archive)
        if archives:
            fresh = path.with_suffix(".new")
            try:
                save(fresh, image)
                fresh.rename(path)
            except OSError:  # no room: the archives stay
                fresh.unlink(missing_ok=True)
                continue
            for archive in archives:
                archive.unlink()
        dropped += len(archives)
    return dropped


def _is_as_mounted(archive: Path, mount: dict[str, Any]) -> bool:
    """Whether the archive holds nothing but a root folder as the mount's options make it."""
    options = dict(re.findall(r"(?:^|,)(mode|uid|gid)=([0-9]+)", str(mount.get("options", ""))))
    expected = (int(options.get("mode", "1777"), 8), int(options.get("uid", "0")), int(options.get("gid", "0")))
    try:
        with tarfile.open(archive, "r:gz") as tar:
            root, more = tar.next(), tar.next()
            return (
                root is not None
                and more is None
                and root.isdir()
                and root.name in (".", "./")
                and not root.pax_headers
                and (root.mode & 0o7777, root.uid, root.gid) == expected
            )
    except (OSError, EOFError, tarfile.TarError):
        return False
