"""``gpuckpt pool``: what is asked of the daemon, what is printed where, and how it ends when something is wrong."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from msgspec.structs import replace

from gpuckpt.cli import cli, pool_view, render
from gpuckpt.cli import pool as pool_cli
from gpuckpt.golden.replica import Replica
from gpuckpt.service.view import PoolView, UseView
from gpuckpt.store.layout import Layout
from tests.command_line import ROOT, Done, run
from tests.fake_guest import answer, hang_up
from tests.fake_pool import NOW, FakePool, event, fake_pool, model, raw, refusal, replica, view
from tests.fakes import publish

HERE = {"check", "run", "install", "uninstall"}  # ask no daemon
ASKING = sorted(set(pool_cli.command.commands) - HERE)
STATE = "GET /v1/state"
NASTY = "a\x1b[2J\x9b\r\n\u202e[bold]x[/]"


@pytest.fixture
def pool(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePool]:
    """The daemon that the environment names."""
    with fake_pool() as made:
        monkeypatch.setenv("GPUCKPT_POOL_SOCKET", str(made.path))
        monkeypatch.setattr("gpuckpt.cli.pool._PAUSE", 0.01)
        monkeypatch.setattr("gpuckpt.cli.pool_logs._PAUSE", 0.01)
        yield made


def do(*words: str) -> Done:
    return run("pool", *words)


def as_json(*words: str) -> Any:
    done = do(*words, "--format", "json")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document.pop("version") == 1
    return document


def states(pool: FakePool, *views: PoolView) -> None:
    """Have the daemon tell these, one after the other; and a Ctrl-C come behind the last one."""
    left = list(views)

    def tell(connection: socket.socket) -> None:
        connection.sendall(raw(left.pop(0) if left else views[-1]))
        if not left:
            os.kill(os.getpid(), signal.SIGINT)

    pool.on(STATE, tell)


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


# --- looking ----------------------------------------------------------------------------------------------------


def test_status(pool: FakePool) -> None:
    done = do("status")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "ready for 2 h 13 min · 127.0.0.1:8400 · process 4242 · gpuckpt 0.1.0"
    rows = [re.split("  +", line.rstrip()) for line in lines]
    assert ["replicas", "█████" + "░" * 19, "3.0 GiB of 14.0 GiB"] in rows
    assert ["goldens in tmpfs", "█" * 22 + "░░", "9.0 GiB of 10.0 GiB"] in rows
    assert "GPU" not in done.stdout  # there is none
    assert ["qwen", "hot", "1 hot, 1 restoring", "9", "3", "300.0 MiB", "tmpfs 1.0 GiB", "1.0 s ago"] in rows
    assert ["large", "disk", "–", "0", "0", "–", "disk 2.0 GiB", "–"] in rows
    assert lines[-1] == "broken: golden x could not be made; next try in 30 s"


def test_status_as_json_is_the_view(pool: FakePool) -> None:
    assert as_json("status") == {"pool": msgspec.to_builtins(pool.view)}
    assert msgspec.convert(as_json("status")["pool"], PoolView) == pool.view


def test_a_pool_without_models(pool: FakePool) -> None:
    nothing = UseView(used=0, limit=0)
    pool.view = replace(view(), models=[], events=[], ttft={}, gpu=nothing, listen=[])
    done = do("status")
    assert done.returncode == 0 and "MODEL" not in done.stdout and "no models" in done.stderr
    assert do("ps").stdout == "" and "no replicas" in do("ps").stderr
    assert do("top", "--once").returncode == 0
    assert as_json("ps") == {"replicas": []}


def test_a_model_that_was_scaled(pool: FakePool) -> None:
    pool.view = view(model("m", "hot", replicas=[replica("m.1")], scale=2))
    assert "1 hot (of 2)" in do("status").stdout


def test_a_budget_that_is_spent(pool: FakePool) -> None:
    pool.view = view(gpu=UseView(used=9, limit=4), memory=UseView(used=1, limit=1 << 40))
    rows = [re.split("  +", line.rstrip()) for line in do("status").stdout.splitlines()]
    assert ["GPU", "█" * 24, "9 B of 4 B"] in rows
    assert ["replicas", "█" + "░" * 23, "1 B of 1024.0 GiB"] in rows  # what is used is seen


def test_ps(pool: FakePool) -> None:
    done = do("ps")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["REPLICA", "MODEL", "PHASE", "REQUESTS", "MEMORY", "PID", "FOR"]
    assert rows[1] == ["qwen.1", "qwen", "hot", "3", "300.0", "MiB", "4100", "12", "s"]
    assert rows[2] == ["qwen.2", "qwen", "restoring", "0", "0", "B", "–", "0.4", "s"]
    held = as_json("ps")["replicas"]
    assert [(one["model"], one["name"], one["phase"]) for one in held][:2] == [
        ("qwen", "qwen.1", "hot"),
        ("qwen", "qwen.2", "restoring"),
    ]
    pool.view = view(model("m", replicas=[replica("m.1", gpu=8 << 30)]))
    assert "GPU" in do("ps").stdout and "8.0 GiB" in do("ps").stdout


def test_top_shows_what_status_does_and_what_happens(pool: FakePool) -> None:
    shown = do("top", "--once").stdout
    assert shown.startswith(do("status").stdout)
    assert re.search(r"hot +100 +21.0 ms +0.480 s", shown)
    assert re.search(r"restored     qwen.1  0.262 s\n.*failed       broken  it died\n", shown)
    assert as_json("top", "--once") == as_json("status")


def test_top_goes_on_until_it_is_interrupted(pool: FakePool) -> None:
    states(pool, *[pool.view] * 4)
    done = do("top")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("ready for 2 h 13 min") > 2 and "\x1b" not in done.stdout
    states(pool, *[pool.view] * 4)
    documents = [json.loads(line) for line in do("top", "--format", "json").stdout.splitlines()]
    assert len(documents) > 2 and documents[0] == {"version": 1, "pool": msgspec.to_builtins(pool.view)}


def test_top_without_a_terminal_ends_with_the_daemon(pool: FakePool) -> None:
    pool.on(STATE, answer(msgspec.json.encode(pool.view)), hang_up)
    done = do("top")
    assert done.returncode == 12 and done.stdout.count("MODEL") == 1


def on_a_terminal(*words: str, columns: int, until: str = "", **environ: str) -> tuple[int, str]:
    """The exit code of a command, and what a terminal got of it; a Ctrl-C follows on the words ``until``."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-m", "gpuckpt", "pool", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end was closed
        while data := os.read(terminal, 1 << 16):
            shown += data
            if until and until.encode() in shown:
                child.send_signal(signal.SIGINT)
                until = ""
    os.close(terminal)
    return child.wait(timeout=30), shown.decode()


