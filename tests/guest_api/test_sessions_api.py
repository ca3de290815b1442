"""The session API over HTTP: the whole flow, then everything that clients do wrong, and bad luck.

After each test the server is healthy, and a session that had stopped before it writes what it would have written.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.guest_api.conftest import Guest, opened, safetensors, until, with_header

PROMPT = "def read(self):"
LONG = "import os, sys\n" * 300  # 1,500 tokens and more: a pass that takes a while
WIDTH = 256  # features of the model
LAYERS = 4


@pytest.fixture(scope="module")
def expected(guest: Guest) -> list[int]:
    """What the bystander is to write."""
    return guest.tokens("the bystander's prompt", 8)


@pytest.fixture(autouse=True)
def bystander(guest: Guest, expected: list[int]) -> Iterator[None]:
    """A stopped session that nobody touches. It must go on as if nothing had happened."""
    path = guest.paused("bystander", 2, prompt="the bystander's prompt")
    yield
    guest.clear("bystander")
    assert guest.ok("GET", "/health")["ok"] is True
    assert guest.process.poll() is None
    told = guest.ok("POST", f"{path}/resume", {})
    assert (told["state"], told["tokens"]) == ("done", expected)
    guest.clear()


def floats(file: bytes) -> list[float]:
    header, data = opened(file)
    (name,) = [key for key in header if key != "__metadata__"]
    assert header[name]["dtype"] == "F32"
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def hidden(values: list[float], shape: list[int]) -> bytes:
    return safetensors({"hidden": ("F32", shape, struct.pack(f"<{len(values)}f", *values))})


def _ids(guest: Guest, prompt: str) -> list[int]:
    """The tokens of a prompt, as an exported session has them."""
    path = guest.paused("tokens", 1, prompt=prompt)
    header, _ = opened(guest.data(f"{path}/export"))
    guest.ok("DELETE", path)
    tokens: list[int] = json.loads(header["__metadata__"]["gpuckpt_session"])["tokens"]
    return tokens


# ---------------------------------------------------------------------- the flow


def test_the_whole_flow(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.session("flow")
    assert guest.ok("GET", path)["state"] == "idle"
    told = guest.ok(
        "POST",
        f"{path}/generate",
        {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "breakpoints": [{"layer": [1, 2, 3], "step": 0}]},
    )
    read = told["prompt_tokens"]
    for layer in (1, 2, 3):
        assert told["state"] == "paused"
        pause = told["pause"]
        assert (pause["layer"], pause["layers"], pause["step"], pause["position"]) == (layer, LAYERS, 0, 0)
        assert pause["shape"] == [1, read, WIDTH]
        assert pause["checkpoint"]["bytes"] == read * WIDTH * 4
        assert [measured for measured, _ in pause["norms"]] == list(range(layer + 1))
        shown = guest.ok("GET", path)
        assert shown["state"] == "paused"
        assert shown["pause"]["breakpoint"] == pause["breakpoint"]
        # The copy is made by another thread: it may still be on its way.
        until(lambda: guest.ok("GET", path)["pause"]["checkpoint"]["complete_us"] is not None)
        lens = guest.ok("GET", f"{path}/lens?top=7")
        assert lens["layer"] == layer
        shares = [token["probability"] for token in lens["tokens"]]
        assert len(shares) == 7 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001
        told = guest.ok("POST", f"{path}/resume", {"wait": "end"})
    assert (told["state"], told["finish_reason"], told["tokens"]) == ("done", "length", expected)
    assert guest.ok("GET", path)["state"] == "idle"

    # The second turn reads what is new, and the last token of the first, which no pass has read yet.
    for breakpoint in guest.ok("GET", path)["breakpoints"]:
        guest.ok("DELETE", f"{path}/breakpoints/{breakpoint['id']}")
    alone = guest.session("alone")
    fresh = guest.ok("POST", f"{alone}/generate", {"token_ids": [50, 51, 52], "max_tokens": 1})
    assert fresh["prompt_tokens"] == 3
    second = guest.ok("POST", f"{path}/generate", {"token_ids": [50, 51, 52], "max_tokens": 4, "ignore_eos": True})
    assert second["prompt_tokens"] == 4
    shown = guest.ok("GET", path)
    assert (shown["turns"], shown["tokens"], shown["length"]) == (2, read + 8 + 3 + 4, read + 8 + 3 + 3)
    # And it writes what one writes that has never stopped, nor kept what it had read.
    prompt = told["prompt_tokens"]
    plain = guest.session("plain")
    guest.ok("POST", f"{plain}/generate", {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True})
    again = guest.ok("POST", f"{plain}/generate", {"token_ids": [50, 51, 52], "max_tokens": 4, "ignore_eos": True})
    assert again["tokens"] == second["tokens"]
    text = guest.ok(
        "POST",
        "/v1/completions",
        {
            "prompt": [*_ids(guest, PROMPT), *expected, 50, 51, 52],
            "max_tokens": 4,
            "temperature": 0,
            "ignore_eos": True,
        },
    )
    assert text["usage"]["prompt_tokens"] == prompt + 8 + 3
    assert text["choices"][0]["text"] == second["text"]
    assert guest.ok("DELETE", path)["ok"] is True
    guest.refused(404, "GET", path)


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


def test_resume_answers_at_once_at_the_token_or_at_the_end(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 200)
    path = guest.paused("waits", 2, tokens=200)
    assert guest.ok("POST", f"{path}/resume", {"wait": "token"})["tokens"][:1] == expected[:1]
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    path = guest.paused("at-once", 2, tokens=200)
    assert guest.ok("POST", f"{path}/resume", {"wait": "none"})["state"] == "running"
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    path = guest.paused("end", 2, tokens=200)
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected


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


def test_conditions(guest: Guest) -> None:
    tokens = guest.tokens(PROMPT, 12)
    path = guest.session("conditions")

    def stopped(condition: Any, **what: Any) -> Any:
        guest.ok("DELETE", path)
        guest.session("conditions")
        spec = {"layer": 2, "condition": condition, **what}
        body = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "breakpoints": [spec]}
        return guest.ok("POST", f"{path}/generate", body)

    # The pass that reads the fourth token that was written.
    first = tokens.index(tokens[3])
    told = stopped({"tokens": [tokens[3]]}, phase="decode")
    assert (told["state"], told["pause"]["step"]) == ("paused", first + 1)
    told = stopped({"norm_above": 0.0})
    norm = told["pause"]["norms"][-1][1]
    assert (told["state"], told["pause"]["step"]) == ("paused", 0)
    assert stopped({"norm_above": norm * 0.99, "norm_below": norm * 1.01})["pause"]["step"] == 0
    assert stopped({"norm_above": norm * 1000})["state"] == "done"
    # The entropy of 8,192 tokens is at most log(8192) = 9.01.
    assert stopped({"entropy_below": 9.1, "entropy_above": 0.0})["pause"]["step"] == 0
    done = stopped({"entropy_above": 9.1})
    assert (done["state"], done["tokens"]) == ("done", tokens)
    assert stopped({}, step=5)["pause"]["step"] == 5
    read = stopped({}, phase="decode")["pause"]["position"]
    assert stopped({}, position=read + 2)["pause"]["position"] == read + 2
    once = stopped({}, once=True)
    assert once["state"] == "paused"
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == tokens


def test_pausing_a_running_generation(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 400)
    path = guest.session("running")
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "wait": False}
    assert guest.ok("POST", f"{path}/generate", body)["state"] == "running"
    steps = []
    for layer in (None, 3, None, 0, 4):
        shown = guest.ok("POST", f"{path}/pause", {"layer": layer})
        assert shown["state"] == "paused"
        assert layer in (None, shown["pause"]["layer"])
        assert shown["breakpoints"] == []  # it holds once
        steps.append(shown["pause"]["step"])
        guest.refused(409, "POST", f"{path}/pause", {})
        assert guest.ok("POST", f"{path}/resume", {"wait": "none"})["state"] == "running"
    assert steps == sorted(steps)
    guest.ok("POST", f"{path}/pause", {})
    told = guest.ok("POST", f"{path}/resume", {})
    assert (told["state"], told["tokens"]) == ("done", expected)
    guest.refused(409, "POST", f"{path}/pause", {})


def test_a_pause_that_comes_too_late_stops_no_later_generation(guest: Guest) -> None:
    path = guest.session("late")
    guest.ok("POST", f"{path}/generate", {"prompt": LONG, "max_tokens": 1, "wait": False})
    # The only pass of this generation is behind layer 0 by now: it ends without a stop.
    until(lambda: guest.ok("GET", path)["state"] == "running")
    shown = guest.ok("POST", f"{path}/pause", {"layer": 0})
    assert shown["state"] == "idle"
    assert shown["breakpoints"] == []
    assert guest.ok("POST", f"{path}/generate", {"max_tokens": 2})["state"] == "done"


def test_suspend_and_resume(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.paused("sleeper", 2)
    assert guest.ok("POST", f"{path}/suspend")["state"] == "suspended"
    guest.refused(409, "POST", f"{path}/generate", {"prompt": "x"})
    guest.refused(409, "POST", f"{path}/cancel")
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected
    assert guest.ok("POST", f"{path}/suspend")["state"] == "suspended"
    guest.refused(409, "POST", f"{path}/generate", {"prompt": "x"})
    assert guest.ok("POST", f"{path}/resume", {})["state"] == "idle"
    guest.ok("DELETE", f"{path}/breakpoints/b1")
    assert guest.ok("POST", f"{path}/generate", {"max_tokens": 3})["state"] == "done"


def test_cancel(guest: Guest) -> None:
    path = guest.session("cancelled")
    body = {"prompt": PROMPT, "max_tokens": 5000, "ignore_eos": True, "wait": False}
    guest.ok("POST", f"{path}/generate", body)
    guest.refused(409, "POST", f"{path}/generate", {"prompt": "another"})
    until(lambda: guest.ok("GET", path)["generated"] > 3)
    guest.ok("POST", f"{path}/cancel")
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    shown = guest.ok("GET", path)
    assert shown["tokens"] - shown["length"] <= 1
    assert guest.ok("POST", f"{path}/generate", {"max_tokens": 2})["state"] == "done"
    # Of a stopped one, too. What it was reading it reads with the next generation.
    path = guest.paused("stopped", 2)
    assert guest.ok("POST", f"{path}/cancel")["state"] == "idle"
    told = guest.ok("POST", f"{path}/generate", {"max_tokens": 8, "ignore_eos": True, "breakpoints": []})
    while told["state"] == "paused":
        told = guest.ok("POST", f"{path}/resume", {})
    assert told["tokens"] == guest.tokens(PROMPT, 8)


def test_events(guest: Guest) -> None:
    path = guest.session("watched")
    seen: list[tuple[str, Any]] = []

    def watch() -> None:
        seen.extend(guest.events(f"{path}/events"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    until(lambda: bool(guest.ok("GET", path)["wire_bytes"]["sent"] > 1200))  # its first event is out
    body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "breakpoints": [{"layer": 2, "phase": "prefill"}]}
    told = guest.ok("POST", f"{path}/generate", body)
    assert told["state"] == "paused"
    told = guest.ok("POST", f"{path}/resume", {})
    guest.ok("DELETE", path)
    watcher.join(30)
    assert not watcher.is_alive()
    assert [name for name, _ in seen] == ["state", "paused", "resumed", *["token"] * 4, "done", "deleted"]
    assert [data["token"] for name, data in seen if name == "token"] == told["tokens"]
    assert "".join(data["text"] for name, data in seen if name == "token") == told["text"]
    assert seen[0][1]["id"] == "watched"


def test_a_streamed_generation_is_the_whole_one(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 8)
    path = guest.session("streamed")
    body = {"prompt": PROMPT, "max_tokens": 8, "stream": True, "ignore_eos": True, "logprobs": 2}
    seen = list(guest.events(f"{path}/generate", body | {"breakpoints": [{"layer": 1, "step": 3}]}))
    assert [name for name, _ in seen] == ["token"] * 3 + ["paused"]
    assert [data["token"] for _, data in seen[:-1]] == expected[:3]
    assert all(len(data["top_logprobs"]) == 2 for _, data in seen[:-1])
    told = guest.ok("POST", f"{path}/resume", {})
    assert told["tokens"] == expected
    assert [entry["token"] for entry in told["logprobs"]] == expected


def test_wire_bytes(guest: Guest) -> None:
    path = guest.paused("counted", 2)
    before = guest.ok("GET", path)["pause"]["wire_bytes"]
    file = guest.data(f"{path}/activation")
    after = guest.ok("GET", path)["pause"]["wire_bytes"]
    # The activation, and the first of the two looks at the session.
    assert len(file) < after["sent"] - before["sent"] < len(file) + 2500
    assert after["received"] == before["received"]
    guest.ok("PUT", f"{path}/activation", file)
    assert guest.ok("GET", path)["pause"]["wire_bytes"]["received"] - after["received"] == len(file)


def test_messages_are_read_once(guest: Guest) -> None:
    path = guest.session("talk")
    one = {"role": "user", "content": "Hi"}
    first = guest.ok("POST", f"{path}/generate", {"messages": [one], "max_tokens": 4, "ignore_eos": True})
    two = {"role": "user", "content": "And now?"}
    second = guest.ok("POST", f"{path}/generate", {"messages": [two], "max_tokens": 4, "ignore_eos": True})
    assert second["state"] == "done"
    shown = guest.ok("GET", path)
    assert shown["tokens"] == first["prompt_tokens"] + 4 + (second["prompt_tokens"] - 1) + 4


# ---------------------------------------------------------------------- bad input


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
    nested = {"__metadata__": {"pause": "[" * 100_000}, name: entry}
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
        "metadata that is no JSON": with_header({"__metadata__": {"pause": "{"}, name: entry}, data),
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


# ---------------------------------------------------------------------- files of sessions that were damaged


@pytest.fixture
def exported(guest: Guest) -> bytes:
    path = guest.paused("source", 1, 2, 3)
    file = guest.data(f"{path}/export")
    guest.ok("DELETE", path)
    return file


def changed(file: bytes, change: Callable[[Any], None]) -> bytes:
    """A session's file with other facts in it."""
    header, data = opened(file)
    facts = json.loads(header["__metadata__"]["gpuckpt_session"])
    change(facts)
    header["__metadata__"]["gpuckpt_session"] = json.dumps(facts)
    return with_header(header, data)


