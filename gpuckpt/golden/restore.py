"""Bring a replica back from a golden: map or copy memory, let the processes run, check the answer."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from gpuckpt.cuda.room import moved
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    GpuckptError,
    GpuFullError,
    RestoreError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import clone, failures, fitness, gpu, prepare, weights
from gpuckpt.golden.assembly import assemble, write_operation
from gpuckpt.golden.carried import carried
from gpuckpt.golden.prepare import Options, Source
from gpuckpt.golden.replica import Replica, alive, commit, empty_again, making
from gpuckpt.golden.restoring import restoring
from gpuckpt.golden.serving import container_trouble, wait_healthy
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.manifest import Held, Manifest
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload import adapter as adapter_of
from gpuckpt.workload.base import Replay
from gpuckpt.workload.endpoint import RequestFailed

_LONGEST = 60.0  # seconds that a restore may take, and the time in which its bytes come from a slow disk
_SLOWEST = 50e6  # bytes per second
_MUCH = 256 << 20  # bytes of copied memory from which on it is worth to switch huge pages on


@dataclass(frozen=True)
class RestoreRequest:
    """Which golden to restore, as what, and how; see ``gpuckpt restore --help`` for each field's meaning.

    ``replica`` None: one that was prepared, else one that bears the golden's name. ``gpu_wait``: seconds that it may
    wait for room on the GPUs, ``gpus``: those that it comes to if they have room, by UUID.
    """

    name: str
    replica: str | None = None
    options: Options = field(default_factory=Options)
    canary: bool = True
    keep: bool = False
    ignore_identity: tuple[str, ...] = ()
    huge_pages: bool = True
    fallback: Literal["cold"] | None = None
    start_timeout: float = 600
    keeper: str = ""
    gpu_wait: float = 0.0
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Restored:
    """A replica that answers, how it came to be, and where the time went.

    ``first_token_ns``: when the first streamed token (or first answer) came, CLOCK_MONOTONIC; None without canary.
    ``canary_match`` is None when no canary was replayed. ``fallback_reason`` is set when it was started cold, else
    ``gpus`` is what it holds on GPUs.
    """

    replica: Replica
    phases: PhaseTable
    first_token_ns: int | None
    canary_match: bool | None
    fallback_reason: GpuckptError | None = None
    gpus: tuple[Held, ...] = ()

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the command to the first streamed token."""
        return None if self.first_token_ns is None else (self.first_token_ns - self.phases.started_ns) / 1e9


def restore(request: RestoreRequest, tools: Tools, phases: PhaseTable) -> Restored:
    """Restore the golden ``request.name`` into a replica.

    Either the replica is ready, its canary equal to the recorded one, or nothing of it remains. Raises NotFoundError,
    BusyError (the replica runs already), IncompatibleError (another machine), VerificationError (the golden's bytes
    or the canary differ), OutOfSpaceError (GpuFullError on the GPUs, DeadlineError after waiting), RestoreError. With
    ``fallback`` these start the server cold instead.
    """
    with opened(request, tools, phases) as source:
        return from_opened(request, tools, phases, source)


@contextlib.contextmanager
def opened(request: RestoreRequest, tools: Tools, phases: PhaseTable, replicas: int = 1) -> Iterator[Source]:
    """The golden, found fit for so many replicas; with ``fallback`` also one that is not, and why.

    Nothing was touched for it yet. Raises as :func:`restore`.
    """
    with prepare.opened(tools, request.name) as source, contextlib.ExitStack() as stack:
        with phase(tools, phases, "checks"):
            stack.enter_context(fitness.own_folders(tools, source.manifest, replicas))
            try:
                fitness.require(tools, source, request.options, replicas, ignore=request.ignore_identity)
            except GpuckptError as error:
                if request.fallback is None or isinstance(error, UsageError):
                    raise
                source = replace(source, trouble=error)
        yield source


