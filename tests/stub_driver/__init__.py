"""Stand-ins for NVIDIA's libraries and programs: libcuda, NVML, cuda-checkpoint and nvidia-smi without a GPU.

They are compiled when tests need them, and loaded by the real cuda-bindings and pynvml in processes of their own. What
is wrong with an argument's layout or the translation of a code shows; what a device would do does not. They share a
folder:

    devices           a line for each: UUID, bytes (- where the driver does not tell), 1 under MIG (- where the type has
                      none), the type's name
    version           the driver's
    pids              of the made-up processes
    processes/PID     state, 1 if it can never be restored; then lines with a device and bytes on it
    calls             a line for each call that changes a process, with its arguments
    refuse/STEP-PID   a code of the driver with which the call ends; without a process: init, nvml, processes; and used:
                      what processes hold is not told
    hang/STEP-PID     the call waits until it is gone

A process may also hold memory by its own calls of libcuda; then it is in the world by itself until it ends.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpuckpt
from gpuckpt.cuda.driver import Gpu
from gpuckpt.cuda.remote import Remote

HERE = Path(__file__).parent
_FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-unused-parameter")


def build(folder: Path) -> Path:
    """Compile the libraries and cuda-checkpoint into ``folder``."""
    for name, file in (("libcuda.so.1", "cuda.c"), ("libnvidia-ml.so.1", "nvml.c")):
        _compile("-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, HERE / file)
    _compile(
        "-o", folder / "cuda-checkpoint", HERE / "cuda_checkpoint.c", folder / "libcuda.so.1", "-Wl,-rpath,$ORIGIN"
    )
    return folder


def _compile(*arguments: str | Path) -> None:
    subprocess.run(["cc", *_FLAGS, *map(str, arguments)], check=True)


class World:
    """The folder, and programs that act on it: ``bin`` holds cuda-checkpoint and nvidia-smi, ``helper`` is the helper's
    command."""

    def __init__(self, folder: Path, built: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.helper = (str(self.bin / "helper"),)
        self.bin.mkdir(parents=True)
        self.clear()
        self.environment = {
            "GPUCKPT_STUB_DRIVER": str(folder),
            "LD_LIBRARY_PATH": str(built),
            "PYTHONPATH": str(Path(gpuckpt.__file__).parents[1]),
        }
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items())
        for name, command in (
            ("cuda-checkpoint", [str(built / "cuda-checkpoint")]),
            ("nvidia-smi", [sys.executable, "-S", str(HERE / "nvidia_smi.py")]),
            ("helper", [sys.executable, "-m", "gpuckpt.cuda.helper"]),
        ):
            script = self.bin / name
            note = 'echo $$ > "$GPUCKPT_STUB_DRIVER/helper.pid"\n' if name == "helper" else ""
            script.write_text(f'#!/bin/sh\n{exports}{note}exec {shlex.join(command)} "$@"\n')
            script.chmod(0o755)

    def clear(self) -> None:
        """No process, no device, nothing refused."""
        for name in ("processes", "refuse", "hang"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        for name in ("calls", "pids", "devices"):
            (self.folder / name).write_text("")
        (self.folder / "version").write_text("570.86.15")

    def device(self, one: Gpu, *, told: bool = True, mig: bool | None = None) -> None:
        """``told``: whether the driver says how much memory it has; ``mig``: None for a type that has none."""
        with (self.folder / "devices").open("a") as file:
            file.write(f"{one.uuid} {one.memory if told else '-'} {'-' if mig is None else int(mig)} {one.name}\n")

    def start(self, pid: int, held: dict[str, int], state: str = "running") -> None:
        """A process with so many bytes by device."""
        lines = [f"{state} 0", *(f"{uuid} {count}" for uuid, count in held.items())]
        (self.folder / "processes" / str(pid)).write_text("\n".join(lines) + "\n")
        with (self.folder / "pids").open("a") as file:
            file.write(f"{pid}\n")

    def state(self, pid: int) -> str:
        return (self.folder / "processes" / str(pid)).read_text().split()[0]

    def held(self, pid: int) -> dict[str, int]:
        """Where the memory of a process is, or was when it was taken off."""
        _, *rows = (self.folder / "processes" / str(pid)).read_text().splitlines()
        return {uuid: int(count) for uuid, count in map(str.split, rows)}

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def refuse(self, step: str, pid: int = 0, code: int = 1) -> None:
        (self.folder / "refuse" / f"{step}-{pid}").write_text(str(code))

    def allow(self, step: str, pid: int = 0) -> None:
        (self.folder / "refuse" / f"{step}-{pid}").unlink()

    def hang(self, step: str, pid: int) -> Path:
        """Have a call wait until the file that is returned is gone."""
        file = self.folder / "hang" / f"{step}-{pid}"
        file.touch()
        return file

    def wait_for(self, call: str) -> None:
        """Until the driver was called so."""
        until = time.monotonic() + 60
        while not any(line == call or line.startswith(f"{call} ") for line in self.calls()):
            assert time.monotonic() < until, self.calls()
            time.sleep(0.002)

    def helper_pid(self) -> int:
        return int((self.folder / "helper.pid").read_text())

    def remote(self, socket: Path) -> Remote:
        """The real driver's code over the stand-ins, in a process of its own."""
        return Remote(socket, argv=self.helper)
