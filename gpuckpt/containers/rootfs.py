"""The root file system of a container: a throw-away overlay over an image's layers or a folder of the host.

Layers, top down: the replica's own writable one, the golden's frozen one (read-only, shared by all its replicas),
the base. podman is given the mounted folder as ``rootfs``, so the same code serves images and folders. An image's
layers are named one by one, because an overlay over podman's mounted image would be an overlay over an overlay,
and there the kernel reports mapped files under the inner one's mount, which CRIU cannot find.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gpuckpt import proc
from gpuckpt.errors import NotFoundError

SOURCE = "gpuckpt-rootfs"  # the mounts' recognisable name in /proc/self/mountinfo


def mount(folder: Path, base: Sequence[Path], golden: Path | None = None) -> Path:
    """Mount the overlay under ``folder`` and return the mount point, ``folder/rootfs``.

    ``base`` are the base's layers, the uppermost first.
    ``folder`` must not lie in the file system's layer it covers other than as ``base`` = / (overlayfs refuses lower
    layers that contain one another; the writable layer may lie inside the base).
    """
    for layer in base:
        if not layer.is_dir():
            raise NotFoundError(f"no root file system at {layer}", remedy="correct --rootfs, or pull the image again")
    upper, work, merged = folder / "upper", folder / "work", folder / "rootfs"
    for path in (upper, work, merged):
        path.mkdir(mode=0o755, exist_ok=True)
    lower = ":".join(_escaped(path) for path in ([golden] if golden else []) + list(base))
    options = f"lowerdir={lower},upperdir={_escaped(upper)},workdir={_escaped(work)}"
    proc.run(["mount", "-t", "overlay", SOURCE, "-o", options, merged], timeout=30)
    return merged


def unmount(folder: Path) -> None:
    """Undo :func:`mount`; a folder that is not mounted is left as it is."""
    merged = folder / "rootfs"
    # A mount may be stacked or still held by a dying process: lazy unmounting detaches it at once either way.
    while os.path.ismount(merged):
        proc.run(["umount", "-l", merged], timeout=30)


def _escaped(path: Path) -> str:
    # Commas separate options and colons lower layers; overlayfs takes both with a backslash before them.
    return str(path).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
