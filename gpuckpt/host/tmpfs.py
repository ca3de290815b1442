"""The tmpfs that goldens lie in: look at it, mount it, check it.

A golden is mapped straight from this tmpfs' page cache, so it must be memory: on a disk file system a restore would
read it page by page. It holds what a server had in memory, so nobody but root may enter it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from gpuckpt import paths, proc
from gpuckpt.checks import Check
from gpuckpt.config import Store
from gpuckpt.errors import GpuckptError, NotFoundError, PreflightError

SOURCE = "gpuckpt-store"  # the device column of /proc/mounts: says whose mount it is
_SHARE = 0.8  # of MemTotal; a limit, not a reservation: tmpfs takes pages only as they are written
_MOUNTINFO = Path("/proc/self/mountinfo")
_MEMINFO = Path("/proc/meminfo")
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_LOW = 1 << 30


class TmpfsInfo(Struct, frozen=True):
    """A mounted tmpfs; sizes in bytes. ``options`` are the file system's own, e.g. ``{"huge": "within_size"}``."""

    path: Path
    source: str
    size: int
    used: int
    free: int
    options: dict[str, str]

    @property
    def huge(self) -> str:
        """Its huge page mode; the kernel does not print the default, ``never``."""
        return self.options.get("huge", "never")


def info(path: Path, *, mountinfo: Path = _MOUNTINFO) -> TmpfsInfo | None:
    """The tmpfs mounted exactly at ``path``, or None: nothing is mounted there, or something else is."""
    real = os.path.realpath(path)
    kind, found = "", None
    for line in mountinfo.read_text(errors="surrogateescape").splitlines():
        # proc(5): ID PARENT MAJ:MIN ROOT MOUNTPOINT OPTIONS [TAGS…] - TYPE SOURCE SUPEROPTIONS
        front, _, back = line.partition(" - ")
        fields, tail = front.split(" "), back.split(" ")
        if len(fields) > 5 and len(tail) > 2 and _unescaped(fields[4]) == real:
            kind, found = tail[0], tail  # mounts stack: the last one is the one that is seen
    if found is None or kind != "tmpfs":
        return None
    values = os.statvfs(real)
    size, free = values.f_blocks * values.f_frsize, values.f_bavail * values.f_frsize
    options = {name: value for name, _, value in (word.partition("=") for word in found[2].split(","))}
    return TmpfsInfo(path, _unescaped(found[1]), size, size - free, free, options)


def ensure(store: Store) -> bool:
    """Mount a tmpfs at ``store.path`` if there is none; True if it was mounted now.

    Raises PreflightError if the path cannot be trusted, holds files of another file system, or mount(8) refuses.
    """
    _refuse_untrusted(store.path)
    if info(store.path) is not None:
        return False
    try:
        store.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(f"cannot make the store's folder {store.path}", cause=str(error)) from error
    with _locked(store.path):
        # Another process may have mounted it while we waited for the lock: two mounts would hide each other's files.
        if info(store.path) is not None:
            return False
        if _holds_files(store.path):
            raise PreflightError(
                f"the store {store.path} is not a tmpfs and holds files",
                cause="a tmpfs mounted there would hide them, and goldens are fast only in memory",
                remedy="set store.path to an empty folder, or move these files away",
            )
        try:
            proc.run(mount_command(store), timeout=30)
        except (proc.CommandError, NotFoundError) as error:
            why = "; ".join(error.log) or error.message
            raise PreflightError(
                f"cannot mount a tmpfs at {store.path}",
                cause=why,
                remedy=f"as root on the host: {proc.quoted(mount_command(store))}",
            ) from error
    return True


def mount_command(store: Store, *, thp: Path = _THP) -> list[str]:
    """The mount(8) command that makes the store."""
    size = store.size if store.size is not None else int(memory_total() * _SHARE)
    options = mount_options(store, size=str(_whole_pages(size)), thp=thp)
    return ["mount", "-t", "tmpfs", "-o", options, SOURCE, str(store.path)]


