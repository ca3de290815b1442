"""The processors that threads are bound to, which CRIU neither records nor restores.

vLLM on processors, OpenMP and others bind each of their threads to a core and let it spin there. Restored without it
they get into each other's way: decoding with two threads on two cores takes 1.6 times as long, and more on a machine
that has other work (stock podman's restores suffer of it, too).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from gpuckpt.proc import processes_below


def bound(pid: int) -> dict[str, tuple[int, ...]]:
    """The threads below ``pid`` that may not run on every processor that we may, by the list of those they may run on.

    The list is as in /proc/PID/status (``0-3,8``), the threads' ids are the container's own.
    """
    everywhere = os.sched_getaffinity(0)
    found: dict[str, list[int]] = {}
    for _, inside, allowed in _threads(pid):
        if not everywhere <= processors(allowed):
            found.setdefault(allowed, []).append(inside)
    return {allowed: tuple(sorted(threads)) for allowed, threads in found.items()}


def bind(pid: int, affinity: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Bind the threads below ``pid`` as :func:`bound` found them; a sentence for what this machine does not have."""
    wanted = {thread: allowed for allowed, threads in affinity.items() for thread in threads}
    here = os.sched_getaffinity(0)
    lacking = {allowed for allowed in affinity if not processors(allowed) & here}
    for thread, inside, _ in _threads(pid) if wanted else ():
        allowed = wanted.get(inside)
        if allowed is not None and allowed not in lacking:
            with contextlib.suppress(ProcessLookupError):  # it ended since we looked
                os.sched_setaffinity(thread, processors(allowed) & here)
    return [
        f"threads bound to the processors {allowed} run on any: this machine has none of them" for allowed in lacking
    ]


def processors(text: str) -> set[int]:
    """The numbers in a list such as ``0-3,8`` (cpuset(7), list format)."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def _threads(pid: int) -> Iterator[tuple[int, int, str]]:
    """Each thread below ``pid``: its id here, in its own namespace, and its list of processors."""
    for process in processes_below(pid):
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue  # it has ended
        for thread in threads:
            fields = {}
            try:
                with open(f"/proc/{process}/task/{thread}/status", encoding="utf-8", errors="replace") as status:
                    for line in status:
                        name, _, value = line.partition(":")
                        fields[name] = value
            except OSError:
                continue
            if "NSpid" in fields and "Cpus_allowed_list" in fields:
                yield int(thread), int(fields["NSpid"].split()[-1]), fields["Cpus_allowed_list"].strip()
