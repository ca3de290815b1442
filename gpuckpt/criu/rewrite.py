"""Rewrite a dump so that a restore maps memory instead of copying it.

CRIU restores private anonymous memory by allocating, zeroing and filling every page. After the dump, offline, the
bytes of such memory are copied into *memory files* (:mod:`gpuckpt.criu.memory_files`) on the store's tmpfs, and the
images are changed so that CRIU maps those files privately at the same addresses: a mapping costs microseconds whatever
its size, pages come from the page cache when they are touched, and a write gives the writer a copy of its own. The
files are never written again, and every replica of the golden maps the same ones.

What is done to the images (formats: CRIU's images/*.proto):

- ``mm-PID.img``: a mapping is cut at the edges of its populated runs; a populated piece becomes a private file
  mapping (status REGULAR | FILE_PRIVATE, flags without MAP_ANONYMOUS, ``shmid`` the file's id, ``pgoff`` in bytes).
- ``pagemap-PID.img``, ``pages-N.img``: what was moved is taken out, the rest stays to be copied. Blocks of 2 MiB of
  anonymous memory that hold nothing but zeros are taken out too and stored nowhere.
- ``files.img``: the memory files, as read-only regular files on a mount that the container already has.

New images are written beside the old ones and take their names at the very end. Until then the dump is whole, so it
holds its pages twice meanwhile: the store needs room for the dump and its memory files, less what is zeros or shared.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuckpt.criu.images import FRESH, PAGE, load, load_exactly, replacing, save_beside
from gpuckpt.criu.memory_files import Link, MemoryFiles, Room, Segment, Small
from gpuckpt.criu.pages import (
    FILE_PRIVATE,
    PRESENT,
    REGULAR,
    Piece,
    Run,
    cut,
    is_anonymous,
    part_of,
    pieces_of,
    runs_of,
    unmappable,
    without,
    without_zeros,
)
from gpuckpt.errors import IncompatibleError, VerificationError

IMAGE_VERSION = 2  # CRTOOLS_IMAGES_V1_1 (include/image.h), the one format that is known here
_MAP_ANONYMOUS = 0x20
_ZEROS = bytes(64 << 10)


@dataclass(frozen=True)
class Copied:
    """Memory that stays to be copied, and why."""

    pid: int
    start: int
    pages: int
    reason: str


@dataclass
class Rewritten:
    """What a rewrite did: bytes mapped, bytes of them found in existing extents, bytes of zeros that are stored no
    more, what is still copied, digests of the new files."""

    mapped: int = 0
    shared: int = 0
    zeros: int = 0
    mappings: int = 0
    copied: list[Copied] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass
class _Process:
    """A process whose images are to be replaced: its page map and mappings, what stays in its pages image."""

    pid: int
    pagemap: dict[str, Any]
    mm: dict[str, Any]
    source: Path
    stored: memoryview
    rest: list[Run]
    vmas: list[tuple[dict[str, Any], list[tuple[Piece, list[Segment]]]]]


def rewrite(
    images: Path,
    memory: Path,
    *,
    mount_point: str,
    link: Link = lambda name, size, path: False,
    room: Room = lambda count: None,
    keep: Callable[[int], str | None] = lambda pid: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Rewritten:
    """Rewrite the images in the folder ``images``; memory files go to the folder ``memory`` (on the same tmpfs).

    ``mount_point`` is where the container sees ``memory``; it must be one of the dump's mounts. ``link`` finds an
    extent of another golden and links it instead of having it written, ``room`` raises if so many bytes more do not
    fit, ``progress`` gets the bytes handled so far (see :class:`gpuckpt.criu.memory_files.MemoryFiles`). ``keep`` gives
    the reason why a process' memory must be copied, or None.

    If it raises, what lies in ``memory`` is the caller's to remove. The images are as they were after IncompatibleError
    (their format is not the known one), OSError (no space left) and what ``room`` raises. After VerificationError (they
    are damaged, or only some could be replaced) and after an interruption in the last step, a few renames, they are no
    dump: the caller must discard them.
    """
    version = load(images / "inventory.img")["entries"][0]["img_version"]
    if version != IMAGE_VERSION:
        raise IncompatibleError(
            f"CRIU's images have format {version}, gpuckpt rewrites format {IMAGE_VERSION}",
            remedy="use a gpuckpt that knows this CRIU, or create with --mode copy",
        )
    files = load_exactly(images / "files.img")
    mount = _mount_id(images, mount_point)
    done = Rewritten()
    with (
        replacing(images) as fresh,
        _Sources() as sources,
        MemoryFiles(memory, link=link, room=room, progress=progress) as writer,
    ):
        found = (int(path.stem.partition("-")[2]) for path in sorted(images.glob("mm-*.img")))
        planned = [_plan(images, pid, memory, sources, writer, keep, done) for pid in found]
        processes = [process for process in planned if process is not None]
        writer.finish()
        table = _FileTable(files)
        for process in processes:
            fresh += _write(images, process, table)
        files["entries"] += table.entries(memory, mount, mount_point)
        fresh.append(save_beside(images / "files.img", files))
        done.digests, done.shared = writer.digests, writer.shared
    return done


class _Sources:
    """Pages images mapped for reading, each once; unmapped at the end of a ``with``."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[mmap.mmap, memoryview]] = {}

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for mapped, view in self._open.values():
            # An error on its way up may still hold a part of the view; then the mapping ends with it.
            with suppress(BufferError):
                view.release()
                mapped.close()

    def open(self, path: Path) -> memoryview:
        if path in self._open:
            raise IncompatibleError(f"two processes have their pages in {path.name}")
        with path.open("rb") as file:
            # An empty file cannot be mapped; one page of anonymous memory stands for it and is never read.
            size = os.fstat(file.fileno()).st_size
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else mmap.mmap(-1, PAGE)
        self._open[path] = mapped, memoryview(mapped)
        return self._open[path][1]


