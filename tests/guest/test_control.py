"""The control socket: orders, their files, and what is made of nonsense."""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpuckpt_guest import control
from gpuckpt_guest.control import Control, ControlError, Handler

from tests.opened import opened


class Host:
    """The other side."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, request: Any, files: Sequence[int] = ()) -> dict[str, Any]:
        line = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
        with self.connect() as connection:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
            connection.sendmsg([line], rights)
            return self.answer(connection)

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(60)
        made.connect(str(self.path))
        return made

    def answer(self, connection: socket.socket) -> dict[str, Any]:
        text = b""
        while piece := connection.recv(1 << 16):
            text += piece
        assert text.endswith(b"\n") and text.count(b"\n") == 1
        found: dict[str, Any] = json.loads(text)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "control.sock")


@pytest.fixture
def serve(host: Host) -> Iterator[Any]:
    made: list[Control] = []

    def begin(handlers: Mapping[str, Handler], **options: Any) -> Control:
        made.append(Control(handlers, path=str(host.path), **options))
        return made[-1]

    yield begin
    for each in made:
        each.close()
    assert not host.path.exists()


def test_an_order(host: Host, serve: Any) -> None:
    serve({"ranks": lambda request, files: {"ranks": request["much"] * 2}})
    assert host.ask({"do": "ranks", "much": 2}) == {"ranks": 4}
    assert host.ask({"do": "ranks", "much": 3}) == {"ranks": 6}


def test_only_the_owner_can_connect(host: Host, serve: Any) -> None:
    serve({})
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o600


def test_files_come_with_it_and_are_closed(host: Host, serve: Any) -> None:
    seen: list[int] = []

    def save(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        seen.extend(files)
        for number, file in enumerate(files):
            os.write(file, f"rank {number}".encode())
        if request.get("fail"):
            raise OSError("no space")
        return {"bytes": [os.fstat(file).st_size for file in files]}

    serve({"save": save})
    mine = [os.memfd_create("some weights") for _ in range(3)]
    try:
        assert host.ask({"do": "save"}, mine) == {"bytes": [6, 6, 6]}
        assert os.pread(mine[2], 10, 0) == b"rank 2"
        assert "error" in host.ask({"do": "save", "fail": 1}, mine)
        assert "error" in host.ask(b"nonsense\n", mine)
        host.ask({"do": "nothing"}, mine)
        assert len(held("some weights")) == 3
    finally:
        for file in mine:
            os.close(file)
    assert len(seen) == 6
    for file in seen:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(file)


def test_a_line_that_comes_in_pieces(host: Host, serve: Any) -> None:
    serve({"state": lambda request, files: {"asleep": False}})
    with host.connect() as connection:
        for piece in (b'{"do"', b': "sta', b'te"}\n'):
            connection.sendall(piece)
            time.sleep(0.02)
        assert host.answer(connection) == {"asleep": False}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (b"nonsense\n", "no JSON"),
        (b"\xff\xfe\n", "no JSON"),
        (b"[1]\n", "a request is"),
        (b'{"do": 3}\n', "a request is"),
        (b"{}\n", "a request is"),
        (b'{"do": "fly"}\n', "there is no 'fly'"),
        (b"x" * 66_000, "too long"),
    ],
)
def test_nonsense(host: Host, serve: Any, request_: bytes, said: str) -> None:
    serve({"state": lambda request, files: {"asleep": False}})
    assert said in host.ask(request_)["error"]["message"]
    assert host.ask({"do": "state"}) == {"asleep": False}


def test_a_request_without_an_end(host: Host, serve: Any) -> None:
    serve({})
    with host.connect() as connection:
        connection.sendall(b'{"do": "state"}')
        connection.shutdown(socket.SHUT_WR)
        assert host.answer(connection)["error"]["message"] == "the request has no end"


def test_who_says_nothing_does_not_hold_others_up(host: Host, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, patience = control._receive, iter([0.1])

    def receive(connection: socket.socket) -> Any:
        """Little patience with the first one alone: the others may be late, too, on a loaded machine."""
        monkeypatch.setattr(control, "_PATIENCE", next(patience, 60.0))
        return real(connection)

    monkeypatch.setattr(control, "_receive", receive)
    serve({"state": lambda request, files: {"asleep": False}})
    with host.connect():
        assert host.ask({"do": "state"}) == {"asleep": False}
    host.connect().close()  # looks whether somebody is there
    assert host.ask({"do": "state"}) == {"asleep": False}


def test_who_does_not_wait_for_the_answer(host: Host, serve: Any) -> None:
    done = threading.Event()

    def slow(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        time.sleep(0.05)
        done.set()
        return {}

    serve({"sleep": slow, "state": lambda request, files: {"asleep": True}})
    with host.connect() as connection:
        connection.sendall(b'{"do": "sleep"}\n')
    assert host.ask({"do": "state"}) == {"asleep": True}
    assert done.is_set()


@pytest.mark.parametrize(
    ("error", "message", "cause"),
    [
        (ControlError("it cannot sleep", "it has no sleep mode"), "it cannot sleep", "it has no sleep mode"),
        (RuntimeError("of its own"), "the order 'sleep' failed", "RuntimeError: of its own"),
    ],
)
def test_a_failure_is_answered(host: Host, serve: Any, error: Exception, message: str, cause: str) -> None:
    def fail(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        raise error

    serve({"sleep": fail})
    for _ in range(2):
        assert host.ask({"do": "sleep"}) == {"error": {"message": message, "cause": cause}}


def test_two_at_once_come_one_after_the_other(host: Host, serve: Any) -> None:
    busy: list[int] = []
    most: list[int] = []

    def work(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        busy.append(1)
        most.append(len(busy))
        time.sleep(0.05)
        busy.pop()
        return {"n": request["n"]}

    serve({"work": work})
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(host.ask({"do": "work", "n": n})["n"])) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [0, 1, 2, 3]
    assert most == [1] * 4


def test_coroutines_run_on_the_loop(host: Host, serve: Any) -> None:
    where: list[threading.Thread] = []

    async def state(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        where.append(threading.current_thread())
        if request.get("fail"):
            raise ControlError("no")
        return {"asleep": True}

    async def main() -> None:
        serve({"state": state}, loop=asyncio.get_running_loop())
        assert await asyncio.to_thread(host.ask, {"do": "state"}) == {"asleep": True}
        told = await asyncio.to_thread(host.ask, {"do": "state", "fail": 1})
        assert told["error"]["message"] == "no"
        assert where == [threading.current_thread()] * 2

    asyncio.run(main())


def test_a_coroutine_without_a_loop(host: Host, serve: Any) -> None:
    async def state(request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        return {}

    serve({"state": state})
    assert "no event loop" in host.ask({"do": "state"})["error"]["cause"]


def test_what_an_earlier_server_left_is_replaced_and_one_that_lives_is_not(host: Host, serve: Any) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(host.path))
    serve({"state": lambda request, files: {"asleep": False}})
    with pytest.raises(OSError, match="in use"):
        Control({}, path=str(host.path))
    assert host.ask({"do": "state"}) == {"asleep": False}


def test_no_connection_and_no_file_is_held(host: Host, serve: Any) -> None:
    """A dump cannot carry them."""
    serve({"state": lambda request, files: {"asleep": False}})
    mine = os.memfd_create("somebody's file")
    for _ in range(3):
        assert host.ask({"do": "state"}, [mine]) == {"asleep": False}
    os.close(mine)
    deadline = time.monotonic() + 60
    while sockets(host.path) > 1 or held("somebody's file"):  # an answer comes before its connection is closed
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sockets(host.path) == 1


def sockets(path: Path) -> int:
    """How many sockets there are at this place: the one that listens, and this side of each connection to it."""
    return sum(line.endswith(f" {path}") for line in Path("/proc/net/unix").read_text().splitlines())


def held(name: str) -> list[int]:
    """The descriptors of files with this name."""
    return [number for number, target in opened() if name in target]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GPUCKPT_CONTROL", raising=False)
    assert control.where() == "/run/gpuckpt/control.sock"
    monkeypatch.setenv("GPUCKPT_CONTROL", str(tmp_path / "absent" / "c.sock"))
    assert control.where().startswith(str(tmp_path)) and not control.wanted()
    monkeypatch.setenv("GPUCKPT_CONTROL", str(tmp_path / "c.sock"))
    assert control.wanted()


def test_one_file_for_each_rank() -> None:
    assert control.files_for([3, 4], 2) == [3, 4]
    with pytest.raises(ControlError, match="1 files came"):
        control.files_for([3], 2)


@pytest.mark.parametrize(
    ("request_", "files", "said"),
    [
        ({"caches": True}, 0, "'caches' is True"),
        ({"caches": 2}, 0, "'caches' is 2"),
        ({"caches": "1"}, 0, "'caches' is '1'"),
        ({"caches": [1]}, 0, "'caches' is [1]"),
        ({"caches": 1, "carried": 1}, 0, "'carried' came beside 'caches'"),
        ({"caches": 1}, 2, "2 files came"),
    ],
)
def test_orders_for_caches_that_are_not_understood(request_: dict[str, Any], files: int, said: str) -> None:
    with pytest.raises(ControlError) as caught:
        control.caches_only({"do": "wake"} | request_, [3] * files)
    assert said in str(caught.value)


def test_orders_for_caches() -> None:
    assert control.caches_only({"do": "sleep", "caches": 1}, [])
    assert not control.caches_only({"do": "wake", "caches": 0, "carried": 1}, [3, 4])
    assert control.files_to_wake({"do": "wake", "caches": 0}, [3], 1) == ([3], None)
    for kind in (True, False):
        control.same_sleep("it cannot", kind, kind)
        with pytest.raises(ControlError, match="it cannot"):
            control.same_sleep("it cannot", kind, not kind)


def test_files_to_wake_up_from() -> None:
    assert control.files_to_wake({"do": "wake"}, [3, 4], 2) == ([3, 4], None)
    assert control.files_to_wake({"do": "wake", "carried": 0}, [3], 1) == ([3], None)
    assert control.files_to_wake({"do": "wake", "carried": 1}, [3, 4], 1) == ([3], 4)
    for ranks in (0, 2):
        with pytest.raises(ControlError, match="by one process") as caught:
            control.files_to_wake({"do": "wake", "carried": 1}, [3] * (ranks + 1), ranks)
        assert caught.value.cause == f"{ranks} hold weights"
