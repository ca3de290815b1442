"""Which processes of a dump could drop or grow mapped memory and count on zeros where a file's bytes would be.

Private anonymous memory reads as zeros after madvise(2) with MADV_DONTNEED, MADV_DONTNEED_LOCKED or
MADV_GUARD_INSTALL, and so does what mremap(2) adds to it. A private mapping of a memory file reads as the file instead,
and past the file's end it kills (SIGBUS). So a process is only mapped if the kernel refuses it these calls, for each of
its threads, in every ABI of the machine, and userfaultfd(2) and io_uring, which do the same without them. The evidence
is in the dump: the filters that the threads were frozen with.

That refusal is enough was looked up in the sources of what uses these calls. None of them misbehaves silently, so no
library has to be looked for in a process:

- glibc: malloc_trim, heaps of other arenas and stacks of ended threads do not look at madvise's answer, and never count
  on zeros after it (calloc takes the high-water mark ``mprotect_size`` for dirty); realloc copies when mremap fails.
- musl: the answer is not used; calloc looks at the memory; realloc copies when mremap fails.
- jemalloc: tries MADV_DONTNEED at its start and clears memory itself where that does not work; reports it on stderr.
- mimalloc: purged memory stays marked as dirty, which calloc clears. gperftools' and Google's tcmalloc: calloc always
  clears.
- Go: falls back from madvise to mapping anew; spans are cleared when they are used again (``needzero``).
- V8, PartitionAlloc: discarding promises no zeros, and a failure is checked: it would end the server loudly while the
  golden is made. What must be zeros is mapped anew. OpenJDK, CoreCLR, mono: uncommit by mapping anew; answers of
  madvise are not used, nor are zeros expected of it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuckpt.criu import seccomp_filter
from gpuckpt.criu.images import load
from gpuckpt.criu.seccomp_filter import Call
from gpuckpt.errors import GpuckptError

# Advice (linux/mman.h): DONTNEED, DONTNEED_LOCKED, GUARD_INSTALL.
DROPPING = (4, 24, 102)
# By the machine type in core-PID.img: AUDIT_ARCH_* (linux/audit.h), numbers of madvise, process_madvise, mremap,
# userfaultfd and io_uring_setup. A process of the machine can make the calls of every one of its ABIs, whatever it was
# compiled for.
_X32 = 0x40000000
_TSYNC = 1  # SECCOMP_FILTER_FLAG_TSYNC
_ABIS = {
    "X86_64": (
        (0xC000003E, 28, 440, 25, 323, 425),
        (0xC000003E, 28 | _X32, 440 | _X32, 25 | _X32, 323 | _X32, 425 | _X32),
        (0x40000003, 219, 440, 163, 374, 425),
    ),
    "AARCH64": ((0xC00000B7, 233, 440, 216, 282, 425), (0x40000028, 220, 440, 163, 388, 425)),
}
# The kernel looks at the lower half of an advice only (it is an int), a filter may compare all 64 bits.
_UPPER_HALVES = (0, 1 << 32, 0xFFFFFFFF << 32)
_LETTING_THROUGH = (
    seccomp_filter.ALLOW,
    seccomp_filter.LOG,
    seccomp_filter.TRACE,
    seccomp_filter.USER_NOTIF,
)


@dataclass(frozen=True)
class _Filter:
    """A recorded filter: its program, the index of the one installed before it, its flags (linux/seccomp.h)."""

    program: bytes
    previous: int | None
    flags: int


class Evidence:
    """The seccomp filters of a dump's threads, and what they let through."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._threads = {int(entry["pid"]): entry["threads"] for entry in load(images / "pstree.img")["entries"]}
        self._filters = _filters(images)
        self._known: dict[tuple[str, tuple[bytes, ...]], str | None] = {}

    @property
    def processes(self) -> tuple[int, ...]:
        """The ids of the dump's processes, inside the container."""
        return tuple(self._threads)

    def against_mapping(self, pid: int) -> str | None:
        """Why the memory of the process must be copied, or None if no thread of it can be given stale bytes."""
        try:
            leader = self._core(pid)
            common = self._common(leader["thread_core"])
            for thread in self._threads[pid]:
                if reason := self._of_thread(leader if thread == pid else self._core(thread), common):
                    return reason
        except (GpuckptError, OSError, LookupError, TypeError, ValueError) as error:
            # What is not understood is no evidence; copying is always right.
            return f"its seccomp filters cannot be read: {error}"
        return None

    def _core(self, thread: int) -> dict[str, Any]:
        core: dict[str, Any] = load(self._images / f"core-{thread}.img")["entries"][0]
        return core

    def _common(self, leader: dict[str, Any]) -> list[bytes]:
        """The programs of the first thread that a restore gives to the others too.

        Where all threads of a process have equal filters CRIU records them with the first thread alone and the flag
        TSYNC, and says of the others that they have none (try_use_tsync() in criu/seccomp.c).
        """
        if _mode(leader) != "filter":
            return []
        return [found.program for found in self._chain(int(leader["seccomp_filter"])) if found.flags & _TSYNC]

    def _of_thread(self, core: dict[str, Any], common: list[bytes]) -> str | None:
        thread = core["thread_core"]
        mode = _mode(thread)
        if mode == "strict":
            return None  # read, write, exit and sigreturn are all it can do
        chain = common
        if mode == "filter":
            chain = [found.program for found in self._chain(int(thread["seccomp_filter"]))]
        if not chain:
            return "no seccomp filter keeps it from dropping memory"
        key = str(core["mtype"]), tuple(chain)
        if key not in self._known:
            self._known[key] = _let_through(*key)
        return self._known[key]

    def _chain(self, index: int) -> list[_Filter]:
        """A filter and those that were installed before it."""
        found: list[_Filter] = []
        at: int | None = index
        while at is not None:
            if len(found) > len(self._filters):
                raise ValueError("the filters of seccomp.img go round in a circle")
            found.append(self._filters[at])
            at = self._filters[at].previous
        return found


