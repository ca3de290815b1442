"""Device state of containers: who holds it, how much, and moving it; what transactions ask of this package.

Processes are named by their ids on the host. Once their state was taken off, nothing of a process tells that it had
any: who was suspended must be kept by whoever asked for it.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

from gpuckpt import proc
from gpuckpt.cuda.driver import Driver, Gpu
from gpuckpt.cuda.holders import device_files, has_devices, holders
from gpuckpt.cuda.room import Room, place
from gpuckpt.cuda.suspend import LIMITS, Limits, Step, resume, suspend, unlock
from gpuckpt.errors import CheckpointError, GpuckptError, InterruptedByUser, RestoreError
from gpuckpt.manifest import Held


class Devices:
    """The GPUs of this host. The driver is reached at the first question, so a machine without any needs nothing."""

    def __init__(
        self,
        driver: Callable[[], Driver],
        room: Path,
        *,
        below: Callable[[int], list[int]] = proc.processes_below,
        files: Path = Path("/proc"),
        limits: Limits = LIMITS,
    ) -> None:
        """``room``: folder of the reservations; ``below``: a process and its descendants; ``files``: procfs."""
        self._make = driver
        self._folder = room
        self._below = below
        self._files = files
        self._limits = limits
        self._sleep: Callable[[float], None] = time.sleep

    def stopped_by(self, stop: threading.Event) -> Devices:
        """The same for one thread of many: its waits for room end with InterruptedByUser once ``stop`` is set."""

        def sleep(seconds: float) -> None:
            if stop.wait(seconds):
                raise InterruptedByUser("interrupted while it waited for room on the GPUs")

        found = copy.copy(self)
        found._sleep = sleep
        return found

    @cached_property
    def driver(self) -> Driver:
        """What is asked."""
        return self._make()

    def holders(self, first: int) -> list[int]:
        """Those of the process ``first`` and its descendants that hold a CUDA context."""
        pids = [pid for pid in self._below(first) if has_devices(pid, proc=self._files)]
        return holders(self.driver, pids, proc=self._files) if pids else []

    def inside(self, first: int) -> dict[int, int]:
        """The process ``first`` and its descendants: what the container calls them, and the host."""
        return {proc.inside(pid): pid for pid in self._below(first)}

    def held(self, pids: Sequence[int]) -> tuple[Held, ...]:
        """What the processes hold, by device; those that were suspended hold nothing."""
        if not pids:
            return ()
        total: dict[str, int] = {}
        for pid in pids:
            for uuid, count in self.driver.memory(pid).items():
                total[uuid] = total.get(uuid, 0) + count
        types = {gpu.uuid: gpu.name for gpu in self.gpus()}
        return tuple(Held(uuid, types.get(uuid, ""), count) for uuid, count in sorted(total.items()) if count > 0)

    def gpus(self) -> tuple[Gpu, ...]:
        """The devices of this host."""
        return self.driver.gpus()

    def refuse(self, held: Sequence[Held]) -> None:
        """Raise CheckpointError for devices whose state the driver cannot move, before anything is tried."""
        mine = {one.uuid for one in held}
        if cut := [gpu for gpu in self.gpus() if gpu.mig and gpu.uuid in mine]:
            raise CheckpointError(
                "the server runs on a part of a GPU, and its state there cannot be frozen",
                cause=f"{cut[0].name} {cut[0].uuid} is divided (MIG), which the driver's checkpoints do not know",
                remedy="give it a whole GPU: nvidia-smi -mig 0, or --gpu with another one",
            )

    def suspend(self, first: int, pids: Sequence[int]) -> list[Step]:
        """Take the state of ``pids`` off the devices; the other processes below ``first`` must have none open.

        Raises CheckpointError; the processes run on then, unless its remedy says that they cannot.
        """
        self.refuse_open(first, pids)
        steps = suspend(self.driver, pids, self._limits)
        try:
            left = self.held(pids)
        except GpuckptError as error:
            raise CheckpointError(
                "the server was suspended, and nobody can tell whether it still holds GPU memory",
                cause=str(error),
                remedy=f"{self._undone(pids)}; gpuckpt doctor",
            ) from error
        except BaseException:
            self._undone(pids)
            raise
        if left:
            raise CheckpointError(
                "the server was suspended and still holds GPU memory",
                cause=", ".join(f"{one.bytes >> 20} MiB on {one.uuid}" for one in left),
                remedy=f"{self._undone(pids)}; the driver may not move all kinds of memory: gpuckpt doctor",
            )
        return steps

    def refuse_open(self, first: int, pids: Sequence[int]) -> None:
        """Raise CheckpointError if another process than ``pids`` below ``first`` has a GPU's files open."""
        others = {pid: device_files(pid, proc=self._files) for pid in self._below(first) if pid not in pids}
        if kept := {pid: files for pid, files in others.items() if files}:
            # NVML without a context; CRIU can neither dump nor restore such a file.
            raise CheckpointError(
                "a process of the server has a GPU's files open without using CUDA, and cannot be frozen",
                cause="; ".join(f"process {pid}: {', '.join(files)}" for pid, files in kept.items()),
                remedy="have it close NVML (nvmlShutdown) before the golden is made, or start without that process",
            )

    def _undone(self, pids: Sequence[int]) -> str:
        try:
            resume(self.driver, pids, limits=self._limits)
        except GpuckptError as error:
            return f"it could not be resumed ({error.message}): stop it"
        return "the server runs on"

    def check(self, held: Sequence[Held], visible: Sequence[str]) -> None:
        """Raise IncompatibleError if what was held on ``held`` can never come back to this host's devices."""
        if held:
            place(held, self._usable(held, visible), {})

    def reserve(
        self,
        held: Sequence[Held],
        visible: Sequence[str] = ("all",),
        *,
        timeout: float = 0.0,
        preferred: Collection[str] = (),
    ) -> AbstractContextManager[dict[str, str]]:
        """Keep room on the devices for ``held``, and say where: see :meth:`gpuckpt.cuda.room.Room.reserve`.

        ``visible``: the devices that the container has been given, ``all`` or UUIDs and indices; on a choice of some
        only those that were used before are taken. ``preferred``: of these, by UUID, if they have room.
        """
        allowed = None if "all" in visible else {one.uuid for one in held}
        room = Room(self._folder, self.driver, sleep=self._sleep)
        return room.reserve(held, timeout=timeout, allowed=allowed, preferred=preferred)

    def _usable(self, held: Sequence[Held], visible: Sequence[str]) -> list[Gpu]:
        mine = {one.uuid for one in held}
        return [gpu for gpu in self.gpus() if "all" in visible or gpu.uuid in mine]

    def resume(self, pids: Sequence[int], gpus: Mapping[str, str], visible: Sequence[str]) -> list[Step]:
        """Put the state of ``pids`` back and let them run. Raises RestoreError.

        ``gpus`` as :meth:`reserve` gave it, ``visible``: the devices of the host where it was taken off.
        """
        pairs = pairing(gpus, visible, [gpu.uuid for gpu in self.gpus()])
        return resume(self.driver, pids, pairs, self._limits)

    def can_carry(self) -> bool:
        """Whether this way to the driver has memory of its own to share; the program cuda-checkpoint has none."""
        return self.driver.shares

    def carry(self, file: int, uuid: str) -> int:
        """Read an open file into memory of a device: see :meth:`gpuckpt.cuda.driver.Driver.carry`."""
        return self.driver.carry(file, uuid)

    def off(self, pids: Sequence[int]) -> list[int]:
        """Those of ``pids`` whose state is in host memory. Raises RestoreError for one that is lost.

        They may be at any step: whoever suspended or resumed them may have been killed.
        """
        states = {pid: self.driver.state(pid) for pid in pids}
        if lost := [pid for pid, state in states.items() if state not in ("running", "locked", "checkpointed")]:
            raise RestoreError(
                "GPU state of the server is lost",
                cause=", ".join(f"process {pid} is {states[pid] or 'without CUDA'}" for pid in lost),
                remedy="stop the replica, and restore its golden again",
            )
        return [pid for pid, state in states.items() if state == "checkpointed"]

    def settle(self, pids: Sequence[int], gpus: Mapping[str, str], visible: Sequence[str]) -> list[Step]:
        """Have all run, at whatever step each of them is; see :meth:`off` and :meth:`resume`."""
        off = self.off(pids)
        steps = self.resume(off, gpus, visible) if off else []
        unlock(self.driver, [pid for pid in pids if self.driver.state(pid) == "locked"], self._limits)
        return steps


def pairing(chosen: Mapping[str, str], visible: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """What the driver is told of devices, old to new: nothing if all are where they were, else a pair for each.

    It wants every device that the process could see (``visible``), each once, and only such as there are (``present``).
    What nobody chose stays where it is, or takes what is left.
    """
    found = dict(chosen)
    rest = [uuid for uuid in visible if uuid not in found]
    for uuid in rest:
        if uuid in present and uuid not in found.values():
            found[uuid] = uuid
    left = [uuid for uuid in present if uuid not in found.values()]
    for uuid in rest:
        if uuid not in found and left:
            found[uuid] = left.pop(0)
    moved = any(old != new for old, new in found.items()) or not set(visible) <= set(present)
    return found if moved else {}
