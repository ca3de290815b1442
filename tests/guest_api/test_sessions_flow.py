"""The session API over HTTP: generations that stop, go on, are paused, suspended, cancelled and listened to."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.guest_api.conftest import LAYERS, PROMPT, WIDTH, Guest, until
from tests.guest_api.files import opened

pytestmark = pytest.mark.usefixtures("bystander")
LONG = "import os, sys\n" * 300  # 1,500 tokens and more: a pass that takes a while


def _ids(guest: Guest, prompt: str) -> list[int]:
    """The tokens of a prompt, as an exported session has them."""
    path = guest.paused("tokens", 1, prompt=prompt)
    header, _ = opened(guest.data(f"{path}/export"))
    guest.ok("DELETE", path)
    tokens: list[int] = json.loads(header["__metadata__"]["gpuckpt_session"])["tokens"]
    return tokens


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
    shown = guest.ok("GET", path)
    assert (shown["state"], shown["text"], shown["generated"]) == ("idle", told["text"], 8)

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


def test_resume_answers_at_once_at_the_token_or_at_the_end(guest: Guest) -> None:
    expected = guest.tokens(PROMPT, 200)
    # So many tokens take so long that they are not at their end when the answer is made.
    path = guest.paused("waits", 2, tokens=8000)
    told = guest.ok("POST", f"{path}/resume", {"wait": "token"})
    assert told["state"] == "running" and told["tokens"][:1] == expected[:1]
    guest.ok("DELETE", path)
    path = guest.paused("at-once", 2, tokens=8000)
    assert guest.ok("POST", f"{path}/resume", {"wait": "none"})["state"] == "running"
    guest.ok("DELETE", path)
    path = guest.paused("end", 2, tokens=200)
    assert guest.ok("POST", f"{path}/resume", {})["tokens"] == expected


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
    path = guest.session("running")
    # More than it can write meanwhile, however long each of these requests takes.
    body = {"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True, "wait": False}
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
    told = guest.ok("POST", f"{path}/resume", {"wait": "token"})
    guest.ok("POST", f"{path}/cancel")
    until(lambda: guest.ok("GET", path)["state"] == "idle")
    guest.refused(409, "POST", f"{path}/pause", {})
    assert told["tokens"] == guest.tokens(PROMPT, len(told["tokens"]))


def test_a_pause_that_comes_too_late_stops_no_later_generation(guest: Guest) -> None:
    for number in range(20):
        path = guest.session(f"late-{number}")
        body = {"prompt": LONG, "max_tokens": 1, "breakpoints": [{"layer": 1, "once": True}]}
        assert guest.ok("POST", f"{path}/generate", body)["state"] == "paused"
        # The only pass of this generation is behind layer 0: it ends without a stop. It may have ended before it is
        # asked: then there is nothing to pause, and one more try is made.
        guest.ok("POST", f"{path}/resume", {"wait": "none"})
        answer = guest.send("POST", f"{path}/pause", {"layer": 0})
        if answer.status_code == 200:
            break
        assert answer.status_code == 409, answer.text
    shown = answer.json()
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
        for event in guest.events(f"{path}/events"):
            seen.append(event)  # others look at it meanwhile

    watcher = threading.Thread(target=watch)
    watcher.start()
    until(lambda: bool(seen))  # it listens: what its state was is its first event
    body = {"prompt": PROMPT, "max_tokens": 4, "ignore_eos": True, "breakpoints": [{"layer": 2, "phase": "prefill"}]}
    told = guest.ok("POST", f"{path}/generate", body)
    assert told["state"] == "paused"
    told = guest.ok("POST", f"{path}/resume", {})
    guest.ok("DELETE", path)
    watcher.join(60)
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
