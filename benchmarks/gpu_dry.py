"""Stand-ins for a dry run of the acceptance on a GPU: a driver without devices, CRIU, and gpuckpt's own commands.

They obey the rules that the choreography relies on (which step follows which, who holds memory when), and take
milliseconds. Whatever they say is made up: the document of a dry run says so, and its figures bear it in large letters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.asking import Answered
from benchmarks.driver import Gpuckpt
from benchmarks.gpu_held import Held
from benchmarks.gpu_record import Document
from benchmarks.harness import CommandFailed, Outcome
from gpuckpt.cuda.driver import DriverError, Gpu, State
from gpuckpt.cuda.helper import Helper
from gpuckpt.cuda.remote import Remote
from gpuckpt.timing import now_ns

GPU = Gpu("GPU-00000000-0000-0000-0000-000000000000", "no GPU: a dry run", 80 << 30, 80 << 30)
_SPEED = 2e12  # bytes per second that it pretends to move: a dry run is to be over soon
_LEAST = 0.001  # seconds of a step
PATIENCE = 300.0  # seconds that a step may take on a machine that is busy with other things
_CONTEXT = 500 << 20  # bytes beside what a process asked for


class Process:
    """Bytes that it pretends to hold, and the state of them."""

    def __init__(self, count: int) -> None:
        self.bytes = count + _CONTEXT
        self.state: State = "running"


_WORLD: dict[int, Process] = {}


def claim(pid: int, count: int) -> None:
    """From now on this process holds so many bytes of the device that is not there."""
    _WORLD[pid] = Process(count)


class Driver:
    """gpuckpt.cuda.driver.Driver, for the processes that were claimed."""

    @property
    def shares(self) -> bool:
        return False

    def state(self, pid: int) -> State | None:
        return _WORLD[pid].state if pid in _WORLD else None

    def lock(self, pid: int, timeout: float) -> None:
        self._step(pid, "running", "locked", 0)

    def checkpoint(self, pid: int) -> None:
        self._step(pid, "locked", "checkpointed", _WORLD[pid].bytes)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        self._step(pid, "checkpointed", "locked", _WORLD[pid].bytes)

    def unlock(self, pid: int) -> None:
        self._step(pid, "locked", "running", 0)

    def carry(self, file: int, uuid: str) -> int:
        raise DriverError("NOT_SUPPORTED", "there is no device to carry anything to")

    def gpus(self) -> tuple[Gpu, ...]:
        used = sum(sum(self.memory(pid).values()) for pid in _WORLD)
        return (Gpu(GPU.uuid, GPU.name, GPU.memory, GPU.memory - used),)

    def memory(self, pid: int) -> dict[str, int]:
        found = _WORLD.get(pid)
        return {GPU.uuid: found.bytes} if found and found.state in ("running", "locked") else {}

    def version(self) -> str:
        return "0.0 (dry)"

    def _step(self, pid: int, wanted: State, then: State, count: int) -> None:
        if pid not in _WORLD or _WORLD[pid].state != wanted:
            raise DriverError("CUDA_ERROR_ILLEGAL_STATE", f"it is not {wanted}")
        time.sleep(_LEAST + count / _SPEED)
        _WORLD[pid].state = then


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Remote]:
    """gpuckpt's own helper, in a thread, with that driver.

    Each has a folder of its own: one that ends removes the file of its socket, which could be the next one's by then.
    """
    own = Path(tempfile.mkdtemp(prefix="dry-", dir=folder))
    path = own / "helper"
    thread = threading.Thread(target=Helper(Driver(), path).serve, name="helper", daemon=True)
    thread.start()
    try:
        while not _answers(path):  # that its file is there is not enough, and a busy machine takes its time
            if not thread.is_alive():
                raise RuntimeError("the stand-in for the GPU helper has ended")
            time.sleep(_LEAST)
        yield Remote(path, argv=("/bin/false",), timeout=PATIENCE)  # and never the real helper
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        try:
            asking.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


class Criu:
    """Stops and continues the process instead of writing it down."""

    def check(self) -> str:
        return "a dry run does not ask CRIU"

    def version(self) -> str:
        return "0.0 (dry)"

    def dump(self, held: Held, images: Path) -> None:
        images.mkdir(parents=True)
        os.kill(held.pid, signal.SIGSTOP)

    def restore(self, held: Held, images: Path) -> None:
        os.kill(held.pid, signal.SIGCONT)


class Commands(Gpuckpt):
    """`gpuckpt create`, `restore`, `suspend` and the others, by their documents alone."""

    def run(self, *words: str) -> Outcome:
        # As if it had been spawned a while ago: what is drawn of it is to be seen, and always the same.
        spawned = now_ns() - 500_000_000
        time.sleep(_LEAST)
        command, name = words[0], next((word for word in words[1:] if not word.startswith("-")), "")
        made = getattr(self, f"_{command}")(name, words)
        return Outcome(made, spawned, now_ns())

    def ask(self, restored: Document, canary: Document, timeout: float) -> Answered:
        if _WORLD[self._pid(str(restored["replica"]))].state != "running":
            raise AssertionError("a replica that is suspended was asked")
        return Answered(now_ns(), None)

    def pids(self, replica: str) -> list[int]:
        return [self._pid(replica)]

    # Goldens are kept in a file: each step is a process of its own.

    @property
    def _folder(self) -> Path:
        made = self.space.folder / "dry-goldens"
        made.mkdir(exist_ok=True)
        return made

    def _pid(self, replica: str) -> int:
        return -1 - zlib.crc32(replica.encode())  # no process has a number below zero

    def _create(self, name: str, words: tuple[str, ...]) -> Document:
        (self._folder / name).touch()
        return {
            "name": name, "image_bytes": 1, "first_token_monotonic_ns": now_ns(), "cold_ttft_s": _LEAST,
            "phases": [{"name": "cold: first token", "seconds": _LEAST}],
        }  # fmt: skip

    def _inspect(self, name: str, words: tuple[str, ...]) -> Document:
        if not (self._folder / name).exists():
            raise CommandFailed(["gpuckpt", *words], 6, {"message": f"there is no golden {name}"}, "")
        return {"name": name, "canary": {"tokens": ["dry"], "logprobs": [0.0], "request": {}}}

    def _restore(self, name: str, words: tuple[str, ...]) -> Document:
        replica = words[words.index("--as") + 1] if "--as" in words else name
        claim(self._pid(replica), 2 << 30)
        return {
            "replica": replica, "golden": name, "socket": "/nowhere", "url": None, "canary_match": True,
            "first_token_monotonic_ns": now_ns(), "ttft_s": _LEAST,
            "phases": [{"name": "first token", "seconds": _LEAST}],
        }  # fmt: skip

    def _suspend(self, name: str, words: tuple[str, ...]) -> Document:
        return self._moved(name, "running", "checkpointed")

    def _wake(self, name: str, words: tuple[str, ...]) -> Document:
        return self._moved(name, "checkpointed", "running")

    def _moved(self, name: str, wanted: State, then: State) -> Document:
        process = _WORLD[self._pid(name)]
        if process.state != wanted:
            raise CommandFailed(["gpuckpt"], 7, {"message": f"{name} is {process.state}"}, "")
        process.state = then
        return {"phases": [{"name": then, "seconds": _LEAST}], "seconds": _LEAST, "gpu_bytes": process.bytes}

    def _stop(self, name: str, words: tuple[str, ...]) -> Document:
        _WORLD.pop(self._pid(name), None)
        return {}

    def _rm(self, name: str, words: tuple[str, ...]) -> Document:
        (self._folder / words[-1 if words[-1] != "json" else -3]).unlink(missing_ok=True)
        return {}

    def _doctor(self, name: str, words: tuple[str, ...]) -> Document:
        return {"checks": []}


def part(name: str) -> Document:
    """A document as one of the session engine's benchmarks writes it; nothing in it was measured."""
    one: dict[str, Any] = {"p50": 1.0, "p95": 1.0, "n": 1, "interval": [1.0, 1.0], "samples": [1.0]}
    if name == "sessions_checkpoint":
        sizes = ("dispatch_us", "launch_us", "beyond_launch_us", "complete_us", "complete_over_bound", "restore_us")
        by_size = {"2.5 MB": {"bytes": 2_500_000, **dict.fromkeys(sizes, one)}}
        return {"setting": {"device": "dry"}, "bandwidth_bytes_per_s": one, "pinned": True, "by_size": by_size}
    if name == "kv_paging":
        copies = {way: {"value": 1.0, "n": 1, "bytes": 1, "gbps": one, "bare_gbps": one} for way in ("out", "in")}
        wakes = {"64": {"all_ms": one, "bytes": 1}}
        return {"setting": {"device": "dry"}, "copies": copies, "small_copies": copies, "wakes": wakes}
    run = {"completed": 50, "token_mismatches": 0, "logits_mismatches": 0, "demand_over_budget": 2.0, "seconds": 1.0,
           "resumed_least": 3, "seconds_over_undisturbed": 1.0, "out_gbps": 1.0, "in_gbps": 1.0}  # fmt: skip
    return {"setting": {"device": "dry"}, "sessions": 50, "demand_bytes": 1, "factors": {"2": run}}
