"""The session API over HTTP: files of sessions that were damaged are refused, or harm nobody else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tests.guest_api.conftest import LAYERS, PROMPT, WIDTH, Guest
from tests.guest_api.files import opened, safetensors, sealed, with_header

pytestmark = pytest.mark.usefixtures("bystander")


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
    return sealed(header, data)


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
        guest.refused(400, "POST", "/v1/sessions/import?id=damaged", sealed(less, data))
        if header[name]["dtype"] == "F32":
            wrong = header | {name: header[name] | {"dtype": "I32"}}
            guest.refused(400, "POST", "/v1/sessions/import?id=damaged", sealed(wrong, data))
        shape = header[name]["shape"]
        if len(shape) > 2:
            swapped = header | {name: header[name] | {"shape": [*shape[:-2], shape[-1], shape[-2]]}}
            guest.refused(400, "POST", "/v1/sessions/import?id=damaged", sealed(swapped, data))
    low, high = header["hidden"]["data_offsets"]
    broken = bytearray(data)
    broken[low:high] = struct.pack("<f", float("nan")) * ((high - low) // 4)
    guest.refused(400, "POST", "/v1/sessions/import?id=damaged", sealed(header, bytes(broken)))
    assert [s["id"] for s in guest.ok("GET", "/v1/sessions")["sessions"]] == ["bystander"]


def test_a_bit_that_was_lost_on_the_way_is_noticed(guest: Guest, exported: bytes) -> None:
    header, data = opened(exported)
    assert opened(sealed(header, data)) == (header, data)
    for name in ("hidden", "0.values", "random"):
        first, end = next(entry["data_offsets"] for key, entry in header.items() if key.endswith(name))
        flipped = bytearray(data)
        flipped[(first + end) // 2] ^= 1
        message = guest.refused(400, "POST", "/v1/sessions/import?id=flip", with_header(header, bytes(flipped)))
        assert "damaged" in message

    def told(change: Callable[[Any], None]) -> str:
        facts = json.loads(header["__metadata__"]["gpuckpt_session"])
        change(facts)
        other = header | {"__metadata__": {"gpuckpt_session": json.dumps(facts)}}
        return guest.refused(400, "POST", "/v1/sessions/import?id=flip", with_header(other, data))

    assert "damaged" in told(at("passes", to=7))
    assert "damaged" in told(at("digest", to="0" * 32))
    assert "no session" in told(lambda facts: facts.pop("digest"))


def test_files_of_others_may_tell_what_they_like(guest: Guest) -> None:
    """What a library writes beside its tensors is no JSON: {"format": "pt"}."""
    plain = safetensors({"v": ("F32", [WIDTH], struct.pack(f"<{WIDTH}f", *[0.5] * WIDTH))}, {"format": "pt"})
    guest.ok("PUT", "/v1/vectors/foreign", plain)
    guest.ok("DELETE", "/v1/vectors/foreign")
    assert "no session" in guest.refused(400, "POST", "/v1/sessions/import", plain)


def test_a_session_of_another_model_is_refused(guest: Guest, exported: bytes) -> None:
    other = changed(exported, at("model", to="0" * 32))
    assert "another model" in guest.refused(409, "POST", "/v1/sessions/import", other)
    plain = safetensors({"v": ("F32", [1], b"\0" * 4)})
    assert "no session" in guest.refused(400, "POST", "/v1/sessions/import", plain)
