"""The memory of sessions over HTTP: leaving, coming back, staying, and what outlives the server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest_api.conftest import PROMPT, Guest, serving, until

SMALL = ("--kv-mib", "6", "--kv-host-mib", "16", "--kv-disk-mib", "64", "--max-batch", "1")


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A server with room for a few sessions only, and a folder."""
    folder = tmp_path_factory.mktemp("small")
    with serving(model, folder / "log", *SMALL, "--kv-dir", str(folder / "kv")) as made:
        yield made


def generate(guest: Guest, path: str, **what: Any) -> Any:
    return guest.ok("POST", f"{path}/generate", {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, **what})


def test_more_sessions_than_memory_are_all_answered(small: Guest) -> None:
    names = [f"many-{number}" for number in range(14)]
    wanted = small.tokens(PROMPT, 6)
    for name in names:
        assert generate(small, small.session(name))["tokens"] == wanted
    told = small.ok("GET", "/v1/engine")["memory"]
    assert told["device"]["budget"] <= 6 << 20 and told["evicted"] > 0 and told["out"]["bytes"] > 0
    states = {small.ok("GET", f"/v1/sessions/{name}")["memory"]["state"] for name in names}
    assert states <= {"device", "away", "leaving", "dropped"} and len(states) > 1
    again = [generate(small, f"/v1/sessions/{name}")["tokens"] for name in names]
    assert all(tokens == again[0] for tokens in again)
    metrics = small.metrics()
    assert metrics["gpuckpt_guest_evicted_total"] > 0 and metrics["gpuckpt_guest_paged_out_bytes_total"] > 0
    small.clear()


def test_suspend_answers_when_it_has_left(small: Guest) -> None:
    path = small.session("leaves")
    generate(small, path)
    told = small.ok("POST", f"{path}/suspend")
    assert told["state"] == "suspended" and told["memory"]["state"] == "away"
    assert told["memory"]["bytes"]["device"] == 0 < told["memory"]["bytes"]["host"]
    assert small.ok("POST", f"{path}/suspend")["state"] == "suspended"  # it has left already
    told = small.ok("POST", f"{path}/prefetch", {"wait": True})
    assert (told["state"], told["memory"]["state"]) == ("idle", "device")
    assert small.ok("POST", f"{path}/prefetch")["memory"]["state"] == "device"
    small.clear()


def test_an_export_of_one_that_has_left_leaves_it_there(small: Guest) -> None:
    path = small.session("away")
    generate(small, path)
    here = small.data(f"{path}/export")
    small.ok("POST", f"{path}/suspend")
    before = small.ok("GET", "/v1/engine")["memory"]["in"]["bytes"]
    assert small.data(f"{path}/export") == here
    told = small.ok("GET", "/v1/engine")["memory"]
    assert told["in"]["bytes"] == before and small.ok("GET", path)["memory"]["state"] == "away"
    small.clear()


def test_pins_and_what_a_client_expects_are_shown(small: Guest) -> None:
    path = small.session("stays")
    generate(small, path)
    assert 500 < small.ok("POST", f"{path}/pin", {"seconds": 600})["memory"]["pinned"] <= 600
    assert small.ok("POST", f"{path}/pin", {"seconds": 0})["memory"]["pinned"] is None
    assert 500 < small.ok("POST", f"{path}/idle", {"seconds": 600})["memory"]["expected"] <= 600
    generate(small, path)
    assert small.ok("GET", path)["memory"]["expected"] is None  # it has come
    small.ok("POST", f"{path}/suspend")
    small.refused(409, "POST", f"{path}/pin", {"seconds": 1})
    for wrong in ({"seconds": -1}, {"seconds": 1e9}, {"seconds": "long"}, {}):
        small.refused(422, "POST", f"{path}/pin", wrong)
        small.refused(422, "POST", f"{path}/idle", wrong)
    small.refused(404, "POST", "/v1/sessions/nobody/prefetch")
    small.clear()


