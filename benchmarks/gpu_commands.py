"""gpuckpt's commands as the acceptance on a GPU uses them: in the run's own workspace, on the real thing or dry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.asking import Answered, until_answered
from benchmarks.driver import Gpuckpt, Server
from benchmarks.gpu_context import Context
from benchmarks.gpu_record import Document
from benchmarks.harness import CommandFailed, Outcome
from benchmarks.memory import pid_of
from gpuckpt import proc
from gpuckpt.cuda.driver import Driver
from gpuckpt.errors import NotFoundError


class Commands(Gpuckpt):
    """Also: suspend and wake, a question to a replica, and the processes of one."""

    def run(self, *words: str) -> Outcome:
        return harness.run([*words], cwd=self.space.folder, env=self.space.env | python_path())

    def ask(self, restored: Document, canary: Document, timeout: float) -> Answered:
        """The recorded question, streamed; when its first token came, and how it differs."""
        return until_answered(harness.endpoint_of(restored), canary, timeout=timeout)

    def pids(self, replica: str) -> list[int]:
        """Of the replica's container, as the host counts them."""
        return proc.processes_below(pid_of(replica))


def python_path() -> dict[str, str]:
    """Ours before what is set already: gpuckpt's packages may be in folders of their own."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(harness.ROOT), os.environ.get("PYTHONPATH", ""))))}


def commands(context: Context) -> Any:
    """For the run's workspace; of a dry run those that stand in for them."""
    if context.dry:
        from benchmarks import gpu_dry

        return gpu_dry.Commands(context.workspace)
    return Commands(context.workspace)


def suspend(gpuckpt: Any, replica: str) -> Outcome:
    """`gpuckpt suspend`: its device state goes to host memory."""
    made: Outcome = gpuckpt.run("suspend", replica, "--format=json")
    return made


def wake(gpuckpt: Any, replica: str) -> Outcome:
    """`gpuckpt wake`: back onto the device."""
    made: Outcome = gpuckpt.run("wake", replica, "--format=json")
    return made


def golden(gpuckpt: Any, name: str) -> Document | None:
    """What `gpuckpt inspect` says of it; None if there is none."""
    try:
        found: Document = gpuckpt.inspect(name)
    except CommandFailed as failure:
        if failure.code != NotFoundError.exit_code:
            raise
        return None
    return found


def gpu_server(context: Context, kind: str, model: str, words: Sequence[str], *, graphs: bool) -> Server:
    """A server on the GPU: its weights outside of its image, so that they come back by a way of their own."""
    options = ["--workload", kind, "--gpu", "all", "--weights", "outside", *(["--cuda-graphs"] if graphs else [])]
    own = context.prefix / "server" / "bin" / "python"
    if context.python and not own.exists():
        # gpuckpt starts `python3` then, and this is the one that has PyTorch.
        folder = context.python.rpartition("/")[0]
        options += ["--env", f"PATH={folder}:{proc.environment()['PATH']}"]
    if context.site:
        options += ["--env", f"PYTHONPATH={context.site}"]
    return Server(tuple(options), ("--model", model, "--served-model-name", "bench", *words), streams=True)


def device_bytes(driver: Driver, pids: Sequence[int]) -> Document:
    """NVML's word: bytes of these processes, and of the whole device (everybody's)."""
    gpus = driver.gpus()
    return {
        "processes": sum(sum(driver.memory(pid).values()) for pid in pids),
        "device": sum(gpu.memory - gpu.free for gpu in gpus),
    }
