"""What podman needs to give a container the GPU: a specification of the Container Device Interface, for one run.

Hosts with NVIDIA's container toolkit have one, and it is left alone. Elsewhere one is written for as long as a run
lasts. It names the driver's device files and, where the driver's libraries lie on a file system of their own, the
folder of these: servers see this host's root file system, so everything else is there already.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_record import Document
from gpuckpt import proc
from gpuckpt.cuda import checks
from gpuckpt.errors import GpuckptError

FOLDER = Path("/run/cdi")
NAME = "gpuckpt-acceptance.json"
_CONTROL = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")


@contextlib.contextmanager
def specified(folder: Path = FOLDER) -> Iterator[str]:
    """Have a specification for the body; which one, in words."""
    file = folder / NAME
    file.unlink(missing_ok=True)  # a killed run's
    found = checks.cdi()
    if found.verdict == "ok":
        yield found.found
        return
    folder.mkdir(parents=True, exist_ok=True)
    made = specification(Path("/dev"), libraries())
    file.write_text(json.dumps(made, indent=1))
    try:
        yield f"written for this run: {len(made['devices']) - 1} devices"
    finally:
        file.unlink(missing_ok=True)


def specification(devices: Path, folders: list[Path]) -> Document:
    """Each device by its number, and all of them; with what they have in common."""
    numbers = sorted(int(file.name[6:]) for file in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name))
    common = [{"path": str(devices / name)} for name in _CONTROL if (devices / name).exists()]
    nodes = {str(number): [{"path": str(devices / f"nvidia{number}")}] for number in numbers}
    every = {"all": [node for one in nodes.values() for node in one], **nodes}
    mounts = [
        {"hostPath": str(folder), "containerPath": str(folder), "options": ["ro", "nosuid", "nodev", "rbind"]}
        for folder in folders
    ]
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "containerEdits": {"deviceNodes": common, **({"mounts": mounts} if mounts else {})},
        "devices": [{"name": name, "containerEdits": {"deviceNodes": own}} for name, own in every.items()],
    }


def libraries() -> list[Path]:
    """Folders with the driver's libraries that a container does not see, as they are not in this host's root."""
    try:
        known = proc.run(["ldconfig", "-p"], timeout=30).stdout
    except GpuckptError:
        return []
    root = os.stat("/").st_dev
    found = set()
    for name in _LIBRARIES:
        for path in re.findall(rf"{re.escape(name)} .*=> (\S+)", known):
            with contextlib.suppress(OSError):
                if os.stat(path).st_dev != root:
                    found.add(Path(path).resolve().parent)
    return sorted(found)
