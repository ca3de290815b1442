"""Take the device state of a container's processes off the GPUs, and put it back: all of it, or none.

Processes of one server wait for one another on the device, so all are locked before any is checkpointed, and all are
restored before any is unlocked. Each step is made for all processes side by side: they share no lane of the bus that
one alone would fill, and a driver that makes one wait for another (NCCL) is noticed by its time being up.

A step that fails is rolled back, so that the server runs as before; where that is impossible the error says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from gpuckpt.cuda.driver import Driver, DriverError, State
from gpuckpt.errors import CheckpointError, GpuckptError, RestoreError

if TYPE_CHECKING:
    from concurrent.futures import Future

_SPARE = 2.0  # seconds beyond a step's own limit after which the driver itself is taken to hang


class Limits(Struct, frozen=True):
    """Seconds that each step may take: for locks what runs on the device must end, for the others memory is copied."""

    lock: float = 10.0
    checkpoint: float = 120.0
    restore: float = 120.0
    unlock: float = 10.0


LIMITS = Limits()


class Step(Struct, frozen=True):
    """What one step took: its name, when it began and ended (CLOCK_MONOTONIC, ns)."""

    name: str
    begin_ns: int
    end_ns: int


def suspend(driver: Driver, pids: Sequence[int], limits: Limits = LIMITS) -> list[Step]:
    """Lock all, then checkpoint all: afterwards they hold no device memory, and their CUDA calls wait.

    Raises CheckpointError; the processes run as before then, unless its remedy says that they cannot.
    """
    _expect(driver, pids, "running", CheckpointError)
    steps: list[Step] = []
    try:
        _all(steps, "lock", pids, limits.lock, lambda pid: driver.lock(pid, limits.lock))
        _all(steps, "checkpoint", pids, limits.checkpoint, driver.checkpoint)
    except _Failed as failed:
        stuck = _roll_back(driver, pids, limits)
        raise _told(failed, CheckpointError, "the server runs on", stuck) from failed
    return steps


def resume(
    driver: Driver, pids: Sequence[int], gpus: Mapping[str, str] | None = None, limits: Limits = LIMITS
) -> list[Step]:
    """Restore all, then unlock all. ``gpus``: onto which devices, by UUID, old to new; empty: where they were.

    Raises RestoreError. Those that were restored are checkpointed again then and hold no device memory; one that the
    driver could not restore may never be: the replica is to be given up.
    """
    _expect(driver, pids, "checkpointed", RestoreError)
    steps: list[Step] = []
    try:
        _all(steps, "restore", pids, limits.restore, lambda pid: driver.restore(pid, gpus or {}))
    except _Failed as failed:
        stuck = _each(pids, limits.checkpoint, lambda pid: _off_again(driver, pid))
        raise _told(failed, RestoreError, "none of it is on a device", stuck) from failed
    try:
        _all(steps, "unlock", pids, limits.unlock, driver.unlock)
    except _Failed as failed:
        raise _told(failed, RestoreError, "", {}) from failed
    return steps


class _Failed(Exception):
    """A step failed for some processes: why, by process id."""

    def __init__(self, step: str, why: Mapping[int, str]) -> None:
        super().__init__(step)
        self.step = step
        self.why = why


def _expect(driver: Driver, pids: Sequence[int], state: State, kind: type[GpuckptError]) -> None:
    found = {pid: driver.state(pid) for pid in pids}
    if wrong := {pid: now for pid, now in found.items() if now != state}:
        raise kind(
            "the GPU state of the server is not what it should be",
            cause="; ".join(f"process {pid} is {now or 'without CUDA'}, not {state}" for pid, now in wrong.items()),
            remedy="another program may be at work on it (cuda-checkpoint, CRIU's CUDA plugin); restart the server",
        )


def _all(steps: list[Step], name: str, pids: Sequence[int], limit: float, work: Callable[[int], None]) -> None:
    """One step for all processes; raises _Failed once all have ended or the time is up."""
    begin = time.monotonic_ns()
    why = _each(pids, limit + _SPARE, work)
    steps.append(Step(name, begin, time.monotonic_ns()))
    if why:
        raise _Failed(name, why)


def _each(pids: Sequence[int], limit: float, work: Callable[[int], None]) -> dict[int, str]:
    """Call ``work`` for each side by side; why it failed, by process id. One that hangs is left to itself."""
    if not pids:
        return {}
    from concurrent.futures import ThreadPoolExecutor, wait  # which restores of other servers do not need

    pool = ThreadPoolExecutor(len(pids), thread_name_prefix="gpuckpt-cuda")
    try:
        running: dict[Future[None], int] = {pool.submit(work, pid): pid for pid in pids}
        done, late = wait(running, timeout=limit)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    found = {running[one]: f"the driver did not answer within {limit:g} s" for one in late}
    found |= {running[one]: str(error) for one in done if (error := one.exception()) is not None}
    for one in done:
        error = one.exception()
        if error is not None and not isinstance(error, GpuckptError):
            raise error
    return dict(sorted(found.items()))


def _roll_back(driver: Driver, pids: Sequence[int], limits: Limits) -> dict[int, str]:
    """Have all run again: in the order of a resume. Returns why some cannot."""

    def restored(pid: int) -> None:
        if driver.state(pid) == "checkpointed":
            driver.restore(pid, {})

    def unlocked(pid: int) -> None:
        state = driver.state(pid)
        if state == "locked":
            driver.unlock(pid)
        elif state != "running":
            raise DriverError("STATE", f"it is {state or 'without CUDA'}")

    _each(pids, limits.restore + _SPARE, restored)
    return _each(pids, limits.unlock + _SPARE, unlocked)


def _off_again(driver: Driver, pid: int) -> None:
    if driver.state(pid) == "locked":
        driver.checkpoint(pid)


def _told(failed: _Failed, kind: type[GpuckptError], well: str, stuck: Mapping[int, str]) -> GpuckptError:
    causes = "; ".join(f"process {pid}: {why}" for pid, why in failed.why.items())
    if stuck:
        left = "; ".join(f"process {pid}: {why}" for pid, why in stuck.items())
        remedy = f"it could not be undone ({left}): stop the server"
    else:
        remedy = f"{well}; {_ADVICE[failed.step]}" if well else _ADVICE[failed.step]
    return kind(f"the GPU state of the server could not be moved: {failed.step} failed", cause=causes, remedy=remedy)


_ADVICE = {
    "lock": "let its requests end, and try again; programs whose processes share device memory cannot be suspended",
    "checkpoint": "the driver names the reason; see what it cannot do: shared memory of processes, NVLink peers, MIG",
    "restore": "give the replica up: free device memory, or another GPU of the same type, and restore the golden again",
    "unlock": "stop the replica, and restore it again",
}
