"""Clean up after transactions that were killed: half-made goldens, orphaned replicas, borrowed kernel settings.

Every command that changes something begins with it; when there is nothing to do it costs two directory listings.
A transaction holds its name's lock while it lives, and the kernel drops the lock when it dies, so a half-made thing
whose lock is free belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, GpuckptError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.tools import Tools
from gpuckpt.host import hugepages
from gpuckpt.store import locks, sharing
from gpuckpt.store.layout import TIERS, Layout


def orphans(layout: Layout) -> tuple[list[Path], list[Path]]:
    """Folders of half-made goldens and half-made replicas that belong to no living process."""
    staged = [
        path
        for tier in TIERS
        for path in _folders(layout.staging_of(tier))
        if locks.is_free(layout.golden_locks, "golden", path.name)
        and locks.is_free(layout.golden_locks, "copy", path.name)
    ]
    made = [
        path
        for path in _folders(layout.replicas)
        if ((found := replicas.load(path)) is None or found.state not in replicas.SETTLED)
        and locks.is_free(layout.replica_locks, "replica", path.name)
    ]
    return staged, made


def sweep(settings: Settings, tools: Callable[[], Tools]) -> list[str]:
    """Remove what killed transactions left; returns one sentence for each thing removed, or that would not go.

    ``tools`` is only called (and podman only started) if there is something to remove.
    """
    done: list[str] = []
    layout = Layout.of(settings)
    if hugepages.sweep(layout.run):
        done.append("put the kernel's huge page mode back")
    layout.prepare()
    staged, made = orphans(layout)
    for folder in made:
        done += guarded(f"the half-made replica {folder.name}", partial(_remove_replica, layout, folder, tools))
    for folder in staged:
        done += guarded(f"the half-made golden {folder.name}", partial(_remove_golden, layout, folder))
    return done


def guarded(what: str, remove: Callable[[], bool]) -> list[str]:
    """What ``remove`` did to ``what``, as a sentence; none if it says that there was nothing to do."""
    # A thing that would not go must not keep every later command from its work.
    try:
        return [f"removed {what}"] if remove() else []
    except BusyError:
        return []  # somebody took the name in the meantime
    except (GpuckptError, OSError) as error:
        why = ": ".join(filter(None, (str(error), getattr(error, "cause", None))))
        return [f"could not remove {what}: {why}"]


def _remove_replica(layout: Layout, folder: Path, tools: Callable[[], Tools]) -> bool:
    with locks.exclusive(layout.replica_locks, "replica", folder.name):
        found = replicas.load(folder) or replicas.Replica(folder.name, folder.name, folder)
        if not folder.exists() or found.state in replicas.SETTLED:
            return False
        replicas.discard(tools(), found)
        return True


def _remove_golden(layout: Layout, folder: Path) -> bool:
    with locks.exclusive(layout.golden_locks, "golden", folder.name):
        if not folder.exists():
            return False
        sharing.remove(next(layout.home(tier) for tier in TIERS if layout.staging_of(tier) == folder.parent), folder)
        return True


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
