"""Bring replicas back from a golden: map or copy memory, let the processes run, check the answer."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from msgspec import structs

from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    GpuckptError,
    GpuFullError,
    OutOfSpaceError,
    RestoreError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import clone, failures, gpu, identity, prepare, weights
from gpuckpt.golden.assembly import assemble, write_operation
from gpuckpt.golden.carried import carried
from gpuckpt.golden.prepare import Options, Source
from gpuckpt.golden.replica import Replica, alive, commit, empty_again, making, stop
from gpuckpt.golden.serving import container_trouble, wait_healthy
from gpuckpt.golden.tools import Reporter, Silent, Tools, phase
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import Manifest
from gpuckpt.store import locks, seal
from gpuckpt.store.digests import digest_bytes
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload import adapter as adapter_of
from gpuckpt.workload.base import Replay
from gpuckpt.workload.endpoint import RequestFailed

if TYPE_CHECKING:
    from concurrent.futures import Future


_LONGEST = 60.0  # seconds that a restore may take, and the time in which its bytes come from a slow disk
_SLOWEST = 50e6  # bytes per second
_MUCH = 256 << 20  # bytes of copied memory from which on it is worth to switch huge pages on


@dataclass(frozen=True)
class RestoreRequest:
    """Which golden to restore, as what, and how; see ``gpuckpt restore --help`` for each field's meaning.

    ``replica`` None: one that was prepared, else one that bears the golden's name. ``gpu_wait``: seconds that it may
    wait for room on the GPUs.
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


@dataclass(frozen=True)
class Restored:
    """A replica that answers, how it came to be, and where the time went.

    ``first_token_ns``: when the first streamed token (or first answer) came, CLOCK_MONOTONIC; None without canary.
    ``canary_match`` is None when no canary was replayed. ``fallback_reason`` is set when it was started cold.
    """

    replica: Replica
    phases: PhaseTable
    first_token_ns: int | None
    canary_match: bool | None
    fallback_reason: GpuckptError | None = None

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
    with prepare.opened(tools, request.name) as source, contextlib.ExitStack() as stack:
        with phase(tools, phases, "checks"):
            stack.enter_context(_own_folders(tools, source.manifest))
            source = _checked(request, tools, source, 1)
        return _restore(request, tools, phases, source)


