"""Names and folders of the store, and who may touch them.

    STORE/goldens/NAME/    a published golden: manifest.json  images/  rootfs/  volumes/
    STORE/staging/NAME/    one that is being made; becomes a golden by one rename
    STATE/replicas/NAME/   a replica's writable layer, socket and record (never in the tmpfs)
    STATE/logs/            what failed operations left for reading
    STORE/locks/, STATE/locks/   one flock'd file per name; the kernel lets go when the holder dies

Goldens hold whatever was in a server's memory: every folder is root's alone, and no component of a path may be a
symbolic link that somebody else made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.config import NAME, Settings
from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.paths import private_folder

_NAME = re.compile(NAME)


def check_name(name: str) -> str:
    """Return ``name`` if it can name a golden or replica; raise UsageError otherwise.

    It becomes a file name, a container name and part of a socket path (limited to 107 bytes by unix(7)).
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"“{name}” cannot be a name",
            cause="1 to 40 of letters, digits, “-”, “_”, “.”, beginning and ending with a letter or digit",
            remedy="choose another, for example “qwen-0.5b”",
        )
    return name


@dataclass(frozen=True)
class Layout:
    """The folders of one configuration; makes them on demand, private to root."""

    store: Path
    state: Path
    run: Path

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        return cls(settings.store.path, settings.paths.state, settings.paths.run)

    @property
    def goldens(self) -> Path:
        return self.store / "goldens"

    @property
    def staging(self) -> Path:
        return self.store / "staging"

    @property
    def replicas(self) -> Path:
        return self.state / "replicas"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def golden_locks(self) -> Path:
        """One flock'd file per golden's name; in the store, which several installations may share."""
        return self.store / "locks"

    @property
    def replica_locks(self) -> Path:
        """The same for the names of replicas."""
        return self.state / "locks"

    def golden(self, name: str) -> Path:
        """The folder of the published golden ``name``; raises NotFoundError if there is none."""
        folder = self.goldens / check_name(name)
        if not folder.is_dir() or folder.is_symlink():
            known = ", ".join(self.names()) or "none"
            raise NotFoundError(
                f"no golden named {name}", cause=f"the store {self.store} holds: {known}", remedy="gpuckpt ls"
            )
        return folder

    def names(self) -> list[str]:
        """Names of all published goldens, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.goldens) if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def prepare(self) -> None:
        """Make the folders of state and locks, or check those that exist."""
        for folder in (self.replicas, self.logs, self.replica_locks):
            private_folder(folder)

    def prepare_store(self) -> None:
        """Make the store's folders; only once its tmpfs is mounted, or they would lie hidden below it."""
        for folder in (self.goldens, self.staging, self.golden_locks):
            private_folder(folder)


def exchange(one: Path, other: Path) -> None:
    """Let two paths of one file system change places in a single step (renameat2(2), RENAME_EXCHANGE)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, rename_exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
