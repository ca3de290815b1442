"""Preflight checks of the machine itself: rights, kernel, cgroups, memory.

Everything is read from /proc and /sys, nothing is executed, so that all of them take a few milliseconds.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct, field

from gpuckpt import proc as commands
from gpuckpt.checks import Check, Verdict
from gpuckpt.config import Settings
from gpuckpt.host import hugepages, limits, seccomp, tmpfs

# Bit numbers from capability.h, and what fails without each.
_NEEDED = {
    "CAP_CHOWN": (0, "containers' files get their owners"),
    "CAP_DAC_OVERRIDE": (1, "files of every user are read and written"),
    "CAP_FOWNER": (3, "modes and times of other users' files are restored"),
    "CAP_KILL": (5, "processes of other users are stopped and killed"),
    "CAP_SETGID": (6, "restored processes get their groups"),
    "CAP_SETUID": (7, "restored processes get their users"),
    "CAP_SETPCAP": (8, "restored processes get their bounding sets"),
    "CAP_NET_ADMIN": (12, "network namespaces and TCP repair"),
    "CAP_SYS_CHROOT": (18, "containers change their root"),
    "CAP_SYS_PTRACE": (19, "CRIU stops and reads processes"),
    "CAP_SYS_ADMIN": (21, "mounts, namespaces, /proc/PID/map_files"),
    "CAP_MKNOD": (27, "containers' devices and overlay white-outs"),
}
_SYS_RESOURCE = 24
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
_GIB = 1 << 30


class Machine(Struct, frozen=True):
    """Where the kernel is asked; tests point it at a folder of fakes."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    uid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=platform.release)

    def read(self, name: str) -> str | None:
        """The text of ``name`` below /proc, or None if it is absent or unreadable."""
        try:
            return (self.proc / name).read_text(errors="replace")
        except OSError:
            return None


def all_checks(settings: Settings, machine: Machine | None = None) -> list[Check]:
    """Every check of this package, in the order a reader wants them."""
    here = machine or Machine()
    return [
        root(here),
        capabilities(here),
        sys_resource(here),
        limits.check(),
        kernel(here),
        features(here),
        overlay(here),
        cgroups(here),
        io_uring(here),
        confinement(here),
        seccomp.check(),
        tmpfs.check(settings.store),
        disk(settings, here),
        hugepages.check(settings.paths.run),
        swap(here),
        memory(here),
    ]


def disk(settings: Settings, machine: Machine) -> Check:
    """Does the disk tier outlive a reboot, and is there room in it? Its folder is made when it is first used."""
    path, title = settings.store.disk or settings.paths.state / "goldens", "disk tier"
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    try:
        values, device = os.statvfs(there), os.stat(there).st_dev
    except OSError as error:
        return Check("host.disk", title, "skip", f"{there}: {error.strerror}", "only root may look")
    # proc(5): ID PARENT MAJ:MIN ROOT MOUNTPOINT OPTIONS [TAGS…] - TYPE SOURCE SUPEROPTIONS
    mark = f"{os.major(device)}:{os.minor(device)}"
    lines = (machine.read("self/mountinfo") or "").splitlines()
    kind = next((line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2:3] == [mark]), "")
    free = values.f_bavail * values.f_frsize
    found = f"{path}: {free / _GIB:.1f} GiB free" + (f", {kind}" if kind else "")
    if kind in ("tmpfs", "ramfs"):
        why = "it is memory, so what `gpuckpt move NAME --to disk` puts there is gone after a reboot"
        return Check("host.disk", title, "warn", found, why, "set store.disk to a folder on a disk")
    if free < _GIB:
        why = "a golden takes as much as its server has in memory"
        return Check("host.disk", title, "warn", found, why, "set store.disk to a folder on a larger disk")
    return Check("host.disk", title, "ok", found, "gpuckpt move NAME --to disk")


def root(machine: Machine) -> Check:
    why = "CRIU, mounts and podman's checkpoints need root in the machine's own user namespace"
    if machine.uid != 0:
        return Check("host.root", "root", "fail", f"user {machine.uid}", why, "sudo gpuckpt doctor")
    # In a user namespace user 0 is somebody else outside, and the kernel refuses most of what CRIU does.
    mapping = (machine.read("self/uid_map") or "").split()
    if mapping and mapping != ["0", "0", str(2**32 - 1)]:
        return Check("host.root", "root", "fail", "user 0 of a user namespace (a rootless container?)", why)
    return Check("host.root", "root", "ok", "user 0", why)


