"""One long-lived process that talks to the driver, for all commands and the pool: ``python -m gpuckpt.cuda.helper``.

The first call to the driver in a process initialises CUDA: hundreds of milliseconds, on a machine with many devices
seconds. The helper pays that once, and then answers on a Unix socket that only its user can reach (wire.py says how).
Each connection has a thread, and each call of those who ask (remote.py) a connection: a call that the driver keeps for
long keeps nobody else.

It ends by itself when nobody has asked for a while, and with the file of its socket gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from gpuckpt.cuda.driver import Driver, DriverError
from gpuckpt.cuda.wire import METHODS, received, send
from gpuckpt.errors import GpuckptError

_IDLE = 900.0  # seconds without a question after which it ends


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
                self._let_in(listener)
            if self._is(mine):
                self._path.unlink(missing_ok=True)
            listener.setblocking(False)  # nobody comes any more; who is at the door already is answered
            while late := self._let_in(listener):
                late.join()

    def _let_in(self, listener: socket.socket) -> threading.Thread | None:
        """Answer who comes next, in a thread; None if nobody does in the listener's time."""
        try:
            connection, _ = listener.accept()
        except (TimeoutError, BlockingIOError):
            return None
        with self._lock:
            self._busy += 1  # not only once its thread runs: who has just been let in keeps it from its end
        answering = threading.Thread(target=self._answer, args=(connection,), daemon=True)
        answering.start()
        return answering

    def _wanted(self, mine: int) -> bool:
        with self._lock:
            return self._is(mine) and (self._busy > 0 or time.monotonic() - self._last < self._idle)

    def _is(self, inode: int) -> bool:
        try:
            return self._path.stat().st_ino == inode
        except FileNotFoundError:
            return False

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                while (asked := received(connection)) is not None:
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
            send(connection, answer, made)
        finally:
            for handle in (*files, *made):
                os.close(handle)

    def _called(self, line: bytes, files: list[int], made: list[int]) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            name, arguments = asked["call"], asked["arguments"]
            if name not in METHODS or (name == "carry") != bool(files):
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


if __name__ == "__main__":
    raise SystemExit(main())
