"""The driver through NVIDIA's cuda-checkpoint program, for drivers 555 to 565, or where no bindings are installed.

Each call starts a process, which initialises CUDA: seconds where the helper takes microseconds. Devices are asked for
with nvidia-smi, which comes with every driver.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gpuckpt import proc
from gpuckpt.cuda.driver import NO_CONTEXT, DriverError, Gpu, State, host_memory
from gpuckpt.errors import DeadlineError, GpuckptError, NotFoundError

_LONGEST = 120.0  # seconds that moving the memory of one process may take
_STATES: tuple[State, ...] = ("running", "locked", "checkpointed", "failed")
_MIB = 1 << 20
# It prints the driver's words for a code (cuGetErrorString), and ends with the code's lowest eight bits.
_CODES = {
    "invalid argument": "CUDA_ERROR_INVALID_VALUE",
    "out of memory": "CUDA_ERROR_OUT_OF_MEMORY",
    "initialization error": "CUDA_ERROR_NOT_INITIALIZED",
    "no CUDA-capable device is detected": "CUDA_ERROR_NO_DEVICE",
    "invalid device context": "CUDA_ERROR_INVALID_CONTEXT",
    "OS call failed or operation not supported on this OS": "CUDA_ERROR_OPERATING_SYSTEM",
    "the operation cannot be performed in the present state": "CUDA_ERROR_ILLEGAL_STATE",
    "device not ready": "CUDA_ERROR_NOT_READY",
    "operation not supported": "CUDA_ERROR_NOT_SUPPORTED",
    "unknown error": "CUDA_ERROR_UNKNOWN",
}
_UNUSABLE = "Error initializing CUDA"  # its words when not the process is at fault, but the machine
_UNTOLD = ("[N/A]", "[Not Supported]")


class Program:
    """cuda-checkpoint and nvidia-smi; ``program`` is the former's path."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @property
    def shares(self) -> bool:
        return False

    def state(self, pid: int) -> State | None:
        done = self._run("--get-state", "--pid", str(pid))
        if done.code:
            refused = _refused(done)
            if refused.code in NO_CONTEXT and not refused.detail.startswith(_UNUSABLE):
                return None
            raise refused
        word = done.stdout.strip().lower()
        found = next((state for state in _STATES if state == word), None)
        if found is None:
            raise DriverError("UNKNOWN_STATE", word)
        return found

    def lock(self, pid: int, timeout: float) -> None:
        self._act("lock", pid, "--timeout", str(max(1, int(timeout * 1000))))

    def checkpoint(self, pid: int) -> None:
        self._act("checkpoint", pid)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        pairs = ",".join(f"{old}={new}" for old, new in gpus.items())
        self._act("restore", pid, *(("--device-map", pairs) if pairs else ()))

    def unlock(self, pid: int) -> None:
        self._act("unlock", pid)

    def carry(self, file: int, uuid: str) -> int:
        raise DriverError("NOT_SUPPORTED", "the program cuda-checkpoint has no memory of its own to share")

    def gpus(self) -> tuple[Gpu, ...]:
        # Nothing is quoted in these tables: what may have commas has to be the last column.
        rows = self._query("gpu", "uuid", "memory.total", "memory.free", "mig.mode.current", "name")
        return tuple(Gpu(uuid, name, *_memory(total, free), mig == "Enabled") for uuid, total, free, mig, name in rows)

    def memory(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for uuid, process, used in self._query("compute-apps", "gpu_uuid", "pid", "used_memory"):
            if process == str(pid):
                if not used.isdigit():
                    raise DriverError("MEMORY_UNTOLD", f"nvidia-smi does not tell what process {pid} holds: {used}")
                found[uuid] = found.get(uuid, 0) + int(used) * _MIB
        return found

    def version(self) -> str:
        rows = self._query("gpu", "driver_version")
        return rows[0][0] if rows else ""

    def _act(self, action: str, pid: int, *more: str) -> None:
        done = self._run("--action", action, "--pid", str(pid), *more)
        if done.code:
            raise _refused(done)

    def _run(self, *words: str) -> proc.Result:
        try:
            return proc.run([str(self._program), *words], timeout=_LONGEST, check=False)
        except DeadlineError as error:
            raise DriverError("TIMEOUT", error.message) from error
        except NotFoundError as error:
            raise DriverError("NO_PROGRAM", error.message) from error

    def _query(self, what: str, *columns: str) -> list[list[str]]:
        try:
            done = proc.run(
                ["nvidia-smi", f"--query-{what}={','.join(columns)}", "--format=csv,noheader,nounits"],
                timeout=30,
                check=False,
            )
        except GpuckptError as error:
            raise DriverError("NVIDIA_SMI", error.message) from error
        rows = [
            [cell.strip() for cell in line.split(",", len(columns) - 1)] for line in done.stdout.splitlines() if line
        ]
        if done.code or any(len(row) != len(columns) for row in rows):  # of a device that is lost it writes a sentence
            raise DriverError("NVIDIA_SMI", " ".join(proc.tail(done.stdout + done.stderr)) or f"status {done.code}")
        return rows


def _refused(done: proc.Result) -> DriverError:
    said = proc.tail(done.stdout + done.stderr)
    words = re.search(r'"([^"]*)"', said[-1]) if said else None
    code = _CODES.get(words[1]) if words else None
    return DriverError(code or f"STATUS_{done.code}", said[-1] if said else "")


def _memory(total: str, free: str) -> tuple[int, int]:
    if total in _UNTOLD and free in _UNTOLD:
        return host_memory()
    if not (total.isdigit() and free.isdigit()):
        raise DriverError("NVIDIA_SMI", f"memory in all {total}, free {free}")
    return int(total) * _MIB, int(free) * _MIB
