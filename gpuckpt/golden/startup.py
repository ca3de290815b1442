"""Start a server and make it ready to be dumped: healthy, warmed up, its canary recorded, its memory given back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from gpuckpt.errors import (
    CheckpointError,
    DaemonUnreachableError,
    GpuckptError,
    IncompatibleError,
    NotFoundError,
    OutOfSpaceError,
)
from gpuckpt.golden import failures, gpu, profile, weights
from gpuckpt.golden.assembly import assemble, seccomp_digest
from gpuckpt.golden.launch import CreateRequest, launch_of
from gpuckpt.golden.replica import Replica, empty_again
from gpuckpt.golden.serving import container_trouble, wait_healthy
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.manifest import Canary, Launch
from gpuckpt.timing import PhaseTable


@dataclass(frozen=True)
class Started:
    """A server that is healthy in its container, and what a dump copies of it: from where, to where."""

    replica: Replica
    launch: Launch
    container: str
    written: dict[Path, Path]


@dataclass(frozen=True)
class Ready:
    """A server that was warmed up and is to be dumped: what holds its device state, where its weights were written."""

    started: Started
    canary: Canary | None
    first_token_ns: int
    holders: gpu.Holders | None
    given: weights.Given


def ready(
    request: CreateRequest, tools: Tools, phases: PhaseTable, launch: Launch, replica: Replica, staging: Path
) -> Ready:
    """Start and exercise the server; once more with its weights in the image, if it cannot have them outside."""
    started = _started(request, tools, phases, launch, replica, staging)
    if request.weights == "outside":
        weights.require_able(tools, started.replica)
    canary, first_token_ns = _exercise(request, tools, started.replica, phases)
    holders = _holders(request, tools, started)
    if not request.accelerator.outside or canary is None:
        given = _given(request, tools, phases, started, canary, holders)
        return Ready(started, canary, first_token_ns, holders, given)
    folder = staging / "weights"
    try:
        given = weights.release(tools, phases, started.replica, request.adapter, canary, folder)
        return Ready(started, canary, first_token_ns, holders, given)
    except GpuckptError as error:
        if request.weights == "outside" or isinstance(error, OutOfSpaceError):
            raise
        why = f"{error.message}: {error.cause}" if error.cause else error.message
        tools.report.note(f"starting once more, with the weights in the image: {why}")
    shutil.rmtree(folder)
    within = structs.replace(request.accelerator, outside=False)
    again = launch_of(request, tools, within)
    started = _started(request, tools, phases, again, empty_again(tools, started.replica), staging)
    canary, _ = _exercise(request, tools, started.replica, phases)
    holders = _holders(request, tools, started)
    given = _given(request, tools, phases, started, canary, holders)
    return Ready(started, canary, first_token_ns, holders, given)


def _given(
    request: CreateRequest,
    tools: Tools,
    phases: PhaseTable,
    started: Started,
    canary: Canary | None,
    holders: gpu.Holders | None,
) -> weights.Given:
    """Where weights stay: vLLM's caches, most of what it has on a GPU. The guest's are no larger than its sessions."""
    if holders is None or request.adapter.record.kind != "vllm":
        return weights.NOTHING
    return weights.release_caches(tools, phases, started.replica, request.adapter, canary)


def _holders(request: CreateRequest, tools: Tools, started: Started) -> gpu.Holders | None:
    if not request.gpus:
        return None
    found = gpu.find(tools, tools.containers.inspect(started.container).pid, request.gpus)
    if found is None:
        tools.report.note("the server was given GPUs and holds no memory there")
    return found


def _started(
    request: CreateRequest, tools: Tools, phases: PhaseTable, launch: Launch, replica: Replica, staging: Path
) -> Started:
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
) -> Started:
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
    return Started(replica, launch, container, written)


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
