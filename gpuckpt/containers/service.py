"""A podman service of our own: same containers as `podman`, but a PATH that begins with the CRIU to use.

podman, runc and crun find ``criu`` on PATH only, so every CRIU gets its own service. It is started on the first
call, ends by itself when idle, and is not needed by running containers.
"""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from gpuckpt import proc
from gpuckpt.checks import Check
from gpuckpt.containers import checks
from gpuckpt.containers.api import Api
from gpuckpt.errors import DaemonUnreachableError, GpuckptError, PreflightError

_IDLE_SECONDS = 300
_START_SECONDS = 30  # 0.1 s on an idle machine; a loaded one just after boot is slow


def choose_runtime(wanted: str, *, cache: Path | None = None) -> str:
    """``wanted``, or for ``auto`` the first of runc and crun, if it can checkpoint.

    ``cache`` is for :func:`gpuckpt.programs.ask`. Raises PreflightError with the reason if none can; the doctor says
    the same (:mod:`gpuckpt.containers.checks`).
    """
    troubles = []
    for name in checks.RUNTIMES if wanted == "auto" else (wanted,):
        found = checks.inspect_runtime(name, cache=cache)
        if found and found.trouble is None:
            return name
        troubles.append(f"{name} {found.version}: {found.trouble}" if found else f"{name} is not installed")
    raise PreflightError(
        "no OCI runtime here can checkpoint" if wanted == "auto" else f"the OCI runtime {wanted} cannot checkpoint",
        cause="; ".join(troubles),
        remedy="make setup" if wanted == "auto" else "set podman.runtime to auto, or make setup",
    )


def check(run: Path, criu: Path, runtime: str) -> Check:
    """Does our podman service answer, or can it be started? It ends by itself when idle, so starting it is no harm."""
    why = "create and restore ask it for containers; it has the CRIU to use on its PATH"
    began = time.monotonic()
    try:
        api = connect(run, criu, runtime=runtime)
    except GpuckptError as error:
        found = f"{error.message}: {error.cause or '; '.join(error.log[-2:])}"
        return Check("containers.service", "podman service", "fail", found, why, "gpuckpt doctor")
    found = f"answers at {api.path} ({time.monotonic() - began:.2f} s)"
    return Check("containers.service", "podman service", "ok", found, why)


def connect(run: Path, criu: Path, *, runtime: str = "auto", timeout: float = 600) -> Api:
    """The API of a podman service that uses ``criu``; started if none answers under ``run``.

    ``runtime`` is what :func:`choose_runtime` returned, or ``auto`` to have it choose. The service ends when nobody
    asks for some minutes, as during a long warm-up: the next call starts it again. Raises DaemonUnreachableError if
    it cannot be started, with the end of its log.
    """
    # Containers inherit the hard limits of the service: one that was started from a shell with lower limits than ours
    # would refuse what we ask for.
    limits = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)]
    identity = blake3(f"{criu} {runtime} {limits}".encode()).hexdigest()[:12]
    folder = run / f"podman-{identity}"
    path = folder / "podman.sock"

    def start() -> None:
        _ensure(folder, path, criu, runtime)

    if not _answers(path):
        start()
    return Api(path, timeout, reconnect=start)


def _ensure(folder: Path, path: Path, criu: Path, runtime: str) -> None:
    """Start the service unless another command did so while we waited for our turn."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if not _answers(path):
            _start(folder, path, criu, choose_runtime("auto") if runtime == "auto" else runtime)


def _start(folder: Path, path: Path, criu: Path, runtime: str) -> None:
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    link = tools / "criu"
    if not link.is_symlink() or Path(os.readlink(link)) != criu:
        link.unlink(missing_ok=True)
        link.symlink_to(criu)
    argv = ["podman", "--runtime", runtime]
    if not Path("/run/systemd/system").is_dir():  # sd_booted(3): else systemd owns the cgroup tree
        argv += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
    log = folder / "service.log"
    # Of our descriptors it gets none but its log (proc.spawn), so neither this lock nor a golden's outlives us in it.
    child = proc.spawn(
        [*argv, "system", "service", "--time", str(_IDLE_SECONDS), f"unix://{path}"], log=log, path=[tools]
    )
    (folder / "service.pid").write_text(f"{child.pid}\n")
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if _answers(path):
            return
        if child.poll() is not None:
            break
        time.sleep(0.01)
    raise DaemonUnreachableError(
        "the podman service did not start",
        remedy="gpuckpt doctor",
        log=proc.tail(log.read_text(errors="replace")),
        log_path=str(log),
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for our turn; the kernel ends it when we end, however we do. The file stays."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _answers(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        Api(path, timeout=5).call("GET", "/_ping")
    except GpuckptError:
        return False
    return True
