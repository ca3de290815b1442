"""A server's control socket, and what may come from it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.errors import (
    DaemonUnreachableError,
    GpuckptError,
)
from gpuckpt.workload.control import Control, ControlRefused, Woken


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[[bytes | None], tuple[Control, list[Any]]]]:
    """A server on a Unix socket that answers every request with the same bytes; what it was asked, and its files."""
    asked: list[Any] = []
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(answer: bytes | None) -> tuple[Control, list[Any]]:
        path = tmp_path / "control.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        sockets.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                line, files, _, _ = socket.recv_fds(connection, 4096, 16)
                asked.append((json.loads(line), [os.pread(handle, 100, 0) for handle in files]))
                for handle in files:
                    os.close(handle)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    connection.recv(1)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return Control(path, timeout=0.3 if answer is None else 60), asked

    yield start
    for one in sockets:
        one.shutdown(socket.SHUT_RDWR)  # who waits in accept(2) wakes up
        one.close()
    for thread in threads:
        thread.join(60)


def test_files_go_along_with_a_request(listening: Any, tmp_path: Path) -> None:
    control, asked = listening(b'{"bytes": 7, "phases": {"map": 0.5}}\n')
    (tmp_path / "w").write_bytes(b"weights")
    with (tmp_path / "w").open("rb") as file:
        assert control.wake([file.fileno()]) == Woken(7, {"map": 0.5})
    assert asked == [({"do": "wake"}, [b"weights"])]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (b'{"error": {"message": "no", "cause": "why"}}\n', ControlRefused, "no"),
        (b'{"error": "no"}\n', ControlRefused, "no"),
        (b"nonsense\n", ControlRefused, "not understood"),
        (b"[1]\n", ControlRefused, "not understood"),
        (b'{"ranks": "two"}\n', ControlRefused, "not understood"),
        (b'{"ranks": Infinity}\n', ControlRefused, "not understood"),
        (b'{"ranks": -1}\n', ControlRefused, "not understood"),
        (b"[" * 100_000 + b"\n", ControlRefused, "not understood"),
        (b'{"error": null}\n', ControlRefused, "gives no reason"),
        (b'{"error": {"message": "\\u001b[31mred"}}\n', ControlRefused, "�\\[31mred"),
        (b"", DaemonUnreachableError, "ended while it was told to ranks"),
        (None, DaemonUnreachableError, "does not answer on its control socket"),
    ],
)
def test_what_a_server_may_answer(listening: Any, answer: bytes | None, kind: type[GpuckptError], said: str) -> None:
    control, _ = listening(answer)
    with pytest.raises(kind, match=said):
        control.ranks()


@pytest.mark.parametrize("phases", ["NaN", "Infinity", "-1", '"x"', "1e300"])
def test_times_that_are_none(listening: Any, phases: str) -> None:
    control, _ = listening(b'{"bytes": 1, "phases": {"map": %s}}\n' % phases.encode())
    with pytest.raises(ControlRefused, match="not understood"):
        control.wake([])


@pytest.mark.parametrize("answer", ['{"bytes": [1, 2]}', '{"bytes": [-1]}', '{"bytes": [true]}', '{"bytes": 1}'])
def test_counts_that_are_none(listening: Any, tmp_path: Path, answer: str) -> None:
    control, _ = listening(answer.encode() + b"\n")
    (tmp_path / "w").touch()
    with (tmp_path / "w").open("rb") as file, pytest.raises(ControlRefused, match="not understood"):
        control.save([file.fileno()])


def test_a_link_to_another_server_s_socket_is_not_followed(listening: Any, tmp_path: Path) -> None:
    listening(b'{"ranks": 1}\n')
    (tmp_path / "link").symlink_to("control.sock")
    with pytest.raises(DaemonUnreachableError, match="control socket"):
        Control(tmp_path / "link").ranks()


def test_its_path_may_be_longer_than_a_sockets_address(listening: Any, tmp_path: Path) -> None:
    listening(b'{"ranks": 1}\n')
    far = tmp_path / ("x" * 150)
    far.mkdir()
    (tmp_path / "control.sock").rename(far / "control.sock")
    assert Control(far / "control.sock").ranks() == 1


def test_a_server_without_the_socket_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="control socket"):
        Control(tmp_path / "none").sleep()


def test_what_comes_behind_the_answer_is_not_waited_for(listening: Any) -> None:
    control, _ = listening(b'{"asleep": true}\n ')
    assert control.asleep() is True
