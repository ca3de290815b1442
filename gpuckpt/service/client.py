"""Ask the warm pool's daemon, over its Unix socket; one connection for each request (the API: docs/pool-api.md).

Every method raises

    DaemonUnreachableError   no daemon, or it stops in the middle, or says what cannot be understood
    PreflightError           only root may ask it; or who listens there is not to be trusted
    UsageError               the request itself is wrong
    NotFoundError            no such model
    BusyError                not possible now, or the service goes down
    DeadlineError            not within the deadline, or the daemon is silent
    GpuckptError             anything else, with the daemon's words
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, overload
from urllib.parse import quote

import msgspec

from gpuckpt import http1
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    NotFoundError,
    PreflightError,
    UsageError,
)
from gpuckpt.service.view import SCHEMA, EventView, PoolView

DEFAULT_SOCKET = Path("/run/gpuckpt/pool.sock")
_LONGEST = 64 << 20  # bytes of an answer, or of one event
_MARGIN = 10  # seconds that a daemon may take to say that a deadline has passed
_T = TypeVar("_T")


class Woken(msgspec.Struct, frozen=True):
    """A replica that is hot; the tier that it came from, and the seconds that it took."""

    replica: str
    tier: str
    seconds: float
    model: str = ""


class Slept(msgspec.Struct, frozen=True):
    """Replicas of a model that are being frozen, or removed."""

    model: str
    frozen: list[str] = []
    stopped: list[str] = []


class Scaled(msgspec.Struct, frozen=True):
    """How many replicas of a model are kept hot; None: as the configuration says."""

    model: str
    replicas: int | None


class Drained(msgspec.Struct, frozen=True):
    """Replicas of a model that takes no more requests; they go when those at work are answered."""

    model: str
    stopped: list[str]


class Reloaded(msgspec.Struct, frozen=True):
    """What another configuration has changed: names of models; ``notes`` tell what needs a restart."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    notes: list[str] = []


class _Events(msgspec.Struct, frozen=True):
    events: list[EventView]


class _Problem(msgspec.Struct, frozen=True):
    message: str
    cause: str | None = None
    remedy: str | None = None


class _Error(msgspec.Struct, frozen=True):
    error: _Problem


