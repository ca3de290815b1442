"""Names and folders of the store, and who may touch them.

    STORE/goldens/NAME/    a published golden: manifest.json  images/  memory/  rootfs/  volumes/
    STORE/staging/NAME/    one that is being made; becomes a golden by one rename
    DISK/NAME/, DISK/.staging/NAME/   the same in the disk tier, which survives a reboot; DISK is STATE/goldens
                           unless configured
    STATE/replicas/NAME/   a replica's writable layer, socket and record (never in the tmpfs)
    STATE/logs/            what failed operations left for reading
    STORE/locks/, DISK/.locks/, STATE/locks/   one flock'd file per name; the kernel lets go when the holder dies

A golden has one name and one content, whether it lies in the tmpfs (STORE), on disk, or in both.

Goldens hold whatever was in a server's memory: every folder is root's alone, and no component of a path may be a
symbolic link that somebody else made.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from gpuckpt.config import NAME, Settings
from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.paths import private_folder

_NAME = re.compile(NAME)
Tier = Literal["tmpfs", "disk"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""Where a golden can lie, the fastest first."""


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
    disk_chosen: Path | None = None

    @classmethod
    def of(cls, settings: Settings) -> Layout:
        return cls(settings.store.path, settings.paths.state, settings.paths.run, settings.store.disk)

    @property
    def disk(self) -> Path:
        """The disk tier's folder."""
        return self.disk_chosen or self.state / "goldens"

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

    def home(self, tier: Tier) -> Path:
        """The folder of a tier's published goldens."""
        return self.goldens if tier == "tmpfs" else self.disk

    def staging_of(self, tier: Tier) -> Path:
        """The folder on the same file system where a tier's goldens are made."""
        return self.staging if tier == "tmpfs" else self.disk / ".staging"

    @property
    def golden_locks(self) -> tuple[Path, ...]:
        """The folders with one flock'd file per golden's name: a name is held in every tier at once.

        Each tier has its own, because several installations may share one of them. The store has one as soon as
        it was mounted; before (after a reboot), nobody can work on anything in it.
        """
        store = self.store / "locks"
        return (self.disk / ".locks", store) if store.is_dir() else (self.disk / ".locks",)

    @property
    def replica_locks(self) -> Path:
        """The same for the names of replicas."""
        return self.state / "locks"

    def tiers(self, name: str) -> dict[Tier, Path]:
        """The folders of the published golden ``name`` by tier, the fastest first; empty if there is none."""
        check_name(name)
        folders: dict[Tier, Path] = {tier: self.home(tier) / name for tier in TIERS}
        return {tier: folder for tier, folder in folders.items() if folder.is_dir() and not folder.is_symlink()}

    def locate(self, name: str) -> tuple[Path, Tier]:
        """The folder of the published golden ``name`` in its fastest tier; raises NotFoundError if there is none."""
        for tier, folder in self.tiers(name).items():
            return folder, tier
        known = ", ".join(self.names()) or "none"
        raise NotFoundError(
            f"no golden named {name}",
            cause=f"the store {self.store} and {self.disk} hold: {known}",
            remedy="gpuckpt ls",
        )

    def golden(self, name: str) -> Path:
        """The folder of the published golden ``name``; raises NotFoundError if there is none."""
        return self.locate(name)[0]

    def tier_of(self, folder: Path) -> Tier:
        """The tier that a golden's folder lies in."""
        return "disk" if folder.parent == self.disk else "tmpfs"

    def names(self) -> list[str]:
        """Names of all published goldens of every tier, sorted."""
        return sorted({name for tier in TIERS for name in self.names_in(tier)})

    def names_in(self, tier: Tier) -> list[str]:
        """Names of the goldens published in one tier, sorted; what begins with a dot is the tier's own."""
        try:
            with os.scandir(self.home(tier)) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
                )
        except FileNotFoundError:
            return []

    def prepare(self) -> None:
        """Make the folders of state, disk tier and locks, or check those that exist."""
        disk = (self.disk, self.staging_of("disk"), self.disk / ".locks")
        for folder in (self.replicas, self.logs, self.replica_locks, *disk):
            private_folder(folder)

    def prepare_store(self) -> None:
        """Make the store's folders; only once its tmpfs is mounted, or they would lie hidden below it."""
        for folder in (self.goldens, self.staging, self.store / "locks"):
            private_folder(folder)


def exchange(one: Path, other: Path) -> None:
    """Let two paths of one file system change places in a single step (renameat2(2), RENAME_EXCHANGE)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, rename_exchange = -100, 2
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
