"""Make a golden: start the server, wait, warm up, record the canary, dump, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from msgspec import structs

from gpuckpt.criu import hot
from gpuckpt.criu.prune import drop_empty_archives
from gpuckpt.cuda import nodes
from gpuckpt.cuda.checks import specifications
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import catalogue, failures, gpu, mapping, prepare, profile, trial, weights
from gpuckpt.golden.assembly import assemble, link_images, seccomp_digest
from gpuckpt.golden.describe import describe
from gpuckpt.golden.replica import Replica, alive, commit, discard, empty_again, making
from gpuckpt.golden.serving import container_trouble, wait_healthy
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.host.limits import container_ulimits
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import (
    Address,
    Canary,
    Launch,
    Manifest,
    Mount,
    Port,
    Ulimit,
    Volume,
)
from gpuckpt.store import digests, locks, seal, sharing
from gpuckpt.store.layout import Layout, check_name, exchange
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.base import Accelerator, Adapter, LaunchLine


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
    mode: Literal["auto", "mapped", "copy"] = "auto"
    gpus: tuple[str, ...] = ()
    graphs: bool = False
    weights: Literal["auto", "image", "outside"] = "auto"

    @property
    def accelerator(self) -> Accelerator:
        """What the server runs on. Weights are outside by themselves where a GPU has them and a canary proves it."""
        able = bool(self.gpus) and self.canary and self.adapter.record.kind != "http"
        outside = self.weights == "outside" or (self.weights == "auto" and able)
        return Accelerator(gpu=bool(self.gpus), graphs=self.graphs, outside=outside)


@dataclass(frozen=True)
class Created:
    """A published golden, the phase table of its making, and the replica that was left running, if any."""

    manifest: Manifest
    folder: Path
    phases: PhaseTable
    first_token_ns: int
    replica: Replica | None


class _NotMapped(Exception):
    """A golden of a server on a GPU that could not be restored with its memory mapped."""


def create(request: CreateRequest, tools: Tools, phases: PhaseTable) -> Created:
    """Make and publish the golden ``request.name``.

    Either it is published whole, or nothing remains: no container, mount, file or changed kernel setting. Raises
    BusyError (the name is taken), CheckpointError (the server or CRIU failed, or the golden could not be restored),
    OutOfSpaceError, DeadlineError, VerificationError (the canary does not repeat, or not after a restore),
    NotFoundError (model, image or folder missing), IncompatibleError (memory that must be mapped cannot be). After one
    OutOfSpaceError the golden is there all the same, as it says: room was lacking only for its memory to be mapped.
    """
    try:
        return _create(request, tools, phases)
    except _NotMapped as error:
        tools.report.note(f"starting once more, to be copied, not mapped: {error.__cause__}")
    return _create(replace(request, mode="copy"), tools, phases)


def _create(request: CreateRequest, tools: Tools, phases: PhaseTable) -> Created:
    name = check_name(request.name)
    layout, report = tools.layout, tools.report
    with locks.exclusive(layout.golden_locks, "golden", name), contextlib.ExitStack() as stack:
        if (earlier := layout.tiers(name)) and not request.replace:
            raise BusyError(
                f"a golden named {name} exists already",
                remedy=f"choose another name, remove it (gpuckpt rm {name}), or add --replace",
            )
        # They stand on its written files; and none can be started while we hold the name.
        if running := [one.name for one in catalogue.using(tools, name, tuple(earlier)) if alive(tools, one)]:
            raise BusyError(
                f"golden {name} cannot be replaced: it has running replicas: {', '.join(running)}",
                remedy=f"stop them first: gpuckpt stop {' '.join(running)}",
            )
        launch = _launch(request, tools, request.accelerator)
        _refuse_own_folders(launch, tools)
        staging = stack.enter_context(_staging(layout, layout.staging / name))
        replica = stack.enter_context(making(tools, name, name))
        ready = _ready(request, tools, phases, launch, replica, staging)
        replica, launch, container = ready.started.replica, ready.started.launch, ready.started.container
        written, canary, first_token_ns = ready.started.written, ready.canary, ready.first_token_ns

        present = tools.containers.inspect(container)
        holders = gpu.measured(tools, ready.holders) if ready.holders else None
        state = holders.state if holders else None
        expected = tools.memory_of(present.pid) + (state.carried if state else 0) + sum(map(_size_of, written))
        _require_space(tools, expected)
        affinity = tools.affinity_of(present.pid)
        with gpu.suspended(tools, phases, holders, resume=request.leave_running):
            with phase(tools, phases, "dump"), _watching(tools, staging, expected):
                link_images(present.bundle, staging / "images")
                _dump(request, tools, replica, container, present.bundle)
            replica.operation.require_marks(*written.values())
            phases.split("dump", replica.operation.marks(), first="podman: dump")
        if request.leave_running and ready.given:
            weights.wake(tools, phases, replica, ready.given)
        address = Address(ip=present.ip, mac=present.mac) if present.ip and present.mac else None

        mapped = mapping.COPIED
        with phase(tools, phases, "rewrite"):
            drop_empty_archives(staging / "images")
            if launch.mapped:
                mapped = mapping.map_memory(tools, staging, forced=request.mode == "mapped")
        memory = mapped.memory
        if memory.mode == "mapped" and not request.leave_running:
            with phase(tools, phases, "trial"):
                tried = trial.Trial(launch, present.bundle, request.adapter, canary, state, ready.given)
                pages = _tried(request, tools, replica, tried)
                memory = trial.keep_copied(tools, staging, memory, pages)
        with phase(tools, phases, "digests"):
            kept = weights.keep(tools, staging, ready.given.files)
            _make_private(staging)
            known = mapped.digests | kept.digests
            contents = digests.record(staging, lambda done: report.bytes(done, 0), known=known)
        with phase(tools, phases, "publish"):
            manifest = describe(
                tools,
                staging,
                name=name,
                workload=request.adapter.record,
                launch=launch,
                address=address,
                canary=canary,
                phases=phases,
                cold_ttft_s=(first_token_ns - phases.started_ns) / 1e9,
                contents=contents,
                memory=memory,
                affinity=affinity,
                gpu=state,
                weights=kept.names,
                caches=ready.given.caches,
            )
            manifest.write(staging)
            seal.write(staging)
            # Publishing is last: after it nothing can fail that would leave more, or less, than the golden.
            left = commit(replica, tier="cold") if request.leave_running else None
            if left is None:
                discard(tools, replica)
            try:
                folder = _publish(staging, layout.goldens / name)
                if "disk" in earlier:
                    # One name, one content: the replaced golden must not come back after a reboot.
                    _withdraw(layout.disk, earlier["disk"], layout.staging_of("disk") / name)
            except BaseException:
                if left is not None:
                    replica.save()  # not ready after all: the roll-back takes its volumes too
                raise
    prepare.discard_prepared(tools, name)  # those of a golden that was replaced
    phases.stop()
    if mapped.lacking is not None and request.mode == "mapped":
        raise OutOfSpaceError(
            f"golden {name} was made and kept, but its memory is copied, not mapped",
            cause=str(mapped.lacking),
            remedy="use it as it is, or make room (gpuckpt df, gpuckpt rm) and create it again with --replace",
        ) from mapped.lacking
    return Created(manifest, folder, phases, first_token_ns, left)


def _tried(request: CreateRequest, tools: Tools, replica: Replica, tried: trial.Trial) -> hot.Pages:
    """The trial of a golden that is mapped. What drivers do with the host memory of their processes is theirs."""
    try:
        return trial.trial(tools, replica, tried)
    except (CheckpointError, VerificationError) as error:
        if request.mode != "auto" or tried.state is None:
            raise
        raise _NotMapped from error


@dataclass(frozen=True)
class _Started:
    """A server that is healthy in its container, and what a dump copies of it: from where, to where."""

    replica: Replica
    launch: Launch
    container: str
    written: dict[Path, Path]


@dataclass(frozen=True)
class _Ready:
    """A server that was warmed up and is to be dumped: what holds its device state, where its weights were written."""

    started: _Started
    canary: Canary | None
    first_token_ns: int
    holders: gpu.Holders | None
    given: weights.Given


def _ready(
    request: CreateRequest, tools: Tools, phases: PhaseTable, launch: Launch, replica: Replica, staging: Path
) -> _Ready:
    """Start and exercise the server; once more with its weights in the image, if it cannot have them outside."""
    started = _started(request, tools, phases, launch, replica, staging)
    canary, first_token_ns = _exercise(request, tools, started.replica, phases)
    holders = _holders(request, tools, started)
    if not request.accelerator.outside or canary is None:
        given = _given(request, tools, phases, started, canary, holders)
        return _Ready(started, canary, first_token_ns, holders, given)
    folder = staging / "weights"
    try:
        given = weights.release(tools, phases, started.replica, request.adapter, canary, folder)
        return _Ready(started, canary, first_token_ns, holders, given)
    except (CheckpointError, VerificationError) as error:
        if request.weights == "outside":
            raise
        why = f"{error.message}: {error.cause}" if error.cause else error.message
        tools.report.note(f"starting once more, with the weights in the image: {why}")
    shutil.rmtree(folder)
    within = structs.replace(request.accelerator, outside=False)
    again = _launch(request, tools, within)
    started = _started(request, tools, phases, again, empty_again(tools, started.replica), staging)
    canary, _ = _exercise(request, tools, started.replica, phases)
    holders = _holders(request, tools, started)
    given = _given(request, tools, phases, started, canary, holders)
    return _Ready(started, canary, first_token_ns, holders, given)


def _given(
    request: CreateRequest,
    tools: Tools,
    phases: PhaseTable,
    started: _Started,
    canary: Canary | None,
    holders: gpu.Holders | None,
) -> weights.Given:
    """Where weights stay: vLLM's caches, most of what it has on a GPU. The guest's are no larger than its sessions."""
    if holders is None or request.adapter.record.kind != "vllm":
        return weights.NOTHING
    return weights.release_caches(tools, phases, started.replica, request.adapter, canary)


def _holders(request: CreateRequest, tools: Tools, started: _Started) -> gpu.Holders | None:
    if not request.gpus:
        return None
    found = gpu.find(tools, tools.containers.inspect(started.container).pid, request.gpus)
    if found is None:
        tools.report.note("the server was given GPUs and holds no memory there")
    return found


def _started(
    request: CreateRequest, tools: Tools, phases: PhaseTable, launch: Launch, replica: Replica, staging: Path
) -> _Started:
    """Start the server; with ``--mode auto`` once more, to be copied, if it cannot live where memory is mapped."""
    if not launch.mapped:
        return _start(request, tools, phases, launch, replica, staging)
    try:
        started = _start(request, tools, phases, launch, replica, staging)
        present = tools.containers.inspect(started.container)
        reason = profile.unfit(tools.programs_of(present.pid))
        trouble: GpuckptError | None = None
    except CheckpointError as error:
        trouble = error
        try:
            reason = profile.died_of_it(tools.containers.inspect(replica.container).exit_code)
        except NotFoundError:
            reason = None
        if reason is None:
            raise
    if reason is None:
        return started
    if request.mode == "mapped":
        raise IncompatibleError(
            f"the memory of {request.name} cannot be mapped: {reason}",
            cause=trouble.message if trouble else None,
            remedy="leave --mode out, or create with --mode copy",
            log=trouble.log if trouble else (),
        ) from trouble
    tools.report.note(f"starting once more, to be copied, not mapped: {reason}")
    launch = structs.replace(launch, mapped=False, seccomp_blake3=seccomp_digest(mapped=False))
    return _start(request, tools, phases, launch, empty_again(tools, replica), staging)


def _start(
    request: CreateRequest, tools: Tools, phases: PhaseTable, launch: Launch, replica: Replica, staging: Path
) -> _Started:
    with phase(tools, phases, "container"):
        replica, volumes = _volumes(tools, replica, launch)
        written = {replica.folder / "upper": staging / "rootfs"}
        written |= {folder: staging / "volumes" / name for name, folder in volumes.items()}
        with container_trouble(replica, kind=CheckpointError):
            replica, container = assemble(
                tools,
                replica,
                launch,
                memory=staging / "memory",
                tcp_established=launch.tcp_established,
                copies=tuple(written.items()),
            )
            tools.containers.start(container)
    with phase(tools, phases, "server start"):
        wait_healthy(request.adapter, tools, replica, timeout=request.start_timeout, kind=CheckpointError)
    return _Started(replica, launch, container, written)


def _launch(request: CreateRequest, tools: Tools, on: Accelerator) -> Launch:
    mapped = (
        request.mode != "copy"
    )  # decided before the dump: what a process was told about memory cannot be taken back
    port = request.publish.container_port if request.publish else None
    python = None
    config: dict[str, object] = {}
    if request.image:
        tools.containers.image_digest(request.image)  # NotFoundError before anything is made
        config = tools.containers.image_config(request.image)
    else:
        candidate = tools.settings.paths.prefix / "server" / "bin" / "python"
        python = candidate if candidate.exists() else None
    line = request.adapter.launch(request.arguments, port=port, python=python, on=on)
    workdir = request.workdir or str(config.get("WorkingDir") or "/")
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    env |= dict(str(pair).partition("=")[::2] for pair in _words(config.get("Env")))
    argv = line.argv
    if request.adapter.record.kind == "http" and request.image:
        # A generic image's entrypoint belongs to its command; a server that we start ourselves replaces it.
        argv = (*map(str, _words(config.get("Entrypoint"))), *argv)
    return Launch(
        argv=argv,
        env=line.environment(env, request.env),
        workdir=workdir,
        user=str(config.get("User") or ""),
        image=request.image,
        rootfs=None if request.image else str(request.rootfs),
        mounts=(*line.mounts, *_driver(request), *request.mounts),
        volumes=request.volumes,
        own=_own(request, line, workdir, tools),
        gpus=request.gpus,
        port=request.publish,
        ulimits=tuple(
            Ulimit(name=str(limit["Name"]), soft=int(limit["Soft"]), hard=int(limit["Hard"]))
            for limit in container_ulimits()
        ),
        shm_size=request.shm_size,
        mapped=mapped,
        seccomp_blake3=seccomp_digest(mapped=mapped),
        capabilities=(),
        tcp_established=request.tcp_established,
    )


def _driver(request: CreateRequest) -> Iterator[Mount]:
    """What of NVIDIA's driver the root file system would not show; a CDI specification brings it by itself."""
    if request.gpus and not request.image and not specifications():
        for path in nodes.libraries():
            yield Mount(source=path, destination=path)


