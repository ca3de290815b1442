"""Take the device state of a container's processes off the GPUs, and put it back: all of it, or none.

Processes of one server wait for one another on the device, so all are locked before any is checkpointed, and all are
restored before any is unlocked. Each step is made for all processes side by side: they share no lane of the bus that
one alone would fill, and a driver that makes one wait for another (NCCL) is noticed by its time being up.

A step that fails is rolled back, so that the server runs as before; where that is impossible the error says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from gpuckpt.cuda.driver import Driver, DriverError, State
from gpuckpt.errors import CheckpointError, GpuckptError, RestoreError

_SPARE = 2.0  # seconds beyond a step's own limit after which the driver itself is taken to hang


class Limits(Struct, frozen=True):
    """Seconds that each step may take: for locks what runs on the device must end, for the others memory is copied.

    ``late``: how long a call whose time is up is waited for before the others are rolled back.
    """

    lock: float = 10.0
    checkpoint: float = 120.0
    restore: float = 120.0
    unlock: float = 10.0
    late: float = 30.0


LIMITS = Limits()


class Step(Struct, frozen=True):
    """What one step took: its name, when it began and ended (CLOCK_MONOTONIC, ns)."""

    name: str
    begin_ns: int
    end_ns: int


def suspend(driver: Driver, pids: Sequence[int], limits: Limits = LIMITS) -> list[Step]:
    """Lock all, then checkpoint all: afterwards they hold no device memory, and their CUDA calls wait.

    Raises CheckpointError; the processes run as before then, unless its remedy says that they cannot. So they do after
    an interrupt.
    """
    _expect(driver, pids, "running", CheckpointError)
    steps, made = list[Step](), list[_Calls]()
    try:
        _all(steps, made, "lock", pids, limits.lock, lambda pid: driver.lock(pid, limits.lock))
        _all(steps, made, "checkpoint", pids, limits.checkpoint, driver.checkpoint)
    except BaseException as error:
        late = _late(made, limits)
        stuck = late | _roll_back(driver, [pid for pid in pids if pid not in late], limits)
        if isinstance(error, _Failed):
            raise _told(error, CheckpointError, "the server runs on", stuck) from error
        raise
    return steps


def resume(
    driver: Driver, pids: Sequence[int], gpus: Mapping[str, str] | None = None, limits: Limits = LIMITS
) -> list[Step]:
    """Restore all, then unlock all. ``gpus``: onto which devices, by UUID, old to new; empty: where they were.

    Raises RestoreError. Those that were restored are checkpointed again then and hold no device memory; one that the
    driver could not restore may never be: the replica is to be given up.
    """
    _expect(driver, pids, "checkpointed", RestoreError)
    steps, made = list[Step](), list[_Calls]()
    try:
        _all(steps, made, "restore", pids, limits.restore, lambda pid: driver.restore(pid, gpus or {}))
    except BaseException as error:
        late = _late(made, limits)
        rest = [pid for pid in pids if pid not in late]
        stuck = late | _each(rest, limits.checkpoint, lambda pid: _off_again(driver, pid))
        if isinstance(error, _Failed):
            raise _told(error, RestoreError, "none of it is on a device", stuck) from error
        raise
    try:
        _all(steps, made, "unlock", pids, limits.unlock, driver.unlock)
    except _Failed as failed:
        raise _told(failed, RestoreError, "", {}) from failed
    return steps


def unlock(driver: Driver, pids: Sequence[int], limits: Limits = LIMITS) -> None:
    """Unlock those that are locked and hold their memory. Raises RestoreError."""
    try:
        _all([], [], "unlock", pids, limits.unlock, driver.unlock)
    except _Failed as failed:
        raise _told(failed, RestoreError, "", {}) from failed


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


class _Calls:
    """The calls of one step, each in a thread, which no command waits for when it ends: the driver may never answer."""

    def __init__(self, work: Callable[[int], None]) -> None:
        self.errors: dict[int, BaseException] = {}
        self._work = work
        self._over: dict[int, threading.Event] = {}
        self._begun: set[int] = set()
        self._beginning = threading.Lock()

    def begin(self, pids: Sequence[int]) -> _Calls:
        """Make them. If an interrupt comes before all are begun, the rest never is, and :meth:`wait` knows of it."""
        try:
            self._over = {pid: threading.Event() for pid in pids}
            for pid in pids:
                threading.Thread(target=self._call, args=(pid,), name=f"gpuckpt-cuda-{pid}", daemon=True).start()
        except BaseException:
            with self._beginning:
                self._over = {pid: over for pid, over in self._over.items() if pid in self._begun}
            raise
        return self

    def _call(self, pid: int) -> None:
        with self._beginning:
            over = self._over.get(pid)
            if over is None:
                return
            self._begun.add(pid)
        try:
            self._work(pid)
        except BaseException as error:  # told by whoever waits
            self.errors[pid] = error
        finally:
            over.set()

    def wait(self, limit: float) -> list[int]:
        """Wait until all have ended, at most so many seconds; the processes of those that have not."""
        until = time.monotonic() + limit
        for over in self._over.values():
            over.wait(max(0.0, until - time.monotonic()))
        return [pid for pid, over in self._over.items() if not over.is_set()]


def _all(
    steps: list[Step], made: list[_Calls], name: str, pids: Sequence[int], limit: float, work: Callable[[int], None]
) -> None:
    """One step for all processes; raises _Failed once all have ended or the time is up. Its calls go to ``made``."""
    begin = time.monotonic_ns()
    made.append(_Calls(work))  # before they begin: an interrupt while they do must find them there
    why = _why(made[-1].begin(pids), limit + _SPARE)
    steps.append(Step(name, begin, time.monotonic_ns()))
    if why:
        raise _Failed(name, why)


def _each(pids: Sequence[int], limit: float, work: Callable[[int], None]) -> dict[int, str]:
    """Call ``work`` for each side by side; why it failed, by process id."""
    return _why(_Calls(work).begin(pids), limit)


def _why(calls: _Calls, limit: float) -> dict[int, str]:
    found = dict.fromkeys(calls.wait(limit), f"the driver did not answer within {limit:g} s")
    for pid, error in calls.errors.items():
        if not isinstance(error, GpuckptError):
            raise error
        found[pid] = str(error)
    return dict(sorted(found.items()))


def _late(made: Sequence[_Calls], limits: Limits) -> dict[int, str]:
    """Wait for calls that are still out: what they are about to do could not be undone before. Those that stay out."""
    left = {pid for calls in made for pid in calls.wait(limits.late)}
    return dict.fromkeys(sorted(left), "the driver is still at it")


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
