"""Orders to a server from the host that it runs on: to give its weights back, to take them again.

A Unix socket in the folder that only the replica and its host see; nothing of it is reachable over a network. One
request for each connection, one line of JSON each way; open files come with the request's line (SCM_RIGHTS)::

    {"do": "ranks"}                  → {"ranks": N}         processes that hold weights: each has a file of its own
    {"do": "save"}  N writable files → {"bytes": [n, …]}    write the weights into them, as flat.py has it
    {"do": "sleep"}                  → {"released": bytes}  give weights and caches back; requests wait from now on
    {"do": "wake"}  N readable files → {"bytes": B, "phases": {"map": s, "stream": s, "kv": s}}  take them again
    {"do": "state"}                  → {"asleep": bool}

While a server was being restored the host may have carried its file to the device already, all of it and at the same
offsets, into memory of its own. The handle of that memory, an open file, then comes behind the weights' files, of which
there must be one::

    {"do": "wake", "carried": 1}  1 readable file, 1 handle → {"bytes": B, "phases": {"map": s, "copy": s, "kv": s}}

The weights' file is compared as ever; then "copy" from the carried memory takes the place of "stream" from the file,
and nothing of the memory stays with the server. If it cannot be used (the driver refuses it, it is another device's, it
is too small, its bytes are others), the file is read: the phases have "stream", and the answer has ``"told": "…"`` with
the reason. ``"told"`` beside "copy" says that a part of the memory could not be given back. Carried memory takes room
while the server takes its own: a server that has too little beside it says so and stays asleep, and can be asked again
without. ``"carried": 0`` is as nothing said; what else a wake has is refused.

The weights may stay where they are, in the image, while caches alone are given back and keep their addresses. No
files come with these orders. Requests wait in between, too, and nothing is left of what was cached::

    {"do": "sleep", "caches": 1} → {"released": bytes}
    {"do": "wake", "caches": 1}  → {"bytes": 0, "phases": {"map": 0.0, "stream": 0.0, "kv": s}}

A server wakes up from what it was put to sleep by: an order of the other kind, to a server that is asleep, is refused,
and it stays asleep. ``"caches": 0`` is as nothing said.

What cannot be done is answered ``{"error": {"message": …, "cause": …}}``. To sleep asleep and to wake awake is no
error and does nothing. A file that does not fit is refused, and the server stays asleep.

Any server can have such a socket; the two that gpuckpt knows, vLLM and the guest, have it by this module. It must
listen at /run/gpuckpt/control.sock, be the owner's alone (0600), and hold no connection while nobody asks: a listening
socket comes back with the process, a connection does not.

One thread serves it, one request after the other. Handlers that are coroutines run on the event loop that is given.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import inspect
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PATH = "/run/gpuckpt/control.sock"
# Takes the request and its files, which are closed when it returns; returns the answer, or a coroutine that does.
Handler = Callable[[dict[str, Any], Sequence[int]], Any]

_log = logging.getLogger("gpuckpt_guest")
_LINE = 64 << 10  # bytes of a request
_FILES = 253  # the kernel's limit for one message
_PATIENCE = 10.0  # seconds for a request to arrive, and for an answer to be taken


class ControlError(Exception):
    """A request that cannot be met, and why."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class Control:
    """The socket, and the thread that answers."""

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        path: str | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Listens from now on. ``loop``: where handlers that are coroutines run. Raises OSError.

        A socket that an earlier server has left is replaced; one that somebody listens at is not.
        """
        self.path = path or where()
        self._handlers = dict(handlers)
        self._loop = loop
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _bind(self._socket, self.path)
            # Before anybody can connect. A rename from a safer place would not do: the kernel keeps the name that was
            # bound, and the socket would be restored under that.
            os.chmod(self.path, 0o600)
            self._socket.listen(8)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="gpuckpt-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more; waits for the request that is being answered."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # who waits in accept(2) wakes up
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EBADF):  # closed
                    return
                _log.exception("nobody can connect to %s", self.path)
                time.sleep(1)  # out of descriptors, say
                continue
            with connection:
                try:
                    self._attend(connection)
                except OSError as error:  # it has hung up, or reads nothing
                    _log.warning("a request to %s went unanswered: %s", self.path, error)
                except Exception:  # a fault of ours: the next one is to be answered
                    _log.exception("a request to %s went unanswered", self.path)

    def _attend(self, connection: socket.socket) -> None:
        line, files, fault = _receive(connection)
        try:
            if not line and not fault:
                return  # it has looked whether somebody is here
            answer = _error(fault) if fault else self._answer(line, files)
        finally:
            for file in files:
                os.close(file)
        connection.settimeout(_PATIENCE)
        connection.sendall(json.dumps(answer, separators=(",", ":")).encode() + b"\n")

    def _answer(self, line: bytes, files: Sequence[int]) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _error("the request is no JSON", str(error))
        if not isinstance(request, dict) or not isinstance(request.get("do"), str):
            return _error('a request is {"do": …}')
        handler = self._handlers.get(request["do"])
        if handler is None:
            return _error(f"there is no {request['do']!r}", f"there are {', '.join(sorted(self._handlers))}")
        try:
            found = handler(request, files)
            if inspect.iscoroutine(found):
                if self._loop is None:
                    found.close()
                    raise RuntimeError("there is no event loop for this handler")
                found = asyncio.run_coroutine_threadsafe(found, self._loop).result()
            return dict(found)
        except ControlError as error:
            return _error(str(error), error.cause)
        except Exception as error:  # whatever it is, who asks must not wait for ever
            _log.exception("the order %r failed", request["do"])
            return _error(f"the order {request['do']!r} failed", f"{type(error).__name__}: {error}")


def where() -> str:
    """Where the socket is to be."""
    return os.environ.get("GPUCKPT_CONTROL") or PATH


def wanted() -> bool:
    """Whether there is a place for the socket: there is none in a server that gpuckpt has not started."""
    return os.path.isdir(os.path.dirname(where()))


def files_for(files: Sequence[int], ranks: int) -> Sequence[int]:
    """The files of a request, one for each rank. Raises ControlError if there are more or fewer."""
    if len(files) != ranks:
        raise ControlError(f"{len(files)} files came with the request", f"{ranks} processes hold weights")
    return files


def files_to_wake(request: dict[str, Any], files: Sequence[int], ranks: int) -> tuple[Sequence[int], int | None]:
    """The files to wake up from, one for each rank, and the handle of memory of the device that holds the same.

    Raises ControlError if there are more or fewer, or if the request has what is not known.
    """
    if unknown := sorted(set(request) - {"do", "carried", "caches"}):
        raise ControlError(f"a wake has no {', '.join(map(repr, unknown))}", "this server knows 'carried' and 'caches'")
    carried = request.get("carried", 0)
    if isinstance(carried, bool) or not isinstance(carried, int) or carried not in (0, 1):
        raise ControlError(f"'carried' is {carried!r}", "one handle can come behind the weights' files, or none")
    if not carried:
        return files_for(files, ranks), None
    if ranks != 1:
        raise ControlError("weights that are on the device can be taken by one process", f"{ranks} hold weights")
    if len(files) != 2:
        raise ControlError(f"{len(files)} files came with the request", "one with the weights and one handle make two")
    return files[:1], files[1]


def caches_only(request: dict[str, Any], files: Sequence[int]) -> bool:
    """Whether an order to sleep or to wake is for caches, and the weights stay.

    Raises ControlError if that cannot be told, or if the order has what does not go with it.
    """
    caches = request.get("caches", 0)
    if isinstance(caches, bool) or not isinstance(caches, int) or caches not in (0, 1):
        raise ControlError(f"'caches' is {caches!r}", "1 is for caches alone, 0 for weights and caches")
    if not caches:
        return False
    if others := sorted(set(request) - {"do", "caches"}):
        raise ControlError(f"{', '.join(map(repr, others))} came beside 'caches'", "caches go and come without more")
    if files:
        raise ControlError(f"{len(files)} files came with the request", "caches have no content that would be read")
    return True


def same_sleep(what: str, asleep: bool, asked: bool) -> None:
    """Raise ControlError if a server that is asleep is asked for the other kind of sleep; ``True``: caches alone."""
    if asleep and not asked:
        raise ControlError(what, 'it is asleep without its caches, its weights are there: only "caches": 1 wakes it')
    if asked and not asleep:
        raise ControlError(what, "it is asleep without its weights: they must come back from their files")


def _error(message: str, cause: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "cause": cause}}


def _bind(made: socket.socket, path: str) -> None:
    try:
        made.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise
        made.bind(path)


def _receive(connection: socket.socket) -> tuple[bytes, list[int], str]:
    """A line, the files that came with it, and what is wrong with them. Raises OSError if it does not come in time."""
    line, files = b"", array.array("i")
    fault = ""
    end = time.monotonic() + _PATIENCE
    try:
        while b"\n" not in line:
            connection.settimeout(max(0.001, end - time.monotonic()))
            data, ancillary, flags, _ = connection.recvmsg(
                1 << 12, socket.CMSG_SPACE(_FILES * files.itemsize), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    files.frombytes(content[: len(content) - len(content) % files.itemsize])
            if flags & socket.MSG_CTRUNC:
                fault = "too many files came with the request"
            line += data
            if not data or len(line) > _LINE:
                fault = fault or ("the request is too long" if data else "the request has no end" if line else "")
                break
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return line.partition(b"\n")[0], list(files), fault