def _own(request: CreateRequest, line: LaunchLine, workdir: str, tools: Tools) -> tuple[str, ...]:
    """Where the server's own folders lie on the host, of those that a volume holds."""
    shared: list[tuple[str, Path | None, bool]] = [
        (mount.destination, Path(mount.source), mount.read_only) for mount in request.mounts
    ]
    shared += [(volume.destination, tools.containers.volume(volume.name), False) for volume in request.volumes]
    found = []
    for own in line.own:
        inside = Path(os.path.normpath(Path(workdir) / own))
        for destination, source, read_only in shared:
            if inside.is_relative_to(destination):
                if read_only:
                    raise UsageError(
                        f"the server cannot keep its files in {own}",
                        cause=f"{destination} is mounted read-only",
                        remedy=f"--volume {source}:{destination}:rw, or a folder of the container",
                    )
                if source is None:
                    raise UsageError(
                        f"the server cannot keep its files in {own}",
                        cause=f"the volume on {destination} is made by this command",
                        remedy="make it first (podman volume create), or name a folder of the host: --volume",
                    )
                found.append(str(source / inside.relative_to(destination)))
    return tuple(found)


def _refuse_own_folders(launch: Launch, tools: Tools) -> None:
    """A container that sees gpuckpt's own mounts is frozen with them, and they are others when it is restored."""
    layout = tools.layout
    for mount in launch.mounts:
        source = Path(mount.source)
        for own in (layout.state, layout.run, layout.store):
            if own.is_relative_to(source) or source.is_relative_to(own):
                raise UsageError(
                    f"{source} cannot be given to the server",
                    cause=f"gpuckpt's own folder {own} is part of it" if own != source else "it is gpuckpt's own",
                    remedy="give it only the folders that it needs: --volume",
                )