def restore_all(
    requests: Sequence[RestoreRequest], tools: Tools, phases: PhaseTable
) -> tuple[list[Restored], list[tuple[str, GpuckptError]]]:
    """Restore several replicas of one golden side by side; each is a transaction of its own.

    ``requests`` name the same golden, and each a replica. Returns those that are ready, in the order of the requests,
    and those that failed with their errors. Each has a phase table of its own, from the common start. Raises what
    concerns all of them: NotFoundError, IncompatibleError, VerificationError of the golden. An interrupt lets those
    finish that are under way and removes what this call made.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    first = requests[0]
    with (
        prepare.opened(tools, first.name) as source,
        ThreadPoolExecutor(len(requests)) as pool,
        contextlib.ExitStack() as stack,
    ):
        with phase(tools, phases, "checks"):
            if len(requests) > 1 and source.manifest.launch.own:
                raise UsageError(
                    f"only one replica of {first.name} can run at a time",
                    cause=f"it keeps files in {source.manifest.launch.own[0]}",
                    remedy="restore one; or create a golden that keeps its files in a folder of the container",
                )
            stack.enter_context(_own_folders(tools, source.manifest))
            source = _checked(first, tools, source, len(requests))
        tools.report.stage(f"restore {len(requests)}")
        quiet = structs.replace(tools, report=_NotesOnly(tools.report))
        # Noted by the threads themselves: an interrupt can come before we know of one that we have started.
        made: list[Restored] = []

        def work(one: RestoreRequest) -> Restored:
            restored = _restore(one, quiet, phases.branch(), source)
            made.append(restored)
            return restored

        running: dict[Future[Restored], RestoreRequest] = {}
        try:
            running |= {pool.submit(work, one): one for one in requests}
            for done, _ in enumerate(as_completed(running), start=1):
                tools.report.stage(f"restore {len(requests)}: {done} done")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            _take_back(tools, made)
            raise
    phases.stop()
    ready = [future.result() for future in running if future.exception() is None]
    failed: list[tuple[str, GpuckptError]] = []
    for future, one in running.items():
        trouble = future.exception()
        if isinstance(trouble, GpuckptError):
            failed.append((str(one.replica), trouble))
        elif trouble is not None:  # a fault of ours: nobody would be told of the others
            _take_back(tools, ready)
            raise trouble
    return ready, failed


@contextlib.contextmanager
def _own_folders(tools: Tools, golden: Manifest) -> Iterator[None]:
    """Have the folders that only one replica can have. Raises BusyError.

    CRIU takes the server's lock again, and would wait for whoever has it.
    """
    with contextlib.ExitStack() as stack:
        for own in golden.launch.own:
            stack.enter_context(locks.exclusive(tools.layout.replica_locks, "volume", digest_bytes(own.encode())[:16]))
            if any(locks.held(file) for file in Path(own).glob("*/lock")):
                raise BusyError(
                    f"{own} belongs to another server that runs",
                    cause=f"{golden.name} keeps files there, and only one server at a time can",
                    remedy="stop the other one (gpuckpt ls)",
                )
        yield


def _take_back(tools: Tools, made: Sequence[Restored]) -> None:
    """Stop replicas that were restored; one that will not go does not keep the others."""
    for one in made:
        try:
            stop(tools, one.replica.name)
        except (GpuckptError, OSError) as error:
            tools.report.note(f"could not stop {one.replica.name}: {error}")


class _NotesOnly(Silent):
    """A reporter for one of several operations side by side: their stages would only confuse each other."""

    def __init__(self, report: Reporter) -> None:
        self._report = report

    def note(self, text: str) -> None:
        self._report.note(text)


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


def _restore(request: RestoreRequest, tools: Tools, phases: PhaseTable, source: Source) -> Restored:
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


def _from_golden(
    request: RestoreRequest, tools: Tools, phases: PhaseTable, source: Source, replica: Replica
) -> Restored:
    if source.trouble is not None:
        raise source.trouble
    golden = source.manifest
    held = golden.gpu.devices if golden.gpu else ()
    with contextlib.ExitStack() as room:
        # Before anything is made: a server that has no room on the GPUs is no server.
        reserved = tools.devices.reserve(held, golden.launch.gpus, timeout=request.gpu_wait)
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
    with _restoring(tools, replica, bundle, tcp_established=options.tcp_established, limit=limit) as restoring:
        with phase(tools, phases, "restore"), _huge_pages(request, tools, golden):
            first = restoring.until_resumed(partial(_bind, tools, golden))
        phases.split("restore", replica.operation.marks(), first="podman: restore")
        if golden.gpu is not None:
            gpu.restored(tools, phases, golden.gpu, first, chosen)
        if given:
            weights.wake(tools, phases, replica, given, ahead, first)
        room.close()  # what it has by now is no longer free
        first_token_ns, match = _answers(request, tools, phases, golden, replica, restoring)
    if request.keep:
        _keep_work_files(bundle, replica)
    tier = tools.layout.tier_of(source.folder)
    return Restored(commit(replica, tier=tier, memory=golden.memory.mode), phases, first_token_ns, match)


class _Restoring(threading.Thread):
    """podman's restore, which ends some time after the processes run: podman and the runtime have books to keep."""

    def __init__(self, tools: Tools, replica: Replica, *, tcp_established: bool, limit: float) -> None:
        super().__init__(daemon=True)
        self._restore = partial(
            tools.containers.restore,
            replica.container,
            tools.layout.state,
            tcp_established=tcp_established,
            limit=limit,
        )
        self._operation = replica.operation
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._restore()
        except BaseException as error:
            self.error = error

    def until_resumed(self, prepare: Callable[[int], None]) -> int | None:
        """Start it, and wait until the processes run, or it is over; returns the first one, raises what it raised.

        ``prepare`` is called with the first process when all are there and CRIU is about to let them run.
        """
        self.start()
        first: int | None = None
        while self.is_alive() and (first := self._operation.restored()) is None:
            self.join(0.001)
        if first is not None or (first := self._operation.restored()) is not None:
            prepare(first)
        while self.is_alive() and not self._operation.resumed():
            self.join(0.001)
        if self.error is not None:
            raise self.error
        return first


