"""A process that holds memory (gpu_process.py), as those see it who suspend, dump and restore it; and CRIU for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness, workspace
from benchmarks.gpu_context import Context
from gpuckpt import proc
from gpuckpt.errors import DeadlineError, GpuckptError

_PROGRAM = harness.ROOT / "benchmarks" / "gpu_process.py"
_LOOK = 0.002
_PATIENCE = 60.0  # seconds that it may take to sum its bytes
_SIGNAL = signal.SIGUSR1


class Held:
    """One such process; ``first`` is the sum of its bytes when they were made."""

    def __init__(self, context: Context, count: int, library: str, *, seed: int = 7) -> None:
        """Raises GpuckptError with its last words if it cannot start."""
        self.bytes = count
        self.library = library
        self.folder = Path(tempfile.mkdtemp(prefix="gpuckpt-held-", dir=context.folder))
        self._asked = 0
        self._log = self.folder / "log"
        python = context.interpreter() if library == "torch" else _plain_python()
        # Of a dry run the process holds next to nothing; its driver believes what it is told.
        held = min(count, 1 << 16) if context.dry else count
        with self._log.open("wb") as log:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [python, "-S" if library != "torch" else "-u", str(_PROGRAM), str(self.folder),
                 str(held), library, str(seed), str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_environment(context, library),
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        if context.dry:
            from benchmarks import gpu_dry

            gpu_dry.claim(self.pid, count)
        self._patience = context.left if context.dry else _PATIENCE
        try:
            self.first = self._read("ready.json", context.left if context.dry else min(context.left, 120.0))
        except BaseException:
            self.end()
            raise

    def sum(self) -> int:
        """Of its bytes as they are now. Raises DeadlineError, or GpuckptError if it has ended."""
        self._asked += 1
        os.kill(self.pid, _SIGNAL)
        return self._read(f"sum-{self._asked}.json", self._patience)

    def dumped(self) -> None:
        """CRIU has killed it: its id has to be free before it can come back."""
        if self._process is not None:
            self._process.wait(20)
            self._process = None

    def end(self) -> None:
        """Whatever it is: running, restored, or gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        elif self._is_it():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _runs(self) -> bool:
        return self._process.poll() is None if self._process is not None else self._is_it()

    def _is_it(self) -> bool:
        """Whether the id is still its own, of which a restored process is no child of ours."""
        try:
            return os.fsencode(self.folder) in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return False

    def _read(self, name: str, timeout: float) -> int:
        until = time.monotonic() + timeout
        file = self.folder / name
        while not file.exists():
            if not self._runs():
                raise GpuckptError(
                    f"the process that holds {self.bytes} bytes ({self.library}) has ended",
                    log=proc.tail(self._log.read_text(errors="replace"), 5),
                )
            if time.monotonic() > until:
                raise DeadlineError(f"the process that holds {self.bytes} bytes gave no answer in {timeout:.0f} s")
            time.sleep(_LOOK)
        return int(json.loads(file.read_text())["sum"])


@contextlib.contextmanager
def holding(context: Context, count: int, library: str, *, seed: int = 7) -> Iterator[Held]:
    """A process with so many bytes, for the body."""
    made = Held(context, count, library, seed=seed)
    try:
        yield made
    finally:
        made.end()


def _plain_python() -> str:
    """One that needs no environment: what it has open is dumped, too."""
    return shutil.which("python3", path=proc.environment()["PATH"]) or shutil.which("python3") or "python3"


def _environment(context: Context, library: str) -> dict[str, str]:
    if library == "torch":
        return context.environment()
    kept = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    return proc.environment({name: os.environ[name] for name in kept if name in os.environ})


class Criu:
    """Plain CRIU, without podman, its own plugin for CUDA left out: the device state is moved by us."""

    def __init__(self, context: Context) -> None:
        self._program = str(workspace.criu_program())
        self._context = context
        self._empty = context.folder / "no-plugins"
        self._empty.mkdir(exist_ok=True)

    def check(self) -> str:
        """What `criu check` says. Raises GpuckptError."""
        done = proc.run([self._program, "check"], timeout=30)
        return " ".join(proc.tail(done.stdout + done.stderr, 3))

    def version(self) -> str:
        return proc.run([self._program, "--version"], timeout=30).stdout.replace("Version:", "").strip()

    def dump(self, held: Held, images: Path) -> None:
        """Write the process to ``images``; it is killed. Raises GpuckptError with what CRIU says, and it runs on."""
        images.mkdir(parents=True)
        self._run("dump", images, "--tree", str(held.pid))
        held.dumped()

    def restore(self, held: Held, images: Path) -> None:
        """Bring it back under its id, as an orphan. Raises GpuckptError with what CRIU says."""
        self._run("restore", images, "--restore-detached")

    def _run(self, what: str, images: Path, *words: str) -> None:
        log = images / f"{what}.log"
        argv = [self._program, what, "--images-dir", str(images), "--shell-job", "--libdir", str(self._empty)]
        argv += ["-v4", "--log-file", log.name, *words]
        try:
            proc.run(argv, timeout=max(10.0, self._context.left))
        except GpuckptError as error:
            raise GpuckptError(f"criu {what} failed", log=tuple(_errors(log)) or error.log) from error


def _errors(log: Path) -> list[str]:
    """The lines of CRIU's log that say what is wrong."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [re.sub(r"^\([\d.]+\)\s*", "", line) for line in lines if "Error" in line][:6]
