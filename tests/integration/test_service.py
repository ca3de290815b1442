"""The podman service of our own: started once, started again, and holding nothing of ours."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuckpt.containers import service
from tests.integration.conftest import PREFIX, Bench

CRIU = PREFIX / "bin" / "criu"
ROOT = Path(__file__).resolve().parents[2]


def pid_of(bench: Bench) -> int:
    (file,) = (bench.folder / "run").glob("podman-*/service.pid")
    return int(file.read_text())


def services(bench: Bench) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"service" in words and any(word.startswith(f"unix://{bench.folder}".encode()) for word in words):
                found.append(int(entry.name))
    return found


@pytest.fixture(autouse=True)
def _processes_are_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    # The service outlives its starter on purpose; Python warns about such children when it forgets them.
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)


def test_many_first_commands_start_one_service(bench: Bench) -> None:
    with ThreadPoolExecutor(6) as pool:
        apis = list(pool.map(lambda _: service.connect(bench.folder / "run", CRIU, runtime="runc"), range(6)))
    assert all(api.call("GET", "/_ping") is not None for api in apis)
    assert services(bench) == [pid_of(bench)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_that_ended_meanwhile_is_started_again(bench: Bench, number: signal.Signals) -> None:
    api = service.connect(bench.folder / "run", CRIU, runtime="runc")
    first = pid_of(bench)
    os.kill(first, number)
    os.waitpid(first, 0)
    assert api.call("GET", "/_ping") is not None
    assert services(bench) == [pid_of(bench)] != [first]


def test_the_service_holds_nothing_of_ours(bench: Bench) -> None:
    locked = bench.folder / "lock"
    handle = os.open(locked, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(handle, True)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code = (
        "import os, pathlib, sys; [os.close(number) for number in (0, 1, 2)]\n"
        "from gpuckpt.containers import service\n"
        f"service.connect(pathlib.Path({str(bench.folder / 'run')!r}), pathlib.Path({str(CRIU)!r}), runtime='runc')\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[handle], env=bench.env, cwd=ROOT, check=False)
    assert done.returncode == 0
    pid = pid_of(bench)
    held = {entry.name: os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    log = str(next((bench.folder / "run").glob("podman-*/service.log")))
    assert (held["0"], held["1"], held["2"]) == ("/dev/null", log, log)
    assert not [target for target in held.values() if target.endswith("lock") and target.startswith(str(bench.folder))]
    os.close(handle)
    again = os.open(locked, os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