def _plan(
    images: Path,
    pid: int,
    memory: Path,
    sources: _Sources,
    writer: MemoryFiles,
    keep: Callable[[int], str | None],
    done: Rewritten,
) -> _Process | None:
    """Decide what of a process is mapped and have it written; None if all of it stays as it is."""
    pagemap = load_exactly(images / f"pagemap-{pid}.img")
    mm = load_exactly(images / f"mm-{pid}.img")
    runs = runs_of(pagemap["entries"])
    reason = keep(pid)
    if reason is not None:
        if pages := sum(run.pages for run in runs):
            done.copied.append(Copied(pid, runs[0].start, pages, reason))
        return None
    source = images / f"pages-{pagemap['entries'][0]['pages_id']}.img"
    stored = sources.open(source)
    if sum(run.pages for run in runs) * PAGE > len(stored):
        raise VerificationError(f"{source.name} is shorter than pagemap-{pid}.img says")
    small = Small(memory / f"{pid}.small")
    vmas: list[tuple[dict[str, Any], list[tuple[Piece, list[Segment]]]]] = []
    moved: list[tuple[int, int]] = []
    for vma, inside in _by_mapping(pid, mm["entries"][0]["vmas"], runs):
        why = unmappable(vma)
        dropped: list[Run] = []
        if why is None and is_anonymous(vma):
            inside, dropped = without_zeros(inside, lambda begin, end: _is_zero(stored, begin, end))
        pieces = pieces_of(inside, vma) if why is None else []
        taken = {one.start for piece in pieces for one in piece.runs}
        done.copied += [
            Copied(pid, left.start, left.pages, why or "a short run") for left in inside if left.start not in taken
        ]
        done.zeros += sum(one.pages for one in dropped) * PAGE
        done.mapped += sum(one.pages for piece in pieces for one in piece.runs) * PAGE
        moved += sorted((one.start, one.end) for one in (*dropped, *(run for piece in pieces for run in piece.runs)))
        vmas.append((vma, [(piece, writer.store(piece, stored, small)) for piece in pieces]))
        done.mappings += sum(len(segments) for _, segments in vmas[-1][1])
    if not moved:
        return None
    writer.write_small(small, stored)
    return _Process(pid, pagemap, mm, source, stored, without(runs, moved), vmas)


