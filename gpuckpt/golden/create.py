"""Make a golden: start the server, wait, warm up, record the canary, dump, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gpuckpt import __version__
from gpuckpt.containers.api import PodmanError
from gpuckpt.criu import images as criu_images
from gpuckpt.errors import BusyError, CheckpointError, DeadlineError, GpuckptError, OutOfSpaceError
from gpuckpt.golden import failures, identity
from gpuckpt.golden.assembly import assemble, link_images, seccomp_digest
from gpuckpt.golden.replica import Replica, commit, making
from gpuckpt.golden.tools import Tools
from gpuckpt.host.limits import container_ulimits
from gpuckpt.manifest import (
    Address,
    Canary,
    Launch,
    Manifest,
    Mount,
    PhaseRecord,
    Port,
    Sizes,
    Ulimit,
    Volume,
)
from gpuckpt.store import digests, locks, seal
from gpuckpt.store.layout import check_name, exchange
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.base import Adapter
from gpuckpt.workload.endpoint import Endpoint

_POLL = 0.05  # seconds between health checks of a starting server


@dataclass(frozen=True)
class CreateRequest:
    """What to make a golden of, and how; see ``gpuckpt create --help`` for each field's meaning."""

    name: str
    adapter: Adapter
    arguments: tuple[str, ...]
    image: str | None = None
    rootfs: Path = Path("/")
    publish: Port | None = None
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    volumes: tuple[Volume, ...] = ()
    workdir: str | None = None
    shm_size: int = 1 << 30
    warmup: int = 3
    prompts: tuple[str, ...] = ()
    start_timeout: float = 600
    canary: bool = True
    leave_running: bool = False
    tcp_established: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Created:
    """A published golden, the phase table of its making, and the replica that was left running, if any."""

    manifest: Manifest
    folder: Path
    phases: PhaseTable
    first_token_ns: int
    replica: Replica | None


def create(request: CreateRequest, tools: Tools, phases: PhaseTable) -> Created:
    """Make and publish the golden ``request.name``.

    Either it is published whole, or nothing remains: no container, mount, file or changed kernel setting. Raises
    BusyError (the name is taken), CheckpointError (the server or CRIU failed), OutOfSpaceError, DeadlineError,
    VerificationError (the canary does not repeat), NotFoundError (model, image or folder missing).
    """
    name = check_name(request.name)
    layout, report = tools.layout, tools.report
    with locks.exclusive(layout.locks, "golden", name), contextlib.ExitStack() as stack:
        if (layout.goldens / name).exists() and not request.replace:
            raise BusyError(
                f"a golden named {name} exists already",
                remedy=f"choose another name, remove it (gpuckpt rm {name}), or add --replace",
            )
        launch = _launch(request, tools)
        staging = stack.enter_context(_staging(layout.staging / name))
        replica = stack.enter_context(making(tools, name, name))

        with _phase(tools, phases, "container"):
            copies = [(replica.folder / "upper", staging / "rootfs")]
            copies += [(_volume(tools, volume.name), staging / "volumes" / volume.name) for volume in launch.volumes]
            replica, container = assemble(
                tools, replica, launch, tcp_established=launch.tcp_established, copies=tuple(copies)
            )
            start(tools, container, replica, kind=CheckpointError)
        with _phase(tools, phases, "server start"):
            _wait_healthy(request, tools, replica)
        canary, first_token_ns = _exercise(request, tools, replica, phases)

        present = tools.containers.inspect(container)
        _require_space(tools, present.pid)
        with _phase(tools, phases, "dump"), _watching(tools, staging, tools.memory_of(present.pid)):
            link_images(present.bundle, staging / "images")
            _dump(request, tools, replica, container, present.bundle)
        phases.split("dump", replica.operation.marks())
        address = Address(ip=present.ip, mac=present.mac) if present.ip and present.mac else None

        with _phase(tools, phases, "digests"):
            _make_private(staging)
            files, links = digests.record(staging, lambda done: report.bytes(done, 0))
        with _phase(tools, phases, "publish"):
            manifest = _describe(request, tools, staging, launch, address, canary).model_copy(
                update={
                    "files": files,
                    "links": links,
                    "phases": tuple(PhaseRecord(name=row.name, seconds=row.seconds) for row in phases.rows()),
                    "cold_ttft_s": (first_token_ns - phases.started_ns) / 1e9,
                }
            )
            manifest.write(staging)
            seal.write(staging)
            folder = _publish(staging, layout.goldens / name)
        left = commit(replica) if request.leave_running else None
    phases.stop()
    return Created(manifest, folder, phases, first_token_ns, left)