def test_top_on_a_terminal(pool: FakePool) -> None:
    state = answer(msgspec.json.encode(pool.view))
    pool.on(STATE, state, hang_up)
    code, shown = on_a_terminal("top", columns=100, until="this is from")
    assert code == 0
    begin, end = "\x1b[?1049h", "\x1b[?1049l"
    assert shown.startswith(begin) and shown.rstrip().endswith(end)  # the terminal is as it was before
    assert "\x1b[1;32mready\x1b[0m" in shown and "300.0 MiB" in shown
    assert "does not answer; this is from" in shown  # it may be starting again
    pool.on(STATE, state)
    code, shown = on_a_terminal("top", columns=100, until="FIRST TOKEN", NO_COLOR="1")
    assert code == 0 and not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_narrow_terminals(pool: FakePool, columns: int) -> None:
    for words in (["status"], ["ps"], ["top", "--once"]):
        code, shown = on_a_terminal(*words, columns=columns, NO_COLOR="1", COLUMNS=str(columns))
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines()
        assert code == 0 and max(map(len, lines)) <= columns
        assert "qwen" in shown and "…" not in shown
        if columns >= 80:
            assert any(re.match(r"(qwen +hot|qwen.1 +qwen +hot)", line) for line in lines)


def test_a_terminal_that_knows_no_blocks(pool: FakePool) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "gpuckpt", "pool", "status"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "#####..................." in done.stdout