def at(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(facts: Any) -> None:
        *steps, last = path
        for step in steps:
            facts = facts[step]
        facts[last] = to

    return change


DAMAGES: dict[str, Callable[[Any], None]] = {
    "another version": at("version", to=2),
    "a number for a name": at("id", to=5),
    "a list for a name": at("id", to=[]),
    "a name that is none": at("id", to="../x"),
    "an endless length": at("length", to=float("inf")),
    "a length beyond the text": at("length", to=10**6),
    "a negative length": at("length", to=-1),
    "endless tokens": at("tokens", to=[float("inf")]),
    "tokens of another vocabulary": at("tokens", to=[10**6] * 4),
    "no tokens": at("tokens", to=[]),
    "tokens that are text": at("tokens", to="abcd"),
    "a cache of other layers": at("cache", to=[]),
    "a cache that says nothing": at("cache", to=[None] * LAYERS),
    "a temperature that is text": at("turn", "sampling", "temperature", to="hot"),
    "a temperature that is no number": at("turn", "sampling", "temperature", to=float("nan")),
    "a negative temperature": at("turn", "sampling", "temperature", to=-1.0),
    "a top_p of nothing": at("turn", "sampling", "top_p", to=0),
    "a top_k that is text": at("turn", "sampling", "top_k", to="x"),
    "sampling of another kind": at("turn", "sampling", to={"beam": 3}),
    "max_tokens that is text": at("turn", "max_tokens", to="many"),
    "scores of a negative number": at("turn", "top_scores", to=-1),
    "scores of text": at("turn", "top_scores", to="x"),
    "scores that do not match the tokens": at("turn", "scores", to=[[0.0, []]]),
    "a step that is text": at("turn", "step", to="x"),
    "a negative step": at("turn", "step", to=-1),
    "written tokens that are text": at("turn", "generated", to=["x"]),
    "written tokens of another vocabulary": at("turn", "generated", to=[10**9]),
    "stop strings that are numbers": at("turn", "stops", to=5),
    "no generation": at("turn", to=None),
    "no stop": at("pause", to=None),
    "a layer that is not there": at("pause", "layer", to=LAYERS + 1),
    "a layer that did not run": at("pause", "executed", to=3),
    "a stop elsewhere": at("pause", "position", to=1),
    "a stop with another number of tokens": at("pause", "tokens", to=1),
    "a stop with other steps": at("pause", "step", to=-5),
    "norms of layers that are text": at("pause", "norms", to=[["x", 1.0]]),
    "state handed on that is not there": at("pause", "carried", to=[["x", "y", 1]]),
    "an edit of another kind": at("edits", to=[{"kind": "melt"}]),
    "an edit that is no number": at(
        "edits", to=[{"kind": "scale", "layer": 1, "factor": float("nan"), "first": 0, "last": None, "name": "n"}]
    ),
    "a breakpoint at another layer": at("breakpoints", 0, "layer", to=LAYERS + 1),
    "a breakpoint in no phase": at("breakpoints", 1, "phase", to=7),
    "a breakpoint at a position that is text": at("breakpoints", 1, "position", to="x"),
    "a condition that is text": at("breakpoints", 1, "condition", "norm_above", to="x"),
    "a condition of another kind": at("breakpoints", 1, "condition", to={"moon": "full"}),
    "messages that are none": at("messages", to=[5]),
    "a negative number of passes": at("passes", to=-1),
    "facts that are a list": at("pause", to=[]),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_session_is_refused(guest: Guest, exported: bytes, damage: str) -> None:
    named = "" if "name" in damage else "?id=damaged"
    message = guest.refused(400, "POST", f"/v1/sessions/import{named}", changed(exported, DAMAGES[damage]))
    assert message
    assert [s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]] == ["bystander"]


def test_what_a_file_says_never_harms_those_that_share_a_batch(guest: Guest, exported: bytes) -> None:
    expected = guest.tokens(PROMPT, 400)
    # These are looked at in passes that read one token, which sessions share.
    later = {
        f"{name} later": [at("breakpoints", 1, "phase", to="decode"), at("breakpoints", 1, *path, to="x")]
        for name, path in {"a position": ("position",), "a norm": ("condition", "norm_above")}.items()
    }
    alone = {name: [damage] for name, damage in DAMAGES.items()}
    for name, damages in (later | alone).items():
        file = exported
        for damage in damages:
            file = changed(file, damage)
        if guest.send("POST", "/v1/sessions/import?id=poison", file).status_code != 201:
            continue
        # It was taken: then it may fail, but alone.
        path = guest.session("other")
        spec = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "wait": False}
        guest.ok("POST", f"{path}/generate", spec)
        stream = guest.events(f"{path}/events")
        next(stream)
        for _ in range(3):  # it has stopped up to two more times
            guest.send("POST", "/v1/sessions/poison/resume", {"wait": "end"})
        ended = next(data for event, data in stream if event == "done")
        assert (ended["reason"], ended["tokens"]) == ("length", len(expected)), f"{name}: {ended}"
        guest.clear("bystander")


