"""A server that is told to give its weights back and to take them again, by its control socket."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.guest.test_control import Host

from .conftest import START_S, _environment, serving, until


def test_asleep_it_is_healthy_and_requests_wait(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.sock"
    monkeypatch.setenv("GPUCKPT_CONTROL", str(path))
    host = Host(path)
    file = os.memfd_create("weights")
    with serving(model, tmp_path / "log", "--dtype", "float32", "--weights-outside", "--kv-mib", "64") as guest:
        wanted = guest.tokens("a prompt", 12)
        pause = guest.paused("halted", 2)
        (size,) = host.ask({"do": "save"}, [file])["bytes"]
        assert size == os.fstat(file).st_size
        before = guest.memory()
        released = host.ask({"do": "sleep"})["released"]
        assert released > 1 << 20 and guest.memory() < before - released // 2
        answers: list[list[int]] = []
        asking = threading.Thread(target=lambda: answers.append(guest.tokens("a prompt", 12)))
        asking.start()
        until(lambda: guest.metrics()["gpuckpt_guest_requests_running"] == 1)
        time.sleep(0.2)  # if it were not held it would be answered by now
        assert guest.ok("GET", "/health")["ok"] is True and answers == []
        assert guest.metrics()["gpuckpt_guest_requests_running"] == 1
        assert host.ask({"do": "wake"}, [file])["bytes"] > 1 << 20
        asking.join(60)
        assert answers == [wanted]
        assert guest.ok("POST", f"{pause}/resume", {})["state"] == "done"
    os.close(file)


def test_weights_that_are_on_the_device_already(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "control.sock"
    monkeypatch.setenv("GPUCKPT_CONTROL", str(path))
    host = Host(path)
    file, handle = os.memfd_create("weights"), os.memfd_create("carried")
    with serving(model, tmp_path / "log", "--dtype", "float32", "--weights-outside", "--kv-mib", "64") as guest:
        wanted = guest.tokens("a prompt", 12)
        (size,) = host.ask({"do": "save"}, [file])["bytes"]
        assert os.sendfile(handle, file, 0, size) == size
        os.pwrite(file, bytes(size - (2 << 20)), 2 << 20)  # behind the header: who read it would write something else
        host.ask({"do": "sleep"})
        told = host.ask({"do": "wake", "carried": 1}, [file, handle])
        assert set(told["phases"]) == {"map", "copy", "kv"} and "told" not in told
        assert guest.tokens("a prompt", 12) == wanted
        host.ask({"do": "sleep"})
        os.ftruncate(handle, 4096)
        told = host.ask({"do": "wake", "carried": 1}, [file, handle])
        assert set(told["phases"]) == {"map", "stream", "kv"} and "it has 4096 bytes of" in told["told"]
        assert guest.tokens("a prompt", 12) != wanted
    os.close(file)
    os.close(handle)


def test_nowhere_to_take_orders(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuckpt_guest", "serve", "--model", str(model), "--weights-outside"],
        env=_environment() | {"GPUCKPT_CONTROL": str(tmp_path / "absent" / "control.sock")},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_S,
    )
    assert done.returncode == 4
    assert "no orders can be taken at" in done.stderr
