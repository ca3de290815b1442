"""What the processes of a dump have in memory, read from its images as a restore would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gpuckpt.criu.images import PAGE, load, stored_pages

FILE_PRIVATE, MAP_ANONYMOUS = 1 << 6, 0x20


def contents(images: Path, pid: int, file_page: Callable[[str, int], bytes | None]) -> Iterator[tuple[int, bytes]]:
    """Every page of the process that is not all zeros: its address and its bytes, in order of addresses.

    ``file_page`` gives the page of a mapped file: its path inside the container and an offset; None for a file whose
    content does not matter (it is the same before and after a rewrite). Shared memory is left out.
    """
    names = {entry["id"]: entry["reg"]["name"] for entry in load(images / "files.img")["entries"] if entry.get("reg")}
    pagemap = load(images / f"pagemap-{pid}.img")["entries"]
    stored = (images / f"pages-{pagemap[0]['pages_id']}.img").read_bytes()
    own: dict[int, bytes] = {}
    offset = 0
    for entry in pagemap[1:]:
        for index in range(stored_pages(entry)):
            own[entry["vaddr"] + index * PAGE] = stored[offset : offset + PAGE]
            offset += PAGE
    zeros = bytes(PAGE)
    for vma in load(images / f"mm-{pid}.img")["entries"][0]["vmas"]:
        # CRIU hands the flags to mmap(2) as they are: with MAP_ANONYMOUS the kernel does not look at the file.
        file = vma["status"] & FILE_PRIVATE and not vma["flags"] & MAP_ANONYMOUS
        name = names.get(vma["shmid"]) if file else None
        for address in range(vma["start"], vma["end"], PAGE):
            page = own.get(address)
            if page is None and name is not None:
                page = file_page(name, vma["pgoff"] + address - vma["start"])
            if page is not None and page != zeros:
                yield address, page
