"""Rewritten images decode to the same memory, byte for byte."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuckpt.criu.hot import Pages, keep_copied
from gpuckpt.criu.images import PAGE, load, save, stored_pages
from gpuckpt.criu.pages import HUGE
from gpuckpt.criu.rewrite import rewrite
from gpuckpt.errors import IncompatibleError, VerificationError
from tests.property.decoding import MAP_ANONYMOUS, contents

MOUNT = "/run/gpuckpt-memory"
ANONYMOUS, FILE, SHARED, STACK, HEAP = 513, 65, 129, 517, 545
SHADOW_STACK, PLUGIN = 513 | 1 << 15, 513 | 1 << 27  # status bits that newer CRIUs use
GROWSDOWN, LOCKED, NORESERVE, HUGETLB = 0x100, 0x2000, 0x4000, 0x40000
WIPE_ON_FORK = 1 << 18


@dataclass(frozen=True)
class Vma:
    """A made-up mapping: pages, kind, odd flags, and the (begin, length, byte) of its stored runs.

    Byte 0 is a run of zeros, 1 one whose second half is zeros, others hold different pages.
    """

    pages: int
    gap: int
    status: int
    flags: int
    advice: int
    runs: tuple[tuple[int, int, int], ...]

    @property
    def mappable(self) -> bool:
        """Whether a private mapping of a file may take its place; everything that is not known may not."""
        return (
            self.status in (ANONYMOUS, HEAP, FILE)
            and not self.flags & (GROWSDOWN | LOCKED | HUGETLB)
            and not self.advice & WIPE_ON_FORK
        )


@st.composite
def vmas(draw: st.DrawFn) -> Vma:
    pages = draw(st.one_of(st.integers(1, 40), st.integers(500, 1600)))
    runs: list[tuple[int, int, int]] = []
    at = draw(st.integers(0, pages))
    while at < pages and len(runs) < 6:
        length = draw(st.one_of(st.integers(1, 12), st.integers(1, pages)))
        length = min(length, pages - at)
        runs.append((at, length, draw(st.integers(0, 3))))
        at += length + draw(st.one_of(st.integers(0, 20), st.integers(0, pages)))
    status = draw(st.sampled_from([*[ANONYMOUS] * 4, HEAP, FILE, SHARED, STACK, SHADOW_STACK, PLUGIN]))
    flags = draw(st.sampled_from([0, 0, 0, 0, NORESERVE, LOCKED, *([] if status == FILE else [GROWSDOWN, HUGETLB])]))
    flags |= {FILE: 0x2, SHARED: 0x1}.get(status, 0x22)
    advice = draw(st.sampled_from([0, 0, 1 << 15, WIPE_ON_FORK]))
    return Vma(pages, draw(st.integers(0, 600)), status, flags, advice, tuple(runs))


def build(folder: Path, processes: list[list[Vma]], base: int, library: int = 1) -> None:
    """Write images of processes with these mappings, beginning at page ``base``; ``library`` is the mapped file's id.

    Beside it there is what no rewrite may touch: a memfd, a ghost file, shared memory.
    """
    owner = _file(1, "")["reg"]["fown"]
    memfd = {"id": library + 1, "flags": 2, "pos": 0, "fown": owner, "inode_id": 9}
    ghost = _file(library + 2, "/tmp/deleted (ghost)")
    files: list[dict[str, Any]] = [
        _file(library, "/lib/some.so"), {"type": "MEMFD", "id": library + 1, "memfd": memfd}, ghost
    ]  # fmt: skip
    for number, content in ((1, b"shared memory"), (2, bytes(3 * PAGE))):
        entry = {"vaddr": 0, "compat_nr_pages": 0, "flags": 4, "nr_pages": -(-len(content) // PAGE)}
        pages_id = 1000 + number
        save(folder / f"pagemap-shmem-{number}.img", {"magic": "PAGEMAP", "entries": [{"pages_id": pages_id}, entry]})
        (folder / f"pages-{pages_id}.img").write_bytes(content.ljust(entry["nr_pages"] * PAGE, b"\0"))
    (folder / "ghost-file-3.img").write_bytes(b"raw")
    for index, mappings in enumerate(processes, 1):
        entries: list[dict[str, Any]] = []
        pagemap: list[dict[str, Any]] = [{"pages_id": index}]
        address = base * PAGE
        with (folder / f"pages-{index}.img").open("wb") as pages:
            for number, vma in enumerate(mappings):
                address += vma.gap * PAGE
                entries.append(
                    {
                        "start": address, "end": address + vma.pages * PAGE, "pgoff": 0,
                        "shmid": library * (vma.status == FILE),
                        "prot": 3, "flags": vma.flags, "status": vma.status, "fd": -1, "madv": vma.advice,
                    }
                )  # fmt: skip
                for begin, length, value in vma.runs:
                    pagemap.append(
                        {"vaddr": address + begin * PAGE, "compat_nr_pages": 0, "flags": 4, "nr_pages": length}
                    )
                    for page in range(length):
                        # Zero pages, and the same few contents again and again: both are common.
                        if value == 0 or (value == 1 and 2 * page > length):
                            pages.write(bytes(PAGE))
                        else:
                            pages.write(bytes([value]) * (PAGE - 8) + (number + page).to_bytes(8, "big"))
                address += vma.pages * PAGE
        save(folder / f"pagemap-{index}.img", {"magic": "PAGEMAP", "entries": _merged(pagemap)})
        mm = {"mm_start_code": 0, "mm_end_code": 0, "mm_start_data": 0, "mm_end_data": 0, "mm_start_stack": 0,
              "mm_start_brk": 0, "mm_brk": 0, "mm_arg_start": 0, "mm_arg_end": 0, "mm_env_start": 0, "mm_env_end": 0,
              "exe_file_id": 1, "mm_saved_auxv": [0, 0], "vmas": entries}  # fmt: skip
        save(folder / f"mm-{index}.img", {"magic": "MM", "entries": [mm]})
    save(folder / "files.img", {"magic": "FILES", "entries": files})
    save(folder / "inventory.img", {"magic": "INVENTORY", "entries": [{"img_version": 2}]})
    mount = {"fstype": 0, "mnt_id": 7, "root_dev": 1, "parent_mnt_id": 1, "flags": 0, "root": "/", "source": "x",
             "mountpoint": MOUNT, "options": ""}  # fmt: skip
    save(folder / "mountpoints-1.img", {"magic": "MNTS", "entries": [mount]})


def _merged(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Page maps do not stop at the edges of mappings: neighbouring runs become one entry."""
    found = entries[:1]
    for entry in entries[1:]:
        last = found[-1]
        if "vaddr" in last and last["vaddr"] + last["nr_pages"] * PAGE == entry["vaddr"]:
            last["nr_pages"] += entry["nr_pages"]
        else:
            found.append(entry)
    return found