def test_no_color(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in do("status").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in do("status").stdout


def test_names_and_words_of_strangers_command_no_terminal(pool: FakePool) -> None:
    one = model(NASTY, NASTY, trouble=NASTY, replicas=[replica(NASTY, NASTY)])
    happened = event(9, NASTY, NASTY, NASTY, reason=NASTY)
    pool.view = view(one, version=NASTY, state=NASTY, listen=[NASTY], events=[happened])
    pool.happened = [happened]
    for words in (["status"], ["ps"], ["top", "--once"], ["events"], ["wake", NASTY], ["scale", NASTY, "1"]):
        done = do(*words)
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout + done.stderr) & set("\x1b\x9b\r\u202e")
        assert "[bold]x[/]" in done.stdout.replace("\n", "")
    assert as_json("status")["pool"]["models"][0]["name"] == NASTY
    assert completed("pool", "wake", "") == []
    shown = do("wake", "x" + NASTY)
    assert shown.returncode == 6 and not set(shown.stderr) & set("\x1b\x9b\r\u202e")


def test_times_and_lines() -> None:
    told = {value: pool_view.span(value) for value in (-1, 0.44, 9.96, 59.6, 61, 3600, 7261, 90000, 864061)}
    assert list(told.values()) == [
        "0.0 s",
        "0.4 s",
        "10.0 s",
        "1 min",
        "1 min 1 s",
        "1 h",
        "2 h 1 min",
        "1 d 1 h",
        "10 d",
    ]
    assert pool_view.span(90000, 1) == "1 d"
    assert pool_view.counted([replica("a", "standby"), replica("b", "odd"), replica("c")]) == "1 hot, 1 standby, 1 odd"
    assert pool_view.event_line(event(1, "woken", "m", "other.1")).endswith("woken        m other.1")
    line = pool_view.event_line(event(1, "restored", "m", "m.1", seconds=0.25, tier="disk", reason="asked"))
    assert line.endswith("restored     m.1  0.250 s from disk  asked")
    assert render.one_line("a\tb\nc") == "a b�c"


# --- events -----------------------------------------------------------------------------------------------------


def test_events(pool: FakePool) -> None:
    pool.happen(event(3, "reloaded"), event(4, "woken", "qwen", "qwen.1", seconds=0.0213, reason="asked"))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW - 96))
    lines = do("events").stdout.splitlines()
    assert len(lines) == 4 and lines[-1] == f"{when}  woken        qwen.1  21.3 ms  asked"
    assert lines[2].endswith("  reloaded")
    assert do("events", "--limit", "1").stdout.splitlines() == lines[-1:]
    assert do("events", "--limit", "0").stdout == ""
    assert do("events", "--model", "broken").stdout.splitlines() == [lines[1]]
    assert [one["seq"] for one in as_json("events", "--model", "qwen")["events"]] == [1, 4]
    pool.happened.clear()
    nothing = do("events")
    assert nothing.returncode == 0 and nothing.stdout == "" and "nothing has happened" in nothing.stderr


def test_following_events_until_the_daemon_goes(pool: FakePool) -> None:
    def live() -> None:
        pool.happen(event(3, "woken", "qwen", "qwen.1"), event(4, "woken", "phi", "phi.1"))
        pool.go_down()

    threading.Timer(0.3, live).start()
    done = do("events", "--follow", "--limit", "1")
    assert done.returncode == 0 and "no more events" in done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["failed", "woken", "woken"]


def test_following_events_as_json_until_interrupted(pool: FakePool) -> None:
    threading.Timer(0.2, lambda: pool.happen(event(3, "woken", "qwen"), event(4, "woken", "phi"))).start()
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    done = do("events", "-f", "--model", "qwen", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["event"]["seq"] for one in documents] == [1, 3] and documents[0]["version"] == 1


