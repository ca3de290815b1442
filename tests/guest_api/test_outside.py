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

from .conftest import _environment, serving


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
        time.sleep(0.5)
        assert guest.ok("GET", "/health")["ok"] is True and answers == []
        assert guest.metrics()["gpuckpt_guest_requests_running"] == 1
        assert host.ask({"do": "wake"}, [file])["bytes"] > 1 << 20
        asking.join(30)
        assert answers == [wanted]
        assert guest.ok("POST", f"{pause}/resume", {})["state"] == "done"
    os.close(file)


def test_nowhere_to_take_orders(model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpuckpt_guest", "serve", "--model", str(model), "--weights-outside"],
        env=_environment() | {"GPUCKPT_CONTROL": str(tmp_path / "absent" / "control.sock")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 4
    assert "no orders can be taken at" in done.stderr
