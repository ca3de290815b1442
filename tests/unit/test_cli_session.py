"""``gpuckpt session``: what is asked of the guest, what is printed where, and how it ends when something is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from gpuckpt.cli import cli, session, session_view
from gpuckpt.golden.replica import Replica
from gpuckpt.sessions import Tensor, tensors
from gpuckpt.store.layout import Layout
from gpuckpt.workload.base import SOCKET_NAME
from tests.command_line import Done, run
from tests.fake_guest import (
    DONE,
    ENGINE,
    IDLE,
    PAUSED,
    RESULT,
    SESSION,
    TOKEN,
    FakeGuest,
    answer,
    hang_up,
    problem,
    stream,
)

SUBCOMMANDS = sorted(session.command.commands)
START = "POST /v1/sessions"
GENERATE = "POST /v1/sessions/demo/generate"
SHOW = "GET /v1/sessions/demo"
DELETE = "DELETE /v1/sessions/demo"


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Layout]:
    """Folders of our own, with a path so short that a replica's socket fits."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith("GPUCKPT_")]:
            monkeypatch.delenv(name)
        made = Layout(Path(folder, "store"), Path(folder, "s"), Path(folder, "run"))
        for key, path in {"STORE__PATH": made.store, "PATHS__STATE": made.state, "PATHS__RUN": made.run}.items():
            monkeypatch.setenv(f"GPUCKPT_{key}", str(path))
        Path(folder, "empty.toml").touch()
        monkeypatch.setenv("GPUCKPT_CONFIG", str(Path(folder, "empty.toml")))
        made.prepare()
        yield made


@pytest.fixture
def guest(layout: Layout) -> Iterator[FakeGuest]:
    """The guest in the replica ``one``."""
    made = replica(layout, "one")
    made.sockets.mkdir()
    served = FakeGuest(made.sockets / SOCKET_NAME)
    try:
        yield served
    finally:
        served.close()


def replica(layout: Layout, name: str, state: str = "ready") -> Replica:
    folder = layout.replicas / name
    folder.mkdir()
    made = Replica(name, "gold", folder, state=state)
    made.save()
    return made


def do(*words: str) -> Done:
    return run("session", *words)


def as_json(*words: str) -> Any:
    done = do(*words, "--format", "json")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document.pop("version") == 1
    return document


# --- which guest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", SUBCOMMANDS)
def test_help(word: str) -> None:
    shown = CliRunner().invoke(cli, ["session", word, "--help"])
    assert shown.exit_code == 0 and shown.stderr == "" and shown.stdout.startswith("Usage: ")
    assert "REPLICA" in shown.stdout and "--address" in shown.stdout and "--format" in shown.stdout


