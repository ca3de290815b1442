"""Standbys: replicas that hold no GPU memory and no processor, and answer again after a fraction of a second.

On the way down a server gives its weights back where they lie outside its image, its device state goes to host memory,
its processes are frozen. On the way up they are thawed, their device state is put back, the weights are read. What is
on the way is written down before the first step, so that one that was cut short can be woken or stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from gpuckpt.containers import freezer
from gpuckpt.containers.podman import Container
from gpuckpt.cuda.room import moved
from gpuckpt.errors import BusyError, GpuckptError, NothingToDo, RestoreError
from gpuckpt.golden import gpu, weights
from gpuckpt.golden.carried import carried
from gpuckpt.golden.replica import Replica, Standby, alive, by_name
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.manifest import DeviceState, Held, Manifest
from gpuckpt.store import locks
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload import adapter

_UNDOING = 60.0  # seconds for a server to take its memory again when it could not be suspended
_QUIET = 30.0  # seconds in which the requests of a server on a GPU must have ended


@dataclass(frozen=True)
class Changed:
    """A replica that was suspended or woken, where the time went, and the GPU memory that it gave or took."""

    replica: Replica
    phases: PhaseTable
    gpus: tuple[Held, ...]

    @property
    def gpu_bytes(self) -> int:
        """Of all GPUs together."""
        return sum(one.bytes for one in self.gpus)


def suspend(
    tools: Tools, name: str, golden: Manifest | None, phases: PhaseTable, *, container: Container | None = None
) -> Changed:
    """Make a standby of the running replica ``name``; afterwards it holds no GPU memory.

    ``golden`` is its golden's manifest, if there is one; it says whether weights lie outside. ``container``: its
    container, where the caller knows it. Raises NotFoundError, BusyError, NothingToDo (it is a standby), DeadlineError
    (requests do not end), CheckpointError. The replica runs on then, unless the error says that it cannot.
    """
    with _held(tools, name, container) as (replica, container):
        if replica.standby is not None and freezer.frozen(container.pid, container.id):
            raise NothingToDo(f"replica {name} is a standby already", remedy=f"gpuckpt wake {name}")
        if replica.standby is not None:  # one that was killed on its way: up again, and down once more
            with _kept(tools, golden):
                _up(tools, replica, container, golden, phases, timeout=_QUIET)
            replica = by_name(tools.layout.replicas, name)
        with _kept(tools, golden):
            return _down(tools, replica, container, golden, phases)


def wake(
    tools: Tools,
    name: str,
    golden: Manifest | None,
    phases: PhaseTable,
    *,
    timeout: float = 0.0,
    gpus: Collection[str] = (),
    container: Container | None = None,
) -> Changed:
    """Let the standby ``name`` answer again; it waits at most ``timeout`` seconds for room on the GPUs.

    ``gpus``: those that it comes to if they have room, by UUID. ``container``: as in :func:`suspend`.
    Raises NotFoundError, BusyError, NothingToDo (it is awake), GpuFullError (no room; it stays a standby),
    RestoreError, VerificationError (its weights are damaged).
    """
    with _held(tools, name, container) as (replica, container):
        if replica.standby is None and not freezer.frozen(container.pid, container.id):
            raise NothingToDo(f"replica {name} is awake already", cause=f"it answers on {replica.endpoint}")
        with _kept(tools, golden):
            return _up(tools, replica, container, golden, phases, timeout=timeout, preferred=gpus)


@contextlib.contextmanager
def _held(tools: Tools, name: str, known: Container | None) -> Iterator[tuple[Replica, Container]]:
    by_name(tools.layout.replicas, name)
    with locks.exclusive(tools.layout.replica_locks, "replica", name):
        replica = by_name(tools.layout.replicas, name)
        container = known or tools.containers.inspect(replica.container)
        if replica.state != "ready" or not container.alive or not container.pid:
            raise BusyError(
                f"replica {name} does not run",
                cause=f"it is {replica.state}, its container {container.status}",
                remedy=f"gpuckpt stop {name}, and restore {replica.golden} again",
            )
        if container.status == "paused":
            raise BusyError(f"replica {name} was paused by podman", remedy=f"podman unpause {replica.container}")
        yield replica, container


def _kept(tools: Tools, golden: Manifest | None) -> contextlib.AbstractContextManager[None]:
    """Keep others from removing the weights that are given up or taken meanwhile. Raises BusyError."""
    if golden is None or not golden.weights:
        return contextlib.nullcontext()
    return locks.shared(tools.layout.golden_locks, "golden", golden.name)


def _down(tools: Tools, replica: Replica, container: Container, golden: Manifest | None, phases: PhaseTable) -> Changed:
    holders = gpu.find(tools, container.pid, _gpus(golden))
    given = _giving(tools, replica, golden, container.pid)
    if golden is not None and (holders is not None or given):
        with phase(tools, phases, "quiesce"):
            adapter(golden.workload).quiesce(replica.endpoint, timeout=_QUIET)
    state = holders.state if holders else _NONE
    tier = tools.layout.tier_of(given.files[0].parents[1]) if given.files else ""
    going = Standby(state.processes, _devices(state), state.visible, bool(given), tier)
    try:
        replace(replica, standby=going).save()
        if given:
            weights.sleep(tools, phases, replica, given)
        with gpu.suspended(tools, phases, holders, resume=False) as off, phase(tools, phases, "freeze"):
            state = off or state
            going = replace(going, devices=_devices(state))
            replace(replica, standby=going).save()
            freezer.freeze(container.pid, container.id)
    except BaseException:
        _undo(tools, replica, container, going, given)
        raise
    phases.stop()
    return Changed(replace(replica, standby=going), phases, state.devices)


def _undo(tools: Tools, replica: Replica, container: Container, going: Standby, given: weights.Given) -> None:
    """Let a server that could not be suspended answer as before; what cannot be undone the next wake tries again."""
    try:
        freezer.thaw(container.pid, container.id)
        pids = gpu.on_host(tools, going.processes, container.pid)
        if tools.devices.off(pids):
            raise RestoreError("its GPU state is still in host memory")
        tools.devices.settle(pids, {}, going.visible)
        if given:
            weights.wake(tools, PhaseTable(), replica, given, first=container.pid, timeout=_UNDOING)
        replica.save()
    except (OSError, GpuckptError) as trouble:
        tools.report.note(f"{replica.name} does not answer yet: {trouble}; try gpuckpt wake {replica.name}")


def _up(
    tools: Tools,
    replica: Replica,
    container: Container,
    golden: Manifest | None,
    phases: PhaseTable,
    *,
    timeout: float,
    preferred: Collection[str] = (),
) -> Changed:
    was = replica.standby or Standby()
    given = _given(tools, replica, golden, container.pid) if was.given else weights.NOTHING
    held = tuple(Held(uuid, name, count) for uuid, name, count in was.devices)
    gpus = _gpus(golden)
    if not freezer.frozen(container.pid, container.id):  # it was killed on its way, and may hold some of it still
        held, gpus = _lacking(tools, was, container, held), tuple(one.uuid for one in held)
    waited = now_ns()
    with contextlib.ExitStack() as room:
        chosen = room.enter_context(tools.devices.reserve(held, gpus, timeout=timeout, preferred=preferred))
        ahead = room.enter_context(carried(tools, held, given.files, chosen))
        if held:
            phases.add("GPU: room", waited, now_ns())
        with phase(tools, phases, "thaw"):
            freezer.thaw(container.pid, container.id)
        try:
            pids = gpu.on_host(tools, was.processes, container.pid)
            gpu.note(phases, tools.devices.settle(pids, chosen, was.visible))
        except BaseException:
            # Either none of its state is on a device, and it can be tried again, or it is lost: nobody can ask it.
            with contextlib.suppress(GpuckptError, OSError):
                freezer.freeze(container.pid, container.id)
            raise
        if given:
            try:
                weights.wake(tools, phases, replica, given, ahead, container.pid)
            except BaseException:
                _down_again(tools, replica, container, pids)
                raise
    awake = replace(replica, standby=None)
    awake.save()
    phases.stop()
    whole = tuple(Held(uuid, name, count) for uuid, name, count in was.devices)
    return Changed(awake, phases, moved(whole, chosen))


def _down_again(tools: Tools, replica: Replica, container: Container, pids: list[int]) -> None:
    """One that is on the device without its weights is no use there: as a standby it can be tried again."""
    try:
        if not alive(tools, replica):
            return
        if pids:
            tools.devices.suspend(container.pid, pids)
        freezer.freeze(container.pid, container.id)
    except (GpuckptError, OSError) as error:
        tools.report.note(f"it could not be suspended again, and holds its GPU memory until it is stopped: {error}")


def _lacking(tools: Tools, was: Standby, container: Container, held: tuple[Held, ...]) -> tuple[Held, ...]:
    """What of ``held`` is not on the devices now."""
    now = {one.uuid: one.bytes for one in tools.devices.held(gpu.on_host(tools, was.processes, container.pid))}
    left = (Held(one.uuid, one.name, one.bytes - now.get(one.uuid, 0)) for one in held)
    return tuple(one for one in left if one.bytes > 0)


def _gpus(golden: Manifest | None) -> tuple[str, ...]:
    return golden.launch.gpus if golden and golden.launch.gpus else ("all",)


def _devices(state: DeviceState) -> tuple[tuple[str, str, int], ...]:
    return tuple((one.uuid, one.name, one.bytes) for one in state.devices)


def _giving(tools: Tools, replica: Replica, golden: Manifest | None, first: int) -> weights.Given:
    """What a running server is to give back: nothing that it could not have again."""
    if golden is None or not (golden.weights or golden.caches):
        return weights.NOTHING
    found = weights.shown(tools, golden, first)
    if found is None:
        tools.report.note(f"{replica.name} keeps its weights: it was not restored from where {golden.name} is now")
        return weights.NOTHING
    weights.require_intact(golden, found)
    return found


def _given(tools: Tools, replica: Replica, golden: Manifest | None, first: int) -> weights.Given:
    """What a standby has given back."""
    found = weights.shown(tools, golden, first) if golden is not None else None
    if golden is None or found is None:
        why = "which was removed" if golden is None else "of which its container shows no file"
        raise RestoreError(
            f"what {replica.name} has given back is gone",
            cause=f"it is a part of golden {replica.golden}, {why}",
            remedy=f"gpuckpt stop {replica.name}, and restore {replica.golden} again",
        )
    weights.require_intact(golden, found)
    return found


_NONE = DeviceState(devices=(), processes=())
