"""What is in the store: goldens and replicas, their sizes, and the removal of both."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpuckpt import manifest as manifests
from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, NothingToDo, UsageError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden import sweep as sweeping
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools
from gpuckpt.host import tmpfs
from gpuckpt.manifest import Manifest
from gpuckpt.store import locks, sharing
from gpuckpt.store.layout import TIERS, Layout, Tier, check_name


@dataclass(frozen=True)
class Entry:
    """One golden of the store; ``manifest`` is None and ``trouble`` says why if it cannot be read."""

    name: str
    folder: Path
    tiers: tuple[Tier, ...]
    manifest: Manifest | None
    trouble: str | None
    replicas: tuple[tuple[str, str], ...]


def entries(layout: Layout, states: dict[str, str]) -> list[Entry]:
    """Every published golden with its replicas; ``states`` maps replica names to podman's states."""
    made = replicas.all_of(layout.replicas)
    found = []
    for name in layout.names():
        here = layout.tiers(name)
        if not here:
            continue  # removed in the meantime
        folder = next(iter(here.values()))
        manifest, trouble = None, None
        try:
            manifest = manifests.read(folder)
        except GpuckptError as error:
            trouble = error.message
        own = tuple((one.name, state_of(one, states)) for one in made if one.golden == name)
        found.append(Entry(name, folder, tuple(here), manifest, trouble, own))
    return found


def state_of(replica: Replica, states: dict[str, str]) -> str:
    """What to call the state of a replica: podman's word for its container, ``prepared``, ``standby``, or ``gone``."""
    state = states.get(replica.name, "gone")
    if replica.standby is not None and state == "running":
        return "standby"
    return "prepared" if replica.state == "prepared" and state == "exited" else state


def states(tools: Tools) -> dict[str, str]:
    """podman's state of every container of ours, by replica name."""
    from gpuckpt.containers.podman import LABEL

    found = {}
    for entry in tools.containers.list(tools.layout.state):
        # Anybody who may run containers can give them labels: what is no name of a replica is none of ours.
        with contextlib.suppress(UsageError):
            found[check_name(entry["labels"].get(LABEL) or "")] = entry["state"]
    return found


def remove(tools: Tools, name: str, *, force: bool = False, tier: Tier | None = None) -> None:
    """Remove a golden from every tier or from one; its stopped replicas go with it, running ones only with ``force``.

    From one tier of two, only the replicas that use its files go. Raises NotFoundError, or BusyError if it is being
    made, copied or restored, or has running replicas.
    """
    tools.layout.golden(name)
    with locks.exclusive(tools.layout.golden_locks, "golden", name):
        tools.layout.golden(name)
        here = tools.layout.tiers(name)
        if tier is not None and tier not in here:
            raise NotFoundError(
                f"golden {name} is not in the tier {tier}", cause=f"it is in: {', '.join(here)}", remedy="gpuckpt ls"
            )
        going = {tier: here[tier]} if tier else here
        mine = using(tools, name, tuple(going))
        running = [one.name for one in mine if replicas.alive(tools, one)]
        if running and not force:
            raise BusyError(
                f"golden {name} has running replicas: {', '.join(running)}",
                remedy=f"stop them first (gpuckpt stop {' '.join(running)}), or add --force",
            )
        for one in mine:
            with contextlib.suppress(NotFoundError):  # stopped by somebody else in the meantime
                replicas.stop(tools, one.name)
        for where, folder in going.items():
            # Gone for every reader in one step; what a kill in between leaves is swept from the staging side.
            home, doomed = tools.layout.home(where), tools.layout.staging_of(where) / name
            sharing.remove(home, doomed, ignore_errors=True)
            folder.rename(doomed)
            sharing.remove(home, doomed)


def using(tools: Tools, name: str, tiers: Collection[Tier]) -> list[Replica]:
    """The replicas that need the golden ``name`` in ``tiers``: all of its replicas, or of one tier those it serves."""
    every = set(tools.layout.tiers(name)) <= set(tiers)
    made = replicas.all_of(tools.layout.replicas)
    return [one for one in made if one.golden == name and (every or one.needs(tiers))]


def prune(settings: Settings, tools: Callable[[], Tools], *, dry_run: bool) -> list[str]:
    """Remove half-made goldens and replicas, dead replicas and stray containers; a sentence for each.

    A replica is dead that was ready and whose container runs no more (a crash, a reboot, `podman rm`), or that was
    prepared and whose golden or root file system is gone. ``dry_run`` changes nothing. Raises NothingToDo if nothing
    was there to remove.
    """
    layout = Layout.of(settings)
    layout.prepare()
    if dry_run:
        staged, made = sweeping.orphans(layout)
        done = [f"would remove the half-made golden {folder.name}" for folder in staged]
        done += [f"would remove the half-made replica {folder.name}" for folder in made]
    else:
        done = sweeping.sweep(settings, tools)
    work = tools()
    dead = [one for one in replicas.all_of(layout.replicas) if _is_dead(work, one)]
    known = {path.name for path in layout.replicas.iterdir()}
    stray = [name for name in states(work) if name not in known]
    for what, name, remove in (
        *((f"the dead replica {one.name}", one.name, _stop_dead) for one in dead),
        *((f"the stray container of {name}", name, _remove_stray) for name in stray),
    ):
        if not dry_run:
            done += sweeping.guarded(what, partial(remove, work, name))
        elif locks.is_free(layout.replica_locks, "replica", name):
            done.append(f"would remove {what}")
    if not done:
        raise NothingToDo("nothing to prune")
    return done


def _is_dead(tools: Tools, replica: Replica) -> bool:
    if replica.state == "prepared":
        useless = replica.golden not in tools.layout.names() or not tools.overlay.is_mounted(replica.folder)
        return useless or replicas.status(tools, replica) == "gone"
    return replica.state == "ready" and not replicas.alive(tools, replica)


def _stop_dead(tools: Tools, name: str) -> bool:
    with contextlib.suppress(NotFoundError):  # somebody stopped it in the meantime
        return replicas.stop(tools, name, only_dead=True)
    return False


def _remove_stray(tools: Tools, name: str) -> bool:
    with locks.exclusive(tools.layout.replica_locks, "replica", name):
        folder = tools.layout.replicas / name
        if folder.exists():
            return False  # made since we looked
        replicas.discard(tools, Replica(name, name, folder))
        return True


@dataclass(frozen=True)
class Usage:
    """Bytes that one golden takes in one tier: allocated, and apparent (holes counted)."""

    name: str
    tier: Tier
    allocated: int
    apparent: int


@dataclass(frozen=True)
class Disk:
    """The file system of the disk tier, in bytes."""

    size: int
    used: int
    free: int


def usage(layout: Layout) -> tuple[list[Usage], tmpfs.TmpfsInfo | None, Disk | None]:
    """What every golden takes, the tmpfs and the disk they lie in.

    A memory file that goldens of a tier share is counted for the first of them.
    """
    found = []
    for tier in TIERS:
        seen: set[tuple[int, int]] = set()
        for name in layout.names_in(tier):
            allocated = apparent = 0
            for root, folders, files in os.walk(layout.home(tier) / name):
                for entry in (*folders, *files):
                    status = os.lstat(os.path.join(root, entry))
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        allocated += status.st_blocks * 512
                    apparent += status.st_size if entry in files else 0
            found.append(Usage(name, tier, allocated, apparent))
    disk = None
    with contextlib.suppress(FileNotFoundError):
        disk = Disk(*shutil.disk_usage(layout.disk))
    return found, tmpfs.info(layout.store), disk
