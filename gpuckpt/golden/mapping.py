"""Make a dumped golden's memory mappable, sharing extents with the other goldens of the store; or say why not."""

from __future__ import annotations

import errno
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.criu.evidence import Evidence
from gpuckpt.criu.images import PAGE, UndecodableError
from gpuckpt.criu.memory_files import AT_ONCE
from gpuckpt.criu.rewrite import Copied, Rewritten, rewrite
from gpuckpt.errors import GpuckptError, IncompatibleError, OutOfSpaceError
from gpuckpt.golden.tools import Tools
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import CopiedMemory, Memory
from gpuckpt.store.sharing import Sharing
from gpuckpt.workload.base import MEMORY_FOLDER

# Bytes of memory that a rewrite leaves to the machine, and what its threads may be about to write after they asked.
_RESERVE = (256 << 20) + AT_ONCE


@dataclass(frozen=True)
class Outcome:
    """What the manifest says of the memory, digests of the new files by path, and what there was no room for."""

    memory: Memory
    digests: dict[str, str]
    lacking: GpuckptError | None = None


COPIED = Outcome(Memory(mode="copy"), {})


def map_memory(tools: Tools, staging: Path, *, forced: bool) -> Outcome:
    """Rewrite the images in ``staging`` so that memory is mapped where the evidence allows it, and copied elsewhere.

    If it cannot be done at all the images stay as they were, and the outcome is a golden that is copied, with the
    reason; the user is told. With ``forced`` only a lack of room ends like that; IncompatibleError is raised then
    (processes that must be copied, an unknown format of the images). Raises VerificationError, forced or not, if the
    images contradict each other: nobody could restore them.
    """
    images, memory = staging / "images", staging / "memory"
    sharing = Sharing(tools.layout.goldens)
    try:
        evidence = Evidence(images)
        if forced:
            _require(evidence)
        done = rewrite(
            images,
            memory,
            mount_point=MEMORY_FOLDER,
            link=sharing.link,
            room=_room,
            keep=evidence.against_mapping,
            progress=lambda count: tools.report.bytes(count, 0),
        )
    except (IncompatibleError, UndecodableError, OutOfSpaceError, OSError) as error:
        for path in memory.iterdir():
            sharing.unlink(path)
        lacking = _lacking(error)
        if forced and lacking is None:
            raise
        reason = str(lacking or error)
        tools.report.note(f"memory will be copied, not mapped: {reason}")
        return Outcome(Memory(mode="copy", reason=reason), {}, lacking)
    finally:
        sharing.settle()
    return _outcome(tools, done)


def _require(evidence: Evidence) -> None:
    reasons = {pid: reason for pid in evidence.processes if (reason := evidence.against_mapping(pid))}
    if reasons:
        raise IncompatibleError(
            f"memory of {len(reasons)} {'process' if len(reasons) == 1 else 'processes'} cannot be mapped: "
            + ", ".join(map(str, reasons)),
            cause="; ".join(f"process {pid}: {reason}" for pid, reason in reasons.items()),
            remedy="create with --mode auto, which copies these processes' memory, or --mode copy",
        )


def _room(needed: int) -> None:
    """Refuse to take the last memory of the machine; the store's own limit is tmpfs' to hold."""
    available = available_memory()
    if needed + _RESERVE > available:
        raise OutOfSpaceError(f"memory files need {needed >> 20} MiB more, the machine has {available >> 20} MiB left")


def _lacking(error: BaseException) -> GpuckptError | None:
    if isinstance(error, OutOfSpaceError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        return OutOfSpaceError("the store has no room for the dump and its memory files at once")
    return None


def _outcome(tools: Tools, done: Rewritten) -> Outcome:
    copied = _summary(done.copied)
    if not done.mapped:
        reason = "; ".join(dict.fromkeys(one.reason for one in copied)) or "there is no memory to map"
        tools.report.note(f"memory will be copied, not mapped: {reason}")
        return Outcome(Memory(mode="copy", reason=reason, zeros=done.zeros, copied=copied), {})
    memory = Memory(
        mode="mapped",
        mapped=done.mapped,
        shared=done.shared,
        zeros=done.zeros,
        mappings=done.mappings,
        copied=copied,
    )
    return Outcome(memory, {f"memory/{name}": digest for name, digest in done.digests.items()})


def _summary(copied: list[Copied]) -> tuple[CopiedMemory, ...]:
    counts: dict[tuple[int, str], int] = defaultdict(int)
    for one in copied:
        counts[one.pid, one.reason] += one.pages * PAGE
    return tuple(CopiedMemory(pid=pid, reason=reason, bytes=count) for (pid, reason), count in counts.items())
