"""Preflight checks of NVIDIA's side. A GPU is never required: without one, every check is skipped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gpuckpt.checks import Check, Verdict
from gpuckpt.config import Settings
from gpuckpt.cuda.choice import bindings_installed, find_program

_DRIVER = Path("/proc/driver/nvidia/version")
_CDI = (Path("/etc/cdi"), Path("/var/run/cdi"))
# cuCheckpointProcessLock/Checkpoint/Restore/Unlock came with 570. The separate cuda-checkpoint program can take all
# state off and put it back from 550 on, but tells states and makes single steps from 555 on only.
_API = 570
_PROGRAM = 555
_DOWNLOAD = "https://raw.githubusercontent.com/NVIDIA/cuda-checkpoint/main/bin/x86_64_Linux/cuda-checkpoint"


_ROWS = {
    "cuda.driver": "NVIDIA driver",
    "cuda.api": "CUDA checkpoints",
    "cuda.program": "cuda-checkpoint",
    "cuda.cdi": "CDI",
}


def all_checks(settings: Settings, *, driver_file: Path = _DRIVER, cdi_folders: tuple[Path, ...] = _CDI) -> list[Check]:
    """Every check of this package; nothing is executed and no CUDA library is loaded."""
    version = driver_version(driver_file)
    if version is None:
        why = "only servers on a GPU need it"
        return [Check(id, title, "skip", "no NVIDIA GPU", why) for id, title in _ROWS.items()]
    return [driver(version), api(version), program(settings, version), cdi(cdi_folders)]


def driver_version(file: Path = _DRIVER) -> str | None:
    """The loaded NVIDIA kernel driver's version, e.g. ``570.86.15``; None if none is loaded."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri …", or "… Open Kernel Module for x86_64  570.…"
    match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return match[1] if match else "unknown"


def has_api(version: str | None) -> bool:
    """Whether a driver has the CUDA checkpoint API; of none, and of one whose version is not known, it is believed."""
    return version is None or _major(version) == 0 or _major(version) >= _API


def driver(version: str) -> Check:
    """Is the driver new enough to suspend a process at all?"""
    why = f"drivers from {_PROGRAM} on can move device memory to the host; servers without a GPU do not need it"
    return Check("cuda.driver", "NVIDIA driver", "ok" if _major(version) >= _PROGRAM else "warn", version, why)


def api(version: str) -> Check:
    """Has the driver the CUDA checkpoint API, and can it be called?"""
    why = f"GPU state is suspended and resumed through the driver's checkpoint API, which came with {_API}"
    if _major(version) < _API:
        return Check("cuda.api", "CUDA checkpoints", "warn", f"driver {version} is older than {_API}", why)
    if not bindings_installed():
        text = "the driver has the checkpoint API; gpuckpt's GPU packages are not installed"
        mend = f"{sys.executable} -m pip install cuda-bindings nvidia-ml-py"
        return Check("cuda.api", "CUDA checkpoints", "warn", text, why, mend)
    return Check("cuda.api", "CUDA checkpoints", "ok", "the driver has the checkpoint API", why)


def program(settings: Settings, version: str) -> Check:
    """Is NVIDIA's cuda-checkpoint program there?"""
    found = find_program(settings.paths.prefix)
    why = "the way to suspend GPU state by hand, and the only one for drivers before 570"
    if found:
        return Check("cuda.program", "cuda-checkpoint", "ok", str(found), why)
    verdict: Verdict = "ok" if _major(version) >= _API else "warn"
    text = "not installed, and not needed with this driver" if verdict == "ok" else "not installed"
    # One static program in a repository: no package manager has it.
    target = settings.paths.prefix / "bin" / "cuda-checkpoint"
    mend = f"curl -fLo {target} {_DOWNLOAD} && chmod 755 {target}"
    return Check("cuda.program", "cuda-checkpoint", verdict, text, why, mend if verdict == "warn" else None)


def cdi(folders: tuple[Path, ...] = _CDI) -> Check:
    """Do CDI specifications name NVIDIA's devices for podman?"""
    naming = [str(file) for file in specifications(folders)]
    why = "images get their GPU by CDI, with the driver's libraries; remake it after a driver update"
    if naming:
        return Check("cuda.cdi", "CDI", "ok", ", ".join(naming), why)
    mend = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    return Check("cuda.cdi", "CDI", "warn", "no specification for nvidia.com/gpu: only --rootfs / has GPUs", why, mend)


def specifications(folders: tuple[Path, ...] | None = None) -> list[Path]:
    """Files of the Container Device Interface that name NVIDIA's GPUs."""
    files = [
        file
        for folder in (_CDI if folders is None else folders)
        for pattern in ("*.yaml", "*.json")
        for file in sorted(folder.glob(pattern))
    ]
    return [file for file in files if "nvidia.com/gpu" in _text(file)]


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _major(version: str) -> int:
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0