def _file(number: int, name: str) -> dict[str, Any]:
    owner = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}
    regular = {"id": number, "flags": 0, "pos": 0, "fown": owner, "name": name}
    return {"type": "REG", "id": number, "reg": regular}


def decoded(folder: Path, memory: Path, pid: int) -> dict[int, bytes]:
    opened: dict[str, bytes] = {}

    def page(name: str, offset: int) -> bytes | None:
        if not name.startswith(f"{MOUNT}/"):
            return b"L" * PAGE  # a library: not zeros, so that a page wrongly taken from it is seen
        if name not in opened:
            opened[name] = (memory / name[len(MOUNT) + 1 :]).read_bytes()
        content = opened[name]
        assert offset + PAGE <= len(content), f"{name} ends before {offset:#x}"
        return content[offset : offset + PAGE]

    return dict(contents(folder, pid, page))


@settings(max_examples=40)
@given(
    st.lists(st.lists(vmas(), min_size=1, max_size=6), min_size=1, max_size=4),
    st.one_of(st.integers(1, 5000), st.integers(1 << 30, 1 << 34)),
    st.sampled_from([1, 77, (1 << 31) - 5]),
    st.sets(st.integers(1, 4)),
    st.randoms(use_true_random=False),
)
def test_the_same_memory(
    processes: list[list[Vma]], base: int, library: int, kept: set[int], chance: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as name:
        images, memory = Path(name, "images"), Path(name, "memory")
        images.mkdir()
        memory.mkdir()
        build(images, processes, base, library)
        before = [decoded(images, memory, pid) for pid in range(1, len(processes) + 1)]
        stored = sum(stored_pages(row) for path in images.glob("pagemap-[0-9]*") for row in load(path)["entries"][1:])
        others = _others(images, kept)
        entries = load(images / "files.img", payload=True)["entries"]
        mappings = {pid: _mappings(images, pid) for pid in range(1, len(processes) + 1)}
        done = rewrite(images, memory, mount_point=MOUNT, keep=lambda pid: "must be copied" if pid in kept else None)
        assert _others(images, kept) == others, "what does not belong to a mapped process is left as it is"
        files = load(images / "files.img", payload=True)["entries"]
        assert files[: len(entries)] == entries
        backing = _check_files(files[len(entries) :], entries, memory)
        assert not any((memory / f"{pid}.small").exists() for pid in kept)
        after = [decoded(images, memory, pid) for pid in range(1, len(processes) + 1)]
        assert after == before
        assert done.mapped + done.zeros + sum(one.pages for one in done.copied) * PAGE == stored * PAGE
        named: set[int] = set()
        for pid, made_up in enumerate(processes, 1):
            allowed = [vma.mappable and pid not in kept for vma in made_up]
            named |= _check_pieces(mappings[pid], _mappings(images, pid), allowed, backing)
        assert named == set(backing), "a file that no mapping names"
        _check_congruent(images)
        assert not list(images.glob("*.new"))
        assert {path.name for path in memory.iterdir()} == set(done.digests)
        _check_hot(images, memory, before, chance)


def _check_hot(images: Path, memory: Path, before: list[dict[int, bytes]], chance: random.Random) -> None:
    """Whatever pages are said to be written, the memory is the same, and these are copied once."""
    hot: Pages = {}
    for pid, pages in enumerate(before, 1):
        chosen = sorted(chance.sample(sorted(pages), len(pages) // 3))
        merged: list[tuple[int, int]] = []
        for address in chosen:
            if merged and merged[-1][1] == address:
                merged[-1] = (merged[-1][0], address + PAGE)
            else:
                merged.append((address, address + PAGE))
        if merged:
            hot[pid] = tuple(merged)
    rest = {pid: _stored(images, pid) for pid in range(1, len(before) + 1)}
    copied = keep_copied(images, memory, hot, mount_point=MOUNT)
    assert [decoded(images, memory, pid) for pid in range(1, len(before) + 1)] == before
    for pid, addresses in rest.items():
        now = _stored(images, pid)
        assert addresses <= now and (len(now) - len(addresses)) * PAGE == copied.get(pid, 0)
        wanted = {page for start, end in hot.get(pid, ()) for page in range(start, end, PAGE)}
        assert now - addresses <= wanted
        backed = {page for page in wanted if _is_backed(images, pid, page)}
        assert backed <= now
    assert not list(images.glob("*.new"))


def _stored(images: Path, pid: int) -> set[int]:
    entries = load(images / f"pagemap-{pid}.img")["entries"]
    assert (images / f"pages-{entries[0]['pages_id']}.img").stat().st_size == sum(
        stored_pages(entry) * PAGE for entry in entries[1:]
    )
    return {entry["vaddr"] + at * PAGE for entry in entries[1:] for at in range(stored_pages(entry))}


def _is_backed(images: Path, pid: int, page: int) -> bool:
    """Whether the page is mapped from a memory file."""
    ours = {
        entry["id"]
        for entry in load(images / "files.img")["entries"]
        if entry.get("reg") and entry["reg"]["name"].startswith(f"{MOUNT}/")
    }
    return any(
        vma["start"] <= page < vma["end"] and vma["status"] & 64 and vma["shmid"] in ours
        for vma in _mappings(images, pid)
    )


def _others(images: Path, kept: set[int]) -> dict[str, bytes]:
    """The images that a rewrite has nothing to do with."""
    ours = {f"{kind}-{pid}.img" for kind in ("mm", "pagemap", "pages") for pid in range(1, 5) if pid not in kept}
    return {path.name: path.read_bytes() for path in images.iterdir() if path.name not in {*ours, "files.img"}}


def _mappings(images: Path, pid: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load(images / f"mm-{pid}.img", payload=True)["entries"][0]["vmas"]
    return found


def _check_files(added: list[dict[str, Any]], known: list[dict[str, Any]], memory: Path) -> dict[int, int]:
    """New entries of files.img are what CRIU checks them for; returns the sizes of the files by their ids."""
    for entry in added:
        found = entry["reg"]
        path = memory / Path(found["name"]).name
        status = path.stat()
        assert (entry["type"], found["name"]) == ("REG", f"{MOUNT}/{path.name}")
        assert (found["size"], found["mode"]) == (status.st_size, status.st_mode)
        assert found["mode"] == 0o100400 and found["size"] > 0 and found["size"] % PAGE == 0
        assert (found["flags"], found["pos"], found["mnt_id"], found["id"]) == (os.O_RDONLY, 0, 7, entry["id"])
    sizes = {entry["id"]: int(entry["reg"]["size"]) for entry in added}
    assert len(sizes) == len(added) and not sizes.keys() & {entry["id"] for entry in known}
    assert {Path(entry["reg"]["name"]).name for entry in added} == {path.name for path in memory.iterdir()}
    return sizes


def _check_pieces(
    before: list[dict[str, Any]], after: list[dict[str, Any]], mappable: list[bool], backing: dict[int, int]
) -> set[int]:
    """What became of each mapping tiles it: parts of it as they were, and private mappings of the memory files.

    ``backing`` has the sizes of the files by their ids; returns the ids that are named. A mapping that is not mappable
    is there whole.
    """
    named: set[int] = set()
    parts = iter(after)
    for vma, allowed in zip(before, mappable, strict=True):
        at = vma["start"]
        while at < vma["end"]:
            part = next(parts)
            assert part["start"] == at < part["end"] <= vma["end"]
            size, at = part["end"] - part["start"], part["end"]
            edges = {"start": part["start"], "end": part["end"]}
            if part["shmid"] not in backing:
                moved = part["start"] - vma["start"] if vma["status"] == FILE else 0
                assert part == vma | edges | {"pgoff": vma["pgoff"] + moved}
                assert allowed or size == vma["end"] - vma["start"]
                continue
            assert allowed, f"status {vma['status']:#x}, flags {vma['flags']:#x}: this must be copied"
            named.add(part["shmid"])
            assert part["pgoff"] % PAGE == 0 and part["pgoff"] + size <= backing[part["shmid"]]
            made = {"status": FILE, "flags": vma["flags"] & ~MAP_ANONYMOUS, "fd": -1, "fdflags": os.O_RDONLY}
            assert part == vma | edges | made | {"shmid": part["shmid"], "pgoff": part["pgoff"]}
    assert next(parts, None) is None
    return named


@pytest.mark.parametrize(
    ("status", "flags"),
    [(ANONYMOUS, 0x22 | LOCKED), (FILE, 0x2 | LOCKED), (ANONYMOUS, 0x22 | HUGETLB), (HEAP, 0x22 | GROWSDOWN),
     (SHADOW_STACK, 0x22), (PLUGIN, 0x22), (FILE | 1 << 27, 0x2)],
)  # fmt: skip
def test_what_is_not_known_to_be_mappable_is_copied(tmp_path: Path, status: int, flags: int) -> None:
    images, memory = tmp_path / "images", tmp_path / "memory"
    images.mkdir()
    memory.mkdir()
    build(images, [[Vma(1024, 0, status, flags, 0, ((0, 1024, 2),))]], base=512)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    done = rewrite(images, memory, mount_point=MOUNT)
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    ((pages, reason),) = [(one.pages, one.reason) for one in done.copied]
    assert pages == 1024 and reason and (done.mapped, done.zeros, done.mappings) == (0, 0, 0)
    assert not list(memory.iterdir())


def _check_congruent(images: Path) -> None:
    """Extents are mapped at addresses congruent with their offsets modulo 2 MiB."""
    entries = load(images / "files.img")["entries"]
    names = {entry["id"]: entry["reg"]["name"] for entry in entries if "reg" in entry}
    for path in images.glob("mm-*.img"):
        for vma in load(path)["entries"][0]["vmas"]:
            if names.get(vma["shmid"], "").endswith(".extent"):
                assert vma["start"] % HUGE == vma["pgoff"] % HUGE


def test_blocks_of_zeros_are_stored_nowhere(tmp_path: Path) -> None:
    images, memory = tmp_path / "images", tmp_path / "memory"
    images.mkdir()
    memory.mkdir()
    # Of a library's own pages zeros must come back too: what is not stored there reads as the file.
    build(images, [[Vma(2048, 0, ANONYMOUS, 0x22, 0, ((0, 2048, 1),)), Vma(1024, 0, FILE, 2, 0, ((0, 1024, 0),))]], 512)
    before = decoded(images, memory, 1)
    done = rewrite(images, memory, mount_point=MOUNT)
    assert done.zeros == 2 << 20, "the block with the middle page is stored, the one behind it is not"
    assert decoded(images, memory, 1) == before
    assert sum(path.stat().st_size for path in memory.iterdir()) == done.mapped == (6 + 4) << 20


def test_equal_memory_is_stored_once(tmp_path: Path) -> None:
    big = Vma(1024, 0, ANONYMOUS, 0x22, 0, ((0, 1024, 2),))
    images, memory = tmp_path / "images", tmp_path / "memory"
    images.mkdir()
    memory.mkdir()
    build(images, [[big], [big]], base=512)
    first = rewrite(images, memory, mount_point=MOUNT)
    assert first.shared == 4 << 20
    other, elsewhere = tmp_path / "other", tmp_path / "elsewhere"
    other.mkdir()
    elsewhere.mkdir()
    build(other, [[big]], base=512 * 9)

    def link(name: str, size: int, path: Path) -> bool:
        assert (memory / name).stat().st_size == size
        path.hardlink_to(memory / name)
        return True

    second = rewrite(other, elsewhere, mount_point=MOUNT, link=link)
    assert second.shared == 4 << 20
    assert all(path.stat().st_nlink == 2 for path in elsewhere.glob("*.extent"))


def test_a_process_that_must_be_copied_stays_as_it_is(tmp_path: Path) -> None:
    images, memory = tmp_path / "images", tmp_path / "memory"
    images.mkdir()
    memory.mkdir()
    build(images, [[Vma(64, 0, ANONYMOUS, 0x22, 0, ((0, 64, 1),))]], base=1)
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    done = rewrite(images, memory, mount_point=MOUNT, keep=lambda pid: "an allocator that counts on zeros")
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
    assert [(one.pages, one.reason) for one in done.copied] == [(64, "an allocator that counts on zeros")]


def _newer_field(path: Path) -> None:
    """Add a field that is not known here to the first message of an image: number 500, the value 1."""
    data = path.read_bytes()
    size = int.from_bytes(data[8:12], "little")
    extra = b"\xa0\x1f\x01"
    path.write_bytes(
        data[:8] + (size + len(extra)).to_bytes(4, "little") + data[12 : 12 + size] + extra + data[12 + size :]
    )


@pytest.mark.parametrize(
    ("damage", "error"),
    [("version", IncompatibleError), ("mount", IncompatibleError), ("outside", VerificationError),
     ("mm-1.img", IncompatibleError), ("pagemap-1.img", IncompatibleError), ("files.img", IncompatibleError),
     ("magic", IncompatibleError), ("short", VerificationError), ("same pages", IncompatibleError),
     ("no space", OSError)],
)  # fmt: skip
def test_images_that_are_not_understood(tmp_path: Path, damage: str, error: type[Exception]) -> None:
    images, memory = tmp_path / "images", tmp_path / "memory"
    images.mkdir()
    memory.mkdir()
    build(images, [[Vma(1024, 0, ANONYMOUS, 0x22, 0, ((0, 1024, 2),))]] * 2, base=1)
    if damage.endswith(".img"):
        _newer_field(images / damage)
    if damage == "magic":
        path = images / "mm-1.img"
        path.write_bytes(path.read_bytes()[:4] + b"new!" + path.read_bytes()[8:])
    if damage == "short":
        with (images / "pages-1.img").open("r+b") as pages:
            pages.truncate(5 * PAGE)
    if damage == "same pages":
        pagemap = load(images / "pagemap-2.img", payload=True)
        pagemap["entries"][0]["pages_id"] = 1
        save(images / "pagemap-2.img", pagemap)
    if damage == "version":
        save(images / "inventory.img", {"magic": "INVENTORY", "entries": [{"img_version": 3}]})
    if damage == "outside":
        pagemap = load(images / "pagemap-1.img", payload=True)
        pagemap["entries"][1]["vaddr"] += 65 * PAGE
        save(images / "pagemap-1.img", pagemap)
    before = {path.name: path.read_bytes() for path in images.iterdir()}

    def room(count: int) -> None:
        if damage == "no space" and any(memory.iterdir()):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(error):
        rewrite(images, memory, mount_point="/elsewhere" if damage == "mount" else MOUNT, room=room)
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before