# --- acting -----------------------------------------------------------------------------------------------------


def test_wake(pool: FakePool) -> None:
    done = do("wake", "phi", "qwen", "phi")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "phi: gold.1 is hot, from its golden in the tmpfs in 21.3 ms\nqwen: qwen.1 was hot already\n"
    assert as_json("wake", "broken", "--deadline", "9") == {
        "woken": [{"replica": "x.1", "tier": "cold", "seconds": 0.0213, "model": "broken"}]
    }
    assert pool.bodies("POST /v1/models/broken/wake") == [{"deadline": 9.0}]


def test_an_alias_is_known(pool: FakePool) -> None:
    assert do("wake", "gpt-4o-mini", "phi").returncode == 0


def test_sleep(pool: FakePool) -> None:
    pool.view = view(
        model("a", replicas=[replica("a.1"), replica("a.2")]), model("b", replicas=[replica("b.1", "standby")])
    )
    assert do("sleep", "a", "b").stdout == "a: freezing a.1, a.2\nb: nothing to do\n"
    assert as_json("sleep", "a") == {"slept": [{"model": "a", "frozen": ["a.1", "a.2"]}]}
    nothing = do("sleep", "b")
    assert nothing.returncode == 3 and nothing.stdout == "" and "no replica of b is hot and without" in nothing.stderr
    assert as_json("sleep", "b", "--release") == {"slept": [{"model": "b", "stopped": ["b.1"]}]}
    assert do("sleep", "a", "--release").stdout == "a: removing a.1, a.2\n"
    assert do("sleep", "a", "--release").returncode == 3


def test_scale(pool: FakePool) -> None:
    assert do("scale", "qwen", "2").stdout == "qwen: keeps 2 hot replicas\n"
    assert do("scale", "qwen", "auto").stdout == "qwen: keeps as many hot replicas as its rules say\n"
    assert as_json("scale", "qwen", "0") == {"model": "qwen", "replicas": 0}
    assert pool.bodies("POST /v1/models/qwen/scale") == [{"replicas": 2}, {"replicas": None}, {"replicas": 0}]


def test_drain_of_models(pool: FakePool) -> None:
    assert as_json("drain", "qwen") == {"drained": [{"model": "qwen", "stopped": ["qwen.1"]}]}
    llama = "Llama/Llama-3.2-1B-Instruct"
    assert do("drain", "phi", llama).stdout == (
        f"phi: takes no more requests\n{llama}: takes no more requests; removing llama.1 behind the requests at work\n"
    )
    assert pool.view.state == "ready" and do("status").stdout.count(" drained ") == 3


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "typed", "code"), [([], "y\n", 0), ([], "n\n", 3), ([], "\n", 3), ([], "", 130), (["--yes"], "", 0)]
)
def test_drain_of_everything_asks_on_a_terminal(
    pool: FakePool, monkeypatch: pytest.MonkeyPatch, words: list[str], typed: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal(typed))
    done = do("drain", *words)
    assert done.returncode == code
    assert ("with 5 models and 12 requests?" in done.stderr) == (not words)
    assert (pool.view.state == "draining") == (code == 0)


