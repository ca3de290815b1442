"""Talk to a guest server about its sessions, over its Unix socket or a TCP port; one connection for each request.

Every method raises

    UsageError               the request itself is wrong
    NotFoundError            no such session, breakpoint, rule, vector; or the server has no sessions at all
    BusyError                it is there, but not in a state that allows this, or the name is taken
    OutOfSpaceError          there are as many sessions as the guest allows
    DaemonUnreachableError   the guest does not answer, stops in the middle, says what is no answer; its engine failed
    DeadlineError            it was silent for too long
    GpuckptError             anything else, with the guest's words
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlsplit

import msgspec

from gpuckpt import http1
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    NotFoundError,
    OutOfSpaceError,
    UsageError,
)
from gpuckpt.sessions import tensors
from gpuckpt.sessions.records import (
    Branches,
    Breakpoint,
    Created,
    Edit,
    Engine,
    Event,
    Lens,
    Result,
    Session,
    Sessions,
    Variant,
    Vectors,
)
from gpuckpt.sessions.tensors import Tensor
from gpuckpt.workload.endpoint import Endpoint

_LONGEST = 256 << 20  # bytes of a JSON answer or of one event
_CHUNK = 1 << 20
_T = TypeVar("_T")


class Generating(TypedDict, total=False):
    """What a generation is told. One of prompt, token_ids and messages; a session with unread tokens needs none.

    ``stop``: strings that end the text; ``logprobs``: that many of the most likely tokens with each; ``logits``: the
    last step's. ``breakpoints`` stay with the session. Not given: 16 tokens, greedy.
    """

    prompt: str
    token_ids: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    logits: bool
    breakpoints: Sequence[Breakpoint]


def address(text: str) -> Endpoint:
    """The endpoint that ``unix:/path`` or ``http://host:port`` names. Raises UsageError."""
    if text.startswith("unix:") and len(text) > len("unix:"):
        return Endpoint(socket=Path(text.removeprefix("unix:")))
    why = None
    try:
        parts = urlsplit(text)
        whole = parts.scheme == "http" and not (parts.query or parts.fragment or parts.username)
        if whole and parts.hostname and parts.port and parts.path in ("", "/"):
            return Endpoint(host=parts.hostname, port=parts.port)
    except ValueError as error:
        why = str(error)
    raise UsageError(f"“{text}” is no address", cause=why, remedy="unix:/path/of/a.sock, or http://host:port")