def test_what_cannot_fit_is_refused_before_it_is_read(small: Guest) -> None:
    longest = small.ok("GET", "/v1/engine")["limit"]
    assert longest == small.ok("GET", "/v1/engine")["memory"]["longest"]
    path = small.session("long")
    message = small.refused(400, "POST", f"{path}/generate", {"token_ids": [5] * (longest + 1), "max_tokens": 1})
    assert str(longest) in message
    small.clear()


def test_nothing_can_be_kept_without_a_folder(guest: Guest) -> None:
    path = guest.session("nowhere")
    assert "--kv-dir" in guest.refused(400, "POST", f"{path}/suspend", {"durable": True})
    guest.clear()


def _kept_and_killed(model: Path, tmp_path: Path, options: tuple[str, ...]) -> list[int]:
    """Sessions that were kept, and one that was not, of a server that is killed at work."""
    reached = False
    try:
        with serving(model, tmp_path / "one.log", *options) as first:
            wanted = first.tokens(PROMPT, 12)
            kept, stopped = first.session("kept"), first.paused("stopped", 2, tokens=12)
            assert generate(first, kept)["tokens"] == wanted[:6]
            for path in (kept, stopped):
                told = first.ok("POST", f"{path}/suspend", {"durable": True})
                assert told["state"] == "suspended" and told["memory"]["durable"]
            lost = first.session("lost")
            generate(first, lost)
            first.ok("POST", f"{lost}/suspend")
            # In the middle of leaving, and of going on with what was kept.
            first.ok("POST", f"{kept}/resume", {"wait": "paused"})
            generate(first, kept, wait=False, prompt="x", max_tokens=200)
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            reached = True
    except AssertionError:  # the server has ended
        if not reached:
            raise
    return wanted


def test_what_is_durable_outlives_a_killed_server(model: Path, tmp_path: Path) -> None:
    options = (*SMALL, "--kv-dir", str(tmp_path / "kv"))
    wanted = _kept_and_killed(model, tmp_path, options)
    with serving(model, tmp_path / "two.log", *options) as second:
        sessions = {one["id"]: one for one in second.ok("GET", "/v1/sessions")["sessions"]}
        assert set(sessions) == {"kept", "stopped"}
        assert all(one["state"] == "suspended" and one["memory"]["durable"] for one in sessions.values())
        assert second.ok("POST", "/v1/sessions/stopped/resume", {})["tokens"] == wanted
        second.ok("POST", "/v1/sessions/kept/resume", {"wait": "paused"})
        assert generate(second, "/v1/sessions/kept", prompt=None)["tokens"] == wanted[6:]
        # Deleted, it is gone for good.
        second.clear()
        folder = next((tmp_path / "kv").iterdir())
        until(lambda: not list(folder.glob("*.block")) and not list((folder / "sessions").iterdir()))


def test_two_servers_do_not_share_a_folder(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "one.log", *SMALL, "--kv-dir", str(tmp_path / "kv")):
        with (
            pytest.raises(AssertionError),
            serving(model, tmp_path / "two.log", *SMALL, "--kv-dir", str(tmp_path / "kv")),
        ):
            pass
        assert "another server keeps its sessions" in (tmp_path / "two.log").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kv-mib", "0"), "--kv-mib: '0' is none of 1, 2, 3"),
        (("--kv-host-mib", "-4"), "argument --kv-host-mib"),
        (("--kv-mib", "99999999"), "--kv-mib and --kv-host-mib ask for"),
        (("--kv-disk-mib", "64"), "say where with --kv-dir"),
        (("--kv-dir", "/etc/passwd"), "sessions cannot be kept in /etc/passwd"),
        (("--weights-mib", "1"), "hold less than two layers"),
    ],
)
def test_wrong_budgets_are_refused(model: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(AssertionError), serving(model, tmp_path / "log", *options):
        pass
    assert said in (tmp_path / "log").read_text()