def _mode(thread: dict[str, Any]) -> str:
    mode = str(thread.get("seccomp_mode", "disabled"))
    return {"0": "disabled", "1": "strict", "2": "filter"}.get(mode, mode)


def _filters(images: Path) -> list[_Filter]:
    """The filters in seccomp.img (images/seccomp.proto)."""
    path = images / "seccomp.img"
    if not path.exists():
        return []
    return [
        _Filter(base64.b64decode(entry["filter"]), entry.get("prev"), int(entry.get("flags", 0)))
        for image in load(path, payload=True)["entries"]
        for entry in image["seccomp_filters"]
    ]


def _let_through(machine: str, chain: tuple[bytes, ...]) -> str | None:
    if machine not in _ABIS:
        return f"calls of the machine {machine} are not known here"
    for what, call in _probes(machine):
        if seccomp_filter.answer(chain, call) & 0xFFFF0000 in _LETTING_THROUGH:
            return f"its seccomp filter lets {what} through"
    return None


def _probes(machine: str) -> Iterator[tuple[str, Call]]:
    address, length = 0x7F0000200000, 0x200000
    for arch, madvise, process_madvise, mremap, userfaultfd, io_uring in _ABIS[machine]:
        for advice in (low | high for low in DROPPING for high in _UPPER_HALVES):
            yield f"madvise({advice:#x})", Call(arch, madvise, (address, length, advice))
            yield f"process_madvise({advice:#x})", Call(arch, process_madvise, (3, address, 1, advice, 0))
        # In place, anywhere (MREMAP_MAYMOVE), at an address (FIXED), leaving the old one empty (DONTUNMAP).
        for flags in (0, 1, 3, 5):
            yield "mremap", Call(arch, mremap, (address, length, 2 * length, flags))
        yield "userfaultfd", Call(arch, userfaultfd, (0,))  # it can drop and move pages
        yield "io_uring_setup", Call(arch, io_uring, (8, address))  # its madvise (IORING_OP_MADVISE) asks no filter
