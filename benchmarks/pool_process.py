"""The pool's daemon as a process of a benchmark's own: started, killed, started again, asked.

The clients' socket is ours, and handed over as systemd does: connections that come while the daemon is down wait.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.service.client import Client
from gpuckpt.service.view import ModelView, PoolView

# Which process a socket is meant for is said by its number, which only that process knows.
_LAUNCH = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.executable, sys.argv[1:])"
_FIRST = 3  # SD_LISTEN_FDS_START
_READY_SECONDS = 180.0
_STOP_SECONDS = 120.0


class PoolProcess:
    """``gpuckpt pool run`` with its configuration ``toml``, its folders in ``folder``, and the environment ``env``."""

    def __init__(self, folder: Path, toml: str, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.config = folder / "pool.toml"
        self.config.write_text(toml)
        self.log = folder / "pool.log"
        self.admin = folder / "pool.sock"
        self.client = Client(self.admin)
        self._env = {**os.environ, **env, "PYTHONPATH": str(ROOT), "GPUCKPT_POOL_SOCKET": str(self.admin)}
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port: int = self._listening.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        """Start it; ``wait`` until it is ready. Raises GpuckptError if it ends instead, with what it said."""
        words = [sys.executable, "-m", "gpuckpt", "pool", "run", "--config", str(self.config)]
        number = self._listening.fileno()
        # The shell puts the socket where the protocol wants it; the launcher says for whom it is.
        script = f'exec {_FIRST}<&{number}; exec "$0" -c "$1" "${{@:2}}"'
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", script, sys.executable, _LAUNCH, *words],
                env={**self._env, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "front"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(number,),
                start_new_session=True,
            )
        if wait:
            self.until_ready()

    def until_ready(self) -> None:
        """Wait until it is. Raises GpuckptError if it ends instead."""
        until = time.monotonic() + _READY_SECONDS
        while time.monotonic() < until:
            if self.process is None or self.process.poll() is not None:
                raise GpuckptError("the pool has ended", log=tuple(self.log.read_text().splitlines()[-20:]))
            with contextlib.suppress(DaemonUnreachableError):
                view = self.client.state()
                if view.state == "ready" and view.pid == self.process.pid:
                    return
            time.sleep(0.05)
        # Its threads tell where they are before it ends.
        if self.process is not None:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
        raise GpuckptError("the pool did not become ready", log=tuple(self.log.read_text().splitlines()[-80:]))

    def kill(self) -> None:
        """Kill it, with no chance to clean up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, and wait; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise GpuckptError("the pool did not end", log=tuple(self.log.read_text().splitlines()[-20:])) from None

    def close(self) -> None:
        """End it, whatever its state, and the socket."""
        try:
            if self.process is not None:
                self.stop()
        finally:
            self._listening.close()

    def model(self, name: str) -> ModelView:
        """One model as it is now."""
        return next(one for one in self.client.state().models if one.name == name)

    def until(self, name: str, holds: Any, seconds: float = 180.0) -> ModelView:
        """Wait until ``holds(model)``; raises GpuckptError after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            found = next((one for one in self.client.state().models if one.name == name), None)
            if found is not None and holds(found):
                return found
            if time.monotonic() > end:
                raise GpuckptError(f"{name} did not come so far within {seconds:g} s", cause=str(found))
            time.sleep(0.02)

    def view(self) -> PoolView:
        """Everything as it is now."""
        return self.client.state()


@contextlib.contextmanager
def running(folder: Path, toml: str, env: Mapping[str, str]) -> Iterator[PoolProcess]:
    """A pool for the length of a ``with``."""
    made = PoolProcess(folder, toml, env)
    try:
        made.start()
        yield made
    finally:
        made.close()
