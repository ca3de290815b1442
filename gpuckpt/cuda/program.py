"""The driver through NVIDIA's cuda-checkpoint program, for drivers before 570, or where no bindings are installed.

Each call starts a process, which initialises CUDA: seconds where the helper takes microseconds. Devices are asked for
with nvidia-smi, which comes with every driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpuckpt import proc
from gpuckpt.cuda.driver import DriverError, Gpu, State
from gpuckpt.errors import DeadlineError, GpuckptError, NotFoundError

_LONGEST = 120.0  # seconds that moving the memory of one process may take
_STATES: tuple[State, ...] = ("running", "locked", "checkpointed", "failed")
_MIB = 1 << 20


class Program:
    """cuda-checkpoint and nvidia-smi; ``program`` is the former's path."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @property
    def shares(self) -> bool:
        return False

    def state(self, pid: int) -> State | None:
        done = self._run("--get-state", "--pid", str(pid))
        word = done.stdout.strip().lower()
        if done.code:
            return None  # it tells "no context" from nothing else that can go wrong
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
        rows = self._query("--query-gpu=uuid,name,memory.total,memory.free,mig.mode.current")
        return tuple(
            Gpu(uuid, name, int(total) * _MIB, int(free) * _MIB, mig == "Enabled")
            for uuid, name, total, free, mig in rows
        )

    def memory(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for uuid, process, used in self._query("--query-compute-apps=gpu_uuid,pid,used_memory"):
            if int(process) == pid and used.isdigit():
                found[uuid] = found.get(uuid, 0) + int(used) * _MIB
        return found

    def version(self) -> str:
        rows = self._query("--query-gpu=driver_version")
        return rows[0][0] if rows else ""

    def _act(self, action: str, pid: int, *more: str) -> None:
        done = self._run("--action", action, "--pid", str(pid), *more)
        if done.code:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise DriverError(f"STATUS_{done.code}", said[-1] if said else "")

    def _run(self, *words: str) -> proc.Result:
        try:
            return proc.run([str(self._program), *words], timeout=_LONGEST, check=False)
        except DeadlineError as error:
            raise DriverError("TIMEOUT", error.message) from error
        except NotFoundError as error:
            raise DriverError("NO_PROGRAM", error.message) from error

    def _query(self, what: str) -> list[list[str]]:
        try:
            done = proc.run(["nvidia-smi", what, "--format=csv,noheader,nounits"], timeout=30)
        except GpuckptError as error:
            raise DriverError("NVIDIA_SMI", error.message) from error
        return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
