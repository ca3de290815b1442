"""Have CRIU copy the few pages that the first answer writes anyway, instead of mapping them.

A page of a private file mapping costs a fault and a copy when it is first written. For what is always written that is
more than to copy it right away: several processes are restored side by side, the faults of a first answer come one
after the other, from process to process. Which pages these are is seen once, after a first answer.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gpuckpt.criu.images import FRESH, PAGE, load, load_exactly, replacing, save_beside
from gpuckpt.criu.pages import FILE_PRIVATE, PRESENT, Run, runs_of

Pages = dict[int, tuple[tuple[int, int], ...]]
"""By process (its id in the container): ranges of addresses, [start, end), in order."""

# More of one process is no first answer's: copying it would be felt.
_MOST = 64 << 20
_AT_ONCE = 1 << 20  # bytes of a page map (proc(5)) that are read at once: 512 MiB of memory


def written(pids: Iterable[int], mount_point: str) -> Pages:
    """The pages of these processes (ids of the host) that were written since they were mapped from memory files.

    ``mount_point`` is where the processes see the memory files.
    """
    found: Pages = {}
    for pid in pids:
        try:
            inside = _pid_inside(pid)
            found[inside] = tuple(_own_pages(pid, f"{mount_point}/"))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return {pid: ranges for pid, ranges in found.items() if ranges}


def _pid_inside(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
        return next(int(line.split()[-1]) for line in status if line.startswith("NSpid:"))


def _own_pages(pid: int, prefix: str) -> Iterator[tuple[int, int]]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        lines = [line.split(None, 5) for line in maps]
    begin = end = 0
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for words in lines:
            if len(words) < 6 or not words[5].startswith(prefix):
                continue
            low, high = (int(word, 16) for word in words[0].split("-"))
            pagemap.seek(low // PAGE * 8)
            for at, entry in enumerate(_entries(pagemap.fileno(), (high - low) // PAGE)):
                # Bit 63: present; bit 61: the file's page. A page of its own is the process' copy.
                if not entry >> 63 or entry >> 61 & 1:
                    continue
                address = low + at * PAGE
                if address != end:
                    if begin < end:
                        yield begin, end
                    begin = address
                end = address + PAGE
    if begin < end:
        yield begin, end


def _entries(handle: int, count: int) -> Iterator[int]:
    left = count * 8
    while left:
        data = os.read(handle, min(left, _AT_ONCE))
        if not data:
            return
        left -= len(data)
        yield from (entry for (entry,) in struct.iter_unpack("=Q", data))


def keep_copied(images: Path, memory: Path, pages: Pages, *, mount_point: str) -> dict[int, int]:
    """Have a restore copy ``pages`` of the rewritten dump in ``images``; returns the bytes by process.

    Memory files stay as they are: other goldens share them. A process of which there is too much is left out. Raises
    OSError (no space left), with the images as they were; VerificationError if only some could be replaced.
    """
    names = {entry["id"]: entry["reg"]["name"] for entry in load(images / "files.img")["entries"] if entry.get("reg")}
    files = {
        number: memory / name.removeprefix(f"{mount_point}/")
        for number, name in names.items()
        if name.startswith(f"{mount_point}/")
    }
    copied: dict[int, int] = {}
    with replacing(images) as fresh:
        for pid, ranges in pages.items():
            if not (images / f"mm-{pid}.img").exists() or sum(end - start for start, end in ranges) > _MOST:
                continue
            vmas = load(images / f"mm-{pid}.img")["entries"][0]["vmas"]
            parts = list(_parts(vmas, ranges, files))
            if parts:
                fresh += _write(images, pid, parts)
                copied[pid] = sum(end - start for start, end, _, _ in parts)
    return copied


def _parts(
    vmas: list[dict[str, Any]], ranges: tuple[tuple[int, int], ...], files: dict[int, Path]
) -> Iterator[tuple[int, int, Path, int]]:
    """The ranges cut at the edges of mappings of memory files: [start, end), the file and the offset of its bytes."""
    for vma in vmas:
        if not vma["status"] & FILE_PRIVATE or vma["shmid"] not in files:
            continue
        for start, end in ranges:
            low, high = max(start, vma["start"]), min(end, vma["end"])
            if low < high:
                yield low, high, files[vma["shmid"]], vma["pgoff"] + low - vma["start"]


def _write(images: Path, pid: int, parts: list[tuple[int, int, Path, int]]) -> list[Path]:
    """Write the process' page map and pages beside the old ones, ``parts`` among them; returns the new files."""
    pagemap = load_exactly(images / f"pagemap-{pid}.img")
    source = images / f"pages-{pagemap['entries'][0]['pages_id']}.img"
    stored = runs_of(pagemap["entries"])
    runs: list[Run] = []
    offset = 0
    fresh = source.with_suffix(FRESH)
    with source.open("rb") as old, fresh.open("xb") as new:
        fresh.chmod(0o600)
        pieces = [(run.start, run.end, old, run.offset) for run in stored]
        opened = {path: path.open("rb") for path in {part[2] for part in parts}}
        try:
            pieces += [(start, end, opened[path], at) for start, end, path, at in parts]
            for start, end, file, at in sorted(pieces, key=lambda piece: piece[0]):
                new.write(os.pread(file.fileno(), end - start, at))
                if runs and runs[-1].end == start:
                    runs[-1] = Run(runs[-1].start, runs[-1].pages + (end - start) // PAGE, runs[-1].offset)
                else:
                    runs.append(Run(start, (end - start) // PAGE, offset))
                offset += end - start
        finally:
            for each in opened.values():
                each.close()
    pagemap["entries"][1:] = [
        {"vaddr": run.start, "compat_nr_pages": 0, "flags": PRESENT, "nr_pages": run.pages} for run in runs
    ]
    return [fresh, save_beside(images / f"pagemap-{pid}.img", pagemap)]
