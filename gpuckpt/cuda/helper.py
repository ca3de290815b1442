"""One long-lived process that talks to the driver, for all commands and the pool: ``python -m gpuckpt.cuda.helper``.

The first call to the driver in a process initialises CUDA: hundreds of milliseconds, on a machine with many devices
seconds. The helper pays that once, and then answers on a Unix socket that only its user can reach: a line of JSON with
the name of a :class:`~gpuckpt.cuda.driver.Driver`'s method and its arguments, answered by a line with the result or the
driver's refusal. Each connection has a thread, and each call of :class:`Remote` a connection: a call that the driver
keeps for long keeps nobody else.

It ends by itself when nobody has asked for a while, and with the file of its socket gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import convert, to_builtins

from gpuckpt import proc
from gpuckpt.cuda.driver import Driver, DriverError, Gpu, State
from gpuckpt.errors import DaemonUnreachableError, GpuckptError, PreflightError

_IDLE = 900.0  # seconds without a question after which it ends
_START = 60.0  # seconds that initialising CUDA may take
_LONGEST = 300.0  # seconds that one answer may take: the memory of a large process is copied meanwhile
_QUESTIONS = ("state", "gpus", "memory", "version")
_METHODS = (*_QUESTIONS, "lock", "checkpoint", "restore", "unlock", "carry")
_LINE = 1 << 20


# ---------------------------------------------------------------------- the process


class Helper:
    """Answers on a socket until it has been idle."""

    def __init__(self, driver: Driver, path: Path, *, idle: float = _IDLE) -> None:
        self._driver = driver
        self._path = path
        self._idle = idle
        self._last = time.monotonic()
        self._busy = 0
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Answer; returns when nobody has asked for long, or the socket's file is gone or another's."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            self._path.unlink(missing_ok=True)
            before = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(before)
            mine = self._path.stat().st_ino
            listener.listen(64)
            listener.settimeout(1.0)
            while self._wanted(mine):
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
        if self._is(mine):
            self._path.unlink(missing_ok=True)

    def _wanted(self, mine: int) -> bool:
        with self._lock:
            return self._is(mine) and (self._busy > 0 or time.monotonic() - self._last < self._idle)

    def _is(self, inode: int) -> bool:
        try:
            return self._path.stat().st_ino == inode
        except FileNotFoundError:
            return False

    def _answer(self, connection: socket.socket) -> None:
        with self._lock:
            self._busy += 1
        try:
            with connection:
                while (asked := _received(connection)) is not None:
                    self._reply(connection, *asked)
        except OSError:
            pass  # whoever asked has gone; what was begun is done all the same
        finally:
            with self._lock:
                self._busy -= 1
                self._last = time.monotonic()

    def _reply(self, connection: socket.socket, line: bytes, files: list[int]) -> None:
        made: list[int] = []
        try:
            answer = json.dumps(self._called(line, files, made)).encode() + b"\n"
            if made:
                socket.send_fds(connection, [answer], made)
            else:
                connection.sendall(answer)
        finally:
            for handle in (*files, *made):
                os.close(handle)

    def _called(self, line: bytes, files: list[int], made: list[int]) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            name, arguments = asked["call"], asked["arguments"]
            if name not in _METHODS or (name == "carry") != bool(files):
                raise KeyError(name)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return {"error": {"code": "BAD_REQUEST", "message": repr(error)}}
        try:
            if name == "carry":
                made.append(self._driver.carry(files[0], *arguments))
                return {"result": None}
            return {"result": to_builtins(getattr(self._driver, name)(*arguments))}
        except DriverError as error:
            return {"error": {"code": error.code, "message": error.detail}}
        except Exception as error:  # a fault of ours: whoever asked is to see it
            return {"error": {"code": "HELPER", "message": f"{type(error).__name__}: {error}"}}


def _received(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """A line, and the open files that came with it; None at the end."""
    line, files = b"", list[int]()
    try:
        while not line.endswith(b"\n"):
            data, more, _, _ = socket.recv_fds(connection, _LINE, 4)
            files += more
            line += data
            if not data or len(line) > _LINE:
                raise EOFError
    except BaseException as error:
        for handle in files:
            os.close(handle)
        if isinstance(error, EOFError):
            return None
        raise
    return line, files


def main(argv: list[str] | None = None) -> int:
    """``python -m gpuckpt.cuda.helper SOCKET``; if it cannot, its last line says why. Exit codes: 0, 4."""
    (path,) = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the command that started it
    from gpuckpt.cuda.bindings import Bindings

    try:
        driver = Bindings()
    except GpuckptError as error:
        print(json.dumps({"error": [error.message, error.cause, error.remedy]}), flush=True)
        return 4
    Helper(driver, Path(path)).serve()
    return 0


# ---------------------------------------------------------------------- who asks


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
        if answered is None and name in _QUESTIONS:  # they change nothing: another helper may answer
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
        with self._connected() as connection:
            try:
                line = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
                if files:
                    socket.send_fds(connection, [line], files)
                else:
                    connection.sendall(line)
                return _received(connection)
            except TimeoutError as error:
                raise DaemonUnreachableError(
                    f"the GPU helper did not answer “{name}” within {self._timeout:g} s",
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


if __name__ == "__main__":
    raise SystemExit(main())