@contextlib.contextmanager
def _restoring(
    tools: Tools, replica: Replica, bundle: Path, *, tcp_established: bool, limit: float
) -> Iterator[_Restoring]:
    """A restore that ends with the body, which may use the server as soon as its processes run.

    An interrupt is not kept waiting: removing the container ends podman's restore of it.
    """
    restoring = _Restoring(tools, replica, tcp_established=tcp_established, limit=limit)
    trouble: BaseException | None = None
    try:
        yield restoring
    except (GpuckptError, OSError) as error:
        trouble = error
    if restoring.ident is not None:
        restoring.join()
    # Why there is no server is a better reason than that it does not answer.
    if isinstance(restoring.error, GpuckptError):
        raise failures.restore_failure(tools, replica, bundle, restoring.error) from restoring.error
    if restoring.error is not None:
        raise restoring.error
    replica.operation.require_marks()
    if failed := failures.step_failure(replica, "restore", RestoreError):
        raise failed
    if trouble is not None:
        raise trouble


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


def _checked(request: RestoreRequest, tools: Tools, source: Source, replicas: int) -> Source:
    """The golden, found fit; with ``fallback`` also one that is not, and why. Nothing was touched for it yet."""
    try:
        _check(request, tools, source, replicas)
    except GpuckptError as error:
        if request.fallback is None or isinstance(error, UsageError):
            raise
        return replace(source, trouble=error)
    return source


def _check(request: RestoreRequest, tools: Tools, source: Source, replicas: int) -> None:
    golden = source.manifest
    if request.options.tcp_established and not golden.launch.tcp_established:
        raise UsageError(
            f"golden {golden.name} has no open TCP connections to restore",
            cause="it was created without --tcp-established, which closed them",
            remedy="restore without --tcp-established, or create the golden anew with it",
        )
    identity.compare(
        golden.identity,
        golden.launch,
        tools.criu,
        tools.runtime,
        image_digest=tools.containers.image_digest,
        ignore=request.ignore_identity,
    )
    if golden.gpu is not None:
        tools.devices.check(golden.gpu.devices, golden.launch.gpus)
    if found := seal.broken(source.folder, golden):
        raise VerificationError(
            f"golden {golden.name} is damaged and was not restored",
            cause="; ".join(found[:5]),
            remedy=f"remove it (gpuckpt rm {golden.name}) and create it anew, or import it again",
        )
    needed, available = (golden.sizes.cpu_pages + golden.sizes.shared_memory) * replicas, available_memory()
    if needed > available:
        raise OutOfSpaceError(
            f"restoring {golden.name} needs about {needed >> 20} MiB of memory, {available >> 20} MiB are left",
            remedy="stop replicas (gpuckpt ls) or remove goldens (gpuckpt df)",
        )


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
    restoring: threading.Thread,
) -> tuple[int | None, bool | None]:
    """Replay the canary, or without one wait for health; what the server answers decides whether it is ready."""
    workload = adapter_of(golden.workload)
    if not request.canary or golden.canary is None:
        with phase(tools, phases, "health"):
            restoring.join()  # until then podman knows of no process
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
            dead = not restoring.is_alive() and not alive(tools, replica)  # before, podman knows of no process
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
