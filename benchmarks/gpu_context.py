"""What a step of the acceptance on a GPU is told, what it hands back, and what it works with.

Each step is a process of its own (gpu_step.py): a driver that hangs takes no more with it. What it has found is on
disk as soon as it is found, so that a step which is cut off keeps that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec import json as msgspec_json

from benchmarks import harness
from benchmarks.gpu_record import Document
from benchmarks.suite import Unavailable, say
from benchmarks.workspace import Workspace
from gpuckpt.cuda.choice import find_program
from gpuckpt.cuda.driver import Driver
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.remote import Remote
from gpuckpt.errors import PreflightError

_PATIENCE = 120.0  # seconds that one answer of the driver may take


class Context(Struct, frozen=True):
    """``deadline``: CLOCK_MONOTONIC seconds by which the step should have ended by itself.

    ``python``: an interpreter with PyTorch for CUDA, empty if there is none; ``site``: folders that it needs besides,
    to import what gpuckpt imports. ``folder``: for temporary files, in memory where there is enough; ``space``: the
    run's store, state and run folders.
    """

    step: str
    work: str
    dry: bool
    deadline: float
    prefix: Path
    folder: Path
    space: Path
    python: str = ""
    site: str = ""
    arguments: tuple[str, ...] = ()
    earlier: dict[str, Document] = field(default_factory=dict)
    """What the steps before it have found, by their names."""

    @property
    def left(self) -> float:
        """Seconds until the step should have ended."""
        return self.deadline - time.monotonic()

    @property
    def library(self) -> str:
        """What holds device memory: PyTorch if there is one, else the driver itself."""
        return "host" if self.dry else "torch" if self.python else "driver"

    @property
    def models(self) -> Path:
        """Models are made here, once in a run."""
        return self.folder / "models"

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.space)

    def interpreter(self) -> str:
        """For what needs PyTorch; raises Unavailable where there is none."""
        if not self.python and not self.dry:
            raise Unavailable("no Python here has PyTorch for CUDA")
        return self.python or sys.executable

    def environment(self) -> dict[str, str]:
        """For processes of that interpreter."""
        path = os.pathsep.join(filter(None, (str(harness.ROOT), self.site, os.environ.get("PYTHONPATH", ""))))
        return {
            **os.environ,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "TQDM_DISABLE": "1",
        }

    @contextlib.contextmanager
    def driver(self) -> Iterator[Driver]:
        """The driver through gpuckpt's helper, a new one for this step; of a dry run one that has no device."""
        if self.dry:
            from benchmarks import gpu_dry

            with gpu_dry.served(self.folder) as remote:
                yield remote
            return
        socket = self.folder / f"{self.step}.sock"
        # gpuckpt starts it with a clean environment; here the packages may be somewhere of their own.
        kept = [f"{name}={os.environ[name]}" for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ]
        remote = Remote(
            socket,
            argv=("/usr/bin/env", *kept, sys.executable, "-m", "gpuckpt.cuda.helper"),
            timeout=min(_PATIENCE, max(self.left, 5.0)),
        )
        try:
            yield self._answering(remote)
        finally:
            socket.unlink(missing_ok=True)  # the helper ends by that

    def _answering(self, remote: Remote) -> Driver:
        """The helper, or NVIDIA's program where the helper cannot start: slower, and of less precise words."""
        try:
            remote.version()
        except PreflightError:
            if (program := find_program(self.prefix)) is None:
                raise
            return Program(program)
        return remote


class Answer:
    """What a step has found: kept in a file after each finding."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.data: Document = {}

    def note(self, name: str, value: Any) -> None:
        self.data[name] = value
        self.end("cut", "it was cut off")

    def end(self, status: str, reason: str | None) -> None:
        """``status``: ok, failed, skipped; what is kept before says that it was cut off."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps({"status": status, "reason": reason, "data": self.data}))
        temporary.replace(self._file)


def answer_file(context_file: Path) -> Path:
    """Where the step answers that was told its context in this file."""
    return context_file.with_suffix(".answer")


def write(context: Context, file: Path) -> None:
    file.write_bytes(msgspec_json.encode(context, enc_hook=str))


def read(file: Path) -> Context:
    return msgspec_json.decode(file.read_bytes(), type=Context, dec_hook=lambda kind, text: kind(text))


def told(context: Context, text: str, measured: str = "") -> None:
    """A line of progress: which step, what it does, and what it has ``measured``, which a dry run has not."""
    if context.dry:
        say(f"    {context.step} (dry): {text}")
    else:
        say(f"    {context.step}: {text}" + (f", {measured}" if measured else ""))


def seconds(values: Sequence[float]) -> Document | None:
    """p50, p95, n, interval and samples of measured seconds; None of none."""
    from benchmarks.journal import summary

    return summary([{"value": value} for value in values], "value")