def test_tensors_of_a_session_that_do_not_fit(guest: Guest, exported: bytes) -> None:
    header, data = opened(exported)
    names = [name for name in header if name != "__metadata__"]
    assert "hidden" in names and any(name.startswith("cache.") for name in names)
    for name in names:
        less = {key: value for key, value in header.items() if key != name}
        guest.refused(400, "POST", "/v1/sessions/import?id=damaged", with_header(less, data))
        if header[name]["dtype"] == "F32":
            wrong = header | {name: header[name] | {"dtype": "I32"}}
            guest.refused(400, "POST", "/v1/sessions/import?id=damaged", with_header(wrong, data))
        shape = header[name]["shape"]
        if len(shape) > 2:
            swapped = header | {name: header[name] | {"shape": [*shape[:-2], shape[-1], shape[-2]]}}
            guest.refused(400, "POST", "/v1/sessions/import?id=damaged", with_header(swapped, data))
    low, high = header["hidden"]["data_offsets"]
    broken = bytearray(data)
    broken[low:high] = struct.pack("<f", float("nan")) * ((high - low) // 4)
    guest.refused(400, "POST", "/v1/sessions/import?id=damaged", with_header(header, bytes(broken)))
    assert [s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]] == ["bystander"]


def test_a_session_of_another_model_is_refused(guest: Guest, exported: bytes) -> None:
    other = changed(exported, at("model", to="0" * 32))
    assert "another model" in guest.refused(409, "POST", "/v1/sessions/import", other)
    plain = safetensors({"v": ("F32", [1], b"\0" * 4)})
    assert "no session" in guest.refused(400, "POST", "/v1/sessions/import", plain)