def capabilities(machine: Machine) -> Check:
    title = "capabilities"
    if machine.uid != 0:
        return Check("host.capabilities", title, "skip", "asked as root only", "users have none")
    held = _effective(machine)
    missing = {name: why for name, (bit, why) in _NEEDED.items() if not held >> bit & 1}
    if missing:
        why = "; ".join(f"{name.removeprefix('CAP_').lower()}: {reason}" for name, reason in missing.items())
        why += ". Start the container or service that gpuckpt runs in with them"
        return Check("host.capabilities", title, "fail", f"missing: {', '.join(missing)}", why)
    return Check("host.capabilities", title, "ok", f"all {len(_NEEDED)} that are needed", "CRIU and podman use them")


def sys_resource(machine: Machine) -> Check:
    title = "raising limits"
    if machine.uid != 0:
        return Check("host.sys_resource", title, "skip", "asked as root only", "users have no CAP_SYS_RESOURCE")
    if _effective(machine) >> _SYS_RESOURCE & 1:
        return Check("host.sys_resource", title, "ok", "CAP_SYS_RESOURCE", "a golden's limits can be set again")
    why = (
        "limits cannot be raised above the hard ones: gpuckpt passes explicit ulimits below them, but a golden made "
        "elsewhere with higher limits does not restore here"
    )
    return Check("host.sys_resource", title, "warn", "no CAP_SYS_RESOURCE", why)


def kernel(machine: Machine) -> Check:
    version = tuple(int(part) for part in re.findall(r"\d+", machine.release)[:2])
    why = "CRIU restores process ids by clone3 (5.5) and checks rights by CAP_CHECKPOINT_RESTORE (5.9)"
    verdict: Verdict = "fail" if version < (4, 18) else "warn" if version < (5, 9) else "ok"
    return Check("host.kernel", "kernel", verdict, machine.release, why)


def features(machine: Machine) -> Check:
    """What CRIU reads and writes in /proc, tried on this very process."""
    own = machine.proc / "self"
    probes: Sequence[tuple[str, Callable[[], object]]] = (
        ("pagemap (CONFIG_PROC_PAGE_MONITOR)", lambda: _read_some(own / "pagemap")),
        ("map_files (CONFIG_CHECKPOINT_RESTORE)", lambda: os.listdir(own / "map_files")),
        ("ns_last_pid (CONFIG_CHECKPOINT_RESTORE)", (machine.proc / "sys/kernel/ns_last_pid").stat),
        ("namespaces", lambda: [os.readlink(own / "ns" / name) for name in _NAMESPACES]),
        ("memfd", lambda: os.close(os.memfd_create("gpuckpt-probe"))),
    )
    why = "CRIU reads and rebuilds processes through these"
    if machine.uid != 0:
        return Check("host.features", "kernel features", "skip", "asked as root only", why)
    missing = []
    for name, probe in probes:
        try:
            probe()
        except OSError as error:
            missing.append(f"{name}: {error.strerror}")
    if missing:
        why += "; the kernel, or the container around us, does not offer them"
        return Check("host.features", "kernel features", "fail", "; ".join(missing), why)
    found = ", ".join(name.split(" ")[0] for name, _ in probes)
    return Check("host.features", "kernel features", "ok", found, why)


def overlay(machine: Machine) -> Check:
    known = re.search(r"^\S*\s+overlay$", machine.read("filesystems") or "", re.MULTILINE)
    why = "replicas share a golden's files through overlay mounts"
    if known:
        return Check("host.overlayfs", "overlayfs", "ok", "known to the kernel", why)
    # A module need not be loaded to be usable: the kernel loads it at the first mount, if it is installed.
    loader = shutil.which("modprobe", path=commands.environment()["PATH"])
    installed = bool(loader) and (Path("/lib/modules") / machine.release / "modules.dep").exists()
    return Check(
        "host.overlayfs",
        "overlayfs",
        "warn" if installed else "fail",
        "not loaded" if installed else "not known to the kernel",
        why,
        "modprobe overlay",
        (lambda: _modprobe("overlay")) if installed else None,
    )


