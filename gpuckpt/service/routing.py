"""Which model a request is for.

By, in this order: the path ``/upstream/MODEL/…``, the header ``X-Gpuckpt-Model``, ``model`` in a JSON body, in a form,
in the query; and without any of them, the only model that there is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from urllib.parse import parse_qs, unquote

import msgspec
from msgspec import Struct

PREFIX = b"/upstream/"
_DISPOSITION = re.compile(rb'(?im)^content-disposition:[^\r\n]*[; \t]name="?model"?[ \t]*(?:;|\r|$)')
_LONGEST_FIELD = 4096  # bytes of a part of a form, its head included, that may name the model
_LONGEST_FORM = 64 << 10
_PARTS = 100  # of a form, that are looked at
_LONGEST_NAME = 200  # beyond, it is not compared with what there is


class RoutingError(Exception):
    """The request cannot be routed: ``status`` and ``code`` say so in HTTP's and OpenAI's words."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Asked(Struct):
    model: str | None = None
    stream: msgspec.Raw = msgspec.Raw(b"")  # whatever it is, it is the server's to judge


_ASKED = msgspec.json.Decoder(_Asked)
_WHOLE = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Route(Struct, frozen=True):
    """Where a request goes: the model's configured name, the target and body for its replica.

    ``stream``: whether a stream of server-sent events is asked for. ``unsettled``: what the model's server calls it was
    not known, so the body says what the client said; once the server is there, the request is to be routed again.
    """

    model: str
    target: bytes
    body: bytes
    stream: bool
    unsettled: bool = False


class Routes:
    """The models by every name that requests may use.

    ``names``: each of them, and the model that it is. ``served`` tells what a model's own server calls it, None where
    that is not known; a body that says something else is changed there, and only there.
    """

    def __init__(self, names: Mapping[str, str], served: Callable[[str], str | None]) -> None:
        self._names = dict(names)
        self._served = served
        self._models = sorted(set(names.values()))
        self._depth = max((name.count("/") for name in names), default=0) + 1

    def route(self, path: str, query: bytes, raw_path: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Route:
        """Route a request; raises RoutingError."""
        target = raw_path + (b"?" + query if query else b"")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        asked, trouble, unsettled = _Asked(), None, False
        # curl says that a body is a form where nobody says what it is.
        undeclared = kind in (b"", b"application/x-www-form-urlencoded") and body[:1] == b"{"
        if body and (kind.endswith(b"json") or undeclared):
            try:
                if coded := headers.get(b"content-encoding"):
                    raise RoutingError(
                        f"the body is encoded ({coded.decode(errors='replace')}): send it as it is",
                        status=415,
                        code="unsupported_encoding",
                    )
                asked = _read(body)
            except RoutingError as error:  # where something else says which model, its server may judge the body
                trouble = error
        if raw_path.startswith(PREFIX):
            name, target = self._named_by(raw_path, query)
            model = self.find(name)
        elif header := headers.get(b"x-gpuckpt-model"):
            model = self.find(header.decode(errors="replace"))
        elif trouble is not None:
            raise trouble
        elif asked.model is not None:
            model = self.find(asked.model)
            unsettled = self._served(model) is None
            body = self._as_served(model, asked.model, body)
        else:
            model = self._named_elsewhere(kind, headers, query, body)
        # Other interfaces stream too, but not all of them events.
        events = target.startswith(b"/v1/") or b"text/event-stream" in headers.get(b"accept", b"")
        return Route(model, target, body, events and bytes(asked.stream) == b"true", unsettled)

    def _named_elsewhere(self, kind: bytes, headers: Mapping[bytes, bytes], query: bytes, body: bytes) -> str:
        name = None
        if kind == b"multipart/form-data":
            name = _form_field(headers[b"content-type"], body)
        elif kind == b"application/x-www-form-urlencoded":
            name = _first(body[:_LONGEST_FORM])
        name = name or _first(query)
        if name is not None:
            return self.find(name)
        if len(self._models) == 1:
            return self._models[0]
        raise RoutingError(
            'the request names no model: add "model" to its JSON, or send it to /upstream/MODEL/…', code="model_missing"
        )

    def find(self, name: str) -> str:
        """The model called so; raises RoutingError (404) with the nearest name there is."""
        if (model := self._names.get(name)) is not None:
            return model
        near = difflib.get_close_matches(name, self._names, n=1) if len(name) <= _LONGEST_NAME else None
        hint = f"; did you mean “{near[0]}”?" if near else "; GET /v1/models lists what there is"
        raise RoutingError(f"there is no model “{name[:_LONGEST_NAME]}”{hint}", status=404, code="model_not_found")

    def _named_by(self, raw_path: bytes, query: bytes) -> tuple[str, bytes]:
        words = raw_path[len(PREFIX) :].split(b"/", self._depth)
        # Names may have a slash: the longest that fits is meant.
        for count in range(min(len(words), self._depth), 0, -1):
            name = unquote(b"/".join(words[:count]).decode("ascii", "replace"))
            if name in self._names:
                return name, b"/" + b"/".join(words[count:]) + (b"?" + query if query else b"")
        return unquote(words[0].decode("ascii", "replace")), b"/"

    def _as_served(self, model: str, asked: str, body: bytes) -> bytes:
        served = self._served(model)
        if served is None or served == asked:
            return body
        # Every other value stays as it was written, to the digit.
        try:
            whole = _WHOLE.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:  # in what nobody has looked at so far
            raise _no_json(error) from None
        whole["model"] = msgspec.Raw(msgspec.json.encode(served))
        return msgspec.json.encode(whole)


def _read(body: bytes) -> _Asked:
    try:
        return _ASKED.decode(body)
    except msgspec.ValidationError as error:
        raise RoutingError(f"the body is not a request: {error}", code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _no_json(error) from None
    except RecursionError:
        raise RoutingError("the body is not a request: it nests too deeply", code="invalid_json") from None


def _no_json(error: Exception) -> RoutingError:
    return RoutingError(f"the body is not JSON: {error}", code="invalid_json")


def _first(query: bytes) -> str | None:
    values = parse_qs(query.decode("latin-1")).get("model") if b"model" in query else None
    return values[0] if values else None


def _form_field(kind: bytes, body: bytes) -> str | None:
    """The field ``model`` of a multipart form (RFC 7578); the parts before it are stepped over, not looked through."""
    _, found, boundary = kind.partition(b"boundary=")
    boundary = boundary.strip().removeprefix(b'"').partition(b'"')[0].partition(b";")[0].strip()
    if not found or not boundary:
        return None
    mark = b"--" + boundary
    end = body.find(mark)
    for _ in range(_PARTS):
        if end < 0:
            break
        begin = body.find(b"\r\n", end + len(mark))
        end = body.find(b"\r\n" + mark, begin)
        if 0 <= begin < end <= begin + _LONGEST_FIELD:
            head, _, value = body[begin:end].partition(b"\r\n\r\n")
            if _DISPOSITION.search(head):
                return value.decode(errors="replace")
        end += 2 if end >= 0 else 0
    return None
