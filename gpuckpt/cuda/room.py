"""Room on the devices: which of them a suspended server comes back to, and that nobody else takes the memory meanwhile.

A restore that runs out of device memory leaves the process beyond help (the driver refuses every later attempt), so
the memory is counted first, and kept: restores of other commands count what those before them have reserved.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from gpuckpt.cuda.driver import Driver, Gpu
from gpuckpt.errors import GpuFullError, IncompatibleError
from gpuckpt.manifest import Held

_MOMENT = 0.1  # seconds between two looks at what is free
_PREFERENCE = 1.0  # seconds that devices which are preferred are waited for before others are taken
# What NVML counts for a process has its context in it; beside that the driver keeps some for itself. Too much is a
# restore that waits, too little one that can never be repeated.
CONTEXT = 256 << 20
"""Bytes that must be free on a device beside what a process is to hold there."""


def place(held: Sequence[Held], gpus: Sequence[Gpu], reserved: Mapping[str, int]) -> dict[str, str] | None:
    """Onto which devices it can come back now, by UUID, old to new; None: there is no room at the moment.

    Where it was, if there is room; else on the ones of the same type with most free memory. Raises IncompatibleError
    if it can never fit: no device of the type, or none as large. ``reserved``: bytes that others are about to take.
    """
    left = {gpu.uuid: gpu.free - reserved.get(gpu.uuid, 0) for gpu in gpus if not gpu.mig}
    chosen: dict[str, str] = {}
    full = False
    for one in sorted(held, key=lambda one: -one.bytes):
        alike = [gpu for gpu in gpus if gpu.name == one.name and not gpu.mig and gpu.uuid not in chosen.values()]
        large = [gpu for gpu in alike if gpu.memory >= one.bytes + CONTEXT]
        if not large:
            there = ", ".join(f"{gpu.name} ({'MIG' if gpu.mig else f'{gpu.memory >> 20} MiB'})" for gpu in gpus)
            why = ""
            if alike:
                why = f"; it needs {(one.bytes + CONTEXT) >> 20} MiB, with what the driver takes"
            elif any(gpu.name == one.name and not gpu.mig for gpu in gpus):
                why = f"; it ran on {len(held)}, and needs as many"
            raise IncompatibleError(
                f"there is no GPU for it: it ran on a {one.name}, with {one.bytes >> 20} MiB",
                cause=f"GPUs here: {there or 'none'}{why}",
                remedy="restore it where there is one, or create the golden anew here",
            )
        fitting = [gpu for gpu in large if left[gpu.uuid] >= one.bytes + CONTEXT]
        full = full or not fitting
        if fitting:
            same = next((gpu for gpu in fitting if gpu.uuid == one.uuid), None)
            chosen[one.uuid] = (same or max(fitting, key=lambda gpu: left[gpu.uuid])).uuid
    return None if full else chosen


def moved(held: Sequence[Held], chosen: Mapping[str, str]) -> tuple[Held, ...]:
    """The same on the devices that were chosen, by UUID, old to new."""
    return tuple(Held(chosen.get(one.uuid, one.uuid), one.name, one.bytes) for one in held)


class Room:
    """Reservations of device memory, in a folder that all commands share; those of ended processes do not count."""

    def __init__(self, folder: Path, driver: Driver, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._folder = folder
        self._driver = driver
        self._sleep = sleep

    @contextlib.contextmanager
    def reserve(
        self,
        held: Sequence[Held],
        *,
        timeout: float = 0.0,
        allowed: Collection[str] | None = None,
        preferred: Collection[str] = (),
    ) -> Iterator[dict[str, str]]:
        """Keep room for it while the body runs, and say where: UUIDs, old to new. Empty if it holds nothing.

        ``allowed``: the only devices to choose from, by UUID; None: any. ``preferred``: those that it is to come to if
        they have room, or soon will have.

        Raises IncompatibleError at once if it can never fit, GpuFullError if there is no room for ``timeout`` seconds.
        """
        if not held:
            yield {}
            return
        until = time.monotonic() + timeout
        others_from = min(until, time.monotonic() + _PREFERENCE)
        while True:
            with self._locked() as others:
                gpus = [gpu for gpu in self._driver.gpus() if allowed is None or gpu.uuid in allowed]
                chosen = _place(held, gpus, _sum(others), preferred, patient=time.monotonic() < others_from)
                if chosen is not None:
                    mine = self._write(held, chosen)
                    break
            if time.monotonic() >= until:
                raise self._full(held, gpus, timeout)
            self._sleep(_MOMENT)
        try:
            yield chosen
        finally:
            mine.unlink(missing_ok=True)

    def _full(self, held: Sequence[Held], gpus: Sequence[Gpu], timeout: float) -> GpuFullError:
        what = f"{sum(one.bytes for one in held) >> 20} MiB of GPU memory are needed"
        free = ", ".join(f"{gpu.name} {gpu.uuid}: {gpu.free >> 20} MiB" for gpu in gpus)
        remedy = "stop or suspend a replica that is on the GPU (gpuckpt ls, gpuckpt suspend), and try again"
        when = f"were not free within {timeout:g} s" if timeout else "are not free"
        return GpuFullError(f"{what}, and {when}", cause=f"free: {free}", remedy=remedy)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[dict[str, int]]]:
        """Others' reservations, while nobody else can make one."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for file in self._folder.glob("*.json"):
                try:
                    held = json.loads(file.read_text())
                    alive = _started(held["pid"]) == held["started"]
                except (OSError, ValueError, KeyError, TypeError):
                    alive = False
                if alive:
                    found.append(held["bytes"])
                else:  # it was killed
                    file.unlink(missing_ok=True)
            yield found
        finally:
            os.close(lock)

    def _write(self, held: Sequence[Held], chosen: Mapping[str, str]) -> Path:
        needs = {chosen[one.uuid]: one.bytes + CONTEXT for one in held}
        file = self._folder / f"{os.getpid()}-{time.monotonic_ns()}.json"
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({"pid": os.getpid(), "started": _started(os.getpid()), "bytes": needs}))
        return fresh.rename(file)


def _place(
    held: Sequence[Held], gpus: Sequence[Gpu], taken: Mapping[str, int], preferred: Collection[str], *, patient: bool
) -> dict[str, str] | None:
    """As :func:`place`, on the preferred devices if there is room; ``patient``: on others only if there never will."""
    anywhere = place(held, gpus, taken)
    try:
        chosen = place(held, [gpu for gpu in gpus if gpu.uuid in preferred], taken)
    except IncompatibleError:
        return anywhere
    return chosen if chosen is not None or patient else anywhere


def _sum(reservations: Sequence[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in reservations:
        for uuid, count in one.items():
            found[uuid] = found.get(uuid, 0) + count
    return found


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks, for a pid may be another's by now; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
