"""Device state in goldens: taken off the GPUs before a dump, put back after a restore.

The dump carries it as memory of the processes, into which the driver has copied it. CRIU's own plugin for CUDA stays
off (gpuckpt.criu.operation): it moves one process after the other, and starts a program for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from gpuckpt.cuda.checks import driver_version
from gpuckpt.cuda.suspend import Step
from gpuckpt.errors import CheckpointError, GpuckptError, PreflightError, RestoreError
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import DeviceState, Held, Launch
from gpuckpt.timing import PhaseTable

# Seconds for which a server that has just left a GPU waits for room to come back: somebody else was faster.
_PATIENCE = 60.0
_PIPES = "/tmp/nvidia-mps"  # where MPS's daemon is looked for by itself


@dataclass(frozen=True)
class Holders:
    """The processes of a running server that hold state on GPUs, by their ids on the host, and what they hold.

    ``gpus`` are the devices that the container was given. ``told``: NVML names these processes, so that what they hold
    is known; where it does not (in a container of its own, say), ``free`` is what was free on each device meanwhile.
    """

    first: int
    pids: tuple[int, ...]
    state: DeviceState
    gpus: tuple[str, ...]
    told: bool
    free: dict[str, int]


def preflight(tools: Tools, gpus: Sequence[str]) -> None:
    """Ask the driver before a server is started for minutes. Raises PreflightError, and CheckpointError for MIG."""
    try:
        here = tools.devices.gpus()
    except PreflightError as error:
        if driver_version() is not None:  # which a sandbox may hide, so that the driver itself is asked first
            raise
        raise PreflightError(
            "there is no GPU to give",
            cause="NVIDIA's driver is not loaded on this machine",
            remedy="install it (570 or later), then make setup; or leave --gpu out",
        ) from error
    mine = [gpu for gpu in here if "all" in gpus or gpu.uuid in gpus] or list(here)
    if mine and all(gpu.mig for gpu in mine):
        tools.devices.refuse([Held(gpu.uuid, gpu.name, 0) for gpu in mine])


def refuse_shared(launch: Launch) -> None:
    """Raise CheckpointError if the container is shown NVIDIA's Multi-Process Service: its clients share one context.

    A program is its client wherever it finds the daemon's pipes (CUDA_MPS_PIPE_DIRECTORY in NVIDIA's MPS guide). Those
    of the host are none in a container, even on the host's own root file system, unless they are mounted.
    """
    pipes = Path(launch.env.get("CUDA_MPS_PIPE_DIRECTORY", _PIPES))
    above = [mount for mount in launch.mounts if pipes.is_relative_to(mount.destination)]
    if not above:
        return
    mount = max(above, key=lambda one: len(Path(one.destination).parts))  # which hides the others
    if (Path(mount.source) / pipes.relative_to(mount.destination) / "control").exists():
        raise CheckpointError(
            "the server would share its GPU through NVIDIA's MPS, and its state could not be frozen",
            cause=f"{mount.source} is mounted at {mount.destination}, with the pipes of an MPS daemon in it",
            remedy="leave that mount out: the server then has a context of its own",
        )


def find(tools: Tools, first: int, gpus: tuple[str, ...]) -> Holders | None:
    """Who of the container's processes holds device state; None if nobody does.

    Raises CheckpointError for state that the driver cannot move.
    """
    pids = tuple(tools.devices.holders(first))
    if not pids:
        tools.devices.refuse_open(first, pids)
        return None
    held = tools.devices.held(pids)
    tools.devices.refuse(held)
    inside = {pid: name for name, pid in tools.devices.inside(first).items()}
    here = tools.devices.gpus()
    state = DeviceState(
        devices=held, processes=tuple(inside[pid] for pid in pids), visible=tuple(gpu.uuid for gpu in here)
    )
    return Holders(first, pids, state, gpus, bool(held), {gpu.uuid: gpu.free for gpu in here})


def measured(tools: Tools, holders: Holders) -> Holders:
    """The same with the bytes that a dump will carry as things are now."""
    carried = sum(one.bytes for one in tools.devices.held(holders.pids))
    return replace(holders, state=structs.replace(holders.state, carried=carried))


@contextlib.contextmanager
def suspended(
    tools: Tools, phases: PhaseTable, holders: Holders | None, *, resume: bool
) -> Iterator[DeviceState | None]:
    """Have the device state in host memory while the body runs; room for it is kept on the devices.

    Yields what the golden is to say of it. It is put back if the body fails, and with ``resume`` also if it does not.
    Raises CheckpointError.
    """
    if holders is None:
        yield None
        return
    now = tools.devices.held(holders.pids)
    tools.report.stage("GPU")
    note(phases, tools.devices.suspend(holders.first, holders.pids))
    kept: Mapping[str, str] = {}
    with contextlib.ExitStack() as stack:
        try:
            state = holders.state if holders.told else _by_difference(tools, holders)
            # Nobody has come yet, or they were faster: then there is room for it later, or it waits.
            with contextlib.suppress(GpuckptError):
                kept = stack.enter_context(tools.devices.reserve(now, holders.gpus))
            yield state
        except BaseException:
            try:
                _back(tools, phases, holders, kept)
            except GpuckptError as error:
                tools.report.note(f"the server's GPU state could not be put back: {error.message}")
            raise
        if resume:
            _back(tools, phases, holders, kept)


def _by_difference(tools: Tools, holders: Holders) -> DeviceState:
    """What the server had held, by what has become free since it was awake. Raises CheckpointError."""
    held = tuple(
        Held(gpu.uuid, gpu.name, gpu.free - holders.free[gpu.uuid])
        for gpu in tools.devices.gpus()
        if gpu.free > holders.free.get(gpu.uuid, gpu.free)
    )
    if not held:
        raise CheckpointError(
            "nobody can tell how much GPU memory the server holds",
            cause="NVML does not know its processes by their ids here, and nothing became free when it was suspended",
            remedy="run gpuckpt on the host itself, in its first pid namespace",
        )
    tools.report.note("NVML does not know the server's processes: its GPU memory is what became free without it")
    return structs.replace(holders.state, devices=held, carried=sum(one.bytes for one in held))


def _back(tools: Tools, phases: PhaseTable, holders: Holders, kept: Mapping[str, str]) -> None:
    visible = holders.state.visible
    if kept or not holders.state.devices:
        note(phases, tools.devices.resume(holders.pids, kept, visible))
        return
    with tools.devices.reserve(holders.state.devices, holders.gpus, timeout=_PATIENCE) as chosen:
        note(phases, tools.devices.resume(holders.pids, chosen, visible))


def restored(
    tools: Tools, phases: PhaseTable, state: DeviceState, first: int | None, chosen: Mapping[str, str]
) -> None:
    """Put device state back into processes that CRIU has just brought back below ``first``; then they run.

    ``chosen``: onto which devices, from a reservation. Raises RestoreError.
    """
    if not first:
        raise RestoreError("nobody knows the restored server's first process", remedy="gpuckpt doctor")
    pids = on_host(tools, state.processes, first)
    tools.report.stage("GPU")
    note(phases, tools.devices.resume(pids, chosen, state.visible))


def on_host(tools: Tools, processes: Sequence[int], first: int) -> list[int]:
    """Processes below ``first``, by their ids in the container, as the host calls them. Raises RestoreError."""
    here = tools.devices.inside(first)
    if missing := [pid for pid in processes if pid not in here]:
        raise RestoreError(
            "processes with GPU state are not there",
            cause=f"there is no process {', '.join(map(str, missing))} in the container",
            remedy="gpuckpt logs tells what the server has said last; stop it, and create the golden anew",
        )
    return [here[pid] for pid in processes]


def note(phases: PhaseTable, steps: Sequence[Step]) -> None:
    """Steps of the driver as rows of a phase table."""
    for step in steps:
        phases.add(f"GPU: {step.name}", step.begin_ns, step.end_ns)
