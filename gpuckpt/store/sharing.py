"""Hard links between goldens: equal memory is stored once, and nobody's seal is broken by it.

A link that is made or removed moves the change time (ctime) of the one inode, and with it the note in the seal of every
golden that has it: their next restore would read the whole file again. Whoever links or unlinks therefore looks at the
file just before and just after, and tells the seals. A note that did not hold before is left alone, so a changed byte
is found as it was. A kill in between leaves notes that do not hold: the file is read again, which is slow and right.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import time
from pathlib import Path

from gpuckpt.store import seal
from gpuckpt.store.digests import digest_file
from gpuckpt.store.seal import Note

_SETTLE_SECONDS = 0.25


class Sharing:
    """Links and unlinks memory files; :meth:`settle` brings the seals up to date. Threads may share one.

    ``home`` is the folder of the published goldens of one tier: links do not leave a file system.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._moved: dict[Note, Note] = {}
        self._sealed: list[tuple[Path, dict[str, Note]]] | None = None
        self._settled = time.monotonic()

    def link(self, name: str, size: int, path: Path) -> bool:
        """Make ``path`` a link to the memory file ``name`` of any published golden; False if none has it unchanged.

        Its bytes are read and compared with its name, the begin of their digest: a fault in one golden must not
        spread to the next.
        """
        with self._lock:
            if self._sealed is None:
                self._sealed = [(folder, seal.notes_of(folder)) for folder in self._goldens()]
            linked = any(
                self._link(folder / "memory" / name, notes[f"memory/{name}"], size, path)
                for folder, notes in self._sealed
                if f"memory/{name}" in notes
            )
        if linked and not digest_file(path).startswith(Path(name).stem):
            self.unlink(path)
            return False
        # Not only at the end: until then a restore of the other golden reads what was linked.
        if linked and time.monotonic() - self._settled > _SETTLE_SECONDS:
            self.settle()
        return linked

    def _link(self, source: Path, noted: Note, size: int, path: Path) -> bool:
        # The golden may be removed or replaced at any moment; what was opened is what is looked at.
        try:
            handle = os.open(source, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            before = os.fstat(handle)
            if seal.note(before, before.st_dev) != noted or before.st_size != size:
                return False  # written since it was sealed: its bytes may not be those that its name says
            try:
                os.link(source, path, follow_symlinks=False)
            except OSError:  # gone, or linked too often (EMLINK)
                return False
            if path.lstat().st_ino != before.st_ino:
                path.unlink()
                return False
            self._note(before, os.fstat(handle))
            return True
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        """Remove a memory file of a golden that goes; others may have it too."""
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            before = os.fstat(handle)
            if stat.S_ISDIR(before.st_mode):
                return
            with self._lock:
                path.unlink()
                self._note(before, os.fstat(handle))
        finally:
            os.close(handle)

    def _note(self, before: os.stat_result, after: os.stat_result) -> None:
        # Only the change time may differ: a write in the moment between must not be taken for the link.
        old, new = (seal.note(status, before.st_dev) for status in (before, after))
        if old != new and old[:-1] == new[:-1]:
            self._moved[old] = new

    def settle(self) -> None:
        """Renew the notes of what was linked or unlinked, in the seals of all published goldens."""
        with self._lock:
            moved, self._moved = self._moved, {}
            self._settled = time.monotonic()
        if not moved:
            return
        for folder in self._goldens():
            with contextlib.suppress(FileNotFoundError):  # removed by somebody else in the meantime
                seal.renew(folder, moved)

    def _goldens(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            # What begins with a dot is the tier's own.
            return sorted(path for path in self._home.iterdir() if path.is_dir() and not path.name.startswith("."))
        return []


def remove(home: Path, folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete the folder of a golden that is no longer, or not yet, published; others keep what they share with it.

    ``home`` holds the published goldens of its tier.
    """
    sharing = Sharing(home)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted((folder / "memory").iterdir()):
            sharing.unlink(path)
    shutil.rmtree(folder, ignore_errors=ignore_errors)
    sharing.settle()
