"""Transparent huge pages for the time of a restore.

CRIU fills private memory page by page; a fault of 2 MiB costs little more than one of 4 KiB, so with the kernel's
mode ``always`` the same restore takes a fraction of the time. The mode is the whole machine's, so it is borrowed:
switched for the duration and put back, whatever happens.

Several processes may borrow it at once. Each holds a locked file of its own in ``run_dir/thp``; whoever leaves last
puts the original back. The kernel drops a dead process's lock, so a ``kill -9`` leaves nothing but a stale file:
the next holder inherits the recorded original, and :func:`sweep` puts it back when there is no next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from gpuckpt.checks import Check

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BORROWED = "always"


def current(file: Path = MODE) -> str | None:
    """The selected word of a sysfs choice such as ``always [madvise] never``; None if the kernel has no such file."""
    try:
        words = file.read_text().split()
    except OSError:
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), " ".join(words) or None)


@contextlib.contextmanager
def transparent_huge_pages_always(run_dir: Path, *, file: Path = MODE) -> Iterator[bool]:
    """Switch the machine to ``always`` for the body of the ``with``; True if it is in force.

    False (and nothing is changed) where the kernel has no huge pages or /sys is read-only: a restore is then slower,
    not wrong. Errors of ``run_dir`` are raised (OSError).
    """
    if current(file) is None or not os.access(file, os.W_OK):
        yield False
        return
    folder = run_dir / "thp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    holder: int | None = None
    in_force = False
    try:
        with _locked(folder):
            holder = _hold(folder)
            in_force = _borrow(folder, file)
        yield in_force
    finally:
        if holder is not None:
            with _locked(folder):
                os.close(holder)
                _put_back_if_last(folder, file)


def sweep(run_dir: Path, *, file: Path = MODE) -> bool:
    """Put the original mode back if its borrowers were killed; True if something was put back.

    Idempotent, and one failed open(2) when there is nothing to do.
    """
    folder = run_dir / "thp"
    if not (folder / "original.json").exists():
        return False
    with _locked(folder):
        return _put_back_if_last(folder, file)


def left_over(run_dir: Path) -> bool:
    """Is a mode borrowed that no living process holds? Looks only."""
    folder = run_dir / "thp"
    try:
        return _original(folder) is not None and not any(_alive(path) for path in folder.glob("holder-*"))
    except OSError:
        return False


def check(run_dir: Path, *, file: Path = MODE, shmem: Path = SHMEM) -> Check:
    """Can huge pages be borrowed for a restore, and did a killed one leave them on?"""
    mode, shmem_mode = current(file), current(shmem)
    title = "huge pages"
    found = f"enabled={mode or 'absent'}, shmem_enabled={shmem_mode or 'absent'}"
    if mode is None:
        why = "this kernel has no transparent huge pages: restores that copy memory are several times slower"
        return Check("host.thp", title, "warn", found, why)
    if left_over(run_dir):
        why = "a restore was killed before it could put the machine's own mode back"
        original = _original(run_dir / "thp")
        return Check("host.thp", title, "warn", found, why, f"echo {original} > {file}", lambda: _swept(run_dir, file))
    if os.statvfs(file).f_flag & os.ST_RDONLY:
        why = "/sys is read-only here, so they cannot be switched on during a restore, which is then slower"
        return Check("host.thp", title, "warn", found, why, f"echo {_BORROWED} > {file}")
    if shmem_mode == "deny":
        why = "“deny” overrides the store's huge= option: goldens are mapped in small pages"
        return Check("host.thp", title, "warn", found, why, f"echo never > {shmem}")
    return Check("host.thp", title, "ok", found, "“always” is borrowed during a restore and put back after it")


def _swept(run_dir: Path, file: Path) -> None:
    sweep(run_dir, file=file)


def _borrow(folder: Path, file: Path) -> bool:
    mode = current(file)
    if mode == _BORROWED:
        # Another holder's doing, or a killed one's, whose record we inherit; or the machine's own, without a record.
        return True
    # Recorded before the switch: killed in between, a sweep writes back what is already there.
    _record(folder, str(mode))
    try:
        file.write_text(_BORROWED)
    except OSError:
        # access(2) looks at mode bits only; a container's mount or an LSM may still say no.
        return False
    return True


def _put_back_if_last(folder: Path, file: Path) -> bool:
    for path in folder.glob("holder-*"):
        if _alive(path):
            return False
        path.unlink(missing_ok=True)
    original = _original(folder)
    changed = False
    # Somebody who changed the mode in the meantime meant it: only our own value is taken back.
    if original is not None and current(file) == _BORROWED:
        file.write_text(original)
        changed = True
    (folder / "original.json").unlink(missing_ok=True)
    return changed


def _hold(folder: Path) -> int:
    name = f"holder-{os.getpid()}-{time.monotonic_ns()}"
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)  # children do not hold it
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _alive(path: Path) -> bool:
    # A lock belongs to the open file, so this also tells apart two holders in threads of one process.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _boot() -> str:
    return _BOOT_ID.read_text().strip()


def _record(folder: Path, original: str) -> None:
    # A reboot resets the mode; the boot's id makes a record that outlived one (run_dir on a disk) worthless.
    temporary = folder / "original.json.new"
    temporary.write_text(json.dumps({"original": original, "boot": _boot()}))
    temporary.replace(folder / "original.json")


def _original(folder: Path) -> str | None:
    try:
        record = json.loads((folder / "original.json").read_text())
        return str(record["original"]) if record["boot"] == _boot() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
