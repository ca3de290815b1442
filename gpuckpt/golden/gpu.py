"""Device state in goldens: taken off the GPUs before a dump, put back after a restore.

The dump carries it as memory of the processes, into which the driver has copied it. CRIU's own plugin for CUDA stays
off (gpuckpt.criu.operation): it moves one process after the other, and starts a program for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from gpuckpt import proc
from gpuckpt.cuda.suspend import Step
from gpuckpt.errors import GpuckptError, RestoreError
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import DeviceState
from gpuckpt.timing import PhaseTable

# Seconds for which a server that has just left a GPU waits for room to come back: somebody else was faster.
_PATIENCE = 60.0


@dataclass(frozen=True)
class Holders:
    """The processes of a running server that hold state on GPUs, by their ids on the host, and what they hold."""

    first: int
    pids: tuple[int, ...]
    state: DeviceState
    visible: tuple[str, ...]


def find(tools: Tools, first: int, visible: tuple[str, ...]) -> Holders | None:
    """Who of the container's processes holds device state; None if nobody does.

    ``visible``: the devices that the container was given. Raises CheckpointError for state that the driver cannot move.
    """
    pids = tuple(tools.devices.holders(first))
    if not pids:
        return None
    held = tools.devices.held(pids)
    tools.devices.refuse(held)
    state = DeviceState(devices=held, processes=tuple(map(proc.inside, pids)))
    return Holders(first, pids, state, visible)


def measured(tools: Tools, holders: Holders) -> Holders:
    """The same with the bytes that a dump will carry as things are now."""
    carried = sum(one.bytes for one in tools.devices.held(holders.pids))
    return replace(holders, state=structs.replace(holders.state, carried=carried))


@contextlib.contextmanager
def suspended(tools: Tools, phases: PhaseTable, holders: Holders | None, *, resume: bool) -> Iterator[None]:
    """Have the device state in host memory while the body runs; room for it is kept on the devices.

    It is put back if the body fails, and with ``resume`` also if it does not. Raises CheckpointError.
    """
    if holders is None:
        yield
        return
    now = tools.devices.held(holders.pids)
    tools.report.stage("GPU")
    note(phases, tools.devices.suspend(holders.first, holders.pids))
    with contextlib.ExitStack() as stack:
        # Nobody has come yet, or they were faster: then there is room for it later, or it waits.
        kept: Mapping[str, str] = {}
        with contextlib.suppress(GpuckptError):
            kept = stack.enter_context(tools.devices.reserve(now, holders.visible))
        try:
            yield
        except BaseException:
            try:
                _back(tools, phases, holders, kept or None)
            except GpuckptError as error:
                tools.report.note(f"the server's GPU state could not be put back: {error.message}")
            raise
        if resume:
            _back(tools, phases, holders, kept or None)


def _back(tools: Tools, phases: PhaseTable, holders: Holders, kept: Mapping[str, str] | None) -> None:
    if kept is not None:
        note(phases, tools.devices.resume(holders.pids, kept))
        return
    with tools.devices.reserve(holders.state.devices, holders.visible, timeout=_PATIENCE) as chosen:
        note(phases, tools.devices.resume(holders.pids, chosen))


def restored(tools: Tools, phases: PhaseTable, state: DeviceState, first: int, chosen: Mapping[str, str]) -> None:
    """Put device state back into processes that CRIU has just brought back below ``first``; then they run.

    ``chosen``: onto which devices, from a reservation. Raises RestoreError.
    """
    pids = on_host(tools, state, first)
    tools.report.stage("GPU")
    note(phases, tools.devices.resume(pids, chosen))


def on_host(tools: Tools, state: DeviceState, first: int) -> list[int]:
    """The processes that hold the state, as the host calls them now. Raises RestoreError if one is not there."""
    here = tools.devices.inside(first)
    if missing := [pid for pid in state.processes if pid not in here]:
        raise RestoreError(
            "processes with GPU state have not come back",
            cause=f"there is no process {', '.join(map(str, missing))} in the container",
            remedy="gpuckpt logs tells what the server has said last; create the golden anew",
        )
    return [here[pid] for pid in state.processes]


def note(phases: PhaseTable, steps: Sequence[Step]) -> None:
    """Steps of the driver as rows of a phase table."""
    for step in steps:
        phases.add(f"GPU: {step.name}", step.begin_ns, step.end_ns)
