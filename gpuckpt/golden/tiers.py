"""Bring a golden from one tier into another: from the tmpfs to disk, where it survives a reboot, and back.

A copy becomes visible by one rename, after every byte was compared with the manifest's digests while it was copied
and, on disk, after everything was flushed; killed before, it leaves a staging folder for the next command to sweep.
While it runs, the golden can be restored from the tier where it lies.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from gpuckpt import manifest as manifests
from gpuckpt.errors import BusyError, NothingToDo, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden import catalogue, prepare
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.tools import Reporter, Tools
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import Manifest
from gpuckpt.store import copying, digests, locks, seal, sharing
from gpuckpt.store.layout import TIERS, Layout, Tier, exchange


@dataclass(frozen=True)
class Placed:
    """A golden in a tier where it was not before: bytes that were copied, and bytes shared with other goldens there."""

    name: str
    tier: Tier
    folder: Path
    copied: int
    shared: int


def move(tools: Tools, name: str, to: Tier, *, keep: bool) -> Placed | None:
    """Bring golden ``name`` into the tier ``to`` and, unless ``keep``, remove it from where it was.

    None if it was there already and only had to be removed from the other tier. Raises NothingToDo if it is there
    and nowhere else, or is to be kept; what :func:`place` raises; BusyError if running replicas need it where it was.
    """
    source = _other(to)
    tools.layout.golden(name)
    if not keep and (running := _running(tools, name, source)):
        raise BusyError(
            f"golden {name} cannot leave the tier {source}: running replicas use it there: {', '.join(running)}",
            remedy=f"add --keep, or stop them first: gpuckpt stop {' '.join(running)}",
        )
    here = tools.layout.tiers(name)
    if len(here) > 1 and not _same(*here.values()) and (running := _running(tools, name, to)):
        raise BusyError(
            f"another golden named {name} in the tier {to} would be replaced: running replicas use it: "
            + ", ".join(running),
            remedy=f"stop them first: gpuckpt stop {' '.join(running)}",
        )
    placed = None
    try:
        placed = place(tools.layout, name, to, tools.report)
    except NothingToDo:
        if keep or source not in tools.layout.tiers(name):
            raise
    if not keep:
        catalogue.remove(tools, name, tier=source)
    withdraw_prepared(tools, name)
    return placed


def withdraw_prepared(tools: Tools, name: str) -> None:
    """Remove the replicas that were prepared for golden ``name`` where it is not restored from any more."""
    prepare.discard_prepared(tools, name, tier=tools.layout.tier_of(tools.layout.golden(name)))


def place(layout: Layout, name: str, to: Tier, report: Reporter) -> Placed:
    """Copy golden ``name`` into the tier ``to``, whose folders are there; it stays where it is.

    Either the copy is there whole, or nothing remains. Raises NotFoundError, NothingToDo (it is there already),
    BusyError (somebody else makes, copies or removes it), VerificationError (its bytes are not those recorded),
    OutOfSpaceError.
    """
    if layout.disk.is_relative_to(layout.store):
        raise UsageError(
            f"the disk tier {layout.disk} lies in the store {layout.store}",
            cause="the store is memory: nothing in it survives a reboot",
            remedy="set store.disk to a folder on a disk",
        )
    layout.golden(name)
    with locks.shared(layout.golden_locks, "golden", name), locks.exclusive(layout.golden_locks, "copy", name):
        layout.golden(name)
        here = layout.tiers(name)
        if to in here and (len(here) == 1 or _same(*here.values())):
            raise NothingToDo(f"golden {name} is in the tier {to} already")
        if to in here and to == "tmpfs":
            # Only a creation that was killed in its last step leaves this; what is in the tmpfs is the newer one.
            raise BusyError(
                f"another golden named {name} is in the tmpfs",
                remedy=f"remove one of them: gpuckpt rm {name} --tier disk, or --tier tmpfs",
            )
        source = here[_other(to)]
        manifest = manifests.read(source)
        if not seal.fits(source):
            raise _damaged(name, ["manifest.json has changed since the golden was sealed"])
        staging = layout.staging_of(to) / name
        sharing.remove(layout.home(to), staging, ignore_errors=True)  # a killed copy's, whose lock we now hold
        try:
            copied, shared = _fill(layout, name, source, staging, to, manifest, report)
            folder = _publish(staging, layout.home(to) / name, to)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpaceError(
                    f"{layout.home(to)} became full while golden {name} was copied",
                    remedy="make room: gpuckpt df, gpuckpt rm",
                ) from error
            raise
        finally:
            sharing.remove(layout.home(to), staging, ignore_errors=True)
    return Placed(name, to, folder, copied, shared)


def _other(tier: Tier) -> Tier:
    return next(one for one in TIERS if one != tier)


def _running(tools: Tools, name: str, tier: Tier) -> list[str]:
    used = [one for one in catalogue.using(tools, name, (tier,)) if one.needs((tier,))]
    return [one.name for one in used if replicas.alive(tools, one)]


def _same(one: Path, other: Path) -> bool:
    try:
        return (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    except OSError:
        return False


def _damaged(name: str, found: list[str]) -> VerificationError:
    return VerificationError(
        f"golden {name} is damaged and was not copied",
        cause="; ".join(found[:5]),
        remedy=f"gpuckpt verify {name} tells more; create it anew, or import it again",
    )


def _fill(
    layout: Layout, name: str, source: Path, staging: Path, to: Tier, manifest: Manifest, report: Reporter
) -> tuple[int, int]:
    """Make the copy in ``staging``; returns the bytes that were copied and those that are shared."""
    (staging / "memory").mkdir(mode=0o700, parents=True)
    linked = _link(layout, source, staging, to, manifest)
    needed = copying.allocated(source, skip=linked)
    _require_space(layout, name, to, needed)
    durable = to == "disk"
    copied = copying.copy_tree(
        source,
        staging,
        skip={*linked, *digests.OWN},
        durable=durable,
        progress=lambda done: report.bytes(done, needed),
    )
    found = [
        f"{path} has changed: its digest differs from the recorded one"
        for path, digest in copied.digests.items()
        if (record := manifest.files.get(digests.key(path))) is None or record.blake3 != digest
    ]
    if found := found or digests.differences(
        staging, manifest.files, manifest.links, contents=False, attributes_blake3=manifest.attributes_blake3
    ):
        raise _damaged(name, found)
    own = staging / "manifest.json"
    own.touch(mode=0o600)
    own.write_bytes((source / own.name).read_bytes())
    seal.write(staging)
    if durable:
        for path in (own, staging / "seal.json", staging):
            copying.sync(path)
    return copied.bytes, sum((staging / path).stat().st_size for path in linked)


def _link(layout: Layout, source: Path, staging: Path, to: Tier, manifest: Manifest) -> set[str]:
    """Link the extents that other goldens of the tier have already; returns their relative paths.

    An extent's name is the digest of its content, and it is taken only where that is still true.
    """
    shared = sharing.Sharing(layout.home(to))
    linked = set[str]()
    for path in sorted((source / "memory").glob("*.extent")):
        relative = f"memory/{path.name}"
        record = manifest.files.get(relative)
        if record is not None and shared.link(path.name, record.size, staging / relative):
            linked.add(relative)
    shared.settle()
    return linked


def _require_space(layout: Layout, name: str, to: Tier, needed: int) -> None:
    free = shutil.disk_usage(layout.home(to)).free
    if needed > free:
        raise OutOfSpaceError(
            f"golden {name} needs {needed >> 20} MiB, {layout.home(to)} has {free >> 20} MiB free",
            remedy="make room: gpuckpt df, gpuckpt rm",
        )
    if to == "tmpfs" and needed > (available := available_memory()):
        raise OutOfSpaceError(
            f"golden {name} needs {needed >> 20} MiB, the machine has {available >> 20} MiB of memory left",
            remedy="stop replicas (gpuckpt ls), or restore it from disk",
        )


def _publish(staging: Path, target: Path, tier: Tier) -> Path:
    if target.exists():
        exchange(staging, target)
    else:
        staging.rename(target)
    if tier == "disk":
        copying.sync(target.parent)
    return target
