"""``gpuckpt pool``: what all its commands have in common, and what a shell is told."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpuckpt.cli import cli
from gpuckpt.cli import pool as pool_cli
from tests.fake_guest import answer, hang_up
from tests.fake_pool import FakePool, refusal
from tests.pool_commands import NASTY, STATE, completed, do

HERE = {"check", "run", "install", "uninstall"}  # ask no daemon
ASKING = sorted(set(pool_cli.command.commands) - HERE)

# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*ASKING, "check"])
def test_help(word: str) -> None:
    shown = CliRunner().invoke(cli, ["pool", word, "--help"])
    assert shown.exit_code == 0 and shown.stderr == "" and shown.stdout.startswith("Usage: ")
    assert "--format" in shown.stdout and ("--socket" in shown.stdout or word == "check")


def test_the_list_of_commands_says_what_each_does() -> None:
    assert {"status", "ps", "top", "wake", "sleep", "scale", "drain", "reload", "events", "logs"} == set(ASKING)
    lines = CliRunner().invoke(cli, ["pool", "--help"]).stdout.partition("Commands:")[2].splitlines()
    assert not [line for line in lines if line.endswith("...") and line.split()[0] in ASKING]


def test_the_socket_is_an_option_or_a_variable(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert do("status").returncode == 0
    monkeypatch.setenv("GPUCKPT_POOL_SOCKET", "/nonexistent/x.sock")
    missing = do("status")
    assert missing.returncode == 12 and "/nonexistent/x.sock" in missing.stderr
    assert do("status", "--socket", str(pool.path)).returncode == 0
    monkeypatch.setenv("GPUCKPT_POOL_SOCKET", "")
    monkeypatch.setattr("gpuckpt.service.client.DEFAULT_SOCKET", pool.path)
    assert do("status").returncode == 0


CALLS = [
    ["status"],
    ["ps"],
    ["top", "--once"],
    ["wake", "qwen"],
    ["sleep", "qwen"],
    ["scale", "qwen", "1"],
    ["drain"],
    ["drain", "qwen"],
    ["reload"],
    ["events"],
    ["events", "--follow"],
]


@pytest.mark.parametrize("words", CALLS)
def test_without_a_daemon(pool: FakePool, words: list[str]) -> None:
    pool.close()
    pool.path.unlink()
    done = do(*words)
    assert done.returncode == 12 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: the warm pool does not run"
    assert "systemctl start gpuckpt-pool, or gpuckpt pool run" in done.stderr
    told = do(*words, "--format", "json")
    assert told.returncode == 12 and json.loads(told.stdout)["error"]["kind"] == "DaemonUnreachableError"


@pytest.mark.parametrize("words", CALLS)
@pytest.mark.parametrize("reply", [hang_up, b"no HTTP\r\n", answer(b"<html>"), answer(b"<html>", 500)])
def test_a_daemon_that_makes_no_sense(pool: FakePool, words: list[str], reply: Any) -> None:
    pool.otherwise = lambda what, data: reply  # type: ignore[method-assign]
    done = do(*words)
    assert done.returncode == 12 and done.stdout == "" and "remedy" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["wake"], 2, "MODEL"),
        (["sleep"], 2, "MODEL"),
        (["scale", "qwen"], 2, "N|auto"),
        (["scale", "qwen", "many"], 2, "many"),
        (["scale", "qwen", "-1"], 2, "-1"),
        (["scale", "qwen", "99"], 2, "0 to 2 replicas"),
        (["wake", "qwen", "--deadline", "soon"], 2, "soon"),
        (["wake", "qwen", "--deadline", "-1"], 2, "-1"),
        (["wake", "qwn"], 6, "did you mean qwen?"),
        (["wake", "qwen", "qwn"], 6, "did you mean qwen?"),
        (["drain", "phii"], 6, "did you mean phi?"),
        (["events", "--model", "phii"], 6, "did you mean phi?"),
        (["events", "--limit", "-1"], 2, "-1"),
        (["logs"], 2, "MODEL|REPLICA"),
        (["logs", "qwn"], 6, "did you mean qwen?"),
        (["status", "--format", "xml"], 2, "xml"),
        (["stauts"], 2, "stauts"),
    ],
)
def test_exit_codes_of_wrong_input(pool: FakePool, words: list[str], code: int, says: str) -> None:
    done = do(*words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and done.stdout == ""
    assert not [what for what, _ in pool.asked if what.startswith("POST /v1/models/qwen/wake")]


@pytest.mark.parametrize(("status", "code"), [(400, 2), (404, 6), (409, 7), (500, 1), (503, 7), (504, 13)])
def test_exit_codes_of_refusals(pool: FakePool, status: int, code: int) -> None:
    pool.on("POST /v1/models/qwen/wake", refusal(status, f"no: {NASTY}", cause="because", remedy="do"))
    done = do("wake", "qwen")
    assert done.returncode == code and "  why:    because\n  remedy: do\n" in done.stderr and "\x1b" not in done.stderr
    assert json.loads(do("wake", "qwen", "--format", "json").stdout)["error"]["message"] == f"no: {NASTY}"


# --- the shell --------------------------------------------------------------------------------------------------


def test_completion(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("pool", "sta") == ["status"]
    assert completed("pool", "wake", "q") == ["qwen"]
    assert completed("pool", "drain", "qwen", "p") == ["phi"]
    assert completed("pool", "logs", "qwen") == ["qwen", "qwen.1", "qwen.2"]
    assert completed("pool", "events", "--model", "l") == ["large"]
    monkeypatch.delenv("GPUCKPT_POOL_SOCKET")
    assert completed("pool", "scale", "--socket", str(pool.path), "b") == ["broken"]
    monkeypatch.setattr("gpuckpt.service.client.DEFAULT_SOCKET", Path("/nonexistent/x.sock"))
    assert completed("pool", "wake", "") == []


def test_completion_waits_for_nobody(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.cli.complete._LONGEST_WAIT", 0.1)
    over = threading.Event()

    def say_nothing(connection: socket.socket) -> None:
        over.wait(60)

    pool.on(STATE, say_nothing)
    begin = time.monotonic()
    try:
        assert completed("pool", "wake", "") == []
        assert time.monotonic() - begin < 50  # not 60
    finally:
        over.set()


def test_starting_stays_cheap() -> None:
    code = "import gpuckpt.cli.pool, sys; "
    code += "print(sorted({'msgspec', 'rich', 'gpuckpt.service', 'gpuckpt.config', 'gpuckpt.pool'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_asking_needs_no_more_than_the_client() -> None:
    code = "import gpuckpt.service.client, sys; "
    code += "print(sorted({'asyncio', 'http', 'ssl', 'rich', 'gpuckpt.pool', 'gpuckpt.golden'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
