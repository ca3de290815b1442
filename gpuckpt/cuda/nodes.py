"""How a container is given GPUs: by the Container Device Interface, or by their device files.

CDI (``nvidia-ctk cdi generate``) also brings the driver's libraries, which an image does not have. A container on the
host's own root file system sees these anyway; where no specification is, the files of the devices are all it needs.
"""

from __future__ import annotations

import re
from pathlib import Path

from gpuckpt.cuda.checks import specifications
from gpuckpt.errors import NotFoundError, PreflightError

_KIND = "nvidia.com/gpu"
_DRIVERS_OWN = re.compile(r"lib(?:cuda|nv)[\w-]*\.so[0-9.]*$|nvidia-(?:smi|debugdump|persistenced|cuda-mps-\w+)$")
# Beside a device's own file: control, unified memory. Those that are not there are not needed.
_COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")


def devices(
    names: tuple[str, ...],
    *,
    image: bool,
    dev: Path = Path("/dev"),
    driver: Path = Path("/proc/driver/nvidia"),
    cdi: tuple[Path, ...] | None = None,
) -> tuple[str, ...]:
    """What podman is told for GPUs that are called ``all``, by index or by UUID: CDI names, or device files.

    ``image``: the container has an image's root file system, not the host's. Raises PreflightError where an image would
    lack the driver's libraries, or there are no GPUs; NotFoundError for a name that no GPU has.
    """
    if not names:
        return ()
    if specifications(cdi):
        return tuple(f"{_KIND}={name}" for name in names)
    if image:
        raise PreflightError(
            "an image cannot be given GPUs: there is no CDI specification",
            cause="it lacks the libraries of this machine's driver",
            remedy="nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml; or use --rootfs /",
        )
    known = _known(driver)
    if not known or not (dev / "nvidiactl").exists():
        raise PreflightError(
            "the server cannot be given GPUs", cause="no NVIDIA driver is loaded here", remedy="gpuckpt doctor"
        )
    chosen = known if "all" in names else [_one(name, known) for name in names]
    files = [*(f"nvidia{minor}" for _, minor in chosen), *_COMMON]
    return tuple(str(dev / name) for name in dict.fromkeys(files) if (dev / name).exists())


def libraries(mounts: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """What of the driver was mounted into this machine's root file system: files one by one, or a folder.

    A file system that is seen through an overlay does not show what is mounted on it.
    """
    found = [line.split()[4] for line in mounts.read_text(errors="replace").splitlines()]
    return [
        path
        for path in dict.fromkeys(found)
        if not path.startswith(("/proc/", "/sys/", "/run/"))
        and (_DRIVERS_OWN.match(Path(path).name) or _has_libraries(Path(path)))
    ]


def _has_libraries(folder: Path) -> bool:
    return "nvidia" in folder.name and any(any(folder.glob(f"{sub}libcuda.so*")) for sub in ("", "lib64/"))


def _known(driver: Path) -> list[tuple[str, int]]:
    """UUID and minor number of every GPU, in the order of the bus, which is that of their indices."""
    found = []
    for file in sorted((driver / "gpus").glob("*/information")):
        text = file.read_text(errors="replace")
        uuid = re.search(r"^GPU UUID:\s*(\S+)", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        if uuid and minor:
            found.append((uuid[1], int(minor[1])))
    return found


def _one(name: str, known: list[tuple[str, int]]) -> tuple[str, int]:
    for index, gpu in enumerate(known):
        if name in (str(index), gpu[0]):
            return gpu
    raise NotFoundError(
        f"there is no GPU {name}",
        cause="here are " + ", ".join(f"{index} ({uuid})" for index, (uuid, _) in enumerate(known)),
        remedy="--gpu all, an index or a UUID",
    )
