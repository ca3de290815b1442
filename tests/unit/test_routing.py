"""Which model a request is for, and what its server is sent."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from gpuckpt.service.routing import Route, Routes, RoutingError

NAMES = {"m": "m", "alias": "m", "Qwen/Qwen2": "q", "Qwen": "short", "ünicode": "u"}
SERVED = {"m": "served-m", "q": "Qwen/Qwen2"}
JSON = {b"content-type": b"application/json; charset=utf-8"}


def route(
    body: bytes = b"",
    *,
    target: str = "/v1/completions",
    headers: dict[bytes, bytes] | None = None,
    names: dict[str, str] = NAMES,
) -> Route:
    raw_path, _, query = target.encode().partition(b"?")
    routes = Routes(names, SERVED.get)
    return routes.route("", query, raw_path, JSON if headers is None else headers, body)


def refused(*arguments: Any, **options: Any) -> RoutingError:
    with pytest.raises(RoutingError) as raised:
        route(*arguments, **options)
    return raised.value


# ---------------------------------------------------------------------- JSON


def test_the_model_of_a_body() -> None:
    body = b'{"model": "Qwen/Qwen2"}'
    assert route(body) == Route("q", b"/v1/completions", body, False)
    assert route(body, headers={}) == Route("q", b"/v1/completions", body, False)  # of no type, but plainly JSON
    assert route(b'{"model":"\\u00fcnicode"}').model == "u"


def test_only_the_model_s_name_is_changed() -> None:
    values = b'"big": 12345678901234567890, "small": 1e-320, "float": 0.10, "text": "\\u00e9\\/"'
    values += b', "nested": {"model": [1, 2]}'
    got = route(b'{ "model" : "alias" , ' + values + b"}").body
    for value in (b":12345678901234567890", b":1e-320", b":0.10", b':"\\u00e9\\/"', b':{"model": [1, 2]}'):
        assert value in got
    assert json.loads(got)["model"] == "served-m"
    assert list(json.loads(got)) == ["model", "big", "small", "float", "text", "nested"]


def test_of_two_models_the_last_counts() -> None:
    """As it does for every reader of JSON that a server is likely to use; so both must see the same one."""
    got = route(b'{"model": "Qwen", "x": 1, "model": "alias", "x": 2}')
    assert got.model == "m"
    assert json.loads(got.body) == {"model": "served-m", "x": 2}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"model": 7}', "invalid_body"),
        (b'{"model": {}}', "invalid_body"),
        (b'"m"', "invalid_body"),
        (b"{", "invalid_json"),
        (b'{"model": "m"} x', "invalid_json"),
        (b'{"model": "\\ud800"}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "alias", "\xff": 1}', "invalid_json"),
        (b'{"model": "m", "x": ' + b"[" * 100_000, "invalid_json"),
        (b'{"model": "m", "x": ' + b'{"x":' * 100_000, "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
    ],
)
def test_bodies_that_cannot_be_used(body: bytes, code: str) -> None:
    error = refused(body)
    assert (error.status, error.code) == (400, code)


def test_names_that_there_are_not() -> None:
    error = refused(b'{"model": "Qwen/Qwen3"}')
    assert (error.status, error.code) == (404, "model_not_found") and "did you mean “Qwen/Qwen2”" in str(error)
    assert "/v1/models" in str(refused(b'{"model": "else entirely"}'))
    began = time.process_time()
    assert len(str(refused(b'{"model": "' + b"Qwen/" * 1_000_000 + b'"}'))) < 400
    assert time.process_time() - began < 1


def test_no_name_at_all() -> None:
    for body in (b"{}", b'{"model": null}', b""):
        error = refused(body)
        assert (error.status, error.code) == (400, "model_missing")
    assert route(b"{}", names={"m": "m", "alias": "m"}).model == "m"
    assert route(b"", target="/metrics", headers={}, names={"m": "m"}).target == b"/metrics"


@pytest.mark.parametrize(
    ("stream", "asked"), [(b"true", True), (b" true ", True), (b"false", False), (b"1", False), (b'"true"', False)]
)
def test_streams(stream: bytes, asked: bool) -> None:
    assert route(b'{"model": "m", "stream":' + stream + b"}").stream is asked


# ---------------------------------------------------------------------- other ways to name it


def test_the_header() -> None:
    head = {b"x-gpuckpt-model": b"alias", b"content-type": b"application/json"}
    body = b'{"model": "whatever", "stream": true}'
    assert route(body, headers=head) == Route("m", b"/v1/completions", body, True)
    assert route(b"\xff no JSON", headers=head).body == b"\xff no JSON"
    assert route(headers={b"x-gpuckpt-model": "ünicode".encode()}).model == "u"
    assert refused(headers={b"x-gpuckpt-model": b"\xff"}).status == 404


@pytest.mark.parametrize(
    ("target", "model", "passed"),
    [
        ("/upstream/m/v1/x?a=b&c", "m", "/v1/x?a=b&c"),
        ("/upstream/m", "m", "/"),
        ("/upstream/m/", "m", "/"),
        ("/upstream/m?a", "m", "/?a"),
        ("/upstream/alias//x/../y", "m", "//x/../y"),
        ("/upstream/Qwen/Qwen2/v1/x", "q", "/v1/x"),
        ("/upstream/Qwen%2FQwen2/v1/x%2Fy", "q", "/v1/x%2Fy"),
        ("/upstream/Qwen/v1/x", "short", "/v1/x"),
        ("/upstream/Qwen/", "short", "/"),
        ("/upstream/%C3%BCnicode/x", "u", "/x"),
    ],
)
def test_the_path(target: str, model: str, passed: str) -> None:
    body = b'{"model": "is not looked at"}'
    assert route(body, target=target) == Route(model, passed.encode(), body, False)


@pytest.mark.parametrize("target", ["/upstream/", "/upstream//x", "/upstream/no/m/x", "/upstream/%ff", "/upstream/%zz"])
def test_paths_that_name_none(target: str) -> None:
    assert refused(target=target).status == 404


def test_a_long_path_takes_no_time() -> None:
    began = time.process_time()
    refused(target="/upstream/" + "/" * 60_000)
    refused(target="/upstream/" + "%2F/" * 15_000)
    assert time.process_time() - began < 0.2


def test_the_query() -> None:
    got = route(target="/v1/files?x=y&model=Qwen%2FQwen2", headers={})
    assert got == Route("q", b"/v1/files?x=y&model=Qwen%2FQwen2", b"", False)
    assert route(b"{}", target="/v1/x?model=m").model == "m"


FORM = {b"content-type": b"multipart/form-data; boundary=XYZ"}


def form(*parts: bytes, boundary: bytes = b"XYZ") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


FIELD = b'Content-Disposition: form-data; name="model"\r\n\r\nalias'
FILE = b'Content-Disposition: form-data; name="file"; filename="m"\r\nContent-Type: audio/wav\r\n\r\n'


@pytest.mark.parametrize(
    "parts",
    [
        (FIELD,),
        (FILE + b"\x00\r\n\r\n--XY\r\n" * 1000, FIELD),
        (FILE + FIELD.replace(b"alias", b"no"), FIELD),  # in a file, it is a file's
        (b'content-type: text/plain\r\ncontent-disposition:form-data; x=y; name=model ; y="z"\r\n\r\nalias',),
        (FIELD.replace(b'"model"', b'"model2"').replace(b"alias", b"no"), FIELD),
    ],
)
def test_forms(parts: tuple[bytes, ...]) -> None:
    body = b"preamble\r\n" + form(*parts)
    assert route(body, target="/v1/audio/transcriptions", headers=FORM).model == "m"
    assert route(body, target="/v1/x", headers=FORM).body == body
    quoted = {b"content-type": b'multipart/form-data; charset=utf-8; boundary="XYZ"; x=y'}
    assert route(body, target="/v1/x", headers=quoted).model == "m"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"multipart/form-data", form(FIELD)),
        (b"multipart/form-data; boundary=", form(FIELD)),
        (b"multipart/form-data; boundary=XYZ", b""),
        (b"multipart/form-data; boundary=XYZ", b"--XYZ"),
        (b"multipart/form-data; boundary=XYZ", b"--XYZ\r\n" + FIELD),  # it has no end
        (b"multipart/form-data; boundary=XYZ", form(FILE + FIELD)),
        (b"multipart/form-data; boundary=XYZ", form(FIELD + b"x" * 5000)),
        (b"text/plain", b'{"model": "m"}'),
    ],
)
def test_bodies_that_name_none(kind: bytes, body: bytes) -> None:
    assert refused(body, headers={b"content-type": kind}).code == "model_missing"


def test_a_form_on_one_line() -> None:
    kind = {b"content-type": b"application/x-www-form-urlencoded"}
    assert route(b"x=y&model=Qwen%2FQwen2", headers=kind).model == "q"


def test_json_that_curl_calls_a_form() -> None:
    kind = {b"content-type": b"application/x-www-form-urlencoded"}
    assert route(b'{"model": "Qwen/Qwen2"}', headers=kind).model == "q"
    assert refused(b'{"model": ', headers=kind).code == "invalid_json"


def test_what_is_compressed_is_refused() -> None:
    coded = {b"content-type": b"application/json", b"content-encoding": b"gzip"}
    error = refused(b"\x1f\x8b", headers=coded)
    assert (error.status, error.code) == (415, "unsupported_encoding") and "gzip" in str(error)
    assert route(b"\x1f\x8b", headers=coded | {b"x-gpuckpt-model": b"Qwen/Qwen2"}).model == "q"


def test_long_forms_take_no_time() -> None:
    """Whatever they are made of: they are looked at on the loop that everybody waits for."""
    kind = {b"content-type": b"multipart/form-data; boundary=XYZ"}
    long = 8 << 20
    bodies = [
        form(b'name="model"\r\n' * (long // 14)),
        form(FILE + b"x" * long),
        b"\r\n--XYZ\r\n" * (long // 9),
        form(*[b'Content-Disposition: form-data; name="mode' + b"l" * 3900 + b"\r\n\r\nx"] * 2000),
        form(b"content-disposition:" * (long // 20)),
        form(*[b"content-disposition:" * 200] * 2000),
    ]
    for body in bodies:
        began = time.process_time()
        refused(body, headers=kind)
        assert time.process_time() - began < 0.5
