"""What is in the store: goldens and replicas, their sizes, and the removal of both."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpuckpt import manifest as manifests
from gpuckpt.errors import BusyError, GpuckptError, NothingToDo
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools
from gpuckpt.host import tmpfs
from gpuckpt.manifest import Manifest
from gpuckpt.store import locks
from gpuckpt.store.layout import Layout


@dataclass(frozen=True)
class Entry:
    """One golden of the store; ``manifest`` is None and ``trouble`` says why if it cannot be read."""

    name: str
    folder: Path
    manifest: Manifest | None
    trouble: str | None
    replicas: tuple[tuple[str, str], ...]


def entries(layout: Layout, states: dict[str, str]) -> list[Entry]:
    """Every published golden with its replicas; ``states`` maps replica names to podman's states."""
    made = replicas.all_of(layout.replicas)
    found = []
    for name in layout.names():
        folder = layout.goldens / name
        manifest, trouble = None, None
        try:
            manifest = manifests.read(folder)
        except GpuckptError as error:
            trouble = error.message
        own = tuple((one.name, states.get(one.name, "gone")) for one in made if one.golden == name)
        found.append(Entry(name, folder, manifest, trouble, own))
    return found


def states(tools: Tools) -> dict[str, str]:
    """podman's state of every container of ours, by replica name."""
    from gpuckpt.containers.podman import LABEL

    return {entry["labels"][LABEL]: entry["state"] for entry in tools.containers.list(tools.layout.state)}


def remove(tools: Tools, name: str, *, force: bool = False) -> None:
    """Remove a golden; its stopped replicas go with it, running ones only with ``force``.

    Raises NotFoundError, or BusyError if it is being made or restored, or has running replicas.
    """
    folder = tools.layout.golden(name)
    with locks.exclusive(tools.layout.locks, "golden", name):
        mine = [one for one in replicas.all_of(tools.layout.replicas) if one.golden == name]
        running = [one.name for one in mine if replicas.status(tools, one) in ("running", "paused")]
        if running and not force:
            raise BusyError(
                f"golden {name} has running replicas: {', '.join(running)}",
                remedy=f"stop them first (gpuckpt stop {' '.join(running)}), or add --force",
            )
        for one in mine:
            replicas.stop(tools, one)
        # Gone for every reader in one step; what a kill in between leaves is swept from the staging side.
        doomed = tools.layout.staging / name
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def dead_replicas(tools: Tools) -> list[Replica]:
    """Replicas that were ready and whose container runs no more (a crash, a reboot, `podman rm`)."""
    return [
        one
        for one in replicas.all_of(tools.layout.replicas)
        if one.state == "ready" and replicas.status(tools, one) not in ("running", "paused")
    ]


def prune(tools: Tools, swept: list[str], *, dry_run: bool) -> list[str]:
    """Remove dead replicas and stray containers and mounts of ours; returns a sentence for each.

    ``swept`` is what a sweep has removed before. Raises NothingToDo if nothing was there to remove.
    """
    done = list(swept)
    for one in dead_replicas(tools):
        done.append(f"{'would remove' if dry_run else 'removed'} the dead replica {one.name}")
        if not dry_run:
            replicas.stop(tools, one)
    known = {one.name for one in replicas.all_of(tools.layout.replicas)}
    for name, _ in states(tools).items():
        if name not in known and locks.is_free(tools.layout.locks, "replica", name):
            done.append(f"{'would remove' if dry_run else 'removed'} the stray container of {name}")
            if not dry_run:
                replicas.discard(tools, Replica(name, name, tools.layout.replicas / name))
    if not done:
        raise NothingToDo("nothing to prune")
    return done


@dataclass(frozen=True)
class Usage:
    """Bytes that one golden takes in the store; ``shared`` with others is counted once in the store's total."""

    name: str
    allocated: int
    apparent: int


def usage(layout: Layout) -> tuple[list[Usage], tmpfs.TmpfsInfo | None]:
    """What every golden takes, and the tmpfs they lie in."""
    found = []
    for name in layout.names():
        allocated = apparent = 0
        for root, folders, files in os.walk(layout.goldens / name):
            for entry in (*folders, *files):
                status = os.lstat(os.path.join(root, entry))
                allocated += status.st_blocks * 512
                apparent += status.st_size if entry in files else 0
        found.append(Usage(name, allocated, apparent))
    return found, tmpfs.info(layout.store)