# ---------------------------------------------------------------------- bad luck


def head(method: str, path: str, size: int, kind: str = "application/json") -> str:
    return f"{method} {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nContent-Length: {size}"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_its_generation(guest: Guest, stream: bool, reset: bool) -> None:
    path = guest.session("left")
    spec = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True, "stream": stream}
    body = json.dumps(spec).encode()
    guest.vanish(head("POST", f"{path}/generate", len(body)), body, read=1500 if stream else 0, reset=reset)
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    shown = guest.ok("GET", path)
    assert 0 < shown["tokens"] < 8000
    assert guest.ok("POST", f"{path}/generate", {"max_tokens": 2})["state"] == "done"


def test_a_client_that_vanishes_leaves_a_stopped_session_stopped(guest: Guest) -> None:
    path = guest.session("stopped")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "breakpoints": [{"layer": 2, "step": 0}]})
    guest.vanish(head("POST", f"{path}/generate", len(body)), body.encode(), reset=True)
    until(lambda: guest.ok("GET", path)["state"] == "paused")
    # One that waits at a resume, too: the generation is the session's, not that client's.
    guest.vanish(head("POST", f"{path}/resume", 2), b"{}", reset=True)
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    assert guest.ok("GET", path)["turns"] == 1


def test_a_client_that_vanishes_in_an_upload(guest: Guest) -> None:
    path = guest.paused("upload", 2)
    good = guest.data(f"{path}/activation")
    for method, where in (("PUT", f"{path}/activation"), ("POST", "/v1/sessions/import"), ("PUT", "/v1/vectors/half")):
        for reset in (False, True):
            guest.vanish(head(method, where, 50 << 20, "application/octet-stream"), good[:1000], reset=reset)
    guest.vanish(head("POST", f"{path}/steer", 500), b'{"edits": [', reset=True)
    assert guest.data(f"{path}/activation") == good
    assert guest.ok("GET", "/v1/vectors")["vectors"] == []


