"""Preflight checks of podman and the OCI runtimes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from msgspec import Struct

from gpuckpt import proc, programs
from gpuckpt.checks import Check
from gpuckpt.config import Settings
from gpuckpt.errors import GpuckptError

_OLDEST_PODMAN = (4, 0)  # the first whose API takes what a replica's container needs, and netavark
_OLDEST_RUNC = (1, 1)
RUNTIMES = ("runc", "crun")
"""The runtimes that gpuckpt can drive, in the order in which it prefers them."""

_CRIU_CONFIG = "org.criu.config"  # the annotation that names a container's own CRIU options
_LIBCRIU = "libcriu.so.2"  # crun loads it when it is called
# podman looks for its helpers here (containers.conf, helper_binaries_dir), not on PATH alone.
_HELPERS = (
    Path("/usr/local/libexec/podman"),
    Path("/usr/local/lib/podman"),
    Path("/usr/libexec/podman"),
    Path("/usr/lib/podman"),
)
_HYBRID = Path("/sys/fs/cgroup/unified/cgroup.procs")


class Runtime(Struct, frozen=True):
    """An OCI runtime. ``trouble`` says why it cannot checkpoint; None if it can."""

    name: str
    path: Path
    version: str
    trouble: str | None


def all_checks(settings: Settings) -> list[Check]:
    """Every check of this package; ``podman info`` takes a few tenths of a second."""
    return [podman(settings), runtime(settings), info(settings), network(settings)]


def fast_checks(settings: Settings) -> list[Check]:
    """Are the programs there at all? Executes nothing."""
    names = RUNTIMES if settings.podman.runtime == "auto" else (settings.podman.runtime,)
    found = [name for name in names if _which(name)]
    why = "containers are run by podman through an OCI runtime that can checkpoint"
    path = _which("podman")
    program = Check("containers.podman", "podman", "ok", str(path), why) if path else _no_podman(why)
    if not found:
        text = f"no {' or '.join(names)}"
        return [
            program,
            Check("containers.runtime", "OCI runtime", "fail", text, why, _install_runtime(settings.podman.runtime)),
        ]
    return [program, Check("containers.runtime", "OCI runtime", "ok", ", ".join(found), why)]


def podman(settings: Settings) -> Check:
    """Is podman there and new enough?"""
    why = "containers are created, checkpointed and restored through podman"
    path = _which("podman")
    if path is None:
        return _no_podman(why)
    try:
        text = proc.run([path, "--version"], timeout=20).stdout
    except (GpuckptError, OSError) as error:
        found = f"{path} does not run: {error}"
        return Check("containers.podman", "podman", "fail", found, why, _install("podman", again=True))
    version = _version(text)
    if _numbers(version) < _OLDEST_PODMAN:
        why = "podman before 4.0 has neither the API calls nor the network that replicas use"
        return Check("containers.podman", "podman", "fail", f"{version} ({path})", why, _install("podman"))
    return Check("containers.podman", "podman", "ok", f"{version} ({path})", why)


def inspect_runtime(name: str, *, cache: Path | None = None) -> Runtime | None:
    """What the runtime ``name`` on PATH can do; None if it is not installed; ``cache`` as for ``programs.ask``."""
    path = _which(name)
    if path is None:
        return None
    try:
        text = programs.ask([path, "--version"], timeout=10, cache=cache)
        version = _version(text)
        if name == "crun" and "+CRIU" not in text:  # Debian 12's is built so, and may know no `features` either
            return Runtime(name, path, version, "built without CRIU")
        if name == "runc" and _numbers(version) < _OLDEST_RUNC:
            return Runtime(name, path, version, "older than 1.1")
        told = json.loads(programs.ask([path, "features"], timeout=10, cache=cache))
        if name == "crun":
            return Runtime(name, path, version, _crun_trouble(told))
        annotations = told.get("annotations") or {}
    except (GpuckptError, OSError, ValueError) as error:
        return Runtime(name, path, "?", f"does not run: {error}")
    # "checkpoint.enabled" says only that runc was built with it; it finds criu on PATH when it is called.
    enabled = annotations.get("org.opencontainers.runc.checkpoint.enabled", "true") == "true"
    return Runtime(name, path, version, None if enabled else "built without checkpoints")


def _crun_trouble(features: dict[str, Any]) -> str | None:
    read = features.get("potentiallyUnsafeConfigAnnotations") or []
    if not any(one == _CRIU_CONFIG or (one.endswith(".") and _CRIU_CONFIG.startswith(one)) for one in read):
        # It would ignore the annotation without a word: no options, no action script, no hooks.
        return f"too old: does not read the annotation {_CRIU_CONFIG}"
    if _HYBRID.exists():
        return "refuses hybrid cgroups"  # it starts nothing where v1 controllers and a v2 tree are both mounted
    import ctypes

    try:
        ctypes.CDLL(_LIBCRIU)
    except OSError:
        return f"finds no {_LIBCRIU} (package criu-libs or libcriu2)"
    return None


def runtime(settings: Settings) -> Check:
    """Is there an OCI runtime that can checkpoint, among those the configuration allows?"""
    title, why = "OCI runtime", "checkpoint and restore are calls of the OCI runtime, which drives CRIU"
    wanted = settings.podman.runtime
    names = RUNTIMES if wanted == "auto" else (wanted,)
    found = [runtime for runtime in map(inspect_runtime, names) if runtime]
    text = ", ".join(f"{one.name} {one.version}" + (f": {one.trouble}" if one.trouble else "") for one in found)
    if any(one.trouble is None for one in found):
        return Check("containers.runtime", title, "ok", text, why)
    if wanted == "crun" and found:
        why = "the configuration asks for crun, but this one cannot checkpoint; set podman.runtime to auto"
    remedy = _install_runtime("auto" if found else wanted)  # one that cannot checkpoint gets no better by itself
    return Check("containers.runtime", title, "fail", text or f"no {' or '.join(names)}", why, remedy)


def info(settings: Settings) -> Check:
    """Does ``podman info`` work, that is: are its storage and configuration usable?"""
    title, why = "podman works", "podman's storage and configuration must be usable before a container is made"
    path = _which("podman")
    if path is None:
        return Check("containers.info", title, "skip", "there is no podman to ask", why)
    try:
        result = proc.run([path, "info", "--format", "json"], timeout=60, check=False)
        told = json.loads(result.stdout) if result.code == 0 else {}
    except (GpuckptError, OSError, ValueError) as error:
        return Check("containers.info", title, "fail", str(error), why, "podman info")
    if result.code != 0:
        found = "; ".join(proc.tail(result.stderr, 3)) or f"status {result.code}"
        return Check("containers.info", title, "fail", found, why, "podman info")
    host, store = told.get("host", {}), told.get("store", {})
    found = f"storage {store.get('graphDriverName', '?')} at {store.get('graphRoot', '?')}"
    found += f", cgroup manager {host.get('cgroupManager', '?')}"
    return Check("containers.info", title, "ok", found, why)


def network(settings: Settings) -> Check:
    """Is netavark there? Only published ports need it."""
    # In a bundle's prefix podman is told to take the helpers that lie there.
    places = [folder / "netavark" for folder in (settings.paths.prefix / "bin", *_HELPERS)]
    path = next((place for place in places if place.exists()), None) or _which("netavark")
    why = "--publish needs podman's bridge network; without it replicas serve on Unix sockets only"
    if path is None:
        return Check("containers.network", "netavark", "warn", "not installed", why, _install("netavark"))
    return Check("containers.network", "netavark", "ok", str(path), why)


def _which(name: str) -> Path | None:
    found = shutil.which(name, path=proc.environment()["PATH"])
    return Path(found) if found else None


def _no_podman(why: str) -> Check:
    return Check("containers.podman", "podman", "fail", "not installed", why, _install("podman"))


def _install(package: str, *, again: bool = False) -> str:
    """The command that installs ``package`` with this machine's package manager."""
    if _which("dnf"):
        return f"dnf {'reinstall' if again else 'install'} -y {package}"
    return f"apt-get install -y {'--reinstall ' if again else ''}{package}"


def _install_runtime(wanted: str) -> str:
    if wanted == "auto":
        # Fedora's crun is built with CRIU, and is what its podman is tested with; Debian 12's is not.
        return _install("crun" if _which("dnf") else "runc")
    return _install(wanted)


def _version(text: str) -> str:
    match = re.search(r"version\s+(\d[^\s,]*)", text)
    return match[1] if match else "?"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
