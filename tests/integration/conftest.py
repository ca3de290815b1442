"""A gpuckpt of its own for each test module: own store, state and run folders, nothing left behind afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.workload.endpoint import Endpoint

HERE = Path(__file__).resolve().parent
SERVER = HERE / "server.py"
PREFIX = Path(os.environ.get("GPUCKPT_PREFIX", "/opt/gpuckpt"))
GPUCKPT = [str(PREFIX / "venv" / "bin" / "python"), "-m", "gpuckpt"]
PATIENCE = 180.0  # seconds: bounds what hangs, and nothing else
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass
class Done:
    """A finished command of ours."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.out)
        return document


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens at, below those that the kernel gives to whoever asks for any."""
    while True:
        found = list(range(first := random.randrange(20_000, 30_000), first + count))
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in found:
                held.enter_context(socket.create_server(("", port)))
            return found


class Halt:
    """A hook that waits until it is let go: what is to happen meanwhile does, however slow the machine is."""

    def __init__(self, bench: Bench, stage: str) -> None:
        self._reached, self._gone = bench.folder / f"{stage}.reached", bench.folder / f"{stage}.gone"
        self._hook = bench.folder / "hooks.d" / stage / "10-halt"
        self._hook.parent.mkdir(parents=True)
        self._hook.write_text(
            f"#!/bin/sh\ntouch {self._reached}\nuntil [ -e {self._gone} ]; do sleep 0.05; done\nexit 0\n"
        )
        self._hook.chmod(0o755)

    def wait(self, child: subprocess.Popen[str]) -> None:
        """Until the command stands there."""
        deadline = time.monotonic() + PATIENCE
        while not self._reached.exists():
            assert child.poll() is None and time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.02)

    def go(self) -> None:
        """Nobody waits there any more."""
        self._gone.touch()


@dataclass
class Bench:
    """Folders of one test and the commands run in them. Names begin with a random word: podman's are global."""

    folder: Path
    word: str = field(default_factory=lambda: f"t{uuid.uuid4().hex[:6]}")
    store_size: str = "6GiB"

    @property
    def env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(HERE.parents[1]),
            "GPUCKPT_PREFIX": str(PREFIX),
            "GPUCKPT_STORE__PATH": str(self.store),
            "GPUCKPT_STORE__SIZE": self.store_size,
            "GPUCKPT_PATHS__STATE": str(self.folder / "state"),
            "GPUCKPT_PATHS__RUN": str(self.folder / "run"),
            "GPUCKPT_PATHS__HOOKS": str(self.folder / "hooks.d"),
        }

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def name(self, suffix: str = "g") -> str:
        return f"{self.word}-{suffix}"

    def start(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*GPUCKPT, *words],
            env=self.env | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
        )

    def run(self, *words: str, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
        child = self.start(*words, env=env)
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
        return Done(child.returncode, out, err)

    def ok(self, *words: str, env: dict[str, str] | None = None) -> Done:
        done = self.run(*words, env=env)
        assert done.code == 0, f"gpuckpt {' '.join(words)} → {done.code}\n{done.out}\n{done.err}"
        return done

    def create(self, name: str, *server: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Done:
        """Create a golden of the small server and expect success."""
        canary = (
            () if any(word.startswith(("--canary", "--no-canary")) for word in options) else ("--canary", "GET /digest")
        )
        return self.ok(*self.creation(name, *server, options=(*canary, *options)), env=env)

    def creation(self, name: str, *server: str, options: tuple[str, ...] = ()) -> tuple[str, ...]:
        where = "{port}" if "--publish" in options else "{socket}"
        mount = ("--volume", f"{HERE}:{HERE}")
        return ("create", name, *mount, *options, "--", "/usr/bin/python3", str(SERVER), where, *server)

    def endpoint(self, replica: str) -> Endpoint:
        return Endpoint(socket=self.folder / "state" / "replicas" / replica / "socket" / "server.sock")

    def get(self, replica: str, path: str) -> str:
        return self.endpoint(replica).request("GET", path, timeout=60).body.decode()

    def left(self) -> list[str]:
        """Everything of ours that exists: containers, mounts (but the store), half-made folders."""
        names = subprocess.run(
            ["podman", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, check=True
        ).stdout.split()
        found = [f"container {name}" for name in names if name.startswith(f"gpuckpt-{self.word}")]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [
            f"mount {line.split()[4]}"
            for line in mounts
            if line.split()[4].startswith(f"{self.folder}/") and line.split()[4] != str(self.store)
        ]
        for parent in (self.store / "staging", self.folder / "state" / "replicas"):
            found += [str(path) for path in parent.glob("*")]
        if (self.folder / "run" / "thp" / "original.json").exists():
            found.append("transparent huge pages are still borrowed")
        return found

    def goldens(self) -> list[str]:
        return [entry["name"] for entry in self.ok("ls", "--format", "json").json["goldens"]]


@pytest.fixture(scope="session")
def lively_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose greedy text varies."""
    folder = tmp_path_factory.mktemp("models") / "lively"
    script = HERE.parents[1] / "tests" / "lively_model.py"
    subprocess.run([PREFIX / "server" / "bin" / "python", script, folder], check=True)
    return folder


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A fresh gpuckpt; whatever a failed test leaves is removed, and the store is unmounted."""
    folder = Path(f"/var/tmp/gpuckpt-test-{uuid.uuid4().hex[:8]}")
    folder.mkdir(mode=0o700)
    made = Bench(folder)
    try:
        yield made
    finally:
        _clean(made)


def _clean(made: Bench) -> None:
    names = subprocess.run(
        ["podman", "ps", "-a", "--format", "{{.Names}}"], capture_output=True, text=True, check=False
    ).stdout.split()
    for name in names:
        if name.startswith(f"gpuckpt-{made.word}"):
            subprocess.run(["podman", "rm", "-f", "-t", "0", name], capture_output=True, check=False)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{made.folder}/"):
            subprocess.run(["umount", "-l", mount], check=False)
    for pid in (made.folder / "run").glob("podman-*/service.pid"):
        # The service would end by itself when idle; its folder is about to go.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)
    shutil.rmtree(made.folder, ignore_errors=True)
