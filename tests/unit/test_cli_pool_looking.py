"""``gpuckpt pool status``, ``ps``, ``top`` and ``events``: what is told, and how it looks on which terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from msgspec.structs import replace

from gpuckpt.cli import pool_view, render
from gpuckpt.service.view import GpuView, PoolView, UseView
from tests.command_line import ROOT
from tests.fake_guest import answer, hang_up
from tests.fake_pool import NOW, FakePool, event, model, replica, view
from tests.pool_commands import NASTY, STATE, as_json, completed, do, states


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


def test_of_several_gpus_each_has_its_bar(pool: FakePool) -> None:
    one = GpuView(uuid="GPU-a", name="NVIDIA H100", used=0, limit=4)
    pool.view = view(gpu=UseView(used=2, limit=8), gpus=[one, replace(one, uuid="GPU-b", used=2)])
    rows = [re.split("  +", line.rstrip()) for line in do("status").stdout.splitlines()]
    assert ["GPU 0", "░" * 24, "0 B of 4 B"] in rows and ["GPU 1", "█" * 12 + "░" * 12, "2 B of 4 B"] in rows
    assert not [row for row in rows if row[0] == "GPU"]
    pool.view = view(gpu=UseView(used=2, limit=4), gpus=[replace(one, used=2)])
    assert ["GPU", "█" * 12 + "░" * 12, "2 B of 4 B"] in [
        re.split("  +", line.rstrip()) for line in do("status").stdout.splitlines()
    ]


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
    return child.wait(timeout=60), shown.decode()


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


@contextlib.contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do this in a thread, while the body runs."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def told_the_past(pool: FakePool) -> bool:
    return any(what.startswith("GET /v1/events") for what in pool.answered)


def test_following_events_until_the_daemon_goes(pool: FakePool) -> None:
    def live() -> None:
        wait_until(lambda: told_the_past(pool))
        pool.happen(event(3, "woken", "qwen", "qwen.1"), event(4, "woken", "phi", "phi.1"))
        pool.go_down()

    with meanwhile(live):
        done = do("events", "--follow", "--limit", "1")
    assert done.returncode == 0 and "no more events" in done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["failed", "woken", "woken"]


def test_following_events_as_json_until_interrupted(pool: FakePool) -> None:
    def live() -> None:
        wait_until(lambda: told_the_past(pool))
        pool.happen(event(3, "woken", "qwen"), event(4, "woken", "phi"))
        wait_until(lambda: isinstance(sys.stdout, io.StringIO) and '"seq":3' in sys.stdout.getvalue().replace(" ", ""))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(live):
        done = do("events", "-f", "--model", "qwen", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["event"]["seq"] for one in documents] == [1, 3] and documents[0]["version"] == 1