def cgroups(machine: Machine) -> Check:
    why = "the freezer stops a container as one; crun refuses hybrid hierarchies, runc takes all"
    types = {mount: kind for mount, kind in _mounts(machine) if mount.startswith("/sys/fs/cgroup")}
    if types.get("/sys/fs/cgroup") == "cgroup2":
        return Check("host.cgroups", "cgroups", "ok", "v2", why)
    if "cgroup" not in types.values():
        return Check("host.cgroups", "cgroups", "fail", "not mounted", why, "mount -t cgroup2 none /sys/fs/cgroup")
    found = "hybrid (v1 with a v2 tree)" if "cgroup2" in types.values() else "v1"
    if not any(mount.endswith("/freezer") for mount in types):
        return Check("host.cgroups", "cgroups", "fail", f"{found}, without the freezer", why)
    return Check("host.cgroups", "cgroups", "ok", found, why)


def io_uring(machine: Machine) -> Check:
    state = (machine.read("sys/kernel/io_uring_disabled") or "").strip()
    text = {"0": "on", "1": "off for unprivileged programs", "2": "off"}.get(state, "no switch in this kernel")
    why = "CRIU cannot dump io_uring; the containers' seccomp profile turns it off in them, the host stays as it is"
    return Check("host.io_uring", "io_uring", "ok", f"host: {text}; containers: off", why)


def confinement(machine: Machine) -> Check:
    """Which security module confines processes here: SELinux, AppArmor, or none."""
    title = "SELinux, AppArmor"
    enforcing = _text(machine.sys / "fs/selinux/enforce")
    if enforcing == "1":
        why = (
            "containers run without a label of their own (label=disable): the host's files below their root carry "
            "labels that container_t may not read. Namespaces, capabilities and seccomp confine them"
        )
        return Check("host.confinement", title, "ok", "SELinux, enforcing", why)
    if enforcing is not None:
        return Check("host.confinement", title, "ok", "SELinux, permissive", "it forbids nothing")
    if _text(machine.sys / "module/apparmor/parameters/enabled") == "Y":
        why = "podman's profile, if it is loaded, confines containers; CRIU restores them under the same one"
        return Check("host.confinement", title, "ok", "AppArmor", why)
    return Check("host.confinement", title, "ok", "none", "nothing stands between containers and the host's files")


def swap(machine: Machine) -> Check:
    # The first row is a header; a zram device is memory, its contents never reach a disk.
    rows = [row.split() for row in (machine.read("swaps") or "").splitlines()[1:] if row.strip()]
    disks = [row[0] for row in rows if "zram" not in row[0]]
    if disks:
        why = "goldens in tmpfs and frozen standbys can be swapped out: slow restores, and their secrets reach a disk"
        return Check("host.swap", "swap", "warn", f"on: {', '.join(disks)}", why, commands.quoted(["swapoff", *disks]))
    return Check("host.swap", "swap", "ok", "zram only" if rows else "off", "goldens stay in memory")


def memory(machine: Machine) -> Check:
    available = tmpfs.available_memory(meminfo=machine.proc / "meminfo")
    total = tmpfs.memory_total(meminfo=machine.proc / "meminfo")
    found = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    why = "a golden takes as much as its server has in memory, and while it is made both exist"
    return Check("host.memory", "memory", "warn" if available < 2 * _GIB else "ok", found, why)


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return None


def _effective(machine: Machine) -> int:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", machine.read("self/status") or "", re.MULTILINE)
    return int(match[1], 16) if match else 0


def _mounts(machine: Machine) -> list[tuple[str, str]]:
    lines = (machine.read("self/mountinfo") or "").splitlines()
    return [(line.split(" ")[4], line.partition(" - ")[2].split(" ")[0]) for line in lines]


def _read_some(file: Path) -> bytes:
    with file.open("rb", buffering=0) as stream:  # 8 bytes per page: a buffered read may ask for too much
        return stream.read(8)


def _modprobe(module: str) -> None:
    commands.run(["modprobe", module], timeout=30)
