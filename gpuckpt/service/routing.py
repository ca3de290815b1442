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

PREFIX = "/upstream/"
_FORM_MODEL = re.compile(rb'\r\n[^\r\n]*name="model"[^\r\n]*(?:\r\n[^\r\n]+)*\r\n\r\n([^\r\n]{1,500})\r\n')


class RoutingError(Exception):
    """The request cannot be routed: ``status`` and ``code`` say so in HTTP's and OpenAI's words."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class _Asked(Struct):
    model: str | None = None
    stream: bool | None = None


class Route(Struct, frozen=True):
    """Where a request goes: the model's configured name, the target and body for its replica, whether it streams."""

    model: str
    target: bytes
    body: bytes
    stream: bool


class Routes:
    """The models by every name that requests may use.

    ``names``: each of them, and the model that it is. ``served`` tells what a model's own server calls it, None where
    that is not known; a body that says something else is changed there, and only there.
    """

    def __init__(self, names: Mapping[str, str], served: Callable[[str], str | None]) -> None:
        self._names = dict(names)
        self._served = served
        self._models = sorted(set(names.values()))

    def route(self, path: str, query: bytes, raw_path: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Route:
        """Route a request; raises RoutingError."""
        target = raw_path + (b"?" + query if query else b"")
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        asked, trouble = _Asked(), None
        if body and (kind.endswith(b"json") or (not kind and body[:1] == b"{")):
            try:
                asked = _read(body)
            except RoutingError as error:  # where something else says which model, its server may judge the body
                trouble = error
        stream = bool(asked.stream)
        if path.startswith(PREFIX):
            name, target = self._named_by(raw_path, query)
            return Route(self.find(name), target, body, stream)
        if header := headers.get(b"x-gpuckpt-model"):
            return Route(self.find(header.decode("latin-1")), target, body, stream)
        if trouble is not None:
            raise trouble
        if asked.model is not None:
            model = self.find(asked.model)
            return Route(model, target, self._as_served(model, asked.model, body), stream)
        if kind == b"multipart/form-data" and (found := _FORM_MODEL.search(body)):
            return Route(self.find(found[1].decode(errors="replace")), target, body, False)
        if query and (values := parse_qs(query.decode("latin-1")).get("model")):
            return Route(self.find(values[0]), target, body, stream)
        if len(self._models) == 1:
            return Route(self._models[0], target, body, stream)
        raise RoutingError(
            'the request names no model: add "model" to its JSON, or send it to /upstream/MODEL/…', code="model_missing"
        )

    def find(self, name: str) -> str:
        """The model called so; raises RoutingError (404) with the nearest name there is."""
        if (model := self._names.get(name)) is not None:
            return model
        near = difflib.get_close_matches(name, self._names, n=1)
        hint = f"; did you mean “{near[0]}”?" if near else "; GET /v1/models lists what there is"
        raise RoutingError(f"there is no model “{name[:200]}”{hint}", status=404, code="model_not_found")

    def _named_by(self, raw_path: bytes, query: bytes) -> tuple[str, bytes]:
        rest = raw_path[len(PREFIX) :]
        # Names may have a slash: the longest that fits is meant.
        for end in sorted(index for index in range(len(rest) + 1) if rest[index : index + 1] in (b"/", b""))[::-1]:
            name = unquote(rest[:end].decode("latin-1"))
            if name in self._names:
                return name, (rest[end:] or b"/") + (b"?" + query if query else b"")
        return unquote(rest.partition(b"/")[0].decode("latin-1")), b"/"

    def _as_served(self, model: str, asked: str, body: bytes) -> bytes:
        served = self._served(model)
        if served is None or served == asked:
            return body
        # Every other value stays as it was written, to the digit.
        whole = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        whole["model"] = msgspec.Raw(msgspec.json.encode(served))
        return msgspec.json.encode(whole)


def _read(body: bytes) -> _Asked:
    try:
        return msgspec.json.decode(body, type=_Asked)
    except msgspec.ValidationError as error:
        raise RoutingError(f"the body is not a request: {error}", code="invalid_body") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RoutingError(f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise RoutingError("the body is not a request: it nests too deeply", code="invalid_json") from None