def from_opened(request: RestoreRequest, tools: Tools, phases: PhaseTable, source: Source) -> Restored:
    """One replica of a golden that was found fit. Raises as :func:`restore`."""
    with _making(request, tools, source) as replica:
        try:
            restored = _from_golden(request, tools, phases, source, replica)
        except GpuckptError as error:
            if request.fallback != "cold" or isinstance(error, UsageError | GpuFullError):
                raise  # started cold it would have no room on the GPU either
            tools.report.note(f"the restore of {replica.name} failed ({error.message}); starting cold")
            restored = _cold(request, tools, phases, source.manifest, replica, error)
    phases.stop()
    return restored


@contextlib.contextmanager
def _making(request: RestoreRequest, tools: Tools, source: Source) -> Iterator[Replica]:
    """The replica in the making: the one asked for, the first prepared just so that is free, or the golden's name."""
    key = source.key(request.options)
    waiting: list[str] = []
    if request.replica is None:
        waiting = [one.name for one in prepare.prepared(tools, request.name) if one.key == key]
    found: Replica | None = None
    with contextlib.ExitStack() as stack:
        for name in waiting:
            with contextlib.suppress(BusyError):  # another restore has taken it since we looked
                found = stack.enter_context(making(tools, name, request.name, key=key, keeper=request.keeper))
                break
        if found is None:
            name = request.replica if request.replica is not None else request.name
            found = stack.enter_context(making(tools, name, request.name, key=key, keeper=request.keeper))
        yield found


def _from_golden(
    request: RestoreRequest, tools: Tools, phases: PhaseTable, source: Source, replica: Replica
) -> Restored:
    if source.trouble is not None:
        raise source.trouble
    golden = source.manifest
    held = golden.gpu.devices if golden.gpu else ()
    with contextlib.ExitStack() as room:
        # Before anything is made: a server that has no room on the GPUs is no server.
        reserved = tools.devices.reserve(held, golden.launch.gpus, timeout=request.gpu_wait, preferred=request.gpus)
        return _brought_back(request, tools, phases, source, replica, room.enter_context(reserved), room)


def _brought_back(
    request: RestoreRequest,
    tools: Tools,
    phases: PhaseTable,
    source: Source,
    replica: Replica,
    chosen: Mapping[str, str],
    room: contextlib.ExitStack,
) -> Restored:
    golden, options = source.manifest, request.options
    if not replica.bundle:
        with phase(tools, phases, "container"):
            replica = prepare.prepare(tools, source, replica, options)
    else:  # prepared some time ago: hooks and settings are those of now
        write_operation(tools, replica, golden.launch, tcp_established=options.tcp_established)
    bundle = Path(replica.bundle)
    clone.identify(replica)
    _renew_entropy(tools)
    limit = _LONGEST + golden.sizes.total / _SLOWEST
    given = weights.given_by(golden, source.folder)
    ahead = room.enter_context(carried(tools, golden.gpu.devices if golden.gpu else (), given.files, chosen))
    with restoring(tools, replica, bundle, tcp_established=options.tcp_established, limit=limit) as running:
        with phase(tools, phases, "restore"), _huge_pages(request, tools, golden):
            first = running.until_resumed(partial(_bind, tools, golden))
        phases.split("restore", replica.operation.marks(), first="podman: restore")
        if golden.gpu is not None:
            gpu.restored(tools, phases, golden.gpu, first, chosen)
        if given:
            weights.wake(tools, phases, replica, given, ahead, first)
        room.close()  # what it has by now is no longer free
        first_token_ns, match = _answers(request, tools, phases, golden, replica, running)
    if request.keep:
        _keep_work_files(bundle, replica)
    tier = tools.layout.tier_of(source.folder)
    gpus = moved(golden.gpu.devices, chosen) if golden.gpu else ()
    made = commit(replica, tier=tier, memory=golden.memory.mode)
    return Restored(made, phases, first_token_ns, match, gpus=gpus)


def _bind(tools: Tools, golden: Manifest, first: int) -> None:
    try:
        notes = tools.bind(first, golden.affinity)
    except OSError as error:
        notes = [f"threads could not be bound to their processors: {error}"]
    for note in notes:
        tools.report.note(note)


