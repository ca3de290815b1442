"""The driver as commands and the pool have it: through the one helper that has paid for CUDA's start (helper.py)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import convert

from gpuckpt import proc
from gpuckpt.cuda.driver import DriverError, Gpu, State
from gpuckpt.cuda.wire import QUESTIONS, received, send
from gpuckpt.errors import DaemonUnreachableError, PreflightError

_START = 60.0  # seconds that initialising CUDA may take
_LONGEST = 300.0  # seconds that one answer may take: the memory of a large process is copied meanwhile
_SLOWEST = 50e6  # bytes per second of a file that is carried, from a slow disk


class Remote:
    """The driver, through the helper; starts it if there is none. Raises what :class:`Driver` does.

    Besides: DaemonUnreachableError if the helper ends in the midst of a call or does not answer, PreflightError if it
    cannot start.
    """

    def __init__(self, path: Path, *, argv: tuple[str, ...] | None = None, timeout: float = _LONGEST) -> None:
        """``path``: its socket, in a folder of ours. ``argv``: the helper's command but for the socket."""
        self._path = path
        self._argv = argv or (sys.executable, "-m", "gpuckpt.cuda.helper")
        self._timeout = timeout

    @property
    def shares(self) -> bool:
        return True

    def state(self, pid: int) -> State | None:
        found: State | None = self._ask("state", pid)
        return found

    def lock(self, pid: int, timeout: float) -> None:
        self._ask("lock", pid, timeout)

    def checkpoint(self, pid: int) -> None:
        self._ask("checkpoint", pid)

    def restore(self, pid: int, gpus: Mapping[str, str]) -> None:
        self._ask("restore", pid, dict(gpus))

    def unlock(self, pid: int) -> None:
        self._ask("unlock", pid)

    def carry(self, file: int, uuid: str) -> int:
        _, made = self._exchange("carry", (uuid,), [file])
        if len(made) != 1:
            for handle in made:
                os.close(handle)
            raise DriverError("HELPER", "no memory came with its answer")
        return made[0]

    def gpus(self) -> tuple[Gpu, ...]:
        return convert(self._ask("gpus"), tuple[Gpu, ...])

    def memory(self, pid: int) -> dict[str, int]:
        found: dict[str, int] = self._ask("memory", pid)
        return found

    def version(self) -> str:
        found: str = self._ask("version")
        return found

    def _ask(self, name: str, *arguments: Any) -> Any:
        return self._exchange(name, arguments, [])[0]

    def _exchange(self, name: str, arguments: tuple[Any, ...], files: list[int]) -> tuple[Any, list[int]]:
        """The helper's result, and the open files that came with it."""
        answered = self._answer(name, arguments, files)
        if answered is None and name in QUESTIONS:  # another helper may answer
            answered = self._answer(name, arguments, files)
        if answered is None:
            raise DaemonUnreachableError(
                f"the GPU helper ended while it was asked “{name}”",
                remedy="try again: it is started anew; if it happens again, the driver's words are in the kernel's log",
            )
        line, made = answered
        answer = json.loads(line)
        if "error" in answer:
            raise DriverError(answer["error"]["code"], answer["error"]["message"])
        return answer["result"], made

    def _answer(self, name: str, arguments: tuple[Any, ...], files: list[int]) -> tuple[bytes, list[int]] | None:
        """A line and open files; None if the helper has ended."""
        limit = self._timeout + sum(os.fstat(file).st_size for file in files) / _SLOWEST
        with self._connected() as connection:
            try:
                connection.settimeout(limit)
                line = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
                send(connection, line, files)
                return received(connection)
            except TimeoutError as error:
                raise DaemonUnreachableError(
                    f"the GPU helper did not answer “{name}” within {limit:g} s",
                    cause="the driver may hang",
                    remedy="see the kernel's log (dmesg) for NVRM lines; stop the replica",
                ) from error
            except OSError:
                return None

    def _connected(self) -> socket.socket:
        made = self._connect()
        if made is None:
            self._start()
            made = self._connect()
        if made is None:
            raise DaemonUnreachableError(
                "the GPU helper does not answer", cause=str(self._path), remedy="gpuckpt doctor"
            )
        return made

    def _connect(self) -> socket.socket | None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(self._timeout)
        until = time.monotonic() + self._timeout
        while True:
            try:
                made.connect(str(self._path))
                return made
            except BlockingIOError:  # as many as it lets wait for it already
                if time.monotonic() > until:
                    made.close()
                    return None
                time.sleep(0.01)
            except OSError as error:
                made.close()
                if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                    return None
                raise DaemonUnreachableError(
                    "the GPU helper cannot be reached", cause=f"{self._path}: {error}", remedy="a shorter paths.run"
                ) from error

    def _start(self) -> None:
        """Start it, unless another command has just done so."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (found := self._connect()) is not None:
                found.close()
                return
            log = self._path.with_suffix(".log")
            log.unlink(missing_ok=True)
            process = proc.spawn([*self._argv, str(self._path)], log=log)
            until = time.monotonic() + _START
            while process.poll() is None and time.monotonic() < until:
                if (found := self._connect()) is not None:
                    found.close()
                    return
                time.sleep(0.01)
            process.kill()
            message, cause, remedy = _reasons(proc.tail(log.read_text(errors="replace")))
            raise PreflightError(message, cause=cause, remedy=remedy)


def _reasons(said: Sequence[str]) -> tuple[str, str | None, str | None]:
    """What the helper had to say when it could not start: its last line, if that is its own."""
    try:
        message, cause, remedy = json.loads(said[-1])["error"]
    except (ValueError, KeyError, TypeError, IndexError):
        why = said[-1] if said else f"it said nothing, and did not answer within {_START:g} s"
        return "the GPU helper could not be started", why, "gpuckpt doctor"
    return message, cause, remedy