def test_drain_of_everything_asks_no_script(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert as_json("drain") == {} and pool.view.state == "draining"


def test_reload(pool: FakePool) -> None:
    done = do("reload")
    assert (done.stdout, done.stderr) == ("added: new\nchanged: qwen, phi\n", "note: listen: restart\n")
    assert as_json("reload") == {
        "added": ["new"],
        "removed": [],
        "changed": ["qwen", "phi"],
        "notes": ["listen: restart"],
    }
    pool.on("POST /v1/reload", answer({"added": [], "removed": [], "changed": [], "notes": []}))
    assert "no model has changed" in do("reload").stderr
    pool.on("POST /v1/reload", refusal(400, "models.x.pin cannot be 3 (/etc/gpuckpt/pool.toml:7)"))
    assert do("reload").returncode == 2


# --- logs -------------------------------------------------------------------------------------------------------


class _Servers:
    """Containers of which each look finds four letters more printed; they end with their logs."""

    def __init__(self) -> None:
        self.looks: dict[str, int] = {}

    def logs(self, container: str, *, most: int | None = None) -> str:
        self.looks[container] = self.looks.get(container, 0) + 1
        letter = container[-1]
        return f"{letter}0\n{letter}1\n{letter}2\n"[: 4 * self.looks[container]]

    def status(self, container: str) -> str:
        return "running" if self.looks.get(container, 0) < 2 else "exited"


@pytest.fixture
def servers(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> _Servers:
    """What replicas print; those that are recorded are q.1, q.2 and lone."""
    made = _Servers()
    for name in ("q.1", "q.2", "lone"):
        folder = machine.replicas / name
        folder.mkdir()
        Replica(name, "gold", folder, state="ready").save()
    work = SimpleNamespace(layout=machine, containers=made)
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: work)
    monkeypatch.setattr("gpuckpt.golden.replica.status", lambda _, one: made.status(one.container))
    return made


@pytest.fixture
def qwen(pool: FakePool, servers: _Servers) -> FakePool:
    pool.view = view(
        model("qwen", aliases=["q"], replicas=[replica("q.1"), replica("q.2"), replica("q.3", "restoring")])
    )
    return pool


def test_logs_of_a_model(qwen: FakePool, servers: _Servers) -> None:
    servers.looks = {"gpuckpt-q.1": 9, "gpuckpt-q.2": 9}
    lines = [f"q.{n} │ {n}{line}" for n in (1, 2) for line in range(3)]
    assert do("logs", "qwen").stdout.splitlines() == lines == do("logs", "q").stdout.splitlines()
    assert do("logs", "qwen", "-n", "1").stdout.splitlines() == [lines[2], lines[5]]
    assert as_json("logs", "qwen", "-n", "1") == {
        "logs": [{"replica": "q.1", "lines": ["12"]}, {"replica": "q.2", "lines": ["22"]}]
    }


def test_logs_of_a_replica(qwen: FakePool, servers: _Servers) -> None:
    servers.looks = {"gpuckpt-q.2": 9}
    assert do("logs", "q.2").stdout == "20\n21\n22\n"
    assert do("logs", "q.3").returncode == 6  # it has no record yet
    qwen.close()
    alone = do("logs", "lone")
    assert alone.returncode == 0 and alone.stdout == "e0\ne"
    assert do("logs", "qwen").returncode == 12 and do("logs", "a/b").returncode == 12


def test_logs_of_a_model_without_replicas(qwen: FakePool) -> None:
    qwen.view = view(model("qwen", trouble="it died"))
    done = do("logs", "qwen")
    assert done.returncode == 3 and "it died" in done.stderr and "gpuckpt logs --failed gold" in done.stderr


def test_following_the_log_of_a_replica(qwen: FakePool) -> None:
    refused = do("logs", "qwen", "--follow", "--format", "json")
    assert refused.returncode == 2 and "exclude" in refused.stdout
    done = do("logs", "q.2", "--follow")
    assert done.returncode == 0 and done.stdout == "20\n21\n22\n"


def test_following_the_logs_of_a_model(qwen: FakePool, machine: Layout) -> None:
    """Lines stay whole, and replicas that come later are followed, too."""
    states(qwen, *[view(model("qwen", replicas=[replica("q.1")]))] * 3, *[qwen.view] * 8)
    done = do("logs", "qwen", "--follow")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"q.{n} │ {n}{line}" for n in (1, 2) for line in range(3)]


# --- check ------------------------------------------------------------------------------------------------------

CONFIG = """
[front]
listen = ["127.0.0.1:9000"]
[budget]
memory = "8G"
[models.gold]
aliases = ["gpt-4o-mini"]
max_replicas = 3
schedule = ["Mon-Fri 08:00-18:00", "22:00-02:00", "Sat,Sun 10:00-12:00"]
[models."org/b:7"]
golden = "b"
pin = "hot"
idle_freeze = "90s"
[models.c]
create = ["--", "serve"]
"""