def test_a_listener_that_vanishes(guest: Guest) -> None:
    path = guest.session("heard")
    for _ in range(20):
        guest.vanish(f"GET {path}/events HTTP/1.1\nHost: localhost", read=100, reset=True)
    assert guest.ok("POST", f"{path}/generate", {"prompt": PROMPT, "max_tokens": 3})["state"] == "done"


def test_deleting_in_any_state(guest: Guest) -> None:
    guest.ok("DELETE", guest.paused("paused", 2))
    guest.refused(404, "GET", "/v1/sessions/paused")
    path = guest.paused("suspended", 2)
    guest.ok("POST", f"{path}/suspend")
    guest.ok("DELETE", path)
    # Running, alone and in a batch; who waits for them is answered.
    waiting = []
    with ThreadPoolExecutor(4) as pool:
        for number in range(4):
            path = guest.session(f"running-{number}")
            spec = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}
            waiting.append(pool.submit(guest.send, "POST", f"{path}/generate", spec))
        names = [f"running-{number}" for number in range(4)]
        until(lambda: all(guest.ok("GET", f"/v1/sessions/{name}")["generated"] > 2 for name in names))
        for name in names:
            guest.ok("DELETE", f"/v1/sessions/{name}")
        for answer in waiting:
            told = answer.result(30).json()
            assert (told["state"], told["finish_reason"]) == ("done", "cancelled")
    until(lambda: [s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]] == ["bystander"])


