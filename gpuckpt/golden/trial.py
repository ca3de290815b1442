"""Restore a dump once before it is published: proof that it can be, and the pages that a first answer writes.

The container that was frozen is still there, with its files as they were then: it is restored itself, asked once, and
goes as it would have gone.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from gpuckpt.criu import hot
from gpuckpt.errors import CheckpointError, DaemonUnreachableError, GpuckptError, VerificationError
from gpuckpt.golden import failures, gpu, weights
from gpuckpt.golden.assembly import write_operation
from gpuckpt.golden.replica import Replica, alive
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Canary, CopiedMemory, DeviceState, Launch, Memory
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.base import MEMORY_FOLDER, Adapter

REASON = "written by the first answer: cheaper to copy"
_PATIENCE = 60.0  # seconds in which a restored server must answer


@dataclass(frozen=True)
class Trial:
    """What is tried: the golden's launch, podman's folder of its container, how it is asked, what it held outside."""

    launch: Launch
    bundle: Path
    adapter: Adapter
    canary: Canary | None
    state: DeviceState | None = None
    given: weights.Given = weights.NOTHING


def trial(tools: Tools, replica: Replica, tried: Trial) -> hot.Pages:
    """Restore the frozen container of ``replica``, ask it, and remove it; returns the pages that the answer wrote.

    Raises CheckpointError if it cannot be restored or does not answer, VerificationError if it answers differently.
    """
    # What the user wants done at a restore is meant for replicas: no hooks.
    launch, adapter, canary = tried.launch, tried.adapter, tried.canary
    nothing = replica.folder / "no-hooks"
    write_operation(tools, replica, launch, tcp_established=launch.tcp_established, hooks=nothing)
    try:
        try:
            tools.containers.restore(replica.container, tools.layout.state, tcp_established=launch.tcp_established)
        except (GpuckptError, OSError) as error:
            reason = error if isinstance(error, GpuckptError) else GpuckptError(str(error))
            raise _failed(failures.restore_failure(tools, replica, tried.bundle, reason)) from error
        _take_back(tools, replica, tried)
        _first_answer(tools, replica, adapter)
        pages = tools.written(tools.containers.inspect(replica.container).pid, MEMORY_FOLDER)
        if canary is not None and (differences := adapter.replay(replica.endpoint, canary).differences):
            raise VerificationError(
                "the golden answers the canary differently when it is restored, and was not published",
                cause="; ".join(differences),
                remedy="create it again, or with --mode copy",
            )
        return pages
    finally:
        with contextlib.suppress(GpuckptError):  # the transaction removes it in any case, and says what it cannot
            tools.containers.remove(replica.container, tools.layout.state)


def keep_copied(tools: Tools, staging: Path, memory: Memory, pages: hot.Pages) -> Memory:
    """Have restores copy ``pages``; returns what the manifest is to say. Without room for them they stay mapped."""
    try:
        copied = hot.keep_copied(staging / "images", staging / "memory", pages, mount_point=MEMORY_FOLDER)
    except OSError as error:
        tools.report.note(f"pages that a first answer writes stay mapped: {error}")
        return memory
    own = tuple(CopiedMemory(pid=pid, reason=REASON, bytes=count) for pid, count in copied.items())
    total = sum(copied.values())
    return structs.replace(memory, mapped=memory.mapped - total, copied=(*memory.copied, *own))


def _take_back(tools: Tools, replica: Replica, tried: Trial) -> None:
    """Device state and weights, as a replica takes them."""
    spent = PhaseTable()  # of the trial as a whole
    try:
        if tried.state is not None:
            first = tools.containers.inspect(replica.container).pid
            # The server that was dumped has just left its devices, so there is room, or will be.
            with tools.devices.reserve(tried.state.devices, tried.launch.gpus, timeout=_PATIENCE) as chosen:
                gpu.restored(tools, spent, tried.state, first, chosen)
        if tried.given:
            weights.wake(tools, spent, replica, tried.given)
    except GpuckptError as error:
        raise _failed(error) from error


def _first_answer(tools: Tools, replica: Replica, adapter: Adapter) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            adapter.first_token(replica.endpoint)
            return
        except DaemonUnreachableError as error:  # its socket may accept a moment before it runs again
            if time.monotonic() > deadline or not alive(tools, replica):
                message = f"the server of {replica.name} does not answer after a restore"
                raise _failed(failures.server_failure(tools, replica, message, kind=CheckpointError)) from error
            time.sleep(0.01)


def _failed(reason: GpuckptError) -> CheckpointError:
    return CheckpointError(
        "the golden cannot be restored, and was not published",
        cause="; ".join(text for text in (reason.message, reason.cause) if text),
        remedy="create it with --mode copy, which changes nothing in its images",
        log=reason.log,
        log_path=reason.log_path,
    )