def _by_mapping(pid: int, vmas: list[dict[str, Any]], runs: list[Run]) -> Iterator[tuple[dict[str, Any], list[Run]]]:
    """Each mapping with the stored runs in it; a run that spans several is cut at their edges."""
    queue = iter(runs)
    run = next(queue, None)
    for vma in vmas:
        inside: list[Run] = []
        while run is not None and run.start < vma["end"]:
            if run.start < vma["start"]:
                break
            before, run = cut(run, vma["end"])
            inside.append(before)
            run = run or next(queue, None)
        yield vma, inside
        if run is not None and run.start < vma["end"]:
            break
    if run is not None:
        raise VerificationError(f"pagemap-{pid}.img has pages at {run.start:#x}, outside of all mappings")


def _is_zero(stored: memoryview, begin: int, end: int) -> bool:
    # The first byte of each page tells most blocks apart. What passes is compared whole: as bytes, by memcmp(3), and in
    # parts that stay in the processor's cache and for which malloc(3) asks the kernel for nothing.
    return not any(stored[begin:end:PAGE].tobytes()) and all(
        stored[at : at + len(_ZEROS)].tobytes() == _ZEROS for at in range(begin, end, len(_ZEROS))
    )


class _FileTable:
    """The ids, in files.img, of the memory files that mappings name."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._next_id = max((int(entry["id"]) for entry in files["entries"]), default=0) + 1
        self._ids: dict[str, int] = {}

    def id_of(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = self._next_id
            self._next_id += 1
        return self._ids[name]

    def entries(self, memory: Path, mount_id: int, mount_point: str) -> list[dict[str, Any]]:
        """Entries of files.img: regular, read-only, with the exact size and mode, which CRIU checks."""
        owner = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
        return [
            {
                "type": "REG",
                "id": file_id,
                "reg": {
                    "id": file_id,
                    "flags": os.O_RDONLY,
                    "pos": 0,
                    "fown": owner,
                    "name": f"{mount_point}/{name}",
                    "mnt_id": mount_id,
                    "size": (memory / name).stat().st_size,
                    "mode": 0o100400,
                },
            }
            for name, file_id in self._ids.items()
        ]


def _write(images: Path, process: _Process, table: _FileTable) -> list[Path]:
    """Write a process' new images beside the old ones; returns their paths."""
    pages = process.source.with_suffix(FRESH)
    with pages.open("xb") as output:
        pages.chmod(0o600)
        for run in process.rest:
            output.write(process.stored[run.offset : run.offset + run.pages * PAGE])
    entries = process.pagemap["entries"]
    # Not lazily restorable (PE_LAZY), which would need a page server.
    entries[1:] = [
        {"vaddr": run.start, "compat_nr_pages": 0, "flags": PRESENT, "nr_pages": run.pages} for run in process.rest
    ]
    process.mm["entries"][0]["vmas"] = [part for vma, pieces in process.vmas for part in _split(vma, pieces, table)]
    return [
        pages,
        save_beside(images / f"pagemap-{process.pid}.img", process.pagemap),
        save_beside(images / f"mm-{process.pid}.img", process.mm),
    ]


def _split(
    vma: dict[str, Any], pieces: list[tuple[Piece, list[Segment]]], table: _FileTable
) -> Iterator[dict[str, Any]]:
    """The mapping cut into unchanged parts and parts backed by memory files."""
    at = vma["start"]
    for piece, segments in pieces:
        if at < piece.start:
            yield part_of(vma, at, piece.start)
        for segment in segments:
            backed = part_of(vma, segment.start, segment.end)
            backed["status"] = REGULAR | FILE_PRIVATE
            backed["flags"] = vma["flags"] & ~_MAP_ANONYMOUS
            backed["shmid"], backed["pgoff"], backed["fd"] = table.id_of(segment.file.result()), segment.offset, -1
            backed["fdflags"] = os.O_RDONLY
            yield backed
        at = piece.end
    if at < vma["end"]:
        yield part_of(vma, at, vma["end"])


def _mount_id(images: Path, mount_point: str) -> int:
    for path in images.glob("mountpoints-*.img"):
        for entry in load(path)["entries"]:
            if entry["mountpoint"] == mount_point:
                return int(entry["mnt_id"])
    raise IncompatibleError(
        f"the dumped container has no mount at {mount_point}", remedy="create the golden anew with this gpuckpt"
    )