def mount_options(store: Store, *, size: str | None = None, thp: Path | None = _THP) -> str:
    """The file system's options; without ``size`` in the kernel's own words (``80%`` of the memory, whichever it is).

    ``thp`` None: whether the kernel knows huge pages cannot be asked, and is taken for granted.
    """
    if size is None:
        size = str(_whole_pages(store.size)) if store.size is not None else f"{_SHARE:.0%}"
    # No noexec: a server's executable mappings (compiled kernels) are mapped from here too.
    options = [f"size={size}", "mode=0700", "uid=0", "gid=0", "nosuid", "nodev"]
    if thp is None or thp.exists():  # a kernel without huge pages refuses the option, not only its value
        options.append(f"huge={store.huge}")
    return ",".join(options)


def _whole_pages(size: int) -> int:
    return max(size // 4096 * 4096, 4096)


def available_memory(*, meminfo: Path = _MEMINFO) -> int:
    """Bytes that can be taken without swapping (MemAvailable); what tmpfs holds is already subtracted."""
    return meminfo_bytes("MemAvailable", meminfo=meminfo)


def memory_total(*, meminfo: Path = _MEMINFO) -> int:
    """Bytes of memory that the kernel manages (MemTotal)."""
    return meminfo_bytes("MemTotal", meminfo=meminfo)


def meminfo_bytes(name: str, *, meminfo: Path = _MEMINFO) -> int:
    """One row of /proc/meminfo in bytes, 0 if the kernel does not print it."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def check(store: Store, *, mountinfo: Path = _MOUNTINFO, thp: Path = _THP) -> Check:
    """Is the store a private tmpfs with room in it?"""
    path, title = store.path, "store"

    def mount() -> None:
        ensure(store)

    def close() -> None:
        os.chown(path, 0, 0)
        path.chmod(0o700)

    mount_line = proc.quoted(mount_command(store, thp=thp))
    try:
        _refuse_untrusted(path)
        found = info(path, mountinfo=mountinfo)
        if found is None:
            if path.is_dir() and _holds_files(path):
                why = "a tmpfs mounted there would hide them; set store.path to an empty folder, or move them away"
                text = f"{path} is no tmpfs and holds files"
                return Check("host.store", title, "fail", text, why)
            why = "goldens lie in a tmpfs; create and restore mount it when it is not there"
            parents = f"mkdir -p -m 0700 {path} && " if not path.is_dir() else ""
            return Check("host.store", title, "warn", f"{path} is not mounted", why, parents + mount_line, mount)
        state = path.stat()
    except PermissionError as error:
        return Check("host.store", title, "skip", f"{error.filename}: {error.strerror}", "only root may look")
    except GpuckptError as error:
        return Check("host.store", title, "fail", error.message, error.cause or "", error.remedy)
    text = f"{path}: {_gib(found.size)}, {_gib(found.free)} free, huge={found.huge}"
    if state.st_uid != 0 or stat.S_IMODE(state.st_mode) & 0o077:
        why = f"goldens hold secrets, but its mode is {stat.S_IMODE(state.st_mode):04o} and its owner {state.st_uid}"
        command = f"chown root:root {path} && chmod 0700 {path}"
        # Safe to mend unasked only where the mount is ours: another's mode may be meant.
        return Check("host.store", title, "fail", text, why, command, close if found.source == SOURCE else None)
    # df's Used of a full tmpfs is its limit; the memory behind it may run out sooner.
    room = min(found.free, available_memory())
    if room < _LOW:
        why = f"only {_gib(room)} can still be stored; a golden takes as much as its server has in memory"
        return Check("host.store", title, "warn", text, why, "gpuckpt rm NAME")
    if found.huge != store.huge and thp.exists():
        why = f"the configuration says huge={store.huge}: with huge pages fewer faults happen after a restore"
        return Check("host.store", title, "warn", text, why, f"mount -o remount,huge={store.huge} {path}")
    return Check("host.store", title, "ok", text, "goldens are mapped from its page cache")


def _refuse_untrusted(path: Path) -> None:
    # Whoever looks, it is root who will mount: the user's own folders do not do.
    paths.refuse_untrusted(path, what="the store's path", owners=(0,))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # The lock is on the folder itself: whoever opened it before the mount waits here and looks again, whoever opens
    # it afterwards opens the tmpfs. No lock file is needed, and it vanishes with the process.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _holds_files(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is not None


def _unescaped(field: str) -> str:
    # The kernel writes space, tab, newline and backslash as octal escapes.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