def _launch(request: CreateRequest, tools: Tools) -> Launch:
    port = request.publish.container_port if request.publish else None
    python = None
    config: dict[str, object] = {}
    if request.image:
        tools.containers.image_digest(request.image)  # NotFoundError before anything is made
        config = tools.containers.image_config(request.image)
    else:
        candidate = tools.settings.paths.prefix / "server" / "bin" / "python"
        python = candidate if candidate.exists() else None
    line = request.adapter.launch(request.arguments, port=port, python=python)
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    env |= dict(str(pair).partition("=")[::2] for pair in _words(config.get("Env")))
    argv = line.argv
    if request.adapter.record.kind == "http" and request.image:
        # A generic image's entrypoint belongs to its command; a server that we start ourselves replaces it.
        argv = (*map(str, _words(config.get("Entrypoint"))), *argv)
    return Launch(
        argv=argv,
        env=env | line.env | request.env,
        workdir=request.workdir or str(config.get("WorkingDir") or "/"),
        user=str(config.get("User") or ""),
        image=request.image,
        rootfs=None if request.image else str(request.rootfs),
        mounts=(*line.mounts, *request.mounts),
        volumes=request.volumes,
        port=request.publish,
        ulimits=tuple(
            Ulimit(name=str(limit["Name"]), soft=int(limit["Soft"]), hard=int(limit["Hard"]))
            for limit in container_ulimits()
        ),
        shm_size=request.shm_size,
        seccomp_blake3=seccomp_digest(),
        capabilities=(),
        tcp_established=request.tcp_established,
    )


