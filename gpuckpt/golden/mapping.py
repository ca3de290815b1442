"""Make a dumped golden's memory mappable, sharing extents with the other goldens of the store."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from gpuckpt.criu.rewrite import rewrite
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import CopiedMemory, Memory
from gpuckpt.workload.base import MEMORY_FOLDER

COPIED = Memory(mode="copy")


def map_memory(tools: Tools, staging: Path) -> tuple[Memory, dict[str, str]]:
    """Rewrite the images in ``staging``; returns what the manifest says of it and the digests of the new files.

    Raises IncompatibleError (an unknown image format), VerificationError (damaged images), OSError (no space left).
    """
    done = rewrite(
        staging / "images",
        staging / "memory",
        mount_point=MEMORY_FOLDER,
        existing=lambda name: _existing(tools, name),
        progress=lambda count: tools.report.bytes(count, 0),
    )
    copied: dict[tuple[int, str], int] = defaultdict(int)
    for one in done.copied:
        copied[one.pid, one.reason] += one.pages * 4096
    memory = Memory(
        mode="mapped",
        mapped=done.mapped,
        shared=done.shared,
        mappings=done.mappings,
        copied=tuple(CopiedMemory(pid=pid, reason=reason, bytes=count) for (pid, reason), count in copied.items()),
    )
    return memory, {f"memory/{name}": digest for name, digest in done.digests.items()}


def _existing(tools: Tools, name: str) -> Path | None:
    """The extent ``name`` of any published golden."""
    return next(iter(tools.layout.goldens.glob(f"*/memory/{name}")), None)
