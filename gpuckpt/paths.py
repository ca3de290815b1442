"""Folders that only root may change: the way to them is looked at component by component."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from gpuckpt.errors import PreflightError, UsageError

LONGEST_SOCKET = 107  # bytes of a path; unix(7): sun_path holds 108 with the zero at its end
_KINDS = {stat.S_IFLNK: "symbolic link", stat.S_IFDIR: "folder"}


def refuse_untrusted(path: Path, *, what: str = "the folder", owners: Collection[int] | None = None) -> None:
    """Raise PreflightError if somebody else decides where ``path`` leads: a link or folder of theirs on the way.

    ``owners`` are the users who may own what lies on the way: by default root and the one we run as. What does not
    exist yet is fine. ``what`` begins the message ("the store's path").
    """
    if not path.is_absolute():
        raise PreflightError(f"{what} {path} is not absolute", remedy="configure an absolute path")
    trusted = {0, os.geteuid()} if owners is None else owners
    at, rest, links = Path("/"), list(reversed(path.parts[1:])), 0
    while rest:
        name = rest.pop()
        at = at.parent if name == ".." else at / name
        try:
            state = at.lstat()
        except FileNotFoundError:
            return
        if state.st_uid not in trusted:
            kind = _KINDS.get(stat.S_IFMT(state.st_mode), "file")
            raise PreflightError(
                f"{what} {path} leads through a {kind} that is not root's: {at}",
                cause=f"user {state.st_uid} could send what root keeps there, secrets among it, elsewhere",
                remedy=f"chown -h root:root {at}, or configure another path",
            )
        if stat.S_ISDIR(state.st_mode) and state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX:
            # In a folder that others may write, without the sticky bit, they may rename root's entries too.
            raise PreflightError(
                f"{what} {path} leads through a folder that others than root may change: {at}",
                cause=f"its mode is {stat.S_IMODE(state.st_mode):04o}",
                remedy=f"chmod go-w {at}",
            )
        if stat.S_ISLNK(state.st_mode):
            links += 1
            if links > 40:
                raise PreflightError(f"{what} {path} is a loop", cause="too many levels of symbolic links")
            target = Path(os.readlink(at))
            rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            at = Path("/") if target.is_absolute() else at.parent
        elif not stat.S_ISDIR(state.st_mode):
            raise PreflightError(
                f"{what} {path} leads through {at}, which is not a folder", remedy="configure another path"
            )


def private_folder(path: Path) -> Path:
    """Make ``path`` (and its parents) as a folder of ours alone, or check that it is one and close it.

    Raises PreflightError if it, or what leads there, is somebody else's or may be changed by others.
    """
    refuse_untrusted(path.parent)
    # In a parent that is shared with others, such as /tmp, an entry may appear at any time: make, then look.
    for part in [*reversed(path.parents), path]:
        if not os.path.lexists(part):
            part.mkdir(mode=0o700 if part == path else 0o755, exist_ok=True)
    status = path.lstat()
    mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if mine and status.st_mode & 0o077:
        path.chmod(0o700)
    refuse_untrusted(path)
    status = path.stat()
    if status.st_uid != os.geteuid():
        if os.geteuid() != 0:
            raise PreflightError(
                "gpuckpt must run as root", cause=f"{path} belongs to user {status.st_uid}", remedy="sudo gpuckpt …"
            )
        raise PreflightError(
            f"{path} belongs to user {status.st_uid}", remedy=f"chown {os.geteuid()} {path}, or configure another path"
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)  # a link's end
    return path


def read_regular(file: Path, most: int, *, remedy: str | None = None) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises UsageError if it is something else, OSError."""
    # O_NONBLOCK: opening a FIFO would wait for its writer, for ever.
    with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise UsageError(f"{file} is not a regular file", remedy=remedy)
        data = stream.read(most + 1)
    if len(data) > most:
        raise UsageError(f"{file} is larger than {most >> 10} KiB", remedy=remedy)
    return data