def _words(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def _volume(tools: Tools, name: str) -> Path:
    return tools.containers.volume(name) or tools.containers.create_volume(name)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """The folder that becomes the golden; deleted unless it was published (renamed away)."""
    shutil.rmtree(folder, ignore_errors=True)  # a killed creation's, whose lock we now hold
    (folder / "images").mkdir(parents=True, mode=0o700)
    (folder / "volumes").mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _phase(tools: Tools, phases: PhaseTable, name: str) -> Iterator[None]:
    tools.report.stage(name)
    with phases.phase(name):
        yield


def start(tools: Tools, container: str, replica: Replica, *, kind: type[GpuckptError]) -> None:
    """Start a container; an error of ``kind`` with the runtime's reason if its program cannot be run."""
    try:
        tools.containers.start(container)
    except PodmanError as error:
        raise kind(
            f"the server of {replica.name} could not be started",
            cause=error.cause,
            remedy="correct the command after `--`, or the published port, and try again",
        ) from error


def wait_healthy(
    adapter: Adapter, endpoint: Endpoint, tools: Tools, replica: Replica, *, timeout: float, kind: type[GpuckptError]
) -> None:
    """Wait until the server answers its health check; an error of ``kind`` with its last words if it dies.

    Raises DeadlineError, with the server's last words, after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    next_look = 0.0
    while not adapter.healthy(endpoint):
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 0.5
            if not tools.containers.inspect(replica.container).alive:
                raise failures.server_failure(tools, replica, f"the server of {replica.name} ended", kind=kind)
        if now > deadline:
            raise failures.server_failure(
                tools,
                replica,
                f"the server of {replica.name} was not healthy within {timeout:g} s",
                kind=DeadlineError,
            )
        time.sleep(_POLL)


def _wait_healthy(request: CreateRequest, tools: Tools, replica: Replica) -> None:
    wait_healthy(request.adapter, replica.endpoint, tools, replica, timeout=request.start_timeout, kind=CheckpointError)


def _exercise(request: CreateRequest, tools: Tools, replica: Replica, phases: PhaseTable) -> tuple[Canary | None, int]:
    """First token, warm-up, canary, quiet; a server that fails at it is shown with its last lines."""
    adapter, endpoint = request.adapter, replica.endpoint
    canary = None
    try:
        with _phase(tools, phases, "first token"):
            first_token_ns = adapter.first_token(endpoint)
        with _phase(tools, phases, "warm-up"):
            adapter.warm_up(endpoint, request.warmup, request.prompts)
        if request.canary:
            with _phase(tools, phases, "canary"):
                canary = adapter.record_canary(endpoint)
        with _phase(tools, phases, "quiesce"):
            adapter.quiesce(endpoint, timeout=30)
    except GpuckptError as error:
        if error.exit_code in (8, 13):  # the server works; its answers or its clients are the trouble
            raise
        failure = failures.server_failure(
            tools, replica, f"the server of {request.name} failed while it was warmed up", kind=CheckpointError
        )
        failure.cause = "; ".join(text for text in (error.message, error.cause, failure.cause) if text)
        raise failure from error
    return canary, first_token_ns


def _require_space(tools: Tools, pid: int) -> None:
    """Refuse a dump that cannot fit, before it takes the last memory of the machine."""
    needed = tools.memory_of(pid)
    free = shutil.disk_usage(tools.layout.store).free
    available = _available_memory()
    if needed > free:
        raise OutOfSpaceError(
            f"the golden needs about {needed >> 20} MiB, the store has {free >> 20} MiB free",
            cause=f"{tools.layout.store} is full, or its limit is too small",
            remedy="remove goldens (gpuckpt df, gpuckpt rm), or enlarge store.size",
        )
    if needed > available:
        raise OutOfSpaceError(
            f"the golden needs about {needed >> 20} MiB, the machine has {available >> 20} MiB of memory left",
            remedy="free memory: stop replicas, remove goldens (gpuckpt df)",
        )


def _available_memory() -> int:
    from gpuckpt.host.tmpfs import available_memory

    return available_memory()


@contextlib.contextmanager
def _watching(tools: Tools, staging: Path, expected: int) -> Iterator[None]:
    """Report the growth of the images while the body runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            written = sum(entry.stat().st_size for entry in os.scandir(staging / "images") if entry.is_file())
            tools.report.bytes(written, max(expected, written))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _dump(request: CreateRequest, tools: Tools, replica: Replica, container: str, bundle: Path) -> None:
    try:
        tools.containers.checkpoint(
            container, leave_running=request.leave_running, tcp_established=request.tcp_established
        )
    except GpuckptError as error:
        raise failures.dump_failure(tools, replica, bundle, error) from error
    if failed := failures.hook_failure(replica, "checkpoint", CheckpointError):
        raise failed


def _make_private(staging: Path) -> None:
    for folder in (staging, staging / "images"):
        folder.chmod(0o700)
    for entry in os.scandir(staging / "images"):
        if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            os.chmod(entry.path, 0o600)


def _describe(
    request: CreateRequest,
    tools: Tools,
    staging: Path,
    launch: Launch,
    address: Address | None,
    canary: Canary | None,
) -> Manifest:
    images = staging / "images"
    if launch.image:
        base = identity.base_of_image(tools.containers.image_digest(launch.image))
    else:
        base = identity.base_of_folder(
            Path(launch.rootfs or "/"), criu_images.regular_files(images), launch, staging / "rootfs"
        )
    processes = criu_images.processes(images)
    return Manifest(
        name=request.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        gpuckpt=__version__,
        workload=request.adapter.record,
        launch=launch.model_copy(update={"capabilities": criu_images.capabilities(images)}),
        address=address,
        identity=identity.record(tools.criu, tools.runtime, base),
        canary=canary,
        sizes=_sizes(staging),
        processes=processes,
        sockets=criu_images.sockets(images),
        files={},
        phases=(),
        cold_ttft_s=0.0,
    )


def _sizes(staging: Path) -> Sizes:
    images = staging / "images"
    pages = sum(path.stat().st_size for path in images.glob("pages-*.img"))
    shared_pages, shared_files = criu_images.shared_memory_bytes(images)
    gpu = sum(path.stat().st_size for pattern in ("gpu-*", "amdgpu-*") for path in images.glob(pattern))
    everything = sum(path.stat().st_size for path in images.iterdir())
    layer = sum(status.st_size for relative, status in digests.walk(staging) if not relative.startswith("images/"))
    return Sizes(
        cpu_pages=pages - shared_pages,
        gpu=gpu,
        shared_memory=shared_pages + shared_files,
        rootfs=layer,
        metadata=everything - pages - shared_files - gpu,
    )


def _publish(staging: Path, target: Path) -> Path:
    """Give the golden its name, after everything else and in one step: it is there whole or not at all.

    A golden that is replaced changes places with the new one, and goes with the staging folder.
    """
    if target.exists():
        exchange(staging, target)
    else:
        staging.rename(target)
    return target
