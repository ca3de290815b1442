"""Bring a replica back from a golden by copying: CRIU's ordinary way, from tmpfs, with huge pages."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gpuckpt import manifest as manifests
from gpuckpt.errors import (
    DaemonUnreachableError,
    GpuckptError,
    OutOfSpaceError,
    RestoreError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import failures, identity
from gpuckpt.golden.assembly import assemble, link_images
from gpuckpt.golden.replica import Replica, alive, commit, load, making
from gpuckpt.golden.serving import container_trouble, wait_healthy
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import Address, Manifest
from gpuckpt.store import locks, seal
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload import adapter as adapter_of
from gpuckpt.workload.base import Replay
from gpuckpt.workload.endpoint import RequestFailed


@dataclass(frozen=True)
class RestoreRequest:
    """Which golden to restore, and how; see ``gpuckpt restore --help`` for each field's meaning."""

    name: str
    canary: bool = True
    keep: bool = False
    ignore_static_ip: bool = False
    ignore_static_mac: bool = False
    ignore_volumes: bool = False
    ignore_rootfs: bool = False
    tcp_established: bool = False
    ignore_identity: tuple[str, ...] = ()
    huge_pages: bool = True
    fallback: Literal["cold"] | None = None
    start_timeout: float = 600


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
    """Restore the golden ``request.name`` into a replica of the same name.

    Either the replica is ready, its canary equal to the recorded one, or nothing of it remains. Raises NotFoundError,
    BusyError (the replica runs already), IncompatibleError (another machine), VerificationError (the golden's bytes
    or the canary differ), OutOfSpaceError, RestoreError. With ``fallback`` these start the server cold instead.
    """
    tools.layout.golden(request.name)  # NotFoundError before anything else
    with locks.shared(tools.layout.golden_locks, "golden", request.name):
        folder = tools.layout.golden(request.name)
        golden = manifests.read(folder)
        with making(tools, request.name, request.name) as replica:
            try:
                restored = _from_golden(request, tools, phases, golden, folder, replica)
            except GpuckptError as error:
                if request.fallback != "cold" or isinstance(error, UsageError):
                    raise
                tools.report.note(f"the restore failed ({error.message}); starting cold")
                restored = _cold(request, tools, phases, golden, replica, error)
    phases.stop()
    return restored


def _from_golden(
    request: RestoreRequest, tools: Tools, phases: PhaseTable, golden: Manifest, folder: Path, replica: Replica
) -> Restored:
    with phase(tools, phases, "checks"):
        _check(request, tools, golden, folder)
    with phase(tools, phases, "container"):
        replica = _restore_volumes(request, tools, golden, folder, replica)
        address = _address(request, golden)
        with container_trouble(replica, kind=RestoreError, address=address):
            replica, container = assemble(
                tools,
                replica,
                golden.launch,
                memory=folder / "memory",
                golden_layer=None if request.ignore_rootfs else folder / "rootfs",
                address=address,
                tcp_established=request.tcp_established,
            )
            tools.containers.prepare(container)
        bundle = tools.containers.inspect(container).bundle
        link_images(bundle, folder / "images")
    with phase(tools, phases, "restore"), _huge_pages(request, tools, golden):
        try:
            tools.containers.restore(container, tcp_established=request.tcp_established)
        except GpuckptError as error:
            raise failures.restore_failure(tools, replica, bundle, error) from error
    replica.operation.require_marks()
    phases.split("restore", replica.operation.marks(), first="podman: restore")
    if failed := failures.step_failure(replica, "restore", RestoreError):
        raise failed
    first_token_ns, match = _answers(request, tools, phases, golden, replica)
    if request.keep:
        _keep_work_files(bundle, replica)
    tier = tools.layout.tier_of(folder)
    return Restored(commit(replica, tier=tier, memory=golden.memory.mode), phases, first_token_ns, match)


def _address(request: RestoreRequest, golden: Manifest) -> Address | None:
    """The golden's address on the bridge, without the parts that are to be ignored."""
    if golden.address is None:
        return None
    changes: dict[str, str] = {}
    if request.ignore_static_ip:
        changes["ip"] = ""
    if request.ignore_static_mac:
        changes["mac"] = ""
    return golden.address.model_copy(update=changes)


def _check(request: RestoreRequest, tools: Tools, golden: Manifest, folder: Path) -> None:
    if request.tcp_established and not golden.launch.tcp_established:
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
    if found := seal.broken(folder, golden):
        raise VerificationError(
            f"golden {golden.name} is damaged and was not restored",
            cause="; ".join(found[:5]),
            remedy=f"remove it (gpuckpt rm {golden.name}) and create it anew, or import it again",
        )
    needed, available = golden.sizes.cpu_pages + golden.sizes.shared_memory, available_memory()
    if needed > available:
        raise OutOfSpaceError(
            f"restoring {golden.name} needs about {needed >> 20} MiB of memory, {available >> 20} MiB are left",
            remedy="stop replicas (gpuckpt ls) or remove goldens (gpuckpt df)",
        )


def _restore_volumes(
    request: RestoreRequest, tools: Tools, golden: Manifest, folder: Path, replica: Replica
) -> Replica:
    """Fill named volumes that are not here (another machine, a removed volume); those that exist are left alone."""
    for volume in golden.launch.volumes:
        if tools.containers.volume(volume.name) is not None:
            continue
        # Recorded first, so that a failed or killed restore takes the volume it brought away again.
        replica = replace(replica, volumes=(*replica.volumes, volume.name))
        replica.save()
        target = tools.containers.create_volume(volume.name)
        source = folder / "volumes" / volume.name
        if not request.ignore_volumes and source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    return replica


@contextlib.contextmanager
def _huge_pages(request: RestoreRequest, tools: Tools, golden: Manifest) -> Iterator[None]:
    # Mapped memory has its huge pages in the files; only copying fills pages that could be huge.
    if request.huge_pages and golden.memory.mode == "copy":
        with tools.huge_pages(tools.layout.run):
            yield
    else:
        yield


def _answers(
    request: RestoreRequest, tools: Tools, phases: PhaseTable, golden: Manifest, replica: Replica
) -> tuple[int | None, bool | None]:
    """Replay the canary, or without one wait for health; what the server answers decides whether it is ready."""
    workload = adapter_of(golden.workload)
    if not request.canary or golden.canary is None:
        with phase(tools, phases, "health"):
            wait_healthy(workload, tools, replica, timeout=min(60.0, request.start_timeout), kind=RestoreError)
        return None, None
    begin = now_ns()
    tools.report.stage("first token")
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
            if not alive(tools, replica) or time.monotonic() > deadline:
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
        current = load(replica.folder) or replica
        tools.containers.remove(current.container, tools.layout.state)
        tools.overlay.unmount(current.folder)
        for name in ("upper", "work", "socket"):
            shutil.rmtree(current.folder / name, ignore_errors=True)
        current.sockets.mkdir()
        current.sockets.chmod(0o777)
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