def test_a_replica_is_found_by_its_name_and_a_guest_by_its_address(guest: FakeGuest) -> None:
    guest.on(SHOW, answer(SESSION))
    by_name = as_json("show", "one", "demo")
    assert by_name == as_json("show", "demo", "--address", f"unix:{guest.path}") == {"session": SESSION}
    assert by_name == as_json("show", f"--address=unix:{guest.path}", "demo")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["show", "two", "demo"], 6, "no replica named two"),
        (["show", "../two", "demo"], 2, "cannot be a name"),
        (["ls", "waits"], 12, "does not run"),
        (["ls", "dead"], 12, "does not answer"),
        (["ls"], 2, "REPLICA"),
        (["show", "one"], 2, "ID"),
        (["show", "one", "demo", "--address", "unix:/a"], 2, "demo"),
        (["ls", "--address", "/a"], 2, "is no address"),
        (["ls", "--address"], 2, "--address"),
        (["ls", "--no-such-option"], 2, "--no-such-option"),
        (["start", "one", "--continue"], 2, "needs the ID"),
        (["start", "one", "--chat"], 2, "needs a --prompt"),
        (["start", "one", "--stop-at", "x"], 2, "“any”"),
        (["start", "one", "--stop-at", "any", "--stop-at", "1"], 2, "alone"),
        (["start", "one", "--once"], 2, "--stop-at"),
        (["start", "one", "--stop-at", "1", "--when", "cold"], 2, "cold"),
        (["start", "one", "--steer", "twist:1"], 2, "twist"),
        (["start", "one", "--max-tokens", "0"], 2, "0"),
        (["branch", "one", "demo"], 2, "--variant"),
        (["branch", "one", "demo", "--variant", "heat=1"], 2, "heat"),
        (["resume", "one", "demo", "--wait", "long"], 2, "long"),
        (["steer", "one", "demo"], 3, "no edit"),
        (["rm", "one"], 2, "--all"),
        (["rm", "one", "demo", "--all"], 2, "--all"),
        (["export", "one", "demo", "-"], 2, "standard output"),
        (["import", "one", "absent"], 6, "absent"),
        (["import", "one", "."], 2, "."),
        (["vectors", "one", "--put", "v"], 2, "NAME=FILE"),
        (["lens", "one", "demo", "--top", "0"], 2, "0"),
    ],
)
def test_exit_codes_of_wrong_input(layout: Layout, guest: FakeGuest, words: list[str], code: int, says: str) -> None:
    replica(layout, "waits", "prepared")
    replica(layout, "dead")
    done = do(*words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and done.stdout == ""
    assert guest.asked == []  # nothing is begun with words that are wrong


@pytest.mark.parametrize(
    ("reply", "code"),
    [(problem(404, code="not_found"), 6), (problem(409), 7), (problem(429), 11), (problem(503), 12), (hang_up, 12)],
)
def test_exit_codes_of_refusals(guest: FakeGuest, reply: Any, code: int) -> None:
    guest.on(SHOW, reply)
    done = do("show", "one", "demo", "--format", "json")
    assert done.returncode == code and json.loads(done.stdout)["error"]["exit_code"] == code


# --- making and running -----------------------------------------------------------------------------------------


def test_start_prints_the_text_and_says_how_it_ended(guest: FakeGuest) -> None:
    guest.on(START, answer(IDLE, 201))
    guest.on(GENERATE, stream(TOKEN, TOKEN | {"text": " two"}, DONE | {"tokens": 2}))
    done = do("start", "one", "demo", "--prompt", "Hi", "--seed", "1", "--steer", "scale:1:0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, " one two\n", "demo: length, 2 tokens\n")
    assert guest.bodies(START)[0]["steering"] == [{"kind": "scale", "layer": 1, "factor": 0.5}]
    assert guest.bodies(GENERATE) == [
        {
            "prompt": "Hi",
            "max_tokens": 16,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 1,
            "stop": [],
            "ignore_eos": False,
            "stream": True,
        }
    ]


def test_start_says_where_it_stopped(guest: FakeGuest) -> None:
    guest.on(START, answer(IDLE, 201))
    guest.on(GENERATE, stream(TOKEN, PAUSED))
    guest.on(SHOW, answer(SESSION))
    words = ["--stop-at", "2", "--stop-at", "3", "--phase", "decode", "--step", "1", "--when", "norm>3", "--once"]
    done = do("start", "one", "demo", "--prompt", "Hi", "--chat", *words)
    assert done.stdout == " one\n"
    assert done.stderr == "demo: stopped after layer 2 of 4, step 0, breakpoint b1\n"
    body = guest.bodies(GENERATE)[0]
    assert body["messages"] == [{"role": "user", "content": "Hi"}] and "prompt" not in body
    assert body["breakpoints"] == [
        {"layer": [2, 3], "phase": "decode", "step": 1, "condition": {"norm_above": 3.0}, "once": True}
    ]


def test_start_as_json_and_detached(guest: FakeGuest) -> None:
    guest.on(START, answer(IDLE, 201))
    running = RESULT | {"state": "running", "finish_reason": None, "text": "", "tokens": []}
    guest.on(GENERATE, answer(RESULT), answer(running))
    assert as_json("start", "one", "demo", "--prompt", "Hi") == {"result": RESULT}
    done = do("start", "one", "demo", "--prompt", "Hi", "--detach")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "demo: running, 0 tokens\n")
    assert [body["wait"] for body in guest.bodies(GENERATE)] == [True, False]


@pytest.mark.parametrize(
    ("words", "order", "body"),
    [
        (["suspend", "one", "demo"], "suspend", {"durable": False, "wait": True}),
        (["suspend", "one", "demo", "--durable"], "suspend", {"durable": True, "wait": True}),
        (["prefetch", "one", "demo"], "prefetch", {"wait": False}),
        (["prefetch", "one", "demo", "--wait"], "prefetch", {"wait": True}),
        (["pin", "one", "demo", "5min"], "pin", {"seconds": 300.0}),
        (["idle", "one", "demo", "1.5"], "idle", {"seconds": 1.5}),
    ],
)
def test_where_the_cache_is_to_be(guest: FakeGuest, words: list[str], order: str, body: dict[str, Any]) -> None:
    away = SESSION["memory"] | {
        "state": "away", "bytes": {"device": 0, "host": 3 << 20, "disk": 1 << 20},
        "waiting": True, "pinned": 29.5, "expected": 12.0, "durable": True,
    }  # fmt: skip
    guest.on(f"POST /v1/sessions/demo/{order}", answer(IDLE | {"memory": away}))
    done = do(*words)
    assert done.returncode == 0 and guest.bodies(f"POST /v1/sessions/demo/{order}") == [body]
    shown = " ".join(done.stdout.split())
    assert "off the device (3.0 MiB in host memory, 1.0 MiB on disk)" in shown
    assert "waits for room; pinned for 30 s; expected in 12 s; kept in files" in shown


@pytest.mark.parametrize("word", ["soon", "", "-5", "5 parsecs"])
def test_a_time_that_is_none(guest: FakeGuest, word: str) -> None:
    done = do("pin", "one", "demo", "--", word)
    assert done.returncode == 2 and "seconds" in done.stderr


def test_memory(guest: FakeGuest) -> None:
    guest.on("GET /v1/engine", answer(ENGINE))
    done = do("memory", "one")
    shown = " ".join(done.stdout.split())
    assert done.returncode == 0 and "device 64.0 MiB 48.0 MiB 75%" in shown and "1.0 GB/s" in shown
    assert "2048 tokens" in shown and "3 times, 1 of them between two tokens" in shown
    assert as_json("memory", "one") == {"memory": ENGINE["memory"]}
    # One in a golden of an earlier version.
    guest.on("GET /v1/engine", answer({key: value for key, value in ENGINE.items() if key != "memory"}))
    old = do("memory", "one")
    assert old.returncode == 6 and "earlier version" in old.stderr


def test_start_continues_a_session_that_is_there(guest: FakeGuest) -> None:
    guest.on(SHOW, answer(IDLE))
    guest.on("POST /v1/sessions/demo/steer", answer({"ids": ["r1"]}))
    guest.on(GENERATE, stream(TOKEN, DONE))
    done = do("start", "one", "demo", "--continue", "--stop-at", "any", "--steer", "scale:1:0.5")
    assert done.returncode == 0 and done.stdout == " one\n"
    assert guest.bodies("POST /v1/sessions/demo/steer")[0]["standing"] is True
    assert guest.bodies(START) == [] and guest.bodies(GENERATE)[0]["breakpoints"] == [{"condition": {}}]


@pytest.mark.parametrize(
    ("reply", "code"), [(problem(400), 2), (stream(TOKEN), 12), (stream(TOKEN, {"type": "lost"}), 1), (hang_up, 12)]
)
def test_a_start_that_fails_takes_its_session_back(guest: FakeGuest, reply: Any, code: int) -> None:
    guest.on(START, answer(IDLE, 201))
    guest.on(GENERATE, reply)
    guest.on(SHOW, answer(IDLE))
    guest.on(DELETE, answer({"ok": True}))
    assert do("start", "one", "demo", "--prompt", "Hi").returncode == code
    assert len(guest.bodies(DELETE)) == 1
    assert do("start", "one", "demo", "--prompt", "Hi", "--continue").returncode == code
    assert len(guest.bodies(DELETE)) == 1  # that one was there before


@pytest.mark.parametrize("words", [[], ["--format", "json"]])
def test_a_generation_that_failed_in_the_guest(guest: FakeGuest, words: list[str]) -> None:
    guest.on(START, answer(IDLE, 201))
    failed = {"reason": "error", "error": "not finite"}
    whole = RESULT | {"finish_reason": "error", "error": "not finite"}
    guest.on(GENERATE, answer(whole) if words else stream(TOKEN, DONE | failed))
    done = do("start", "one", "demo", "--prompt", "Hi", *words)
    assert done.returncode == 1 and "not finite" in (done.stdout if words else done.stderr)
    assert guest.bodies(DELETE) == []  # there is something to look at


def test_a_prompt_from_standard_input(guest: FakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.on(START, answer(IDLE, 201))
    guest.on(GENERATE, stream(DONE))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb"))
    assert do("start", "one", "--prompt", "-").stdout == ""
    assert guest.bodies(GENERATE)[0]["prompt"] == "a\nb"


def test_pause(guest: FakeGuest) -> None:
    guest.on("POST /v1/sessions/demo/pause", answer(SESSION), answer(SESSION), answer(IDLE))
    assert as_json("pause", "one", "demo", "--layer", "2") == {"session": SESSION}
    assert do("pause", "one", "demo").stderr == ""
    assert "ended before" in do("pause", "one", "demo").stderr
    assert guest.asked[0][1] == {"layer": 2, "wait": True}


def test_resume(guest: FakeGuest) -> None:
    stopped = RESULT | {"state": "paused", "finish_reason": None, "pause": SESSION["pause"]}
    guest.on("POST /v1/sessions/demo/resume", answer(RESULT), answer(stopped), answer(IDLE), answer(RESULT))
    done = do("resume", "one", "demo", "--wait", "token")
    assert (done.stdout, done.stderr) == (" one two\n", "demo: length, 2 tokens\n")
    assert "stopped after layer 2 of 4" in do("resume", "one", "demo").stderr
    assert "idle" in do("resume", "one", "demo").stdout
    assert as_json("resume", "one", "demo") == {"result": RESULT}
    assert [body["wait"] for _, body in guest.asked] == ["token", "end", "end", "end"]


def test_branch(guest: FakeGuest) -> None:
    what = "POST /v1/sessions/demo/branch"
    made: dict[str, Any] = {"sessions": ["s-1", "b"], "results": [RESULT | {"text": "a\x1b[2J"}, RESULT]}
    guest.on(what, answer(made), answer(made), answer(made | {"results": None}))
    variants = ["--variant", "scale:2:0.9", "--variant", "temperature=0.8,seed=1"]
    shown = do("branch", "one", "demo", *variants).stdout
    assert "scale:2:0.9" in shown and "s-1" in shown and "length" in shown and "\x1b" not in shown
    assert as_json("branch", "one", "demo", *variants) == {"result": made}
    for name in made["sessions"]:
        guest.on(f"GET /v1/sessions/{name}", answer(SESSION))
    waiting = do("branch", "one", "demo", *variants, "--paused", "--detach").stdout
    assert "s-1" in waiting and waiting.count("paused") == 2
    assert [(body["resume"], body["wait"]) for body in guest.bodies(what)] == [(True, True)] * 2 + [(False, False)]
    assert guest.bodies(what)[0]["variants"] == [
        {"edits": [{"kind": "scale", "layer": 2, "factor": 0.9}]},
        {"sampling": {"temperature": 0.8}, "seed": 1},
    ]


# --- looking and changing ---------------------------------------------------------------------------------------


def test_ls(guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions", answer({"sessions": []}), answer({"sessions": [SESSION, IDLE]}))
    empty = do("ls", "one")
    assert empty.stdout == "" and "no sessions" in empty.stderr
    lines = do("ls", "one").stdout.splitlines()
    assert lines[1].split()[:8] == ["demo", "paused", "layer", "2", "of", "4,", "step", "0"] and "idle" in lines[2]
    assert as_json("ls", "one") == {"sessions": [SESSION, IDLE]}


def test_show(guest: FakeGuest) -> None:
    guest.on(SHOW, answer(SESSION | {"text": "a\nb\x1b"}))
    seen = {"layer": 2, "tokens": [{"id": 7, "text": "\t", "probability": 0.25}]}
    guest.on("GET /v1/sessions/demo/lens?top=1", answer(seen))
    shown = do("show", "one", "demo", "--lens", "1").stdout
    for part in (
        "paused",
        "layer 2 of 4",
        "0 ▃█!│·· 4   norms 1 to 4",
        "48 B, 12 µs to dispatch, under way, in the ring",
        "0 B received, 90 B sent",
        "scale 0.5 after layer 2, positions 0 to 1",
        "r1: add 2 after layer 1, a vector of length 1.5",
        "b1: after layer 2, prefill, step 0, norm_below 9.0; 1 hits",
        '"a\\nb\\u001b"',
        '0.2500   7  "\\t"',
    ):
        assert part in shown, part
    assert as_json("show", "one", "demo", "--lens", "1")["lens"] == seen
    assert as_json("lens", "one", "demo", "--top", "1") == {"lens": seen}
    assert '"\\t"' in do("lens", "one", "demo", "--top", "1").stdout


def test_steer(guest: FakeGuest) -> None:
    what = "POST /v1/sessions/demo/steer"
    guest.on(what, answer({"ids": []}), answer({"ids": ["r1"]}), answer({"ids": ["r2"]}))
    guest.on("DELETE /v1/sessions/demo/steering/*", answer({"ok": True}))
    guest.on("DELETE /v1/sessions/demo/steering/r1", answer({"ok": True}))
    guest.on(SHOW, answer(IDLE))
    done = do("steer", "one", "demo", "scale::0.9", "--first", "1", "--last", "3")
    assert done.stdout == "" and "resume" in done.stderr
    assert do("steer", "one", "demo", "add:1:2:v", "--standing", "--clear").stdout == "r1\n"
    document = as_json("steer", "one", "demo", "scale:1:2", "--standing", "--remove", "r1")
    assert document == {"ids": ["r2"], "session": IDLE}
    assert do("steer", "one", "demo", "--clear").returncode == 0
    assert guest.bodies(what)[0] == {
        "edits": [{"kind": "scale", "factor": 0.9, "first": 1, "last": 3}],
        "standing": False,
    }
    assert guest.asked[1][0].endswith("/*") and guest.bodies(what)[1]["standing"] is True


def test_vectors(guest: FakeGuest, tmp_path: Path) -> None:
    guest.on("GET /v1/vectors", answer({"vectors": ["v"], "features": 8}), answer({"vectors": [], "features": 8}))
    guest.on("PUT /v1/vectors/v", answer({"ok": True}))
    guest.on("DELETE /v1/vectors/v", answer({"ok": True}))
    vector = Tensor("F32", (2,), bytes(8))
    (tmp_path / "file").write_bytes(tensors.write({"any": vector}))
    (tmp_path / "two").write_bytes(tensors.write({"any": vector, "other": vector}))
    (tmp_path / "none").write_bytes(b"{}")
    assert do("vectors", "one", "--put", f"v={tmp_path / 'file'}").stdout == "v\n"
    assert guest.bodies("PUT /v1/vectors/v") == [tensors.write({"vector": vector})]
    assert do("vectors", "one", "--put", f"v={tmp_path / 'two'}").returncode == 2
    assert do("vectors", "one", "--put", f"v={tmp_path / 'none'}").returncode == 2
    assert "8 numbers" in do("vectors", "one", "--rm", "v").stderr


def test_events(guest: FakeGuest) -> None:
    deleted = {"type": "deleted", "session": "demo"}
    guest.on("GET /v1/sessions/demo/events", stream(SESSION, TOKEN, DONE, deleted))
    assert do("events", "one", "demo").stdout.splitlines() == [
        "state paused",
        'token token=7 text=" one" step=0',
        'done reason="length" tokens=1',
        "deleted",
    ]
    done = do("events", "one", "demo", "--format", "json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["version"] == 1 for line in lines)
    assert lines[0]["event"]["state"] == SESSION and lines[1]["event"] == TOKEN and lines[3]["event"] == deleted


def test_rm_removes_all_that_are_named_or_none(guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions", answer({"sessions": [SESSION]}))
    guest.on(SHOW, answer(SESSION))
    guest.on(DELETE, answer({"ok": True}))
    guest.on("GET /v1/sessions/other", problem(404, code="not_found"))
    assert do("rm", "one", "demo", "other").returncode == 6 and guest.bodies(DELETE) == []
    assert do("rm", "one", "demo", "demo").stdout == "removed demo\n" and len(guest.bodies(DELETE)) == 1
    assert as_json("rm", "one", "--all") == {"removed": ["demo"]}


def test_suspend(guest: FakeGuest) -> None:
    guest.on("POST /v1/sessions/demo/suspend", answer(SESSION | {"state": "suspended"}))
    assert "suspended" in do("suspend", "one", "demo").stdout


# --- moving -----------------------------------------------------------------------------------------------------


def test_export_and_import(guest: FakeGuest, tmp_path: Path) -> None:
    content = tensors.write({"hidden": Tensor("U8", (4,), b"abcd")})
    guest.on("GET /v1/sessions/demo/export", answer(content))
    guest.on("POST /v1/sessions/import", answer(IDLE, 201))
    guest.on("POST /v1/sessions/import?id=copy", answer(SESSION, 201))
    file = tmp_path / "file"
    assert do("export", "one", "demo", str(file)).returncode == 0
    assert file.read_bytes() == content and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert do("export", "one", "demo", str(file)).returncode == 7
    document = as_json("export", "one", "demo", str(file), "--force")
    assert document == {"id": "demo", "file": str(file), "bytes": len(content)}
    assert as_json("import", "one", str(file)) == {"session": IDLE}
    assert "layer 2 of 4" in do("import", "one", str(file), "--as", "copy").stdout
    assert guest.bodies("POST /v1/sessions/import") == [content]


@pytest.mark.parametrize(("reply", "code"), [(answer(b"{}"), 8), (answer(b"x" * 99)[:-1], 12), (problem(409), 7)])
def test_an_export_that_fails_leaves_no_file(guest: FakeGuest, tmp_path: Path, reply: bytes, code: int) -> None:
    guest.on("GET /v1/sessions/demo/export", reply)
    assert do("export", "one", "demo", str(tmp_path / "file")).returncode == code
    assert list(tmp_path.iterdir()) == []


# --- the shell --------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What a shell is told for the last of ``words``, as the program finds it out."""
    *before, incomplete = words
    return [item.value for item in ShellComplete(cli, {}, "gpuckpt", "_X").get_completions(before, incomplete)]


def test_completion(guest: FakeGuest) -> None:
    guest.on("GET /v1/sessions", answer({"sessions": [SESSION, IDLE | {"id": "other"}]}))
    assert completed("session", "sh") == ["show"]
    assert completed("session", "show", "o") == ["one"]
    assert completed("session", "show", "one", "") == ["demo", "other"]
    assert completed("session", "show", "--address", f"unix:{guest.path}", "o") == ["other"]
    assert completed("session", "resume", "one", "demo", "--wait", "") == ["token", "end", "none"]
    guest.on("GET /v1/sessions", hang_up)
    assert completed("session", "show", "one", "") == []
    assert completed("session", "show", "nobody", "") == []


def test_starting_stays_cheap() -> None:
    code = "import gpuckpt.cli.session, sys; "
    code += "print(sorted({'msgspec', 'rich', 'gpuckpt.sessions', 'gpuckpt.config'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


class Terminal(io.StringIO):
    """A standard output that is one."""

    def isatty(self) -> bool:
        return True


def test_text_for_a_terminal_cannot_command_it(guest: FakeGuest) -> None:
    text = "a\x1b[2J\x07é\n"
    guest.on(START, answer(IDLE, 201))
    guest.on(GENERATE, stream(TOKEN | {"text": text}, DONE))
    assert do("start", "one", "--prompt", "Hi").stdout == text  # a pipe gets what the model wrote
    with contextlib.redirect_stdout(Terminal()) as shown:
        session_view.write(text)
    assert shown.getvalue() == "a\ufffd[2J\ufffdé\n"


def test_what_to_do_names_the_replica_that_was_named(guest: FakeGuest, tmp_path: Path) -> None:
    guest.on("POST /v1/sessions/demo/steer", answer({"ids": []}))
    assert "resume one demo" in do("steer", "one", "demo", "scale::2").stderr
    assert (
        f"--address unix:{guest.path} demo" in do("steer", "demo", "scale::2", "--address", f"unix:{guest.path}").stderr
    )
    gone = do("ls", "--address", f"unix:{tmp_path / 'none.sock'}")
    assert gone.returncode == 12 and "no such socket" in gone.stderr
    taken = {"error": {"message": "there is a session 'demo' already", "code": "name_taken"}}
    guest.on("POST /v1/sessions/import", answer(taken, 409), answer({"error": {"message": "odd", "code": "x"}}, 400))
    file = tmp_path / "file"
    file.write_bytes(b"anything")
    assert "choose another name" in do("import", "one", str(file)).stderr
    refused = do("import", "one", str(file))
    assert refused.returncode == 2 and str(file) in refused.stderr and "odd" in refused.stderr
    guest.on("DELETE /v1/vectors/v", answer({"error": {"message": "no vector 'v'", "code": "not_found"}}, 404))
    assert "and vectors tell" in do("vectors", "one", "--rm", "v").stderr
