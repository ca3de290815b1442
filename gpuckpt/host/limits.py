"""Resource limits: what this machine allows, and what a container is given.

podman asks for its own defaults (a million open files, as many processes) when it is given none, and setting a limit
above the hard one needs CAP_SYS_RESOURCE; where the machine lacks it, as many virtual machines and all nested
containers do, `podman start` then ends with "error setting rlimit type 7". So every limit is passed explicitly, at or
below the hard limit that podman inherits from us. podman lowers its own hard limit of processes to kernel.pid_max
when it starts, so that is a bound too. Explicit limits also make goldens portable: CRIU sets the recorded limits
again at restore, and fails on a machine whose hard limits are lower.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

from gpuckpt.checks import Check

# Enough for a model server with thousands of connections and mapped files; 64 Ki is below the hard limit of most
# machines, so that goldens made here restore there.
WANTED = 65536
# A server with a hundred connections and a few hundred mapped weight files still works with this many.
_LEAST_FILES = 1024
_LEAST_PROCESSES = 512
# resource.RLIM_INFINITY is -1 in Python; podman's API takes the kernel's unsigned 64-bit value.
UNLIMITED = 2**64 - 1
_PID_MAX = Path("/proc/sys/kernel/pid_max")

Getter = Callable[[int], tuple[int, int]]


def container_ulimits(
    getrlimit: Getter = resource.getrlimit, *, pid_max: Path = _PID_MAX
) -> list[dict[str, str | int]]:
    """The limits of a container in podman's form: ``{"Name": "nofile", "Soft": 65536, "Hard": 65536}``.

    Counts of files and processes; ``memlock`` (in bytes) only where it can be unlimited, which pinned host memory
    of GPU servers wants. Soft and hard are equal, because servers often raise their soft limit to the hard one
    while starting, and a golden's limits should not depend on whether they did.
    """
    wanted = {name: _capped(getrlimit(kind)[1]) for name, kind in _COUNTS.items()}
    with contextlib.suppress(OSError, ValueError):
        wanted["nproc"] = min(wanted["nproc"], int(pid_max.read_text()))
    if getrlimit(resource.RLIMIT_MEMLOCK)[1] == resource.RLIM_INFINITY:
        wanted["memlock"] = UNLIMITED
    return [{"Name": name, "Soft": value, "Hard": value} for name, value in wanted.items()]


def check(getrlimit: Getter = resource.getrlimit) -> Check:
    """Are the hard limits large enough for a model server?"""
    hard = {name: getrlimit(kind)[1] for name, kind in _COUNTS.items()}
    memlock = getrlimit(resource.RLIMIT_MEMLOCK)[1]
    found = ", ".join(f"{name} {_text(value)}" for name, value in hard.items())
    found += f", memlock {_text(memlock) if memlock == resource.RLIM_INFINITY else f'{memlock >> 10} KiB'}"
    low = [
        f"{name} {hard[name]} < {least}"
        for name, least in (("nofile", _LEAST_FILES), ("nproc", _LEAST_PROCESSES))
        if hard[name] != resource.RLIM_INFINITY and hard[name] < least
    ]
    if low:
        return Check(
            "host.limits",
            "hard limits",
            "fail",
            found,
            f"containers inherit them, and a model server needs more ({', '.join(low)})",
            f"prlimit --pid $$ --nofile={WANTED}:{WANTED} --nproc={WANTED}:{WANTED}",
        )
    return Check("host.limits", "hard limits", "ok", found, "containers get explicit limits at or below these")


_COUNTS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}


def _capped(hard: int) -> int:
    return WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)


def _text(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