class Client:
    """A guest server. ``timeout``: seconds that it may be silent in requests that do not wait for a generation.

    Those that do wait take a ``timeout`` of their own; None, the default, is as long as it takes. A client has no
    state: threads may share it.
    """

    def __init__(self, where: Endpoint | str, *, timeout: float = 60) -> None:
        self.endpoint = address(where) if isinstance(where, str) else where
        self._timeout = timeout

    # ------------------------------------------------------------------ sessions

    def engine(self) -> Engine:
        """The model, what was found about it when it was loaded, and counters."""
        return self._ask("GET", "/engine", Engine)

    def sessions(self) -> tuple[Session, ...]:
        """All sessions but those of requests to OpenAI's endpoints."""
        return self._ask("GET", "/sessions", Sessions).sessions

    def session(self, id: str) -> Session:
        """One session; where it has stopped, if it has."""
        return self._ask("GET", _path(id), Session)

    def create(
        self,
        id: str | None = None,
        *,
        seed: int | None = None,
        steering: Sequence[Edit] = (),
        breakpoints: Sequence[Breakpoint] = (),
    ) -> Session:
        """Make a session that has read nothing; the guest names it if ``id`` is None."""
        body = {"id": id, "seed": seed, "steering": steering, "breakpoints": breakpoints}
        return self._ask("POST", "/sessions", Session, body)

    def delete(self, id: str) -> None:
        """Remove a session in whatever state; what it is generating ends as cancelled."""
        self._ask("DELETE", _path(id), object)

    # ------------------------------------------------------------------ generating

    def generate(
        self, id: str, *, wait: bool = True, timeout: float | None = None, **what: Unpack[Generating]
    ) -> Result:
        """Read on and write until the end or a stop; with ``wait`` false, return as soon as it has begun.

        If this process goes away meanwhile the generation is cancelled, unless it has stopped or was not waited for.
        """
        body = {**what, "wait": wait}
        return self._ask("POST", _path(id, "generate"), Result, body, timeout if wait else self._timeout)

    def stream(self, id: str, *, timeout: float | None = None, **what: Unpack[Generating]) -> Iterator[Event]:
        """The same, as events: tokens as they come, and at last ``done`` or ``paused``. Closing it early cancels."""
        yield from self._events("POST", _path(id, "generate"), {**what, "stream": True}, timeout, ("done", "paused"))

    def events(self, id: str, *, timeout: float | None = None) -> Iterator[Event]:
        """What happens to a session from now on: ``state`` first; ends behind ``deleted``, or when it is closed."""
        yield from self._events("GET", _path(id, "events"), None, timeout, ("deleted",))

    def cancel(self, id: str) -> Session:
        """End the generation at work; the session stays, with what it has read and written."""
        return self._ask("POST", _path(id, "cancel"), Session)

    # ------------------------------------------------------------------ stopping and going on

    def pause(self, id: str, *, layer: int | None = None, wait: bool = True, timeout: float | None = None) -> Session:
        """Stop a running generation after its next layer, or after ``layer`` layers; it may have ended before."""
        body = {"layer": layer, "wait": wait}
        return self._ask("POST", _path(id, "pause"), Session, body, timeout if wait else self._timeout)

    def resume(
        self, id: str, *, wait: Literal["paused", "none", "token", "end"] = "end", timeout: float | None = None
    ) -> Result | Session:
        """Go on where it stopped: until at once, the interrupted pass' token, or the end or next stop.

        With ``paused`` a suspended session is only woken: it stays where it has stopped. Returns the result so far; of
        a session that was suspended and is in no generation, or only woken, the session.
        """
        longest = self._timeout if wait == "none" else timeout
        data = self._bytes("POST", _path(id, "resume"), _json({"wait": wait}), longest)
        found = self._decoded(data, dict[str, Any])
        kind: type[Result] | type[Session] = Session if "id" in found else Result
        return self._decoded(data, kind)

    def suspend(self, id: str, *, durable: bool = False, wait: bool = True, timeout: float | None = None) -> Session:
        """Take an idle or stopped session's cache off the device; resume() brings it back.

        ``durable``: it is kept in files, too, and there again when the server has been restarted.
        """
        body = {"durable": durable, "wait": wait}
        return self._ask("POST", _path(id, "suspend"), Session, body, timeout if wait else self._timeout)

    def prefetch(self, id: str, *, wait: bool = False, timeout: float | None = None) -> Session:
        """Begin to bring a session's cache back to the device, ahead of being needed."""
        return self._ask("POST", _path(id, "prefetch"), Session, {"wait": wait}, timeout if wait else self._timeout)

    def pin(self, id: str, seconds: float) -> Session:
        """Keep a session's cache on the device for so long, whoever else needs the memory; 0: no longer."""
        return self._ask("POST", _path(id, "pin"), Session, {"seconds": seconds})

    def idle(self, id: str, seconds: float) -> Session:
        """Say that the session will not go on for so long: others may have the memory, and it is back in time."""
        return self._ask("POST", _path(id, "idle"), Session, {"seconds": seconds})

    def stop_at(self, id: str, breakpoint: Breakpoint) -> tuple[str, ...]:
        """Add a breakpoint, or one for each of its layers, for this and later generations; returns their names."""
        return self._ask("POST", _path(id, "breakpoints"), Created, breakpoint).ids

    def remove_breakpoint(self, id: str, name: str) -> None:
        """Remove a breakpoint; a session that it has stopped stays stopped."""
        self._ask("DELETE", _path(id, "breakpoints", name), object)

    # ------------------------------------------------------------------ looking and changing

    def activation(self, id: str) -> Tensor:
        """The hidden state at the stop, with the edits made there so far."""
        return self._tensor(_path(id, "activation"), "hidden")

    def set_activation(self, id: str, hidden: Tensor) -> None:
        """Put another tensor in the place of the hidden state: same shape, same type, finite numbers."""
        self._upload("PUT", _path(id, "activation"), tensors.write({"hidden": hidden}))

    def lens(self, id: str, top: int = 10) -> Lens:
        """The ``top`` most likely next tokens, by the model's own head on the hidden state at the stop."""
        return self._ask("GET", f"{_path(id, 'lens')}?top={int(top)}", Lens)

    def steer(self, id: str, *edits: Edit, standing: bool = False) -> tuple[str, ...]:
        """Edit the hidden state at the stop; or, ``standing``, in all passes to come: then returns the rules' names."""
        return self._ask("POST", _path(id, "steer"), Created, {"edits": edits, "standing": standing}).ids

    def unsteer(self, id: str, name: str = "*") -> None:
        """Remove a standing rule; ``*``: all of them, and the edits made at the stop."""
        self._ask("DELETE", _path(id, "steering", name), object)

    def branch(
        self,
        id: str,
        variants: Sequence[Variant],
        *,
        resume: bool = True,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Branches:
        """Make a session for each variant from here, and have them go on as one batch; the parent stays as it is."""
        body = {"variants": variants, "resume": resume, "wait": wait}
        return self._ask("POST", _path(id, "branch"), Branches, body, timeout if resume and wait else self._timeout)

    # ------------------------------------------------------------------ moving

    def export(self, id: str) -> bytes:
        """A session, stopped or idle, as a safetensors file."""
        return b"".join(self.exported(id))

    def exported(self, id: str) -> Iterator[bytes]:
        """The same, piece by piece: it is as large as the session's cache. Raises at the end if it is not whole."""
        yield from self._pieces("GET", _path(id, "export"), b"", self._timeout)

    def import_(self, data: bytes, id: str | None = None) -> Session:
        """A session out of what export() gave, on a guest with the same model; under another name if one is given."""
        query = "" if id is None else f"?id={quote(id, safe='')}"
        return self._decoded(self._upload("POST", f"/sessions/import{query}", data), Session)

    def vectors(self) -> Vectors:
        """Names of the vectors that edits can name."""
        return self._ask("GET", "/vectors", Vectors)

    def vector(self, name: str) -> Tensor:
        """A stored vector."""
        return self._tensor(f"/vectors/{_word(name)}", "vector")

    def set_vector(self, name: str, vector: Tensor) -> None:
        """Store a vector under a name; one of that name is replaced."""
        self._upload("PUT", f"/vectors/{_word(name)}", tensors.write({"vector": vector}))

    def delete_vector(self, name: str) -> None:
        """Forget a vector; edits that use it keep it."""
        self._ask("DELETE", f"/vectors/{_word(name)}", object)

    # ------------------------------------------------------------------ the wire

    def _ask(
        self, method: str, path: str, kind: type[_T], body: Any = None, timeout: float | Literal["own"] | None = "own"
    ) -> _T:
        content = b"" if body is None else _json(body)
        return self._decoded(self._bytes(method, path, content, self._timeout if timeout == "own" else timeout), kind)

    def _tensor(self, path: str, name: str) -> Tensor:
        held, _ = tensors.read(self._bytes("GET", path, b"", self._timeout))
        if name not in held:
            raise DaemonUnreachableError(
                f"the server at {self.endpoint} gave an answer that cannot be understood", cause=f"no tensor {name!r}"
            )
        return held[name]

    def _decoded(self, data: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, ValueError) as error:
            raise DaemonUnreachableError(
                f"the server at {self.endpoint} gave an answer that cannot be understood",
                cause=str(error),
                remedy="is it gpuckpt's guest server, and of this version?",
            ) from error

    def _upload(self, method: str, path: str, data: bytes) -> bytes:
        return b"".join(self._pieces(method, path, data, self._timeout, http1.BYTES))

    def _bytes(self, method: str, path: str, body: bytes, timeout: float | None) -> bytes:
        return b"".join(self._pieces(method, path, body, timeout))

    def _pieces(
        self, method: str, path: str, body: bytes, timeout: float | None, kind: str = http1.JSON
    ) -> Iterator[bytes]:
        # A generator: what its user does between two pieces is outside of the `with` as far as exceptions go.
        with self._answer(method, path, body, timeout, kind) as response:
            while piece := response.body.read(_CHUNK):
                yield piece

    def _events(
        self, method: str, path: str, body: Any, timeout: float | None, last: tuple[str, ...]
    ) -> Iterator[Event]:
        with self._answer(method, path, b"" if body is None else _json(body), timeout) as response:
            name = ""
            while line := response.body.readline(_LONGEST):
                field, _, value = line.rstrip(b"\r\n").partition(b": ")
                if field == b"event":
                    name = value.decode(errors="replace")
                elif field == b"data":
                    event = self._event(name, value)
                    if event.type == "lost":
                        raise GpuckptError(
                            "events were lost", cause="they came faster than they were read", remedy="listen again"
                        )
                    yield event
                    if event.type in last or event.type == "deleted":
                        return
            raise http1.HttpError("the stream ended before its last event")

    def _event(self, name: str, data: bytes) -> Event:
        if name == "state":  # a session as it is, without a type of its own
            state = self._decoded(data, Session)
            return Event(type="state", session=state.id, state=state)
        return self._decoded(data, Event)

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes, timeout: float | None, kind: str = http1.JSON
    ) -> Iterator[http1.Response]:
        try:
            with (
                self._connected(timeout) as connected,
                http1.exchange(connected, method, f"/v1{path}", body, kind) as response,
            ):
                if not 200 <= response.status < 300:
                    raise self._refused(method, path, response.status, response.body.read(_CHUNK))
                yield response
        except TimeoutError as error:
            raise DeadlineError(
                f"the server at {self.endpoint} was silent for {timeout or self._timeout:g} s",
                cause=f"{method} /v1{path} was not answered",
                remedy="it may be reading a long prompt: give it more time",
            ) from error
        except (OSError, http1.HttpError) as error:
            raise DaemonUnreachableError(
                f"the server at {self.endpoint} does not answer",
                cause=f"{type(error).__name__}: {error}",
                remedy="there is no such socket: correct its path, or name a replica that runs (gpuckpt ls)"
                if isinstance(error, FileNotFoundError)
                else "gpuckpt ls shows which replicas run",
            ) from error

    def _connected(self, timeout: float | None) -> socket.socket:
        most = self._timeout if timeout is None else timeout
        if self.endpoint.socket is not None:
            made = http1.connect_unix(self.endpoint.socket, most)
        else:
            made = socket.create_connection((self.endpoint.host, self.endpoint.port), most)
            # Where nothing limits the wait, a machine that vanished must be noticed.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        made.settimeout(timeout)
        return made

    def _refused(self, method: str, path: str, status: int, body: bytes) -> GpuckptError:
        message, code = _problem(body)
        asked = f"{method} /v1{path} was answered with {status}"
        if status in (404, 405) and code != "not_found":
            return NotFoundError(
                f"the server at {self.endpoint} has no sessions",
                cause=asked,
                remedy="serve the model with the guest server: gpuckpt create NAME --workload guest --model FOLDER",
            )
        if status == 404:
            return NotFoundError(message, remedy="gpuckpt session ls, show and vectors tell what there is")
        if code == "name_taken":
            remedy = "choose another name (import: --as); or go on with it, or remove it (gpuckpt session rm)"
            return BusyError(message, remedy=remedy)
        if status == 409:
            remedies = {
                "suspended": "gpuckpt session resume brings it back",
                "too_many_pinned": "gpuckpt session pin REPLICA ID 0 lets go of one of them",
            }
            return BusyError(message, remedy=remedies.get(code, "gpuckpt session show tells in which state it is"))
        if status == 507:
            return OutOfSpaceError(message, remedy="gpuckpt session memory tells what there is and what is used")
        if status == 429:
            return OutOfSpaceError(message, remedy="gpuckpt session rm removes sessions")
        if status == 503:
            return DaemonUnreachableError(message, cause=asked, remedy="gpuckpt logs shows why; restore a new replica")
        if status in (400, 413, 422):
            return UsageError(message)
        return GpuckptError(asked, cause=message)


def _problem(body: bytes) -> tuple[str, str]:
    """The guest's words, and its code for them; of another server, the begin of what it said."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"]), str(error.get("code", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return body[:500].decode(errors="replace"), ""


def _path(id: str, *rest: str) -> str:
    return "/".join(["/sessions", *map(_word, (id, *rest))])


def _word(name: str) -> str:
    if not name or "/" in name:  # which would lead to another path, escaped or not
        raise UsageError(f"“{name}” cannot be a name")
    return quote(name, safe="*")


def _json(body: Any) -> bytes:
    try:
        # Not msgspec's encoder: it writes null, which means "not given", for what is no finite number.
        return json.dumps(msgspec.to_builtins(body), allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        raise UsageError("the request cannot be written as JSON", cause=str(error)) from error
