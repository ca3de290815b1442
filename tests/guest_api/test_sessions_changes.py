"""The session API over HTTP: what is done to a session that has stopped, and sessions that are made from it."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from tests.guest_api.conftest import PROMPT, WIDTH, Guest
from tests.guest_api.files import floats, hidden, opened, safetensors

pytestmark = pytest.mark.usefixtures("bystander")


def test_an_activation_can_be_taken_away_and_put_back(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.paused("put", 2)
    file = guest.data(f"{path}/activation")
    header, data = opened(file)
    assert json.loads(header["__metadata__"]["pause"])["layer"] == 2
    guest.ok("POST", f"{path}/steer", {"edits": [{"kind": "scale", "factor": 0.1}]})
    scaled = floats(guest.data(f"{path}/activation"))
    assert scaled == pytest.approx([value * 0.1 for value in floats(file)], rel=1e-6)
    guest.ok("PUT", f"{path}/activation", file)
    assert guest.ok("GET", path)["pause"]["replaced"] is True
    assert opened(guest.data(f"{path}/activation"))[1] == data
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected

    other = guest.paused("other", 2, prompt="something else entirely, and longer")
    changed = guest.paused("changed", 2)
    values = floats(guest.data(f"{other}/activation"))[-WIDTH:]
    shape = guest.ok("GET", changed)["pause"]["shape"]
    guest.ok("PUT", f"{changed}/activation", hidden(values * shape[1], shape))
    assert guest.ok("POST", f"{changed}/resume", {})["tokens"] != expected


def test_steering(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)

    def written(name: str, edits: list[Any], *, standing: bool = False) -> list[int]:
        path = guest.paused(name, 2)
        guest.ok("POST", f"{path}/steer", {"edits": edits, "standing": standing})
        tokens: list[int] = guest.ok("POST", f"{path}/resume", {})["tokens"]
        return tokens

    assert written("one", [{"kind": "scale", "factor": 1}]) == expected
    scaled = written("scaled", [{"kind": "scale", "factor": -1}])
    assert scaled != expected
    assert written("twice", [{"kind": "scale", "factor": -1}]) == scaled
    assert written("undone", [{"kind": "scale", "factor": -2}, {"kind": "scale", "factor": -0.5}]) == expected
    vector = safetensors({"v": ("F32", [WIDTH], struct.pack(f"<{WIDTH}f", *([3.0, -3.0] * (WIDTH // 2))))})
    guest.ok("PUT", "/v1/vectors/zigzag", vector)
    assert "zigzag" in guest.ok("GET", "/v1/vectors")["vectors"]
    assert opened(guest.data("/v1/vectors/zigzag"))[1] == opened(vector)[1]
    added = written("added", [{"kind": "add", "vector": "zigzag"}])
    assert added != expected
    there_and_back = [{"kind": "add", "vector": "zigzag"}, {"kind": "add", "vector": "zigzag", "factor": -1}]
    path = guest.paused("back", 2)
    before = floats(guest.data(f"{path}/activation"))
    guest.ok("POST", f"{path}/steer", {"edits": there_and_back})
    assert floats(guest.data(f"{path}/activation")) == pytest.approx(before, abs=1e-5)
    guest.ok("DELETE", f"{path}/steering/*")
    assert floats(guest.data(f"{path}/activation")) == before

    # Only some positions; then a standing rule, which also holds in passes to come.
    last = guest.ok("GET", path)["pause"]["tokens"] - 1
    guest.ok("POST", f"{path}/steer", {"edits": [{"kind": "scale", "factor": 0, "first": last}]})
    now = floats(guest.data(f"{path}/activation"))
    assert now[:-WIDTH] == before[:-WIDTH] and set(now[-WIDTH:]) == {0.0}
    path = guest.paused("ruled", 2)
    rule = {"kind": "project", "vector": "zigzag", "layer": 3, "name": "without"}
    assert guest.ok("POST", f"{path}/steer", {"edits": [rule], "standing": True})["ids"] == ["without"]
    (shown,) = guest.ok("GET", path)["steering"]
    assert (shown["name"], shown["kind"], shown["layer"]) == ("without", "project", 3)
    guest.ok("POST", f"{path}/breakpoints", {"layer": 3, "once": True})
    assert guest.ok("POST", f"{path}/resume", {})["pause"]["layer"] == 3
    values = floats(guest.data(f"{path}/activation"))
    along = sum(value * (1 if index % 2 == 0 else -1) for index, value in enumerate(values[:WIDTH]))
    assert abs(along) < 1e-3
    guest.ok("DELETE", f"{path}/steering/without")
    guest.refused(404, "DELETE", f"{path}/steering/without")
    guest.ok("DELETE", "/v1/vectors/zigzag")
    guest.refused(404, "GET", "/v1/vectors/zigzag")


def test_branches(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.paused("parent", 2)
    variants: list[Any] = [
        {"id": "same"},
        {"id": "scaled", "edits": [{"kind": "scale", "factor": -1}]},
        {"id": "warm", "sampling": {"temperature": 1.5}, "seed": 3},
        {"id": "short", "max_tokens": 2},
    ]
    made = guest.ok("POST", f"{path}/branch", {"variants": variants})
    assert made["sessions"] == ["same", "scaled", "warm", "short"]
    same, scaled, warm, short = (result["tokens"] for result in made["results"])
    assert same == expected
    assert short == expected[:2]
    assert scaled != expected and warm != expected
    assert all(result["state"] == "done" for result in made["results"])
    assert guest.ok("GET", "/v1/sessions/same")["parent"] == "parent"

    # The parent is where it was; branches that do not go on stop where it stopped, and go on alone.
    assert guest.ok("GET", path)["pause"]["layer"] == 2
    later = guest.ok("POST", f"{path}/branch", {"variants": [{"id": "later"}, {"id": "never"}], "resume": False})
    assert later["results"] is None
    guest.ok("DELETE", path)
    assert guest.ok("GET", "/v1/sessions/later")["state"] == "paused"
    assert guest.ok("POST", "/v1/sessions/later/resume", {})["tokens"] == expected
    guest.ok("DELETE", "/v1/sessions/never")

    guest.refused(409, "POST", "/v1/sessions/later/branch", {"variants": [{"id": "same"}]})
    guest.refused(400, "POST", "/v1/sessions/later/branch", {"variants": [{"id": "x"}, {"id": "x"}]})
    guest.refused(409, "POST", "/v1/sessions/later/branch", {"variants": [{"edits": [{"kind": "scale", "layer": 1}]}]})
    assert {s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]} == {
        "bystander", "same", "scaled", "warm", "short", "later",
    }  # fmt: skip


def test_export_and_import(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.paused("here", 1)
    guest.ok("POST", f"{path}/breakpoints", {"layer": 3, "step": 4})
    assert guest.ok("POST", f"{path}/resume", {})["pause"]["step"] == 4
    file = guest.data(f"{path}/export")
    guest.refused(409, "POST", "/v1/sessions/import", file)  # the name is taken
    moved = guest.ok("POST", "/v1/sessions/import?id=there", file)
    assert (moved["state"], moved["pause"]["layer"], moved["pause"]["step"]) == ("paused", 3, 4)
    assert [b["id"] for b in moved["breakpoints"]] == [b["id"] for b in guest.ok("GET", path)["breakpoints"]]
    for name in ("there", "here"):
        told = guest.ok("POST", f"/v1/sessions/{name}/resume", {})
        assert (told["state"], told["tokens"]) == ("done", expected)
    # Idle ones, too: they go on in the same way.
    idle = guest.data(f"{path}/export")
    guest.ok("DELETE", path)
    guest.ok("POST", "/v1/sessions/import", idle)
    more = [
        guest.ok("POST", f"/v1/sessions/{name}/generate", {"max_tokens": 5})["tokens"] for name in ("here", "there")
    ]
    assert more[0] == more[1]
