"""Freeze and thaw the processes of a container, by the kernel's freezer of its control group.

podman's own pause does the same, but by way of its service and the OCI runtime, which takes some 50 ms: as long as
everything else that a standby does to answer again. Both versions of control groups are known: ``cgroup.freeze`` of
version 2, ``freezer.state`` of version 1.
"""

from __future__ import annotations

import time
from pathlib import Path

from gpuckpt.errors import DeadlineError, NotFoundError, PreflightError

_ROOT = Path("/sys/fs/cgroup")
_POLL = 0.001


def freeze(pid: int, container: str, *, timeout: float = 10.0, root: Path = _ROOT) -> None:
    """Freeze all processes of the container with the id ``container``, of which ``pid`` is one.

    Returns when they are; they are thawed again if that takes more than ``timeout`` seconds (DeadlineError), or
    is interrupted.
    """
    group = _group(pid, container, root)
    until = time.monotonic() + timeout
    try:
        group.write(True)
        while not group.frozen():
            if time.monotonic() > until:
                raise DeadlineError(
                    f"container {container[:12]} was not frozen within {timeout:g} s",
                    cause="one of its processes does not come out of the kernel",
                    remedy="look for processes in the state D",
                )
            time.sleep(_POLL)
    except BaseException:
        group.write(False)
        raise


def thaw(pid: int, container: str, *, root: Path = _ROOT) -> None:
    """Let all processes of the container run again."""
    _group(pid, container, root).write(False)


def frozen(pid: int, container: str, *, root: Path = _ROOT) -> bool:
    """Whether the container's processes are frozen."""
    return _group(pid, container, root).frozen()


class _Group:
    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        self._version = version

    def write(self, freeze: bool) -> None:
        if self._version == 2:
            (self._folder / "cgroup.freeze").write_text("1" if freeze else "0")
        else:
            (self._folder / "freezer.state").write_text("FROZEN" if freeze else "THAWED")

    def frozen(self) -> bool:
        if self._version == 2:
            return "frozen 1" in (self._folder / "cgroup.events").read_text()
        return (self._folder / "freezer.state").read_text().strip() == "FROZEN"


def _group(pid: int, container: str, root: Path) -> _Group:
    """The control group of a container: the one of ``pid`` whose name has the container's id in it, or its ancestor.

    Never one that is shared with others: freezing that would freeze them.
    """
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError as error:
        raise NotFoundError(f"container {container[:12]} has no process {pid} any more") from error
    for version, wanted in ((1, "freezer"), (2, "")):
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controllers != wanted:
                continue
            parts = Path(path).parts
            own = [index for index, part in enumerate(parts) if container in part]
            folder = (root / wanted).joinpath(*parts[1 : own[0] + 1]) if own else None
            switch = "cgroup.freeze" if version == 2 else "freezer.state"
            if folder is not None and (folder / switch).exists():
                return _Group(folder, version)
    raise PreflightError(
        f"container {container[:12]} has no control group of its own that can be frozen",
        cause=f"process {pid} is in {', '.join(lines)}",
        remedy="let podman manage control groups (not --cgroups=disabled)",
    )
