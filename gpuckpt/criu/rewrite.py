"""Rewrite a dump so that a restore maps memory instead of copying it.

CRIU restores private anonymous memory by allocating, zeroing and filling every page. After the dump, offline, the
bytes of such memory are moved into *memory files* on the store's tmpfs, and the images are changed so that CRIU maps
those files privately at the same addresses: a mapping costs microseconds whatever its size, pages come from the page
cache when they are touched, and a write gives the writer a copy of its own. The files are never written again, and
every replica of the golden maps the same ones.

What is done to the images (formats: CRIU's images/*.proto):

- ``mm-PID.img``: a mapping is cut at the edges of its populated runs; a populated piece becomes a private file
  mapping (status REGULAR | FILE_PRIVATE, flags without MAP_ANONYMOUS, ``shmid`` the file's id, ``pgoff`` in bytes).
- ``pagemap-PID.img``, ``pages-N.img``: what was moved is taken out, the rest stays to be copied.
- ``files.img``: the memory files, as read-only regular files on a mount that the container already has.

Memory files come in two kinds. An *extent* holds a run that begins at a multiple of 2 MiB: file offset and address are
congruent, so the kernel can map it by huge pages. It is named by the digest of its content and cut where its content
says so, not where it happens to lie, so equal runs of other processes and goldens are the same file, stored once.
What is left of a run before, between and after goes page by page into one *small file* a process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from gpuckpt.criu.images import PAGE, load, save, stored_pages
from gpuckpt.errors import IncompatibleError, VerificationError

HUGE = 2 << 20
IMAGE_VERSION = 2  # CRTOOLS_IMAGES_V1_1 (include/image.h), the one format that is known here

# Shorter runs are cheaper to copy than to map: a mapping costs CRIU about 30 µs, a page about 5 µs.
_SMALLEST_RUN = 8
# Pages missing between two runs for which a second mapping is not worth it; they read as zeros either way.
_SMALLEST_GAP = 16
# A content-defined cut comes every 16 blocks of 2 MiB on average, and no extent is longer than 64.
_CUT_ONE_IN = 16
_LONGEST = 64 * HUGE

# Bits of VmaEntry.status (criu/include/image.h).
_REGULAR, _STACK, _VSYSCALL, _VDSO, _FILE_PRIVATE, _ANON_PRIVATE, _VVAR = 0, 1, 2, 3, 6, 9, 12
_PLAIN = 1 << _REGULAR | 1 << _ANON_PRIVATE
_ODD = 1 << _STACK | 1 << _VSYSCALL | 1 << _VDSO | 1 << _VVAR | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 14
_MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_LOCKED = 0x20, 0x100, 0x2000
# Advice (madvise(2)) that also holds on file mappings; 18, wipe on fork, does not.
_ADVICE_KEPT = 1 << 10 | 1 << 14 | 1 << 15 | 1 << 16


@dataclass(frozen=True)
class Copied:
    """Memory that stays to be copied, and why."""

    pid: int
    start: int
    pages: int
    reason: str


@dataclass
class Rewritten:
    """What a rewrite did: bytes mapped, bytes of them found in existing extents, what is still copied, new digests."""

    mapped: int = 0
    shared: int = 0
    mappings: int = 0
    copied: list[Copied] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """Stored pages that follow one another: address, pages, offset of their bytes in the pages image."""

    start: int
    pages: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.pages * PAGE


@dataclass(frozen=True)
class _Piece:
    """A part of a mapping that is to be backed by memory files: [start, end) and the stored runs in it."""

    start: int
    end: int
    runs: tuple[_Run, ...]


def rewrite(
    images: Path,
    memory: Path,
    *,
    mount_point: str,
    existing: Callable[[str], Path | None] = lambda name: None,
    keep: Callable[[int], str | None] = lambda pid: None,
    progress: Callable[[int], None] = lambda done: None,
) -> Rewritten:
    """Rewrite the images in the folder ``images``; memory files go to the folder ``memory`` (on the same tmpfs).

    ``mount_point`` is where the container sees ``memory``; it must be one of the dump's mounts. ``existing`` finds an
    extent of another golden by its name, to be linked instead of written. ``keep`` gives the reason why a process'
    memory must be copied, or None. ``progress`` gets the bytes handled so far.

    The images stay restorable at every moment: each is replaced by a rename, in an order in which the old ones still
    fit the new; an interrupted rewrite must be discarded by the caller (the golden's staging folder). Raises
    IncompatibleError if the images' format is not the known one, VerificationError if they are damaged.
    """
    version = load(images / "inventory.img")["entries"][0]["img_version"]
    if version != IMAGE_VERSION:
        raise IncompatibleError(
            f"CRIU's images have format {version}, gpuckpt rewrites format {IMAGE_VERSION}",
            remedy="use a gpuckpt that knows this CRIU, or create with --mode copy",
        )
    files = load(images / "files.img", payload=True)
    writer = _Writer(memory, existing, progress, _mount_id(images, mount_point), mount_point, _largest_id(files))
    done = Rewritten()
    for path in sorted(images.glob("mm-*.img")):
        _rewrite_process(images, int(path.stem.partition("-")[2]), writer, keep, done)
    files["entries"] += writer.file_entries()
    save(images / "files.img", files)
    done.digests = writer.digests
    done.shared = writer.shared
    return done


def _rewrite_process(
    images: Path, pid: int, writer: _Writer, keep: Callable[[int], str | None], done: Rewritten
) -> None:
    pagemap = load(images / f"pagemap-{pid}.img", payload=True)
    mm = load(images / f"mm-{pid}.img", payload=True)
    runs = _runs(pagemap["entries"])
    reason = keep(pid)
    if reason is not None:
        if pages := sum(run.pages for run in runs):
            done.copied.append(Copied(pid, runs[0].start, pages, reason))
        return
    vmas: list[dict[str, Any]] = []
    moved: list[tuple[int, int]] = []
    source = images / f"pages-{pagemap['entries'][0]['pages_id']}.img"
    with _mapped(source) as stored, writer.process(pid) as small:
        queue = iter(runs)
        run = next(queue, None)
        for vma in mm["entries"][0]["vmas"]:
            inside: list[_Run] = []
            while run is not None and run.start < vma["end"]:
                if run.start < vma["start"]:
                    raise VerificationError(f"pagemap-{pid}.img has pages at {run.start:#x}, outside of all mappings")
                before, run = _cut(run, vma["end"])
                inside.append(before)
                run = run or next(queue, None)
            why = _unmappable(vma)
            pieces = _pieces(inside, vma) if why is None else []
            taken = {one.start for piece in pieces for one in piece.runs}
            for left in inside:
                if left.start not in taken:
                    done.copied.append(Copied(pid, left.start, left.pages, why or "a short run"))
            before_count = len(vmas)
            vmas += _split(vma, pieces, lambda piece: writer.store(piece, stored, small))
            if pieces:
                done.mappings += len(vmas) - before_count
                done.mapped += sum(one.pages for piece in pieces for one in piece.runs) * PAGE
                moved += [(one.start, one.end) for piece in pieces for one in piece.runs]
        if run is not None:
            raise VerificationError(f"pagemap-{pid}.img has pages at {run.start:#x}, outside of all mappings")
        if not moved:
            return
        mm["entries"][0]["vmas"] = vmas
        rest = _rest(runs, moved)
        fresh = source.with_suffix(".new")
        with fresh.open("wb") as output:
            for one in rest:
                output.write(stored[one.offset : one.offset + one.pages * PAGE])
    flags = pagemap["entries"][1].get("flags", 4) & ~2  # not lazily restorable: PE_LAZY would need a page server
    pagemap["entries"][1:] = [
        {"vaddr": one.start, "compat_nr_pages": 0, "flags": flags, "nr_pages": one.pages} for one in rest
    ]
    fresh.rename(source)
    save(images / f"pagemap-{pid}.img", pagemap)
    save(images / f"mm-{pid}.img", mm)


def _unmappable(vma: dict[str, Any]) -> str | None:
    """Why the pages of this mapping must be copied, or None if they may be mapped."""
    status, flags = vma["status"], vma["flags"]
    if status & _ODD:
        return "a stack, or memory of the kernel's making"
    if status & (_PLAIN | 1 << _FILE_PRIVATE) not in (_PLAIN, 1 << _REGULAR | 1 << _FILE_PRIVATE):
        return "shared memory"
    if flags & _MAP_GROWSDOWN:
        return "grows downwards"
    if flags & _MAP_LOCKED:
        return "locked in memory"
    if vma.get("madv", 0) & ~_ADVICE_KEPT:
        return "advice that holds for anonymous memory only"
    return None


def _runs(entries: Sequence[dict[str, Any]]) -> list[_Run]:
    """The stored runs of a page map, in order of their addresses, which is also that of their bytes."""
    found: list[_Run] = []
    offset = 0
    for entry in entries[1:]:
        pages = stored_pages(entry)
        if entry.get("in_parent") or entry.get("flags", 4) & 1:
            raise IncompatibleError("incremental dumps (pages in a parent image) cannot be rewritten")
        if pages:
            found.append(_Run(entry["vaddr"], pages, offset))
            offset += pages * PAGE
    return found


def _cut(run: _Run, at: int) -> tuple[_Run, _Run | None]:
    """The parts of a run before and after the address ``at`` (page maps do not stop at the edges of mappings)."""
    if run.end <= at:
        return run, None
    pages = (at - run.start) // PAGE
    return _Run(run.start, pages, run.offset), _Run(at, run.pages - pages, run.offset + pages * PAGE)


def _pieces(runs: Sequence[_Run], vma: dict[str, Any]) -> list[_Piece]:
    """Gather runs with small gaps between them into pieces worth a mapping; what is too short is left out.

    Pages that are not stored read as zeros in anonymous memory, but as the file in a private file mapping (a library's
    written data): there only runs without a gap make a piece.
    """
    gap = 0 if vma["status"] & 1 << _FILE_PRIVATE else _SMALLEST_GAP * PAGE
    groups: list[list[_Run]] = []
    for run in runs:
        if groups and run.start - groups[-1][-1].end <= gap:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [
        _Piece(group[0].start, group[-1].end, tuple(group))
        for group in groups
        if sum(run.pages for run in group) >= _SMALLEST_RUN
    ]


def _rest(runs: Sequence[_Run], moved: Sequence[tuple[int, int]]) -> list[_Run]:
    """What is left of ``runs`` without the ranges ``moved``; both are in order."""
    found: list[_Run] = []
    ranges = iter(moved)
    gone = next(ranges, None)
    for run in runs:
        part: _Run | None = run
        while part is not None:
            while gone is not None and gone[1] <= part.start:
                gone = next(ranges, None)
            if gone is None or gone[0] >= part.end:
                found.append(part)
                break
            head, tail = _cut(part, gone[0]) if gone[0] > part.start else (None, part)
            if head is not None:
                found.append(head)
            part = _cut(tail, gone[1])[1] if tail is not None else None
    return found


def _split(
    vma: dict[str, Any], pieces: Sequence[_Piece], store: Callable[[_Piece], list[tuple[int, int, int, int]]]
) -> Iterator[dict[str, Any]]:
    """The mapping cut into unchanged parts and parts backed by memory files (start, end, file id, offset)."""
    at = vma["start"]
    for piece in pieces:
        if at < piece.start:
            yield _part(vma, at, piece.start)
        for start, end, file_id, offset in store(piece):
            backed = _part(vma, start, end)
            backed["status"] = 1 << _REGULAR | 1 << _FILE_PRIVATE
            backed["flags"] = vma["flags"] & ~_MAP_ANONYMOUS
            backed["shmid"], backed["pgoff"], backed["fd"] = file_id, offset, -1
            backed["fdflags"] = os.O_RDONLY
            yield backed
        at = piece.end
    if at < vma["end"]:
        yield _part(vma, at, vma["end"])


def _part(vma: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    part = dict(vma) | {"start": start, "end": end}
    if vma["status"] & 1 << _FILE_PRIVATE:
        part["pgoff"] = vma["pgoff"] + start - vma["start"]
    return part


class _Writer:
    """Writes memory files and keeps the table of those that the images will name."""

    def __init__(
        self,
        memory: Path,
        existing: Callable[[str], Path | None],
        progress: Callable[[int], None],
        mount_id: int,
        mount_point: str,
        last_id: int,
    ) -> None:
        self._memory = memory
        self._existing = existing
        self._progress = progress
        self._mount_id = mount_id
        self._mount_point = mount_point
        self._next_id = last_id + 1
        self._ids: dict[str, int] = {}
        self.digests: dict[str, str] = {}
        self.shared = 0
        self._done = 0

    @contextlib.contextmanager
    def process(self, pid: int) -> Iterator[_Small]:
        small = _Small(self._memory / f"{pid}.small")
        try:
            yield small
        finally:
            small.close()
        if small.size:
            self._seal(small.path)
            self.digests[small.path.name] = small.digest
        else:
            small.path.unlink()

    def store(self, piece: _Piece, pages: mmap.mmap, small: _Small) -> list[tuple[int, int, int, int]]:
        """Store a piece; returns the parts it became: start, end, file id, offset in the file."""
        parts: list[tuple[int, int, int, int]] = []
        body = -(-piece.start // HUGE) * HUGE
        body_end = piece.end // HUGE * HUGE
        if body >= body_end:
            parts.append(self._small(piece, piece.start, piece.end, pages, small))
        else:
            if piece.start < body:
                parts.append(self._small(piece, piece.start, body, pages, small))
            parts += self._extents(piece, body, body_end, pages)
            if body_end < piece.end:
                parts.append(self._small(piece, body_end, piece.end, pages, small))
        return parts

    def _small(self, piece: _Piece, start: int, end: int, pages: mmap.mmap, small: _Small) -> tuple[int, int, int, int]:
        offset = small.append(_content(piece, start, end, pages))
        self._advance(end - start)
        return start, end, self._id(small.path.name), offset

    def _extents(self, piece: _Piece, start: int, end: int, pages: mmap.mmap) -> Iterator[tuple[int, int, int, int]]:
        begin = start
        for at in range(start, end, HUGE):
            after = at + HUGE
            # The last page of a block decides whether an extent ends with it: content, not position, makes the cut.
            mark = blake3(_content(piece, after - PAGE, after, pages)).digest()[0]
            if after == end or after - begin >= _LONGEST or mark % _CUT_ONE_IN == 0:
                yield begin, after, self._extent(_content(piece, begin, after, pages)), 0
                self._advance(after - begin)
                begin = after

    def _extent(self, content: bytes | bytearray | memoryview) -> int:
        digest = blake3(content, max_threads=blake3.AUTO).hexdigest()
        name = f"{digest[:40]}.extent"
        if name in self._ids:
            self.shared += len(content)
            return self._ids[name]
        path = self._memory / name
        found = self._existing(name)
        if found is not None and found.stat().st_size == len(content):
            os.link(found, path)
            self.shared += len(content)
        else:
            with path.open("wb") as file:
                # The size first: a tmpfs with huge=within_size takes huge pages only inside it.
                file.truncate(len(content))
                file.write(content)
            self._seal(path)
        self.digests[name] = digest
        return self._id(name)

    @staticmethod
    def _seal(path: Path) -> None:
        path.chmod(0o400)

    def _id(self, name: str) -> int:
        if name not in self._ids:
            self._ids[name] = self._next_id
            self._next_id += 1
        return self._ids[name]

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done)

    def file_entries(self) -> list[dict[str, Any]]:
        """The memory files as entries of files.img: regular, read-only, with the exact size and mode CRIU checks."""
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
                    "name": f"{self._mount_point}/{name}",
                    "mnt_id": self._mount_id,
                    "size": (self._memory / name).stat().st_size,
                    "mode": 0o100400,
                },
            }
            for name, file_id in self._ids.items()
        ]


class _Small:
    """The file of a process' shorter runs, page after page."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file = path.open("xb")
        self._hasher = blake3()

    def append(self, content: bytes | bytearray | memoryview) -> int:
        offset = self.size
        self._file.write(content)
        self._hasher.update(content)
        self.size += len(content)
        return offset

    def close(self) -> None:
        self._file.close()

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()


def _content(piece: _Piece, start: int, end: int, pages: mmap.mmap) -> bytes | bytearray | memoryview:
    """The bytes of [start, end), a part of ``piece``; pages that are not stored are zeros."""
    for run in piece.runs:
        if run.start <= start and end <= run.end:
            offset = run.offset + start - run.start
            return memoryview(pages)[offset : offset + end - start]
    content = bytearray(end - start)
    for run in piece.runs:
        low, high = max(start, run.start), min(end, run.end)
        if low < high:
            offset = run.offset + low - run.start
            content[low - start : high - start] = pages[offset : offset + high - low]
    return content


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file:
        # An empty file cannot be mapped; one page of anonymous memory stands for it and is never read.
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if path.stat().st_size else mmap.mmap(-1, PAGE)
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):
            view.close()


def _mount_id(images: Path, mount_point: str) -> int:
    for path in images.glob("mountpoints-*.img"):
        for entry in load(path)["entries"]:
            if entry["mountpoint"] == mount_point:
                return int(entry["mnt_id"])
    raise VerificationError(
        f"the dumped container has no mount at {mount_point}", remedy="create the golden anew with this gpuckpt"
    )


def _largest_id(files: dict[str, Any]) -> int:
    return max((int(entry["id"]) for entry in files["entries"]), default=0)
