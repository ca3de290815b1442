"""Make a golden: start the server, wait, warm up, record the canary, dump, publish."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpuckpt.criu import hot
from gpuckpt.criu.prune import drop_empty_archives
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    OutOfSpaceError,
    VerificationError,
)
from gpuckpt.golden import catalogue, failures, gpu, mapping, prepare, trial, weights
from gpuckpt.golden.assembly import link_images
from gpuckpt.golden.describe import describe
from gpuckpt.golden.launch import CreateRequest, launch_of, refuse_own_folders
from gpuckpt.golden.replica import Replica, alive, commit, discard, making
from gpuckpt.golden.startup import ready
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import (
    Address,
    Manifest,
)
from gpuckpt.store import digests, locks, seal, sharing
from gpuckpt.store.layout import Layout, check_name, exchange
from gpuckpt.timing import PhaseTable


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
        if request.gpus:
            gpu.preflight(tools, request.gpus)
        launch = launch_of(request, tools, request.accelerator)
        if request.gpus:
            gpu.refuse_shared(launch)
        refuse_own_folders(launch, tools)
        staging = stack.enter_context(_staging(layout, layout.staging / name))
        replica = stack.enter_context(making(tools, name, name))
        server = ready(request, tools, phases, launch, replica, staging)
        replica, launch, container = server.started.replica, server.started.launch, server.started.container
        written, canary, first_token_ns = server.started.written, server.canary, server.first_token_ns

        present = tools.containers.inspect(container)
        holders = gpu.measured(tools, server.holders) if server.holders else None
        carried = holders.state.carried if holders else 0
        expected = tools.memory_of(present.pid) + carried + sum(map(_size_of, written))
        _require_space(tools, expected)
        affinity = tools.affinity_of(present.pid)
        with gpu.suspended(tools, phases, holders, resume=request.leave_running) as state:
            with phase(tools, phases, "dump"), _watching(tools, staging, expected):
                link_images(present.bundle, staging / "images")
                _dump(request, tools, replica, container, present.bundle)
            replica.operation.require_marks(*written.values())
            phases.split("dump", replica.operation.marks(), first="podman: dump")
        if request.leave_running and server.given:
            weights.wake(tools, phases, replica, server.given)
        address = Address(ip=present.ip, mac=present.mac) if present.ip and present.mac else None

        mapped = mapping.COPIED
        with phase(tools, phases, "rewrite"):
            drop_empty_archives(staging / "images")
            if launch.mapped:
                mapped = mapping.map_memory(tools, staging, forced=request.mode == "mapped")
        memory = mapped.memory
        if memory.mode == "mapped" and not request.leave_running:
            with phase(tools, phases, "trial"):
                tried = trial.Trial(launch, present.bundle, request.adapter, canary, state, server.given)
                pages = _tried(request, tools, replica, tried)
                memory = trial.keep_copied(tools, staging, memory, pages)
        with phase(tools, phases, "digests"):
            kept = weights.keep(tools, staging, server.given.files)
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
                caches=server.given.caches,
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
            remedy="remove goldens (gpuckpt df, gpuckpt rm), enlarge store.size, or have the server hold less (of"
            " vLLM on a CPU most is its KV cache: --env VLLM_CPU_KVCACHE_SPACE=1)",
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
