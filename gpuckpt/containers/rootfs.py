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
from gpuckpt.errors import NotFoundError, PreflightError

SOURCE = "gpuckpt-rootfs"  # the mounts' recognisable name in /proc/self/mountinfo
_MOST = 500  # the kernel's OVL_MAX_STACK


def mount(folder: Path, base: Sequence[Path], golden: Path | None = None) -> Path:
    """Mount the overlay under ``folder`` and return the mount point, ``folder/rootfs``.

    ``base`` are the base's layers, the uppermost first. Raises NotFoundError if one is missing, PreflightError if
    they are more than overlayfs takes.
    ``folder`` must not lie in the file system's layer it covers other than as ``base`` = / (overlayfs refuses lower
    layers that contain one another; the writable layer may lie inside the base). Other mounts inside the base are
    not seen: a layer is one file system.
    """
    lower = [*([golden] if golden else []), *base]
    for layer in lower:
        if not layer.is_dir():
            raise NotFoundError(f"no root file system at {layer}", remedy="correct --rootfs, or pull the image again")
    if len(lower) > _MOST:
        raise PreflightError(
            f"the root file system has {len(lower)} layers",
            cause=f"the kernel's overlayfs takes at most {_MOST}",
            remedy="build the image with fewer layers (podman build --squash-all)",
        )
    upper, work, merged, layers = folder / "upper", folder / "work", folder / "rootfs", folder / "layers"
    for path in (upper, work, merged, layers):
        path.mkdir(mode=0o755, exist_ok=True)
    # The upper layer's rights are those of the container's /: a caller's umask must not hide it from the server.
    upper.chmod(0o755)
    # mount(2) takes one page of options, and mount(8) from util-linux 2.39 on passes them one by one through
    # fsconfig(2), which takes 256 bytes each: an image's layers by their full paths fit into neither. So they get
    # names of one to three digits, relative to the folder that mount(8) runs in, and mount(2) is asked for.
    for number, layer in enumerate(lower):
        link = layers / str(number)
        link.unlink(missing_ok=True)
        link.symlink_to(layer.absolute())
    options = f"lowerdir={':'.join(map(str, range(len(lower))))},upperdir=../upper,workdir=../work"
    proc.run(
        ["mount", "-t", "overlay", SOURCE, "-o", options, merged.absolute()],
        timeout=30,
        env={"LIBMOUNT_FORCE_MOUNT2": "always"},
        cwd=layers,
    )
    return merged


def is_mounted(folder: Path) -> bool:
    """Whether what :func:`mount` did for ``folder`` still holds (a reboot undoes it)."""
    return os.path.ismount(folder / "rootfs")


def nested(layer: Path, base: Sequence[Path]) -> bool:
    """Whether a layer lies inside one of the base's, in the same file system: overlayfs refuses the two (ELOOP).

    What matters is the tree of the file system, not the path: a layer on a mount of its own below / is fine.
    """
    return any(
        layer.resolve().is_relative_to(one.resolve())
        and (layer.stat().st_dev == one.stat().st_dev or _mount_id(layer) == _mount_id(one))
        for one in base
    )


def _mount_id(folder: Path) -> str:
    # A btrfs subvolume has a device number of its own without being a mount of its own.
    handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{handle}").read_text().splitlines()
        return next(line for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(handle)


def unmount(folder: Path) -> None:
    """Undo :func:`mount`; a folder that is not mounted is left as it is."""
    merged = folder / "rootfs"
    # A mount may be stacked or still held by a dying process: lazy unmounting detaches it at once either way.
    while os.path.ismount(merged):
        proc.run(["umount", "-l", merged], timeout=30)
