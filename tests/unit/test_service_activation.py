"""Sockets and credentials that systemd hands over."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuckpt.errors import UsageError
from gpuckpt.service.activation import NO_KEYS, Listener, credential, listeners

ROOT = Path(__file__).resolve().parents[2]
BASE = 200  # of the descriptors in these tests: systemd's own number, 3, is pytest's
Hand = Callable[..., dict[str, str]]


@pytest.fixture
def hand() -> Iterator[Hand]:
    """Put sockets where the manager would, and say so as it does."""
    taken: list[int] = []

    def put(*handed: socket.socket, names: str | None = None, **variables: str) -> dict[str, str]:
        for at, one in enumerate(handed, BASE):
            os.dup2(one.fileno(), at, inheritable=True)
            taken.append(at)
            one.close()
        environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(handed)), "PATH": "/bin", **variables}
        return environ | ({"LISTEN_FDNAMES": names} if names is not None else {})

    yield put
    for number in taken:
        with contextlib.suppress(OSError):
            os.close(number)


def tcp() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def got(environ: dict[str, str]) -> list[Listener]:
    return listeners(environ, first=BASE)


def test_none() -> None:
    assert listeners({}) == []


def test_meant_for_another_process(hand: Hand) -> None:
    environ = hand(tcp(), LISTEN_PID="1")
    assert got(environ) == [] and environ == {"PATH": "/bin"}


def test_tcp_and_unix(hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = socket.socket(socket.AF_UNIX)
    local.bind("front")
    local.listen()
    environ = hand(tcp(), local, names="front:more")
    found = got(environ)
    assert environ == {"PATH": "/bin"}, "no child takes them for its own"
    assert [one.name for one in found] == ["front", "more"]
    assert [one.socket.family for one in found] == [socket.AF_INET, socket.AF_UNIX]
    assert not any(os.get_inheritable(one.socket.fileno()) for one in found)
    with socket.create_connection(found[0].socket.getsockname()):
        found[0].socket.setblocking(True)
        found[0].socket.accept()[0].close()
    for one in found:
        one.socket.close()


def test_names_may_be_missing(hand: Hand) -> None:
    (found,) = got(hand(tcp()))
    assert found.name == "unknown"
    found.socket.close()


def test_what_does_not_fit_is_refused(hand: Hand) -> None:
    with pytest.raises(UsageError, match="descriptor 200 “front”") as caught:
        got(hand(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), names="front"))
    assert "DGRAM" in str(caught.value.cause)
    with pytest.raises(UsageError) as caught:
        got(hand(socket.socket()))
    assert "does not listen" in str(caught.value.cause)
    with pytest.raises(UsageError) as caught:
        got(hand() | {"LISTEN_FDS": "40"})
    assert caught.value.cause
    with pytest.raises(UsageError, match="many"):
        got(hand() | {"LISTEN_FDS": "many"})
    reader, writer = os.pipe()
    os.dup2(reader, BASE)
    os.close(reader)
    os.close(writer)
    with pytest.raises(UsageError) as caught:
        got({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
    assert "no socket" in str(caught.value.cause)


def test_the_manager_s_own_numbers() -> None:
    """A process of its own, whose descriptor 3 is a listening socket."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from gpuckpt.service.activation import listeners\n"
        "((name, sock),) = listeners(); print(name, sock.getsockname()[1], 'LISTEN_FDS' in os.environ)"
    )
    with tcp() as server:
        done = subprocess.run(
            [sys.executable, "-c", code, str(server.fileno())],
            pass_fds=[server.fileno()],
            env={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "front", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["front", str(server.getsockname()[1]), "False"]


def test_credentials(tmp_path: Path) -> None:
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert credential(environ={}) is None
    assert credential(environ=environ) is None
    keys = tmp_path / "api-keys"
    keys.write_text("secret\n")
    assert credential(environ=environ) == keys
    keys.write_text(NO_KEYS)
    assert credential(environ=environ) is None
    keys.write_text("")
    assert credential(environ=environ) == keys, "a file that somebody has emptied opens nothing"
    keys.write_text(f"{NO_KEYS}such\n")
    assert credential(environ=environ) == keys
    keys.unlink()
    keys.mkdir()
    with pytest.raises(UsageError, match="api-keys"):
        credential(environ=environ)
