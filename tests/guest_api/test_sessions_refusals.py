"""The session API over HTTP: everything that clients do wrong, and that it is answered with a reason."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.guest_api.conftest import LAYERS, PROMPT, WIDTH, Guest
from tests.guest_api.files import floats, hidden, opened, safetensors, with_header

pytestmark = pytest.mark.usefixtures("bystander")


def test_activations_that_do_not_fit(guest: Guest) -> None:
    path = guest.paused("target", 2)
    expected = guest.tokens(PROMPT, 8)
    shape = guest.ok("GET", path)["pause"]["shape"]
    count = shape[0] * shape[1] * shape[2]
    good = floats(guest.data(f"{path}/activation"))
    for wrong in ([count], [1, shape[1], WIDTH // 2, 2], [1, shape[1] + 1, WIDTH], [0, shape[1], WIDTH], []):
        size = 1
        for length in wrong:
            size *= length
        guest.refused(400, "PUT", f"{path}/activation", hidden([0.0] * size, wrong))
    for dtype, width in (("F16", 2), ("BF16", 2), ("F64", 8), ("I32", 4), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1)):
        file = safetensors({"hidden": (dtype, shape, b"\0" * (count * width))})
        guest.refused(400, "PUT", f"{path}/activation", file)
    for bad in (float("nan"), float("inf"), -float("inf")):
        message = guest.refused(400, "PUT", f"{path}/activation", hidden([*good[:-1], bad], shape))
        assert "finite" in message
    many = {name: ("F32", [1], b"\0" * 4) for name in ("a", "b")}
    guest.refused(400, "PUT", f"{path}/activation", safetensors(many))
    assert guest.ok("GET", path)["pause"]["replaced"] is False
    assert floats(guest.data(f"{path}/activation")) == good
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected


def malformed(good: bytes) -> dict[str, bytes]:
    """Files that are no safetensors files, made from one that is."""
    header, data = opened(good)
    (name,) = [key for key in header if key != "__metadata__"]
    entry = header[name]
    size = len(data)

    def lying(**what: Any) -> bytes:
        return with_header({name: entry | what}, data)

    overlapping = {name: entry, "second": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    nested = {"__metadata__": {"gpuckpt_session": "[" * 100_000}, name: entry}
    return {
        "nothing": b"",
        "seven bytes": good[:7],
        "only the size": good[:8],
        "half the header": good[:60],
        "half the data": good[: -size // 2],
        "one byte less": good[:-1],
        "one byte more": good + b"\0",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + good[8:],
        "a header of 2^64-1 bytes": struct.pack("<Q", 2**64 - 1) + good[8:],
        "a header longer than the file": struct.pack("<Q", len(good)) + good[8:],
        "a header of no bytes": struct.pack("<Q", 0) + good[8:],
        "a header that is a list": with_header([], data),
        "a header that is no JSON": with_header(b"{", data),
        "a header that is no text": with_header(b"\xff\xfe", data),
        "a header that nests": with_header(b"[" * 100_000, data),
        "metadata that nests": with_header(nested, data),
        "metadata of numbers": with_header({"__metadata__": {"pause": 5}, name: entry}, data),
        "metadata that is no JSON": with_header({"__metadata__": {"gpuckpt_session": "{"}, name: entry}, data),
        "overlapping offsets": with_header(overlapping, data),
        "offsets beyond the end": lying(data_offsets=[0, size + 8]),
        "offsets that go backwards": lying(data_offsets=[size, 0]),
        "negative offsets": lying(data_offsets=[-4, size]),
        "huge offsets": lying(data_offsets=[0, 2**63]),
        "a hole": lying(data_offsets=[8, size]),
        "a shape that lies": lying(shape=[1, 1, 1]),
        "a huge shape": lying(shape=[2**62, 2**62]),
        "a negative shape": lying(shape=[-1, -1, -1]),
        "a type that is not there": lying(dtype="F128"),
        "a type of four bits": lying(dtype="F4"),
        "no tensor": with_header({}, b""),
    }


def test_malformed_files(guest: Guest) -> None:
    path = guest.paused("victim", 2)
    good = guest.data(f"{path}/activation")
    wrong: list[str] = []
    for name, file in malformed(good).items():
        for method, where in (
            ("PUT", f"{path}/activation"),
            ("PUT", "/v1/vectors/bad"),
            ("POST", "/v1/sessions/import"),
        ):
            answer = guest.send(method, where, file)
            if answer.status_code != 400 or "error" not in answer.json():
                wrong.append(f"{name}: {method} {where}: {answer.status_code}")
    assert wrong == []
    assert guest.ok("GET", path)["pause"]["replaced"] is False
    assert guest.ok("GET", "/v1/vectors")["vectors"] == []
    assert guest.data(f"{path}/activation") == good


def test_vectors_that_do_not_fit(guest: Guest) -> None:
    def put(dtype: str, shape: list[int], raw: bytes) -> bytes:
        return safetensors({"v": (dtype, shape, raw)})

    for file in (
        put("F32", [WIDTH - 1], b"\0" * 4 * (WIDTH - 1)),
        put("F32", [1, WIDTH], b"\0" * 4 * WIDTH),
        put("I64", [WIDTH], b"\0" * 8 * WIDTH),
        put("BOOL", [WIDTH], b"\0" * WIDTH),
        put("F32", [WIDTH], struct.pack("<f", float("nan")) * WIDTH),
        put("F32", [0], b""),
    ):
        guest.refused(400, "PUT", "/v1/vectors/bad", file)
    # Eight-bit floats are floats; whether they are taken or refused, the server says so in its own words.
    answer = guest.send("PUT", "/v1/vectors/eight", put("F8_E4M3", [WIDTH], b"\0" * WIDTH))
    assert answer.status_code in (200, 400), answer.text
    guest.send("DELETE", "/v1/vectors/eight")
    good = put("F32", [WIDTH], b"\0" * 4 * WIDTH)
    guest.refused(400, "PUT", f"/v1/vectors/{'x' * 65}", good)
    guest.refused(400, "PUT", "/v1/vectors/a%20b", good)
    guest.refused(404, "DELETE", "/v1/vectors/bad")
    path = guest.paused("edited", 2)
    guest.refused(404, "POST", f"{path}/steer", {"edits": [{"kind": "add", "vector": "bad"}]})
    guest.refused(400, "POST", f"{path}/steer", {"edits": [{"kind": "add"}]})
    guest.refused(400, "POST", f"{path}/steer", {"edits": [{"kind": "add", "vector": [1.0, 2.0]}]})
    guest.refused(400, "POST", f"{path}/steer", {"edits": [{"kind": "project", "vector": [0.0] * WIDTH}]})
    guest.refused(422, "POST", f"{path}/steer", {"edits": [{"kind": "melt"}]})
    nan = b'{"edits": [{"kind": "scale", "factor": NaN}]}'
    assert guest.send("POST", f"{path}/steer", nan, kind="application/json").status_code == 422
    assert guest.ok("GET", path)["pause"]["edits"] == []


def test_layers_and_names_that_are_not_there(guest: Guest) -> None:
    path = guest.paused("here", 2)
    for method, rest, body in (
        ("POST", "/breakpoints", {"layer": LAYERS + 1}),
        ("POST", "/breakpoints", {"layer": [1, 2, LAYERS + 1]}),
        ("POST", "/steer", {"edits": [{"kind": "scale", "layer": LAYERS + 1}], "standing": True}),
    ):
        guest.refused(400, method, path + rest, body)
    guest.refused(422, "POST", f"{path}/breakpoints", {"layer": -1})
    guest.refused(422, "POST", f"{path}/breakpoints", {"layer": 1.5})
    guest.refused(422, "POST", f"{path}/breakpoints", {"layers": 1})
    guest.refused(409, "POST", f"{path}/steer", {"edits": [{"kind": "scale", "layer": 3}]})
    guest.refused(404, "DELETE", f"{path}/breakpoints/nobody")
    assert len(guest.ok("GET", path)["breakpoints"]) == 1
    guest.refused(400, "POST", "/v1/sessions", {"id": "new", "breakpoints": [{"layer": 99}]})
    guest.refused(400, "POST", "/v1/sessions", {"id": "new", "steering": [{"kind": "scale", "layer": 99}]})
    guest.refused(400, "POST", "/v1/sessions", {"id": "new", "steering": [{"kind": "scale"}]})
    guest.refused(404, "GET", "/v1/sessions/new")
    guest.refused(409, "POST", "/v1/sessions", {"id": "here"})
    for name in ("", "../x", "a b", "-x", "x" * 65, "é"):
        guest.refused(422, "POST", "/v1/sessions", {"id": name})
    for method, rest in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("POST", "/suspend"),
        ("GET", "/lens"),
        ("GET", "/export"),
        ("GET", "/events"),
        ("GET", "/activation"),
    ):
        guest.refused(404, method, f"/v1/sessions/nobody{rest}")
    guest.refused(404, "POST", "/v1/sessions/nobody/resume", {})
    guest.refused(404, "POST", "/v1/sessions/nobody/generate", {"prompt": "x"})


def test_generations_that_cannot_be(guest: Guest) -> None:
    path = guest.session("picky")
    for status, body in (
        (400, {}),
        (400, {"prompt": ""}),
        (400, {"prompt": "x", "token_ids": [1]}),
        (400, {"token_ids": [8192]}),
        (400, {"token_ids": [1] * 9000}),
        (400, {"prompt": "x", "breakpoints": [{"layer": 1}, {"layer": 99}]}),
        (400, {"prompt": "x", "breakpoints": [{"layer": [1, 2], "id": "shared"}]}),
        (409, {"prompt": "x", "breakpoints": [{"layer": 1, "id": "b"}, {"layer": 2, "id": "b"}]}),
        (422, {"prompt": "x", "max_tokens": 0}),
        (422, {"prompt": "x", "max_tokens": True}),
        (422, {"prompt": "x", "temperature": -0.1}),
        (422, {"prompt": "x", "unknown": 1}),
        (422, {"prompt": 5}),
        (422, []),
    ):
        guest.refused(status, "POST", f"{path}/generate", body)
    for raw in (b"", b"{", b'"\xff"', b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"):
        answer = guest.send("POST", f"{path}/generate", raw, kind="application/json")
        assert answer.status_code in (400, 422) and answer.json()["error"]["message"]
    shown = guest.ok("GET", path)
    assert (shown["state"], shown["tokens"], shown["breakpoints"]) == ("idle", 0, [])


def test_what_is_no_unicode(guest: Guest) -> None:
    path = guest.session("surrogate")
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    for raw in (b'{"prompt": "\\ud800"}', body):
        answer = guest.send("POST", f"{path}/generate", raw, kind="application/json")
        assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]
    assert guest.ok("GET", path)["state"] == "idle"


def test_resuming_twice(guest: Guest) -> None:
    path = guest.paused("twice", 2)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(guest.send, "POST", f"{path}/resume", {"wait": "end"}) for _ in range(8)]
        statuses = sorted(answer.result().status_code for answer in answers)
    assert statuses == [200] + [409] * 7
    guest.refused(409, "POST", f"{path}/resume", {})
    for method, rest, body in (
        ("GET", "/lens", None),
        ("GET", "/activation", None),
        ("POST", "/steer", {"edits": [{"kind": "scale", "layer": 2}]}),
        ("PUT", "/activation", hidden([0.0], [1])),
    ):
        guest.refused(409, method, path + rest, body)


def test_too_strong_an_edit_fails_that_generation_alone(guest: Guest) -> None:
    path = guest.paused("strong", 1, 2)
    guest.ok("POST", f"{path}/steer", {"edits": [{"kind": "scale", "factor": 1e38}] * 2})
    # What is not finite is shown as JSON can: browsers read this, too.
    assert guest.send("GET", f"{path}/lens").status_code in (200, 400, 409)
    told = guest.ok("POST", f"{path}/resume", {})
    assert told["pause"]["layer"] == 2
    stream = guest.events(f"{path}/events")
    assert next(stream)[0] == "state"
    stream.close()  # type: ignore[attr-defined]
    assert guest.ok("GET", path)["state"] == "paused"
    told = guest.ok("POST", f"{path}/resume", {})
    assert (told["state"], told["finish_reason"], told["tokens"]) == ("done", "error", [])
    assert "finite" in told["error"]
    assert guest.ok("GET", path)["state"] == "idle"
