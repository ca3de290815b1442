"""How much memory processes take, by the machine's own books."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gpuckpt import proc
from gpuckpt.containers.podman import container_name

_ROLLUP = ("Rss", "Pss", "Pss_Anon", "Pss_File", "Pss_Shmem", "Private_Clean", "Private_Dirty", "Swap")


def available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable, in bytes."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{meminfo} has no MemAvailable")


def rollup(text: str) -> dict[str, int]:
    """The sums of one process' /proc/PID/smaps_rollup, in bytes; what the kernel does not show is 0."""
    found = dict.fromkeys(_ROLLUP, 0)
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if key in found:
            found[key] = int(rest.split()[0]) * 1024
    return found


def of_processes(pids: Iterable[int]) -> dict[str, int]:
    """The sums over processes. Private_Dirty is what they have written to; Private_Clean may be a file's."""
    total = dict.fromkeys(_ROLLUP, 0)
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        for key, value in rollup(text).items():
            total[key] += value
    return total


def pid_of(replica: str) -> int:
    """The first process of a replica's container, as the host counts; 0 where none runs."""
    argv = ["podman", "inspect", "--format", "{{.State.Pid}}", container_name(replica)]
    return int(proc.run(argv, timeout=60).stdout)


def below(pid: int) -> dict[str, int]:
    """The memory of a container's processes, by the pid of its first one."""
    return of_processes(proc.processes_below(pid))


def cgroup_of(pid: int, *, proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the memory controller charges the process' group with, in bytes; None where it does not tell."""
    try:
        for line in (proc / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                file = root / path.lstrip("/") / "memory.current"
            elif "memory" in controllers.split(","):
                file = root / "memory" / path.lstrip("/") / "memory.usage_in_bytes"
            else:
                continue
            if file.exists():
                return int(file.read_text())
    except (OSError, ValueError):
        return None
    return None