class Client:
    """The daemon behind ``path``. ``timeout``: seconds that it may be silent in requests that wait for no replica.

    A client has no state: threads may share it.
    """

    def __init__(self, path: Path = DEFAULT_SOCKET, *, timeout: float = 30) -> None:
        self.path = path
        self._timeout = timeout

    # ------------------------------------------------------------------ looking

    def state(self) -> PoolView:
        """Everything at this moment."""
        found = self._get("/v1/state", PoolView)
        if found.schema != SCHEMA:
            raise self._not_understood(f"its answer has schema {found.schema}, this program knows {SCHEMA}")
        return found

    def events(self, after: int | None = None, model: str | None = None, limit: int | None = None) -> list[EventView]:
        """What has happened, the oldest first: after event number ``after``, to ``model``, ``limit`` at most."""
        return self._get(_events_path(after, model, limit, follow=False), _Events).events

    def follow_events(self, after: int | None = None, model: str | None = None) -> Iterator[EventView]:
        """The same, and then what happens, as it happens; ends when the daemon does."""
        told = after or 0
        with self._answer("GET", _events_path(after, model, None, follow=True), b"", self._timeout) as (made, response):
            made.settimeout(None)  # nothing may happen for as long as it likes
            # Asked for behind the stream's begin, so that nothing is lost between the two.
            for event in self.events(after, model):
                told = event.seq
                yield event
            # Its end, however abrupt, is what the reader is told by the stream's.
            with suppress(OSError, http1.HttpError):
                while (line := response.body.readline(_LONGEST)).endswith(b"\n"):
                    name, _, value = line.strip().partition(b":")
                    if name == b"data" and (event := self._decoded(value, EventView)).seq > told:
                        yield event

    def metrics(self) -> str:
        """The metrics, in Prometheus' text format."""
        return self._bytes("GET", "/metrics", b"", self._timeout).decode(errors="replace")

    # ------------------------------------------------------------------ acting

    def wake(self, name: str, deadline: float | None = None) -> Woken:
        """See to it that a replica of the model is hot; waits for it, ``deadline`` seconds or as the daemon does."""
        body = {} if deadline is None else {"deadline": deadline}
        return self._act(name, "wake", Woken, body, None if deadline is None else deadline + _MARGIN)

    def sleep(self, name: str, release: bool = False) -> Slept:
        """Freeze the model's hot replicas without requests; ``release``: remove them, and its standbys."""
        return self._act(name, "sleep", Slept, {"release": True} if release else {})

    def scale(self, name: str, replicas: int | None) -> Scaled:
        """Keep so many replicas of the model hot from now on; None: as the configuration says."""
        return self._act(name, "scale", Scaled, {"replicas": replicas})

    @overload
    def drain(self, name: str) -> Drained: ...
    @overload
    def drain(self, name: None = None) -> None: ...
    def drain(self, name: str | None = None) -> Drained | None:
        """Take no more requests for the model, finish those at work, remove its replicas; a wake() ends it.

        Without a name: begin the same for everything; the service ends behind it.
        """
        if name is not None:
            return self._act(name, "drain", Drained, {})
        self._post("/v1/drain", object, {})
        return None

    def reload(self) -> Reloaded:
        """Have the configuration read again."""
        return self._post("/v1/reload", Reloaded, {})

    def check_names(self, names: tuple[str, ...]) -> None:
        """NotFoundError for the first of ``names`` that no model of the pool has."""
        known = {word for one in self.state().models for word in (one.name, *one.aliases)}
        for name in names:
            if name not in known:
                raise _no_model(name, known)

    # ------------------------------------------------------------------ the wire

    def _act(self, name: str, verb: str, kind: type[_T], body: dict[str, Any], timeout: float | None = None) -> _T:
        if not name:
            raise UsageError("a model's name is not empty")
        try:
            return self._post(f"/v1/models/{quote(name, safe='')}/{verb}", kind, body, timeout)
        except NotFoundError as error:
            with suppress(DaemonUnreachableError):  # it went away meanwhile
                self.check_names((name,))
            raise error

    def _get(self, path: str, kind: type[_T]) -> _T:
        return self._decoded(self._bytes("GET", path, b"", self._timeout), kind)

    def _post(self, path: str, kind: type[_T], body: dict[str, Any], timeout: float | None = None) -> _T:
        return self._decoded(self._bytes("POST", path, msgspec.json.encode(body), timeout), kind)

    def _decoded(self, data: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise self._not_understood(str(error)) from error

    def _bytes(self, method: str, path: str, body: bytes, timeout: float | None) -> bytes:
        with self._answer(method, path, body, timeout) as (_, response):
            data = response.body.read(_LONGEST + 1)
            if len(data) > _LONGEST:
                raise http1.HttpError(f"the answer has more than {_LONGEST >> 20} MiB")
            return data

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes, timeout: float | None
    ) -> Iterator[tuple[socket.socket, http1.Response]]:
        try:
            with self._connected(timeout) as made, http1.exchange(made, method, path, body) as response:
                if not 200 <= response.status < 300:
                    raise self._refused(response.status, response.body.read(_LONGEST))
                yield made, response
        except TimeoutError as error:
            raise DeadlineError(
                f"the warm pool was silent for {self._timeout if timeout is None else timeout:g} s",
                cause=f"{method} {path} was not answered",
                remedy="journalctl -u gpuckpt-pool shows what it is doing",
            ) from error
        except (OSError, http1.HttpError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: OSError | http1.HttpError) -> GpuckptError:
        if isinstance(error, PermissionError) and os.geteuid() != 0:
            return PreflightError(
                "gpuckpt must run as root", cause=f"{self.path} is root's alone", remedy="sudo gpuckpt …"
            )
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            missing = isinstance(error, FileNotFoundError)
            return DaemonUnreachableError(
                "the warm pool does not run",
                cause=f"there is no socket {self.path}" if missing else f"nobody listens on {self.path}",
                remedy="systemctl start gpuckpt-pool, or gpuckpt pool run",
            )
        return DaemonUnreachableError(
            f"the warm pool behind {self.path} does not answer",
            cause=f"{type(error).__name__}: {error}",
            remedy="journalctl -u gpuckpt-pool shows why",
        )

    def _not_understood(self, why: str) -> DaemonUnreachableError:
        return DaemonUnreachableError(
            f"what listens on {self.path} gave an answer that cannot be understood",
            cause=why,
            remedy="if gpuckpt was updated: systemctl restart gpuckpt-pool; else correct the socket's path (--socket)",
        )

    def _connected(self, timeout: float | None) -> socket.socket:
        made = http1.connect_unix(self.path, self._timeout)
        try:
            if (owner := _listener(made)) not in (0, os.geteuid()):
                raise PreflightError(
                    f"{self.path} is not the warm pool's",
                    cause=f"who listens there is user {owner}, not root",
                    remedy="correct the socket's path (--socket, GPUCKPT_POOL_SOCKET)",
                )
            made.settimeout(timeout)
        except BaseException:
            made.close()
            raise
        return made

    def _refused(self, status: int, body: bytes) -> GpuckptError:
        try:
            told = msgspec.json.decode(body, type=_Error).error
        except (msgspec.DecodeError, ValueError):
            return self._not_understood(f"{status}, and {body[:200].decode(errors='replace')!r}")
        kinds: dict[int, type[GpuckptError]] = {404: NotFoundError, 409: BusyError, 503: BusyError, 504: DeadlineError}
        kind = kinds.get(status, UsageError if status in (400, 405, 413, 422) else GpuckptError)
        remedy = told.remedy
        if told.cause is None and remedy is None and kind in (BusyError, DeadlineError):
            remedy = "gpuckpt pool status and gpuckpt pool events tell what it is doing"
        return kind(told.message, cause=told.cause, remedy=remedy)


def _listener(made: socket.socket) -> int:
    """The user who listens on the other side; of a socket that systemd has made, systemd's: root."""
    # Not the socket file's owner: between a look at the file and the connection another may take its place.
    held = made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", held)[1]
    return user


def _no_model(name: str, known: set[str]) -> NotFoundError:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return NotFoundError(
        f"the pool has no model {name}",
        cause=f"it has: {', '.join(sorted(known)) or 'none'}",
        remedy=f"did you mean {close[0]}?" if close else "gpuckpt pool status lists them",
    )


def _events_path(after: int | None, model: str | None, limit: int | None, *, follow: bool) -> str:
    words = [] if after is None else [f"after={after}"]
    words += [] if model is None else [f"model={quote(model, safe='')}"]
    words += [] if limit is None else [f"limit={limit}"]
    words += ["follow=1"] if follow else []
    return "/v1/events" + ("?" + "&".join(words) if words else "")
