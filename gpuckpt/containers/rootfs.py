"""The root file system of a container: a throw-away overlay over an image or a folder of the host.

Layers, top down: the replica's own writable one, the golden's frozen one (read-only, shared by all its replicas),
the base. podman is given the mounted folder as ``rootfs``, so the same code serves images and folders.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gpuckpt import proc
from gpuckpt.errors import NotFoundError

SOURCE = "gpuckpt-rootfs"  # the mounts' recognisable name in /proc/self/mountinfo


def mount(folder: Path, base: Path, golden: Path | None = None) -> Path:
    """Mount the overlay under ``folder`` and return the mount point, ``folder/rootfs``.

    ``folder`` must not lie in the file system's layer it covers other than as ``base`` = / (overlayfs refuses lower
    layers that contain one another; the writable layer may lie inside the base).
    """
    if not base.is_dir():
        raise NotFoundError(f"no root file system at {base}", remedy="correct --rootfs")
    upper, work, merged = folder / "upper", folder / "work", folder / "rootfs"
    for path in (upper, work, merged):
        path.mkdir(mode=0o755, exist_ok=True)
    lower = ":".join(_escaped(path) for path in (golden, base) if path)
    options = f"lowerdir={lower},upperdir={_escaped(upper)},workdir={_escaped(work)}"
    proc.run(["mount", "-t", "overlay", SOURCE, "-o", options, merged], timeout=30)
    return merged


def unmount(folder: Path) -> None:
    """Undo :func:`mount`; a folder that is not mounted is left as it is."""
    merged = folder / "rootfs"
    # A mount may be stacked or still held by a dying process: lazy unmounting detaches it at once either way.
    while os.path.ismount(merged):
        proc.run(["umount", "-l", merged], timeout=30)


def remove(folder: Path) -> None:
    """Unmount and delete ``folder``; a mount that stays is an error, never deleted through."""
    unmount(folder)
    shutil.rmtree(folder, ignore_errors=False) if folder.exists() else None


def copy_layer(upper: Path, target: Path) -> None:
    """Copy a writable layer with owners, times, devices (whiteouts) and extended attributes (opaque folders)."""
    proc.run(["cp", "-a", "--reflink=auto", "--sparse=always", upper, target], timeout=600)


def mount_image(image: str) -> Path:
    """Mount a podman image read-only and return where; podman counts the uses."""
    return Path(proc.run(["podman", "image", "mount", image], timeout=60).stdout.strip())


def unmount_image(image: str) -> None:
    """Give one use of the image's mount back."""
    proc.run(["podman", "image", "unmount", image], timeout=60, check=False)


def _escaped(path: Path) -> str:
    # Commas separate options and colons lower layers; overlayfs takes both with a backslash before them.
    return str(path).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
