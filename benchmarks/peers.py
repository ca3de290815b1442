"""The same server in a container of stock podman, checkpointed and restored with podman's own commands.

The container is a user's: an image, bind mounts for what the server needs, no rewriting, no gpuckpt. What CRIU needs
to freeze a vLLM at all is given to it (io_uring off by seccomp, /dev/shm of its own, CRIU's options, limits): without
these podman has nothing to compare.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.asking import Answered, until_answered
from benchmarks.workspace import LABEL, PREFIX, Workspace, criu_program, podman_command
from gpuckpt import proc
from gpuckpt.errors import GpuckptError
from gpuckpt.host.limits import container_ulimits
from gpuckpt.host.seccomp import profile_path
from gpuckpt.timing import now_ns
from gpuckpt.workload.base import SOCKET_FOLDER, SOCKET_NAME
from gpuckpt.workload.endpoint import Endpoint

IMAGE = f"localhost/{PREFIX}-peer"
_SLOW = 900.0  # seconds that one podman command may take
_FILES = ("etc/passwd", "etc/group", "etc/ld.so.cache", "etc/nsswitch.conf", "etc/localtime")


def build_image(space: Workspace) -> str:
    """An image with nothing but a skeleton: what the server needs is bind-mounted from this machine, read-only."""
    root = space.folder / "skeleton"
    for name in ("dev", "etc", "proc", "sys", "run", "root", "opt", "usr", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path(f"/{name}").is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    for name in _FILES:
        with contextlib.suppress(OSError):
            shutil.copyfile(f"/{name}", root / name)
    archive = space.folder / "skeleton.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, arcname=".")
    # Of the run's own: two runs at once must not take each other's image away.
    name = f"{IMAGE}:{space.folder.name.removeprefix(PREFIX).strip('-').lower()}"
    proc.run([*podman_command(), "import", "--change", f"LABEL {LABEL}={space.folder}", archive, name], timeout=_SLOW)
    archive.unlink()
    return name


@dataclass
class Peer:
    """One container of plain podman that runs a golden's launch line; ``name`` without the common prefix."""

    space: Workspace
    image: str
    golden: dict[str, Any]
    word: str
    criu_options: tuple[str, ...] = ()
    started_ns: int = field(default=0, init=False)
    running_ns: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        return f"{PREFIX}-{self.space.folder.name.removeprefix(PREFIX).strip('-')}-{self.word}"

    @property
    def folder(self) -> Path:
        return self.space.folder / "peers" / self.word

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(socket=self.folder / "socket" / SOCKET_NAME)

    @property
    def canary(self) -> dict[str, Any]:
        found: dict[str, Any] = self.golden["canary"]
        return found

    @property
    def config(self) -> Path:
        return self.folder / "criu.conf"

    def podman(self, *words: str | Path, check: bool = True, timeout: float = _SLOW) -> proc.Result:
        """Run podman with the CRIU of this machine's gpuckpt on its PATH."""
        return proc.run([*podman_command(), *words], timeout=timeout, path=[self._tools()], check=check)

    def _tools(self) -> Path:
        tools = self.space.folder / "bin"
        tools.mkdir(exist_ok=True)
        if not (tools / "criu").is_symlink():
            (tools / "criu").symlink_to(criu_program())
        return tools

    def write_config(self, *more: str) -> None:
        options = ["link-remap", "file-locks", "skip-in-flight", "tcp-close", "ghost-limit 1073741824"]
        self.config.write_text("\n".join([*options, *self.criu_options, *more]) + "\n")

    def start(self) -> None:
        """`podman run`, spawned at :attr:`started_ns` and back at :attr:`running_ns`; the server is not waited for."""
        sockets = self.folder / "socket"
        sockets.mkdir(parents=True, exist_ok=True)
        self.endpoint.socket.unlink(missing_ok=True)  # type: ignore[union-attr]
        self.write_config()
        words = ["run", "-d", "--name", self.name, *self._arguments(), self.image, *self.golden["launch"]["argv"]]
        self.started_ns = now_ns()
        self.podman(*words)
        self.running_ns = now_ns()

    def _arguments(self) -> Iterator[str]:
        launch = self.golden["launch"]
        yield from ("--label", f"{LABEL}={self.space.folder}", "--network", "none", "--ipc", "none")
        shm = f"type=tmpfs,destination=/dev/shm,tmpfs-mode=1777,tmpfs-size={launch['shm_size']}"
        yield from ("--mount", shm)
        yield from ("--security-opt", f"seccomp={profile_path(mapped=False)}", "--annotation")
        yield f"org.criu.config={self.config}"
        yield from ("--log-driver", "k8s-file", "--stop-timeout", "10", "--hostname", "bench", "--entrypoint", "[]")
        for limit in container_ulimits():
            yield from ("--ulimit", f"{limit['Name']}={limit['Soft']}:{limit['Hard']}")
        for key, value in launch["env"].items():
            yield from ("--env", f"{key}={value}")
        for path in self._needed():
            yield from ("--volume", f"{path}:{path}:ro")
        yield from ("--volume", f"{self.folder / 'socket'}:{SOCKET_FOLDER}")

    def _needed(self) -> list[str]:
        """Folders of this machine that the server runs from: the system's, its Python environment, the model."""
        needed = ["/usr"]
        python = environment.prefix() / "server"
        if self.golden["launch"]["argv"][0].startswith(f"{python}/"):
            base = (python / "bin" / "python").resolve().parents[1]  # the interpreter's own installation
            needed += [str(python), *([] if base.is_relative_to("/usr") else [str(base)])]
        return needed + [mount["source"] for mount in self.golden["launch"]["mounts"]]

    def first_token(self, timeout: float = 600) -> Answered:
        return until_answered(self.endpoint, self.canary, timeout=timeout, alive=self.trouble)

    def trouble(self) -> str | None:
        """Why the server will never answer: None while its container runs."""
        status = self.status()
        if status == "running":
            return None
        logs = self.podman("logs", "--tail", "5", self.name, check=False)
        return f"the container is {status}: {' | '.join((logs.stdout + logs.stderr).split(chr(10))[-5:])}"

    def status(self) -> str:
        return self.podman("inspect", "--format", "{{.State.Status}}", self.name, check=False).stdout.strip()

    @property
    def bundle(self) -> Path:
        """The container's folder, in which podman keeps its checkpoint."""
        return Path(self.podman("inspect", "--format", "{{.StaticDir}}", self.name).stdout.strip())

    def pid(self) -> int:
        return int(self.podman("inspect", "--format", "{{.State.Pid}}", self.name).stdout.strip())

    def checkpoint(self, *words: str | Path) -> float:
        """`podman container checkpoint`; returns its seconds."""
        begun = now_ns()
        try:
            self.podman("container", "checkpoint", "--file-locks", *words, self.name)
        except GpuckptError as error:
            error.log = (*error.log, *self._criu_log("dump.log"))
            raise
        return (now_ns() - begun) / 1e9

    def link_checkpoint(self, target: Path) -> None:
        """Let the container's checkpoint folder lie elsewhere: podman follows the link."""
        link = self.bundle / "checkpoint"
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            shutil.rmtree(link)
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        link.symlink_to(target)

    def restore(self, *words: str | Path) -> tuple[int, int]:
        """`podman container restore`; returns when it was spawned and when it had ended."""
        spawned = now_ns()
        try:
            self.podman("container", "restore", *words)
        except GpuckptError as error:
            error.log = (*error.log, *self._criu_log("restore.log"))
            raise
        return spawned, now_ns()

    def _criu_log(self, name: str) -> tuple[str, ...]:
        with contextlib.suppress(OSError, GpuckptError):
            lines = (self.bundle / name).read_text(errors="replace").splitlines()
            return tuple(line for line in lines if "Error" in line)[-5:]
        return ()

    def kill(self) -> None:
        """End the server and wait until podman has noticed: only an exited container can be restored."""
        self.podman("kill", self.name, check=False)
        deadline = time.monotonic() + 60
        while self.status() == "running" and time.monotonic() < deadline:
            time.sleep(0.05)

    def remove(self) -> None:
        self.podman("rm", "-f", "-t", "0", self.name, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