@pytest.fixture
def config(machine: Layout, tmp_path: Path) -> Path:
    publish(machine)
    file = tmp_path / "pool.toml"
    file.write_text(CONFIG)
    return file


def test_check(config: Path, machine: Layout) -> None:
    done = do("check", str(config))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [re.split("  +", line.strip()) for line in lines]
    assert lines[0] == f"{config}: 3 models, listens on 127.0.0.1:9000"
    assert ["memory", "8.0 GiB", "the file says so"] in rows
    assert ["MODEL", "GOLDEN", "KEPT", "MOST", "EACH", "FREEZE", "RELEASE", "PIN"] in rows
    assert ["gold", "tmpfs", "0", "3", "8", "1 min", "10 min", "no"] in rows and ["gpt-4o-mini"] in rows
    assert ["org/b:7", "b: missing", "0", "1", "8", "1 min 30 s", "10 min", "hot"] in rows
    assert ["c", "to be made", "0", "1", "8", "1 min", "10 min", "no"] in rows
    assert lines[-1] == "gold: kept ready Mon-Fri 08:00-18:00, 22:00-02:00, Sat,Sun 10:00-12:00"
    assert done.stderr == "org/b:7: there is no golden b; gpuckpt create b …, or create = […]\n"


def test_check_as_json(config: Path) -> None:
    done = do("check", str(config), "--format", "json")
    document = json.loads(done.stdout)
    assert document["version"] == 1 and document["file"] == str(config)
    assert document["budget"]["memory"] == 8 << 30 and document["budget"]["store"] > 0
    gold, b, c = (document["models"][name] for name in ("gold", "org/b:7", "c"))
    assert gold["tiers"] == ["tmpfs"] and gold["schedule"][0] == "Mon-Fri 08:00-18:00" and gold["max_replicas"] == 3
    assert b["golden"] == "b" and b["tiers"] == [] and b["pin"] == "hot" and c["create"] == ["--", "serve"]
    assert document["front"]["listen"] == ["127.0.0.1:9000"] and document["health"]["failures"] == 3


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[modls.x]", 2, "pool.toml:1"),
        ("[models.x]\nidle_frez = 3", 2, "did you mean models.x.idle_freeze?"),
        ("\n[models.x]\npin = 3", 2, "pool.toml:3"),
        ("[models.x\n", 2, "line 1"),
        (None, 6, "example.toml"),
    ],
)
def test_a_wrong_configuration(machine: Layout, tmp_path: Path, text: str | None, code: int, says: str) -> None:
    file = tmp_path / "pool.toml"
    if text is not None:
        file.write_text(text)
    done = do("check", str(file))
    assert done.returncode == code and says in done.stderr and done.stdout == "" and "--config" not in done.stderr


def test_check_needs_no_daemon_and_tells_none(config: Path, pool: FakePool) -> None:
    assert do("check", str(config)).returncode == 0 and pool.asked == []


def test_check_reads_the_example_and_an_empty_file(machine: Layout, tmp_path: Path) -> None:
    example = ROOT / "gpuckpt/pool/example.toml"
    assert do("check", str(example)).returncode == 0
    (tmp_path / "pool.toml").touch()
    assert "0 models" in do("check", str(tmp_path / "pool.toml")).stdout


def test_check_by_who_may_not_look_into_the_store(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Layout, name: str) -> dict[str, Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Layout, "tiers", refuse)
    done = do("check", str(config))
    assert done.returncode == 0 and re.search(r"gold +\? ", done.stdout) and done.stderr == ""


# --- the shell --------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What a shell is told for the last of ``words``, as the program finds it out."""
    *before, incomplete = words
    return [item.value for item in ShellComplete(cli, {}, "gpuckpt", "_X").get_completions(before, incomplete)]


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
        over.wait(5)

    pool.on(STATE, say_nothing)
    begin = time.monotonic()
    assert completed("pool", "wake", "") == []
    assert time.monotonic() - begin < 3
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
