"""Whose machine a golden fits: what is recorded at its creation and compared, field by field, before a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gpuckpt.criu.binary import Criu
from gpuckpt.cuda.checks import driver_version
from gpuckpt.errors import IncompatibleError
from gpuckpt.host import identity as host
from gpuckpt.host.limits import container_ulimits
from gpuckpt.host.seccomp import profile_path
from gpuckpt.manifest import BaseFiles, Identity, Launch
from gpuckpt.store.digests import digest_bytes, digest_file
from gpuckpt.workload.base import MEMORY_FOLDER, SOCKET_FOLDER

# Kernel file systems and podman's own mounts inside a container: not part of the base.
_OUTSIDE = ("/dev/", "/proc/", "/sys/", f"{SOCKET_FOLDER}/", f"{MEMORY_FOLDER}/")

# What podman gives a container (containers.conf(5), default_capabilities) and Docker's three beside it. A restored
# process keeps the golden's capabilities whatever its new container may have, so more is never taken unasked.
DEFAULT_CAPABILITIES = frozenset(
    f"CAP_{name}"
    for name in (
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
        "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
    )
)  # fmt: skip

FIELDS = ("kernel", "machine", "cpu", "criu", "runtime", "base", "driver", "seccomp", "limits", "capabilities")


def record(criu: Criu, runtime: str, base: BaseFiles, *, gpu: bool = False) -> Identity:
    """The identity of this machine with ``base`` as the container's root file system.

    With ``gpu`` NVIDIA's driver is part of it: processes map its libraries, and these must fit the kernel's part.
    """
    here = host.machine()
    return Identity(
        driver=driver_version() if gpu else None,
        kernel=here.kernel,
        machine=here.machine,
        cpu_model=here.cpu_model,
        cpu_flags=here.cpu_flags,
        criu=criu.version,
        runtime=runtime,
        base=base,
    )


def base_of_image(digest: str) -> BaseFiles:
    return BaseFiles(digest=digest, files={})


def base_of_folder(rootfs: Path, paths: set[str], launch: Launch, layer: Path) -> BaseFiles:
    """The identity of a root folder: size and modification time of every file that the processes hold.

    ``paths`` are theirs, inside the container; those in the golden's own ``layer`` are digested with the golden.
    Hashing a whole host would take minutes; what matters is what is mapped, and CRIU maps it again by path.
    """
    files: dict[str, str] = {}
    for path in sorted(paths):
        if path.startswith(_OUTSIDE) or (layer / path.lstrip("/")).exists():
            continue
        note = _note(_on_host(path, rootfs, launch))
        if note:
            files[path] = note
    return BaseFiles(digest=_digest(files), files=files)


def _on_host(path: str, rootfs: Path, launch: Launch) -> Path:
    for mount in launch.mounts:
        if path == mount.destination or path.startswith(f"{mount.destination}/"):
            return Path(mount.source + path[len(mount.destination) :])
    return rootfs / path.lstrip("/")


def _note(path: Path) -> str | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return f"{status.st_size}:{status.st_mtime_ns}"


def _digest(files: dict[str, str]) -> str:
    return digest_bytes("\n".join(f"{path} {note}" for path, note in files.items()).encode())


def compare(
    recorded: Identity,
    launch: Launch,
    criu: Criu,
    runtime: str,
    *,
    image_digest: Callable[[str], str],
    ignore: tuple[str, ...] = (),
) -> None:
    """Raise IncompatibleError naming every field in which this machine differs from the golden's.

    The kernel must be the same release (CRIU restores kernel state that no interface promises to keep), CRIU the same
    version, the processor must have every feature that the recorded one had (libraries choose their code by them at
    start), and the files that are mapped again must be the same.
    """
    differing = [
        (field, text)
        for field, text in _differences(recorded, launch, criu, runtime, image_digest)
        if field not in ignore
    ]
    if differing:
        names = ", ".join(dict.fromkeys(field for field, _ in differing))
        flags = " ".join(f"--ignore-identity {field}" for field in dict.fromkeys(field for field, _ in differing))
        raise IncompatibleError(
            f"this machine differs from the golden's in: {names}",
            cause="; ".join(text for _, text in differing),
            remedy=f"create the golden anew here; or, at your own risk, {flags}",
        )


def _differences(
    recorded: Identity, launch: Launch, criu: Criu, runtime: str, image_digest: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    here = host.machine()
    for field, was, present in (
        ("kernel", recorded.kernel, here.kernel),
        ("machine", recorded.machine, here.machine),
        ("criu", recorded.criu, criu.version),
        ("runtime", recorded.runtime, runtime),
    ):
        if was != present:
            yield field, f"{field} is {present}, the golden's is {was}"
    if recorded.driver and recorded.driver != (driver := driver_version()):
        yield "driver", f"the NVIDIA driver is {driver or 'absent'}, the golden's is {recorded.driver}"
    if launch.seccomp_blake3 != digest_file(profile_path(mapped=launch.mapped)):
        yield "seccomp", "the seccomp profile differs from the one that the golden's processes are under"
    allowed = {str(limit["Name"]): int(limit["Hard"]) for limit in container_ulimits()}
    for limit in launch.ulimits:
        if limit.hard > allowed.get(limit.name, limit.hard):
            yield "limits", f"{limit.name} may be {allowed[limit.name]} here, the golden's processes have {limit.hard}"
    if extra := sorted(set(launch.capabilities) - DEFAULT_CAPABILITIES):
        yield "capabilities", f"the golden's processes hold more than a container does by default: {' '.join(extra)}"
    if missing := sorted(set(recorded.cpu_flags) - set(here.cpu_flags)):
        yield "cpu", f"the processor lacks {' '.join(missing[:8])} of the golden's {recorded.cpu_model}"
    if launch.image:
        present = image_digest(launch.image)
        if present != recorded.base.digest:
            yield "base", f"image {launch.image} is {present[:19]}, the golden's is {recorded.base.digest[:19]}"
    elif launch.rootfs:
        for path, note in recorded.base.files.items():
            found = _note(_on_host(path, Path(launch.rootfs), launch))
            if found != note:
                yield "base", f"{path} {'is missing' if found is None else 'has changed since'}"
                break
