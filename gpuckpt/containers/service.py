"""A podman service of our own: same containers as `podman`, but a PATH that begins with the CRIU to use.

podman, runc and crun find ``criu`` on PATH only, so every CRIU gets its own service. It is started on the first
call, ends by itself when idle, and is not needed by running containers.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from gpuckpt import proc
from gpuckpt.containers.api import Api
from gpuckpt.errors import DaemonUnreachableError, GpuckptError, PreflightError

_IDLE_SECONDS = 300


def choose_runtime(wanted: str) -> str:
    """``wanted``, or for ``auto`` the first of crun and runc that can checkpoint.

    crun tells in its version line (`+CRIU`; Debian 12's is built without); every runc from 1.0 can.
    """
    if wanted != "auto":
        return wanted
    try:
        if "+CRIU" in proc.run(["crun", "--version"], timeout=10).stdout:
            return "crun"
    except GpuckptError:
        pass
    try:
        proc.run(["runc", "--version"], timeout=10)
    except GpuckptError as error:
        raise PreflightError(
            "no OCI runtime here can checkpoint",
            cause="neither crun with +CRIU nor runc is installed",
            remedy="make setup",
        ) from error
    return "runc"


def connect(run: Path, criu: Path, *, runtime: str = "auto", timeout: float = 600) -> Api:
    """The API of a podman service that uses ``criu``; started if none answers under ``run``.

    Raises DaemonUnreachableError if it cannot be started within ten seconds, with the end of its log.
    """
    identity = hashlib.sha256(f"{criu} {runtime}".encode()).hexdigest()[:12]
    folder = run / f"podman-{identity}"
    api = Api(folder / "podman.sock", timeout)
    if _answers(api):
        return api
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    link = tools / "criu"
    if not link.is_symlink() or Path(os.readlink(link)) != criu:
        link.unlink(missing_ok=True)
        link.symlink_to(criu)
    argv = ["podman", "--runtime", choose_runtime(runtime)]
    if not Path("/run/systemd/system").is_dir():  # sd_booted(3): else systemd owns the cgroup tree
        argv += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
    log = folder / "service.log"
    child = proc.spawn(
        [*argv, "system", "service", "--time", str(_IDLE_SECONDS), f"unix://{api.path}"], log=log, path=[tools]
    )
    (folder / "service.pid").write_text(f"{child.pid}\n")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if _answers(api):
            return api
        if child.poll() is not None and not _answers(api):
            break
        time.sleep(0.01)
    raise DaemonUnreachableError(
        "the podman service did not start",
        remedy="gpuckpt doctor",
        log=proc.tail(log.read_text(errors="replace")),
        log_path=str(log),
    )


def _answers(api: Api) -> bool:
    if not api.path.exists():
        return False
    try:
        Api(api.path, timeout=5).call("GET", "/_ping")
    except GpuckptError:
        return False
    return True