def test_a_session_deleted_while_clients_wait_at_its_stop(guest: Guest) -> None:
    path = guest.paused("waited", 2, tokens=8000)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(guest.send, "POST", f"{path}/resume", {"wait": "end"})
        until(lambda: guest.ok("GET", path)["state"] == "running")
        guest.ok("DELETE", path)
        assert answer.result(30).json()["finish_reason"] == "cancelled"


@pytest.mark.timeout(400)
def test_a_thousand_paused_sessions(guest: Guest) -> None:
    """Three times: the first fills what allocators keep, so the others must take next to nothing more."""
    expected = guest.tokens(PROMPT, 2)

    def begin(number: int) -> None:
        guest.paused(f"many-{number}", 2, tokens=2)

    def finish(number: int) -> None:
        path = f"/v1/sessions/many-{number}"
        if number % 2:
            assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected
        guest.ok("DELETE", path)

    kept = []
    slowest = 0.0
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(begin, range(1000)))
            assert guest.metrics()['gpuckpt_guest_sessions{state="paused"}'] == 1001
            assert len(guest.ok("GET", "/v1/sessions")["sessions"]) == 1001
            ending = pool.submit(lambda: list(map(finish, range(1000))))
            # Others are answered meanwhile.
            while not ending.done():
                began = time.monotonic()
                assert guest.tokens(PROMPT, 2) == expected
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.1)
            ending.result()
            kept.append(guest.memory())
    assert slowest < 5
    # A session keeps more than 60 KiB here: 2,000 of them, if they stayed, 120 MiB.
    assert kept[2] - kept[0] < 32 << 20, f"{[size >> 20 for size in kept]} MiB after each thousand"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(guest: Guest) -> None:
    """The server's limit is gigabytes: what says that it has more is refused by what it says."""
    path = guest.paused("large", 2)
    for method, where in (("PUT", f"{path}/activation"), ("POST", "/v1/sessions/import"), ("POST", "/v1/completions")):
        with socket.create_connection(("127.0.0.1", guest.port), timeout=10) as client:
            request = head(method, where, 1 << 45, "application/json").replace("\n", "\r\n")
            client.sendall(request.encode() + b"\r\n\r\n" + b" " * 1000)
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_pages_from_elsewhere_are_refused(guest: Guest) -> None:
    """A web page that somebody looks at on this machine must not reach a server that only listens here."""
    own = {"Origin": guest.base}
    assert requests.post(guest.base + "/v1/sessions", json={}, headers=own, timeout=30).status_code == 201
    for headers in ({"Origin": "https://elsewhere.example"}, {"Origin": "null"}, {"Host": "rebound.example:80"}):
        answer = requests.post(guest.base + "/v1/sessions", json={}, headers=headers, timeout=30)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "forbidden"