def _renew_entropy(tools: Tools) -> None:
    try:
        tools.renew_entropy()
    except OSError as error:
        # Without it two clones could draw the same numbers from getrandom's state in their memory, for a moment.
        tools.report.note(f"the kernel's random generator could not be reseeded: {error}")


@contextlib.contextmanager
def _huge_pages(request: RestoreRequest, tools: Tools, golden: Manifest) -> Iterator[None]:
    # Mapped memory has its huge pages in the files; only copying fills pages that could be huge.
    if request.huge_pages and (golden.memory.mode == "copy" or golden.sizes.cpu_pages >= _MUCH):
        with tools.huge_pages(tools.layout.run):
            yield
    else:
        yield


def _answers(
    request: RestoreRequest,
    tools: Tools,
    phases: PhaseTable,
    golden: Manifest,
    replica: Replica,
    running: threading.Thread,
) -> tuple[int | None, bool | None]:
    """Replay the canary, or without one wait for health; what the server answers decides whether it is ready."""
    workload = adapter_of(golden.workload)
    if not request.canary or golden.canary is None:
        with phase(tools, phases, "health"):
            running.join()  # until then podman knows of no process
            wait_healthy(workload, tools, replica, timeout=min(60.0, request.start_timeout), kind=RestoreError)
        return None, None
    begin = now_ns()
    tools.report.stage("canary")
    deadline = time.monotonic() + 60
    while True:
        try:
            replay: Replay = workload.replay(replica.endpoint, golden.canary)
            break
        except RequestFailed as error:
            failure = failures.server_failure(
                tools, replica, f"the restored server of {replica.name} fails on the canary", kind=RestoreError
            )
            failure.cause = f"{error.message}: {error.cause}"
            raise failure from error
        except DaemonUnreachableError as error:
            # The socket may accept a moment before the server runs again; a dead server never will.
            dead = not running.is_alive() and not alive(tools, replica)  # before, podman knows of no process
            if dead or time.monotonic() > deadline:
                failure = failures.server_failure(
                    tools, replica, f"the restored server of {replica.name} does not answer", kind=RestoreError
                )
                failure.cause = failure.cause or error.cause
                raise failure from error
            time.sleep(0.01)
    phases.add("first token", begin, replay.first_token_ns)
    phases.add("canary", replay.first_token_ns, now_ns())
    if replay.differences:
        raise VerificationError(
            f"the restored server of {replica.name} answers the canary differently",
            cause="; ".join(replay.differences),
            remedy="do not use this golden; create it anew (or restore with --no-canary to look into it)",
        )
    return replay.first_token_ns, True


def _keep_work_files(bundle: Path, replica: Replica) -> None:
    """--keep: CRIU's log and statistics stay in the replica's folder."""
    for name in ("restore.log", "stats-restore"):
        if (bundle / name).is_file():
            shutil.copyfile(bundle / name, replica.folder / "criu" / name)


def _cold(
    request: RestoreRequest,
    tools: Tools,
    phases: PhaseTable,
    golden: Manifest,
    replica: Replica,
    reason: GpuckptError,
) -> Restored:
    """Start the golden's server the long way: same launch line, no image of it needed."""
    workload = adapter_of(golden.workload)
    with phase(tools, phases, "cold: container"):
        current = empty_again(tools, replica)
        with container_trouble(current, kind=RestoreError):
            empty = current.folder / "memory"
            empty.mkdir(exist_ok=True)
            current, container = assemble(tools, current, golden.launch, memory=empty, tcp_established=False)
            tools.containers.start(container)
    with phase(tools, phases, "cold: server start"):
        wait_healthy(workload, tools, current, timeout=request.start_timeout, kind=RestoreError)
    with phase(tools, phases, "cold: first token"):
        first_token_ns = workload.first_token(current.endpoint)
    return Restored(commit(current, tier="cold"), phases, first_token_ns, None, reason)
