"""Suspending and resuming device memory, by its size: how long each step takes, how fast, and whether the bytes stay.

A process holds so many bytes of random numbers; it is suspended and resumed through gpuckpt's helper, again and again;
the device sums the bytes before and afterwards. NVML says what it holds before, meanwhile (nothing) and afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import memory
from benchmarks.gpu_commands import device_bytes
from benchmarks.gpu_context import Answer, Context, seconds, told
from benchmarks.gpu_held import Held, holding
from benchmarks.gpu_probe import compare, devices_of, lengths, suspended
from benchmarks.gpu_record import Document
from benchmarks.suite import Unavailable
from gpuckpt.cuda.choice import find_program
from gpuckpt.cuda.driver import Driver
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.suspend import resume, suspend
from gpuckpt.errors import VerificationError

GB = 1_000_000_000
STEPS = ("lock", "checkpoint", "restore", "unlock")
_ROUNDS = {"0.25": 7, "1": 7, "4": 5, "16": 3, "40": 3}
_SPARE = 3 * GB  # bytes of the device, and of host memory, that are to stay free
_PAIR = 4 * GB


def by_bytes(context: Context, answer: Answer) -> None:
    """Each size in turn; one that does not fit is left out, with the reason."""
    sizes: Document = {}
    left_out: dict[str, str] = {}
    with context.driver() as driver:
        for name in context.arguments:
            if reason := unfit(context, driver, int(float(name) * GB)):
                left_out[name] = reason
                told(context, f"{name} GB: left out, {reason}")
            elif context.left < 5:
                left_out[name] = "there was no time for it"
            else:
                sizes[name] = _one(context, driver, name)
                one = sizes[name]
                told(context, f"{name} GB, out and back", f"checkpoint {one['checkpoint_s']['p50']:.3f} s,"
                              f" restore {one['restore_s']['p50']:.3f} s, n = {one['restore_s']['n']}")  # fmt: skip
            answer.note("sizes", sizes)
            answer.note("left_out", left_out)
    if not sizes:
        raise Unavailable("; ".join(f"{name} GB: {why}" for name, why in left_out.items()))


def unfit(context: Context, driver: Driver, count: int) -> str | None:
    """Why so many bytes cannot be tried here: the device, or the host's memory that they go to; None if they can."""
    free = max((gpu.free for gpu in driver.gpus()), default=0)
    if free < count + _SPARE:
        return f"{free / GB:.1f} GB of the device are free"
    if not context.dry and memory.available() < 1.2 * count + _SPARE:
        return f"{memory.available() / GB:.1f} GB of host memory are free"
    return None


def _one(context: Context, driver: Driver, name: str) -> Document:
    count = int(float(name) * GB)
    taken: dict[str, list[float]] = {f"{step}_s": [] for step in STEPS}
    held_bytes: Document = {"before": [], "suspended": [], "after": []}
    used: Document = {"before": [], "suspended": [], "after": []}
    open_devices: list[str] = []
    with holding(context, count, context.library) as held:
        for number in range(_ROUNDS.get(name, 3)):
            if number > 1 and context.left < 4 * sum(sum(values) / len(values) for values in taken.values()) + 3:
                break
            look(driver, held, "before", held_bytes, used)
            steps = lengths(suspend(driver, [held.pid]))
            look(driver, held, "suspended", held_bytes, used)
            open_devices = devices_of(held.pid)
            steps |= lengths(resume(driver, [held.pid]))
            for step in STEPS:
                taken[f"{step}_s"].append(steps[step])
            look(driver, held, "after", held_bytes, used)
        compare(held)
    if any(held_bytes["suspended"]):
        raise VerificationError(f"suspended, it still holds {max(held_bytes['suspended'])} bytes of the device")
    made: Document = {"bytes": count, "library": context.library, "device_bytes": held_bytes, "device_used": used}
    made["open_devices_while_suspended"] = open_devices
    made |= {key: seconds(values) for key, values in taken.items()}
    for step in ("checkpoint", "restore"):
        # Of what NVML says it holds: its context is moved, too.
        moved = max(held_bytes["before"]) or count
        made[f"{step}_gbps"] = seconds([moved / value / GB for value in taken[f"{step}_s"]])
    return made


def look(driver: Driver, held: Held, when: str, of_process: Document, of_device: Document) -> None:
    """What NVML says now, of the process and of the device; where it names no processes the former is nothing."""
    found = device_bytes(driver, [held.pid])
    of_process[when].append(found["processes"])
    of_device[when].append(found["device"])


def pair(context: Context, answer: Answer) -> None:
    """Two processes: suspended and resumed side by side, and one after the other."""
    with context.driver() as driver:
        if reason := unfit(context, driver, 2 * _PAIR):
            raise Unavailable(reason)
        with (
            holding(context, _PAIR, context.library) as one,
            holding(context, _PAIR, context.library, seed=8) as other,
        ):
            pids = [one.pid, other.pid]
            taken: dict[str, list[float]] = {"together_s": [], "in_turn_s": []}
            for _ in range(5):
                if len(taken["in_turn_s"]) > 1 and context.left < 10:
                    break
                began = time.monotonic()
                suspend(driver, pids)
                resume(driver, pids)
                taken["together_s"].append(time.monotonic() - began)
                began = time.monotonic()
                for pid in pids:
                    suspend(driver, [pid])
                for pid in pids:
                    resume(driver, [pid])
                taken["in_turn_s"].append(time.monotonic() - began)
            compare(one)
            compare(other)
    answer.note("bytes_each", _PAIR)
    for key, values in taken.items():
        answer.note(key, seconds(values))


def program(context: Context, answer: Answer) -> None:
    """What NVIDIA's cuda-checkpoint program takes for what the helper does: each call of it initialises CUDA anew."""
    found = find_program(context.prefix)
    if found is None and not context.dry:
        raise Unavailable("cuda-checkpoint is not installed")
    with context.driver() as driver, holding(context, GB // 4, context.library) as held:
        ways = {"helper": driver, "program": driver if context.dry else Program(found or Path())}
        if isinstance(driver, Program):  # there is no helper
            del ways["helper"]
        for name, way in ways.items():
            taken: dict[str, list[float]] = {"state_s": [], "cycle_s": []}
            for _ in range(5):
                if len(taken["cycle_s"]) > 1 and context.left < 15:
                    break
                began = time.monotonic()
                way.state(held.pid)
                taken["state_s"].append(time.monotonic() - began)
                began = time.monotonic()
                suspend(way, [held.pid])
                resume(way, [held.pid])
                taken["cycle_s"].append(time.monotonic() - began)
            answer.note(name, {"bytes": held.bytes, **{key: seconds(values) for key, values in taken.items()}})
        compare(held)


def through_criu(context: Context, answer: Answer) -> None:
    """A suspended process of some size, dumped into memory and restored by plain CRIU: what a memory image costs."""
    made: Document = {}
    for name in context.arguments:
        count = int(float(name) * GB)
        with context.driver() as driver:
            reason = unfit(context, driver, 2 * count)
        if reason or context.left < 10:
            made[name] = {"left_out": reason or "there was no time for it"}
        else:
            part = Answer(context.folder / f"{context.step}-{name}.part")
            suspended(context, part, count, context.library)
            made[name] = part.data
            took = f"dump {part.data['dump_s']:.2f} s, restore {part.data['restore_s']:.2f} s"
            told(context, f"{name} GB, dumped and restored", took)
        answer.note("sizes", made)
