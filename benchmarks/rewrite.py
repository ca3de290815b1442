"""How fast a dump is rewritten for mapping: bytes of a made-up dump per second, in a tmpfs like the store's.

    python -m benchmarks.rewrite --gib 2 --runs 5

The dump has one large process (weights: runs of up to 512 MiB, a quarter of them zeros, as a server's huge pages
leave them) and one with many short runs. It is made anew for every run, because a rewrite takes it apart. Written to
build/bench/rewrite.json: GB/s (10⁹ bytes of the dump's pages images) of every run and their median. Blocks of zeros
(22 % of the dump) count as bytes although they are not written: the speed of writing is that much lower.

On a virtual machine whose host takes free memory back, the first touch of a page costs far more than its copy: memory
files are then written at the speed at which the host gives pages, and the runs vary with what is left of the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.statistics import Summary
from gpuckpt import proc
from gpuckpt.criu.images import PAGE, save
from gpuckpt.criu.pages import HUGE
from gpuckpt.criu.rewrite import rewrite

MOUNT = "/run/gpuckpt-memory"
OUTPUT = environment.ROOT / "build" / "bench" / "rewrite.json"
_OWNER = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes, mounted as the store's is."""
    folder.mkdir(mode=0o700, parents=True)
    try:
        options = f"huge=within_size,size={size},mode=700,nosuid,nodev"
        proc.run(["mount", "-t", "tmpfs", "-o", options, "gpuckpt-benchmark", folder])
        try:
            yield folder
        finally:
            proc.run(["umount", folder])
    finally:
        folder.rmdir()


def build(images: Path, size: int) -> int:
    """Write the images of two processes with ``size`` bytes of memory; returns the bytes of their pages images."""
    images.mkdir()
    block = os.urandom(HUGE)
    large: list[tuple[int, int]] = []
    address, left = 0x7F0000003000, size * 9 // 10
    while left >= HUGE:
        length = min(left, 512 << 20) // PAGE * PAGE
        large.append((address, length))
        address += length + (64 << 20)
        left -= length
    short = [(0x7E0000000000 + index * (1 << 20), 96 * PAGE) for index in range(size // 10 // (96 * PAGE))]
    total = sum(_process(images, pid, runs, block) for pid, runs in ((1, large), (2, short)))
    regular = {"id": 1, "flags": 0, "pos": 0, "fown": _OWNER, "name": "/lib/some.so"}
    save(images / "files.img", {"magic": "FILES", "entries": [{"type": "REG", "id": 1, "reg": regular}]})
    save(images / "inventory.img", {"magic": "INVENTORY", "entries": [{"img_version": 2}]})
    mount = {"fstype": 0, "mnt_id": 7, "root_dev": 1, "parent_mnt_id": 1, "flags": 0, "root": "/", "source": "x",
             "mountpoint": MOUNT, "options": ""}  # fmt: skip
    save(images / "mountpoints-1.img", {"magic": "MNTS", "entries": [mount]})
    return total


def _process(images: Path, pid: int, runs: list[tuple[int, int]], block: bytes) -> int:
    total = 0
    vmas: list[dict[str, Any]] = []
    pagemap: list[dict[str, Any]] = [{"pages_id": pid}]
    zeros = bytes(HUGE)
    with (images / f"pages-{pid}.img").open("wb", buffering=0) as pages:
        for start, length in runs:
            vmas.append({"start": start, "end": start + length, "pgoff": 0, "shmid": 0, "prot": 3, "flags": 0x22,
                         "status": 513, "fd": -1, "madv": 0})  # fmt: skip
            # CRIU writes an entry for each MiB, what goes through a pipe at once.
            pagemap += [
                {"vaddr": at, "compat_nr_pages": 0, "flags": 4, "nr_pages": min(1 << 20, start + length - at) // PAGE}
                for at in range(start, start + length, 1 << 20)
            ]
            for done in range(0, length, HUGE):
                count = min(HUGE, length - done)
                empty = count == HUGE and 4 * done < length
                # Blocks differ from one another in their first bytes only; a digest does not mind.
                stamp = b"" if empty else (total + done + 1).to_bytes(8, "big")
                body = zeros if empty else block
                pages.write(stamp + body[: count - len(stamp)])
            total += length
    save(images / f"pagemap-{pid}.img", {"magic": "PAGEMAP", "entries": pagemap})
    names = "start_code end_code start_data end_data start_stack start_brk brk arg_start arg_end env_start env_end"
    mm: dict[str, Any] = {f"mm_{name}": 0 for name in names.split()}
    mm |= {"exe_file_id": 1, "mm_saved_auxv": [0, 0], "vmas": vmas}
    save(images / f"mm-{pid}.img", {"magic": "MM", "entries": [mm]})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast is a dump rewritten for mapping?")
    parser.add_argument("--gib", type=float, default=2, help="memory of the made-up dump (%(default)s)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/run/gpuckpt-rewrite-benchmark"))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    size = int(arguments.gib * (1 << 30))
    rates: list[float] = []
    with tmpfs(arguments.folder, size * 5 // 2) as folder:
        for _ in range(arguments.runs):
            images, memory = folder / "images", folder / "memory"
            total = build(images, size)
            memory.mkdir()
            began = time.monotonic_ns()
            done = rewrite(images, memory, mount_point=MOUNT)
            seconds = (time.monotonic_ns() - began) / 1e9
            rates.append(total / seconds / 1e9)
            written = sum(path.stat().st_blocks * 512 for path in memory.iterdir())
            print(f"{rates[-1]:.2f} GB/s: {total / 1e9:.2f} GB in {seconds:.2f} s, {written / 1e9:.2f} GB written")
            shutil.rmtree(images)
            shutil.rmtree(memory)
    result: dict[str, Any] = {
        "benchmark": "rewrite",
        "environment": environment.machine(),
        "dump_bytes": total,
        "zero_bytes": done.zeros,
        "memory_file_bytes": written,
        "mappings": done.mappings,
        "gb_per_s": Summary(tuple(rates)).as_dict(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    zeros = f"{done.zeros / total:.0%} of the bytes are zeros, counted but not written"
    print(f"median {result['gb_per_s']['p50']:.2f} GB/s of {len(rates)} runs ({zeros}); {arguments.output}")


if __name__ == "__main__":
    main()
