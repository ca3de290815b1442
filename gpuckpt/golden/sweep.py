"""Clean up after transactions that were killed: half-made goldens, orphaned replicas, borrowed kernel settings.

Every command that changes something begins with it; when there is nothing to do it costs two directory listings.
A transaction holds its name's lock while it lives, and the kernel drops the lock when it dies, so a half-made thing
whose lock is free belongs to nobody.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from gpuckpt.config import Settings
from gpuckpt.errors import GpuckptError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.tools import Tools
from gpuckpt.host import hugepages
from gpuckpt.store import locks
from gpuckpt.store.layout import Layout


def orphans(layout: Layout) -> tuple[list[Path], list[Path]]:
    """Folders of half-made goldens and half-made replicas that belong to no living process."""
    staged = [path for path in _folders(layout.staging) if locks.is_free(layout.locks, "golden", path.name)]
    made = [
        path
        for path in _folders(layout.replicas)
        if ((found := replicas.load(path)) is None or found.state != "ready")
        and locks.is_free(layout.locks, "replica", path.name)
    ]
    return staged, made


def sweep(settings: Settings, tools: Callable[[], Tools]) -> list[str]:
    """Remove what killed transactions left; returns one sentence for each thing removed.

    ``tools`` is only called (and podman only started) if there is something to remove.
    """
    done: list[str] = []
    layout = Layout.of(settings)
    if hugepages.sweep(layout.run):
        done.append("put the kernel's huge page mode back")
    if not layout.locks.is_dir():
        layout.prepare()
    staged, made = orphans(layout)
    for folder in made:
        with contextlib.suppress(GpuckptError), locks.exclusive(layout.locks, "replica", folder.name):
            found = replicas.load(folder) or replicas.Replica(folder.name, folder.name, folder)
            if found.state != "ready":
                replicas.discard(tools(), found)
                done.append(f"removed the half-made replica {folder.name}")
    for folder in staged:
        with contextlib.suppress(GpuckptError), locks.exclusive(layout.locks, "golden", folder.name):
            shutil.rmtree(folder, ignore_errors=True)
            done.append(f"removed the half-made golden {folder.name}")
    return done


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
