"""A gpuckpt of a benchmark's own: store, state, run and hooks folders, and one place that removes all of it.

The machine's other goldens and replicas are neither seen nor touched. What a killed run left is removed by the next:
each workspace holds a lock for as long as its process lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import prefix
from gpuckpt import proc
from gpuckpt.containers.podman import OWNER
from gpuckpt.errors import GpuckptError, NotFoundError
from gpuckpt.host import hugepages
from gpuckpt.store import locks

PREFIX = "gpuckpt-bench"
LABEL = "gpuckpt.bench"  # containers and images that are not gpuckpt's own carry it, with the workspace as its value
PARENT = Path("/var/tmp")
_LOCK = "lock"


@dataclass(frozen=True)
class Workspace:
    """The folders of one run. ``env`` is what gpuckpt's commands are to be run with."""

    folder: Path
    store_size: str = ""

    @property
    def word(self) -> str:
        """What the names of this run's goldens and containers begin with: podman's names are the whole machine's."""
        return f"bench-{self.folder.name.removeprefix(PREFIX).strip('-_')}"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def ram(self) -> Path:
        """A tmpfs for the peers' images; mounted by :meth:`mount_ram`."""
        return self.folder / "ram"

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def env(self) -> dict[str, str]:
        found = {
            "GPUCKPT_STORE__PATH": str(self.store),
            "GPUCKPT_PATHS__STATE": str(self.state),
            "GPUCKPT_PATHS__RUN": str(self.run),
            "GPUCKPT_PATHS__HOOKS": str(self.folder / "hooks.d"),
        }
        return found | ({"GPUCKPT_STORE__SIZE": self.store_size} if self.store_size else {})

    def mount_ram(self) -> Path:
        if not os.path.ismount(self.ram):
            self.ram.mkdir(exist_ok=True)
            proc.run(["mount", "-t", "tmpfs", "-o", "mode=0700,size=90%", PREFIX, self.ram])
        return self.ram


@contextlib.contextmanager
def workspace(*, parent: Path = PARENT, store_size: str = "") -> Iterator[Workspace]:
    """A fresh workspace for the body; everything in it is gone afterwards, and what killed runs left is too."""
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=parent))
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    space = Workspace(folder, store_size)
    (folder / "disk").mkdir()
    try:
        yield space
    finally:
        remove(folder)
        os.close(handle)


def sweep(parent: Path = PARENT) -> None:
    """Remove the workspaces of runs that were killed."""
    for folder in parent.glob(f"{PREFIX}-*"):
        if not locks.held(folder / _LOCK):
            remove(folder)


def remove(folder: Path) -> None:
    """Take a workspace apart: containers, images, mounts, the podman service, borrowed huge pages, files."""
    space = Workspace(folder)
    for label in (f"{OWNER}={space.state}", f"{LABEL}={folder}"):
        for container in _lines(["podman", "ps", "-aq", "--filter", f"label={label}"]):
            _quietly([*podman_command(), "rm", "-f", "-t", "0", container])
    for image in _lines(["podman", "images", "-q", "--filter", f"label={LABEL}={folder}"]):
        _quietly([*podman_command(), "rmi", "-f", image])
    for mount in reversed(_mounts_below(folder)):
        _quietly(["umount", "-l", mount])
    for pid in space.run.glob("podman-*/service.pid"):
        _end_service(pid)
    with contextlib.suppress(OSError):
        hugepages.sweep(space.run)
    shutil.rmtree(folder, ignore_errors=True)


def podman_command() -> list[str]:
    """podman as gpuckpt's own service runs it: runc, and no systemd where there is none."""
    argv = ["podman", "--runtime", "runc"]
    if not Path("/run/systemd/system").is_dir():
        argv += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
    return argv


def criu_program() -> Path:
    """The CRIU that gpuckpt uses here: its own, else the one on PATH."""
    own = prefix() / "bin" / "criu"
    found = own if own.exists() else shutil.which("criu", path=proc.environment()["PATH"])
    if not found:
        raise NotFoundError("no CRIU on this machine", remedy="make setup")
    return Path(found)


def _end_service(file: Path) -> None:
    # Only if the number is still our service's: its command line names the folder.
    with contextlib.suppress(OSError, ValueError):
        pid = int(file.read_text())
        if os.fsencode(file.parent) in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)


def _mounts_below(folder: Path) -> list[str]:
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]


def _lines(argv: list[str]) -> list[str]:
    try:
        return proc.run(argv, timeout=60).stdout.split()
    except GpuckptError:
        return []


def _quietly(argv: list[str]) -> None:
    with contextlib.suppress(GpuckptError):
        proc.run(argv, timeout=120)
