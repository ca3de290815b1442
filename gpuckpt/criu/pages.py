"""Which stored pages of a process can be mapped from files: decisions on its mappings and page map, no file touched."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gpuckpt.criu.images import PAGE, stored_pages
from gpuckpt.errors import IncompatibleError

HUGE = 2 << 20

# Shorter runs are cheaper to copy than to map: a mapping costs CRIU about 30 µs, a page about 5 µs.
_SMALLEST_RUN = 8
# Pages missing between two runs for which a second mapping is not worth it; they read as zeros either way.
_SMALLEST_GAP = 16

# Bits of VmaEntry.status (criu/include/image.h).
REGULAR, FILE_PRIVATE = 1 << 0, 1 << 6
_STACK, _VSYSCALL, _VDSO, _ANON_PRIVATE, _VVAR = 1 << 1, 1 << 2, 1 << 3, 1 << 9, 1 << 12
_PLAIN = REGULAR | _ANON_PRIVATE
_ODD = _STACK | _VSYSCALL | _VDSO | _VVAR | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 14
_KNOWN = _PLAIN | FILE_PRIVATE | 1 << 5  # heap
_MAP_GROWSDOWN, _MAP_LOCKED = 0x100, 0x2000
# MAP_PRIVATE, MAP_ANONYMOUS, MAP_DENYWRITE, MAP_NORESERVE, MAP_STACK: those with which a file can be mapped, too.
_KNOWN_FLAGS = 0x02 | 0x20 | 0x800 | 0x4000 | 0x20000
_LAZY, PRESENT = 1 << 1, 1 << 2  # of a page map's entry (criu/include/pagemap.h)
# Advice (madvise(2)) that also holds on file mappings; 18, wipe on fork, does not.
_ADVICE_KEPT = 1 << 10 | 1 << 14 | 1 << 15 | 1 << 16


@dataclass(frozen=True)
class Run:
    """Stored pages that follow one another: address, pages, offset of their bytes in the pages image."""

    start: int
    pages: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


@dataclass(frozen=True)
class Piece:
    """A part of a mapping that is to be backed by memory files: [start, end) and the stored runs in it."""

    start: int
    end: int
    runs: tuple[Run, ...]


def runs_of(entries: Sequence[dict[str, Any]]) -> list[Run]:
    """The stored runs of a page map, in order of their addresses, which is also that of their bytes.

    CRIU writes an entry for what goes through a pipe at once, 1 MiB: neighbours are put together again. Raises
    IncompatibleError for an incremental dump.
    """
    found: list[Run] = []
    offset = 0
    for entry in entries[1:]:
        pages = stored_pages(entry)
        flags = entry.get("flags", PRESENT)
        if entry.get("in_parent") or flags & 1:
            raise IncompatibleError("incremental dumps (pages in a parent image) cannot be rewritten")
        if flags & ~(PRESENT | _LAZY):
            raise IncompatibleError(f"the page map has an entry with flags {flags:#x}, which gpuckpt does not know")
        if pages and found and found[-1].end == entry["vaddr"]:
            found[-1] = Run(found[-1].start, found[-1].pages + pages, found[-1].offset)
        elif pages:
            found.append(Run(entry["vaddr"], pages, offset))
        offset += pages * PAGE
    return found


def cut(run: Run, at: int) -> tuple[Run, Run | None]:
    """The parts of a run before and after the address ``at`` (page maps do not stop at the edges of mappings)."""
    if run.end <= at:
        return run, None
    pages = (at - run.start) // PAGE
    return Run(run.start, pages, run.offset), Run(at, run.pages - pages, run.offset + pages * PAGE)


def is_anonymous(vma: dict[str, Any]) -> bool:
    """Whether pages of this (mappable) mapping that are not stored read as zeros."""
    return not vma["status"] & FILE_PRIVATE


def unmappable(vma: dict[str, Any]) -> str | None:
    """Why the pages of this mapping must be copied, or None if they may be mapped."""
    status, flags = vma["status"], vma["flags"]
    if status & _ODD:
        return "a stack, or memory of the kernel's making"
    if status & (_PLAIN | FILE_PRIVATE) not in (_PLAIN, REGULAR | FILE_PRIVATE):
        return "shared memory"
    if flags & _MAP_GROWSDOWN:
        return "grows downwards"
    if flags & _MAP_LOCKED:
        return "locked in memory"
    if status & ~_KNOWN or flags & ~_KNOWN_FLAGS:
        return f"a kind of mapping that gpuckpt does not know (status {status:#x}, flags {flags:#x})"
    if vma.get("madv", 0) & ~_ADVICE_KEPT:
        return "advice that holds for anonymous memory only"
    return None


def pieces_of(runs: Sequence[Run], vma: dict[str, Any]) -> list[Piece]:
    """Gather runs with small gaps between them into pieces worth a mapping; what is too short is left out.

    Pages that are not stored read as zeros in anonymous memory, but as the file in a private file mapping (a library's
    written data): there only runs without a gap make a piece.
    """
    gap = _SMALLEST_GAP * PAGE if is_anonymous(vma) else 0
    groups: list[list[Run]] = []
    for run in runs:
        if groups and run.start - groups[-1][-1].end <= gap:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [
        Piece(group[0].start, group[-1].end, tuple(group))
        for group in groups
        if sum(run.pages for run in group) >= _SMALLEST_RUN
    ]


def without_zeros(runs: Sequence[Run], is_zero: Callable[[int, int], bool]) -> tuple[list[Run], list[Run]]:
    """``runs`` without their aligned blocks of 2 MiB that hold nothing but zeros, and these blocks.

    Huge pages of which a program wrote a corner leave many. ``is_zero`` looks at a range of the pages image (begin,
    end).
    """
    kept: list[Run] = []
    dropped: list[Run] = []
    for run in runs:
        rest: Run | None = run
        for block in range(-(-run.start // HUGE) * HUGE, run.end // HUGE * HUGE, HUGE):
            at = run.offset + block - run.start
            if rest is None or not is_zero(at, at + HUGE):
                continue
            if block > rest.start:
                kept.append(cut(rest, block)[0])
            empty = Run(block, HUGE // PAGE, at)
            dropped.append(empty)
            rest = cut(rest, empty.end)[1]
        if rest is not None:
            kept.append(rest)
    return kept, dropped


def without(runs: Sequence[Run], moved: Sequence[tuple[int, int]]) -> list[Run]:
    """What is left of ``runs`` without the ranges ``moved``; both are in order."""
    found: list[Run] = []
    ranges = iter(moved)
    gone = next(ranges, None)
    for run in runs:
        part: Run | None = run
        while part is not None:
            while gone is not None and gone[1] <= part.start:
                gone = next(ranges, None)
            if gone is None or gone[0] >= part.end:
                found.append(part)
                break
            head, tail = cut(part, gone[0]) if gone[0] > part.start else (None, part)
            if head is not None:
                found.append(head)
            part = cut(tail, gone[1])[1] if tail is not None else None
    return found


def part_of(vma: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The mapping's entry for [start, end) of it."""
    part = dict(vma) | {"start": start, "end": end}
    if not is_anonymous(vma):
        part["pgoff"] = vma["pgoff"] + start - vma["start"]
    return part


def content(piece: Piece, start: int, end: int, pages: memoryview) -> memoryview | bytearray:
    """The bytes of [start, end), a part of ``piece``; pages that are not stored are zeros."""
    first = bisect.bisect_right(piece.runs, start, key=lambda run: run.end)
    if first < len(piece.runs) and piece.runs[first].start <= start and end <= piece.runs[first].end:
        offset = piece.runs[first].offset + start - piece.runs[first].start
        return pages[offset : offset + end - start]
    found = bytearray(end - start)
    for run in itertools.islice(piece.runs, first, None):
        if run.start >= end:
            break
        low, high = max(start, run.start), min(end, run.end)
        offset = run.offset + low - run.start
        found[low - start : high - start] = pages[offset : offset + high - low]
    return found
