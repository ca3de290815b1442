"""What systemd is told, over real datagram sockets."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuckpt.errors import UsageError
from gpuckpt.service.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A manager's end. Bound by a relative path: the temporary folder's own may be longer than an address."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind("notify")
        made.settimeout(60)
        yield made


def lines(manager: socket.socket) -> list[str]:
    return manager.recv(65536).decode().split("\n")


def notifier(**variables: str) -> Notifier:
    return Notifier.from_environment({"NOTIFY_SOCKET": "/notify", **variables})


@pytest.fixture
def ours(manager: socket.socket) -> Notifier:
    return Notifier("notify")


def test_without_a_manager_nothing_happens() -> None:
    silent = Notifier.from_environment({})
    silent.ready("listening")
    silent.ping()
    assert silent.watchdog is None and silent.ping_every is None


def test_the_messages(manager: socket.socket, ours: Notifier) -> None:
    ours.ready()
    assert lines(manager) == ["READY=1"]
    ours.ready("2 models")
    assert lines(manager) == ["READY=1", "STATUS=2 models"]
    ours.stopping("3 requests at work")
    assert lines(manager) == ["STOPPING=1", "STATUS=3 requests at work"]
    ours.status("one\nREADY=1")
    assert lines(manager) == ["STATUS=one READY=1"], "a text cannot bring in another assignment"
    ours.ping()
    assert lines(manager) == ["WATCHDOG=1"]
    ours.extend(1.5)
    assert lines(manager) == ["EXTEND_TIMEOUT_USEC=1500000"]


def test_a_reload_says_when_it_began(manager: socket.socket, ours: Notifier) -> None:
    before = time.monotonic_ns() // 1000
    ours.reloading()
    said = dict(line.split("=") for line in lines(manager))
    assert said["RELOADING"] == "1"
    assert before <= int(said["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_an_abstract_socket() -> None:
    name = f"gpuckpt-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(60)
        notifier(NOTIFY_SOCKET=f"@{name}").ready()
        assert lines(manager) == ["READY=1"]


def test_a_strange_address_is_refused() -> None:
    with pytest.raises(UsageError, match="vsock"):
        notifier(NOTIFY_SOCKET="vsock:2:1234")


def test_a_manager_that_went_away(tmp_path: Path) -> None:
    gone = Notifier(str(tmp_path / "gone"))
    gone.ping()
    gone.status("nobody reads this")
    with pytest.raises(OSError, match=r"No such file|too long"):
        gone.ready()


def test_a_manager_that_does_not_read_keeps_no_ping_waiting(manager: socket.socket, ours: Notifier) -> None:
    began = time.monotonic()
    for _ in range(1000):  # more than a socket's queue (net.unix.max_dgram_qlen) holds
        ours.ping()
    assert time.monotonic() - began < 60


def test_the_watchdog() -> None:
    assert notifier(WATCHDOG_USEC="30000000").watchdog == 30
    assert notifier(WATCHDOG_USEC="30000000").ping_every == 15
    assert notifier(WATCHDOG_USEC="30000000", WATCHDOG_PID=str(os.getpid())).watchdog == 30
    assert notifier(WATCHDOG_USEC="30000000", WATCHDOG_PID="1").watchdog is None
    assert notifier(WATCHDOG_USEC="0").watchdog is None
    assert notifier(WATCHDOG_USEC="soon").watchdog is None
