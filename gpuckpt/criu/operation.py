"""One dump or restore: CRIU's options, the stages it went through, the user's hooks, and its logs.

Runtimes pass CRIU the file named by the container's annotation ``org.criu.config``; every container has its own, in
a folder that also receives what hooks/criu/action notes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from gpuckpt.errors import PreflightError
from gpuckpt.paths import refuse_untrusted
from gpuckpt.proc import processes_below

# CRIU's stages (criu(8), --action-script) and what the time after each is spent on.
STAGES = {
    "pre-dump": "criu: freeze and collect",
    "network-lock": "criu: dump memory",
    "post-dump": "copy written files",
    "network-unlock": "criu: thaw or kill",
    "pre-restore": "criu: read images",
    "setup-namespaces": "criu: namespaces and mounts",
    "post-setup-namespaces": "criu: processes and memory",
    "post-restore": "criu: finish processes",
    "pre-resume": "criu: resume",
    "post-resume": "runtime: hand over",
}


def action_script() -> Path:
    """hooks/criu/action: in a checkout beside the package, in an installed one inside it."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "hooks" / "criu" / "action", package / "data" / "hooks" / "criu" / "action"):
        if candidate.is_file():
            return candidate
    raise PreflightError("the CRIU action script is missing", remedy="reinstall gpuckpt: make setup")


class FailedStep(Struct, frozen=True):
    """A step of the action script that failed, the end of its output, and whether it is the user's executable."""

    name: str
    output: tuple[str, ...]
    users: bool


class Operation(Struct, frozen=True):
    """The folder of one container's CRIU options, stages and hook output."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "criu.conf"

    def write(
        self,
        *,
        golden: str,
        replica: str,
        hooks: Path,
        tcp_established: bool,
        ghost_limit: int,
        loopback: bool,
        hook_seconds: float,
        copies: Sequence[tuple[Path, Path]] = (),
    ) -> None:
        """Write CRIU's options and the context of the action script, and forget an earlier operation's notes.

        Without ``tcp_established`` the network is not locked while a dump or restore goes on: connections are closed
        anyway, and the lock costs six calls of iptables in the container's namespace, 70 ms of a restore.
        ``loopback``: the network namespace is the container's own and empty, and its loopback is to be up.
        ``hook_seconds``: how long one executable of the user's may take.
        ``copies`` (from, to) are made at the end of a dump, while the processes are still frozen.
        """
        check_hooks(hooks)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        plugins = self.folder / "plugins"
        plugins.mkdir(mode=0o700, exist_ok=True)
        self.begin()
        context = [f"GOLDEN={golden}", f"REPLICA={replica}", f"HOOKS={hooks}"]
        context += [f"HOOK_SECONDS={hook_seconds:g}"]
        context += ["LOOPBACK=1"] if loopback else []
        context += [f"COPY={source}\t{target}" for source, target in copies]
        (self.folder / "context").write_text("\n".join(context) + "\n")
        script = self.folder / "action"
        script.unlink(missing_ok=True)
        script.symlink_to(action_script())
        options = [
            "link-remap",  # files deleted but open, such as vLLM's semaphores in /dev/shm
            "file-locks",  # flock(2), which model caches hold; taken again by the restored process
            "skip-in-flight",  # connections half accepted: their clients are gone anyway
            *(["tcp-established"] if tcp_established else ["tcp-close", "network-lock skip"]),
            f"ghost-limit {ghost_limit}",
            # None: its plugin for CUDA would start a program for each process, one after the other, and look for device
            # state that is moved by us.
            f"libdir {plugins}",
            f"action-script {script}",
        ]
        self.config.write_text("\n".join(options) + "\n")

    def begin(self) -> None:
        """Forget an earlier operation's notes."""
        for name in ("stages", "failed", "output", "running"):
            (self.folder / name).unlink(missing_ok=True)

    def marks(self) -> list[tuple[str, int]]:
        """The stages CRIU went through: label of the time that follows, and when (CLOCK_MONOTONIC, ns)."""
        try:
            lines = (self.folder / "stages").read_text().splitlines()
        except FileNotFoundError:
            return []
        # The script knows only the wall clock; both clocks are read together here and differ by a constant.
        offset = time.time_ns() - time.monotonic_ns()
        found = []
        for line in lines:
            stage, at, *_ = line.split(" ")
            if stage in STAGES:
                found.append((STAGES[stage], round(float(at) * 1e9) - offset))
        return found

    def restored(self) -> int | None:
        """The container's first process on the host, once all processes and threads are there; they do not run yet."""
        try:
            lines = (self.folder / "stages").read_text().splitlines()
        except FileNotFoundError:
            return None
        found = next((line.split(" ")[2] for line in lines if line.startswith("post-restore ")), "")
        return int(found) if found else None

    def resumed(self) -> bool:
        """Whether the processes run again, and nothing of the user's is still to be run before they may be used."""
        try:
            over = "\npost-resume " in (self.folder / "stages").read_text()
            hooks = next(
                line for line in (self.folder / "context").read_text().splitlines() if line.startswith("HOOKS=")
            )
        except (FileNotFoundError, StopIteration):
            return False
        return over and not Path(hooks.partition("=")[2], "post-resume").is_dir()

    def require_marks(self, *copies: Path) -> None:
        """Raise PreflightError if the action script did not run, or ``copies`` that a dump makes are not there.

        A runtime that does not know the annotation ``org.criu.config`` ignores it without a word: no option of ours
        was in force then, no hook ran, and written files were not kept.
        """
        missing = [str(path) for path in copies if not path.exists()]
        if not self.marks() or missing:
            raise PreflightError(
                "the container runtime did not pass our options to CRIU",
                cause=f"{' and '.join(missing)} was not made" if missing else "the action script was not called",
                remedy="use runc 1.1 or later, or crun with support for org.criu.config: podman.runtime",
            )

    def end_hooks(self) -> None:
        """Kill the hook that runs now, if one does: podman waits for CRIU, CRIU for its script, the script for it."""
        try:
            pid = int((self.folder / "running").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if os.fsencode(self.folder / "action") not in command:
            return  # it has ended, and the number is another process' now
        for child in processes_below(pid):
            if child != pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    def failed_step(self) -> FailedStep | None:
        """What failed in the action script, or None."""
        try:
            what = (self.folder / "failed").read_text().strip()
        except FileNotFoundError:
            return None
        try:
            output = (self.folder / "output").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            output = []
        origin, _, step = what.partition(": ")
        return FailedStep(step, tuple(output[-15:]), users=origin == "hook")


def check_hooks(hooks: Path) -> None:
    """Raise PreflightError if somebody but root may change what runs as root at CRIU's stages."""
    refuse_untrusted(hooks, what="the hooks folder")
    for path in [hooks, *hooks.glob("*"), *hooks.glob("*/*")]:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise PreflightError(
                f"the hook {path} can be changed by others than root",
                cause="its executables run as root",
                remedy=f"chown root:root {path} && chmod 755 {path}",
            )