def _words(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def _volumes(tools: Tools, replica: Replica, launch: Launch) -> tuple[Replica, dict[str, Path]]:
    """Where the named volumes lie; those that are not there yet are made, and recorded as the transaction's own."""
    found = {}
    for volume in launch.volumes:
        folder = tools.containers.volume(volume.name)
        if folder is None:
            replica = replace(replica, volumes=(*replica.volumes, volume.name))
            replica.save()
            folder = tools.containers.create_volume(volume.name)
        found[volume.name] = folder
    return replica, found


@contextlib.contextmanager
def _staging(layout: Layout, folder: Path) -> Iterator[Path]:
    """The folder that becomes the golden; deleted unless it was published (renamed away)."""
    sharing.remove(layout.goldens, folder, ignore_errors=True)  # a killed creation's, whose lock we now hold
    (folder / "images").mkdir(parents=True, mode=0o700)
    (folder / "volumes").mkdir(mode=0o700)
    (folder / "memory").mkdir()
    (folder / "memory").chmod(0o755)  # seen by the server, whatever user it runs as
    try:
        yield folder
    finally:
        sharing.remove(layout.goldens, folder, ignore_errors=True)


def _exercise(request: CreateRequest, tools: Tools, replica: Replica, phases: PhaseTable) -> tuple[Canary | None, int]:
    """First token, warm-up, canary, quiet; a server that fails at it is shown with its last lines."""
    adapter, endpoint = request.adapter, replica.endpoint
    canary = None
    try:
        with phase(tools, phases, "first token"):
            first_token_ns = adapter.first_token(endpoint)
        with phase(tools, phases, "warm-up"):
            adapter.warm_up(endpoint, request.warmup, request.prompts)
        if request.canary:
            with phase(tools, phases, "canary"):
                canary = adapter.record_canary(endpoint)
        with phase(tools, phases, "quiesce"):
            adapter.quiesce(endpoint, timeout=30)
    except GpuckptError as error:
        if error.exit_code in (8, 13):  # the server works; its answers or its clients are the trouble
            raise
        failure = failures.server_failure(
            tools,
            replica,
            f"the server of {request.name} failed while it was warmed up",
            kind=CheckpointError,
            ending=isinstance(error, DaemonUnreachableError),
        )
        failure.cause = "; ".join(text for text in (error.message, error.cause, failure.cause) if text)
        raise failure from error
    return canary, first_token_ns


def _size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(status.st_size for _, status in digests.walk(folder))


def _require_space(tools: Tools, needed: int) -> None:
    """Refuse a dump of ``needed`` bytes that cannot fit, before it takes the last memory of the machine."""
    free = shutil.disk_usage(tools.layout.store).free
    available = available_memory()
    if needed > free:
        raise OutOfSpaceError(
            f"the golden needs about {needed >> 20} MiB, the store has {free >> 20} MiB free",
            cause=f"{tools.layout.store} is full, or its limit is too small",
            remedy="remove goldens (gpuckpt df, gpuckpt rm), or enlarge store.size",
            lacking=needed - free,
        )
    if needed > available:
        raise OutOfSpaceError(
            f"the golden needs about {needed >> 20} MiB, the machine has {available >> 20} MiB of memory left",
            remedy="free memory: stop replicas, remove goldens (gpuckpt df)",
            lacking=needed - available,
        )


@contextlib.contextmanager
def _watching(tools: Tools, staging: Path, expected: int) -> Iterator[None]:
    """Report the growth of the images while the body runs."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            written = _written(staging / "images")
            tools.report.bytes(written, max(expected, written))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _written(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # CRIU removes images of its own again
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _dump(request: CreateRequest, tools: Tools, replica: Replica, container: str, bundle: Path) -> None:
    try:
        tools.containers.checkpoint(
            container, leave_running=request.leave_running, tcp_established=request.tcp_established
        )
    except (DeadlineError, DaemonUnreachableError):
        raise
    except GpuckptError as error:
        raise failures.dump_failure(tools, replica, bundle, error) from error
    if failed := failures.step_failure(replica, "checkpoint", CheckpointError):
        raise failed


def _make_private(staging: Path) -> None:
    for folder in (staging, staging / "images"):
        folder.chmod(0o700)
    for entry in os.scandir(staging / "images"):
        if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            os.chmod(entry.path, 0o600)


def _publish(staging: Path, target: Path) -> Path:
    """Give the golden its name, after everything else and in one step: it is there whole or not at all.

    A golden that is replaced changes places with the new one, and goes with the staging folder.
    """
    if target.exists():
        exchange(staging, target)
    else:
        staging.rename(target)
    return target


def _withdraw(home: Path, folder: Path, doomed: Path) -> None:
    """Remove a golden of the tier ``home``: gone for every reader in one step."""
    sharing.remove(home, doomed, ignore_errors=True)
    folder.rename(doomed)
    sharing.remove(home, doomed, ignore_errors=True)  # what will not go is swept
