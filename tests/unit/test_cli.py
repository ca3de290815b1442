"""The command line: helps, exit codes, what is said when something is wrong, and how options become a request."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from gpuckpt import manifest as manifests
from gpuckpt.cli import COMMANDS, cli, main, render
from gpuckpt.cli.creation import request_from
from gpuckpt.config import Create, Settings
from gpuckpt.errors import GpuckptError, NotFoundError, UsageError
from gpuckpt.golden.create import CreateRequest
from gpuckpt.golden.replica import Replica
from gpuckpt.manifest import Mount, Port, Request, Volume
from gpuckpt.store import seal
from gpuckpt.store.layout import Layout
from tests.fakes import publish, sample_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A machine of our own below ``tmp_path``, named in the environment; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GPUCKPT_")]:
        monkeypatch.delenv(name)
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    for key, path in {"STORE__PATH": layout.store, "PATHS__STATE": layout.state, "PATHS__RUN": layout.run}.items():
        monkeypatch.setenv(f"GPUCKPT_{key}", str(path))
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("GPUCKPT_CONFIG", str(tmp_path / "empty.toml"))
    layout.prepare()
    return layout


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str) -> Done:
    """Run the program as its entry point does. Wrong input ends in an exit code; a traceback would fail the test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["gpuckpt", *arguments])
        try:
            with pytest.raises(SystemExit) as leaving:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(leaving.value.code, int)
    return Done(leaving.value.code, stdout.getvalue(), stderr.getvalue())


def started(*arguments: str) -> Done:
    """The same in a process of its own, as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "gpuckpt", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


# --- help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS), ["config", "show"], ["config", "path"]])
def test_help(words: list[str]) -> None:
    begin = time.process_time()
    shown = CliRunner().invoke(cli, [*words, "--help"])
    assert shown.exit_code == 0 and shown.stderr == ""
    assert shown.stdout.startswith("Usage: ")
    assert time.process_time() - begin < 1


def test_help_as_a_user_asks_for_it(machine: Layout) -> None:
    times = []
    for words in (["--help"], ["create", "--help"], ["restore", "-h"]):
        before = os.times()
        assert started(*words).returncode == 0
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 1


def test_every_command_is_listed_with_its_help() -> None:
    shown = CliRunner().invoke(cli, ["--help"]).stdout
    for name, (_, text) in COMMANDS.items():
        assert name in shown and text.split(",")[0] in shown


def test_the_version() -> None:
    assert CliRunner().invoke(cli, ["--version"]).stdout.startswith("gpuckpt, version ")


# --- wrong input ----------------------------------------------------------------------------------------------


def test_an_unknown_command_with_a_suggestion(machine: Layout) -> None:
    done = run("retsore", "gold")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("restore") == 1 and "Did you mean" in done.stderr


def test_an_unknown_command_like_no_other(machine: Layout) -> None:
    done = run("xyzzy")
    assert done.returncode == 2 and "xyzzy" in done.stderr and "Did you mean" not in done.stderr


def test_server_arguments_without_the_dashes(machine: Layout) -> None:
    done = started("create", "gold", "python3", "server.py")
    assert done.returncode == 2
    assert "gpuckpt create gold -- python3 server.py" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["create", "--no-such-option"], 2, "--no-such-option"),
        (["create", "gold", "--warmup", "many", "--", "x"], 2, "many"),
        (["create", "gold", "--workload", "other", "--", "x"], 2, "other"),
        (["create", "gold", "--start-timeout", "soon", "--", "x"], 2, "soon"),
        (["create", "gold", "--shm-size", "big", "--", "x"], 2, "--shm-size"),
        (["create", "gold", "--publish", "99999", "--", "x"], 2, "99999"),
        (["create", "gold", "--env", "A", "--", "x"], 2, "NAME=VALUE"),
        (["create", "gold", "--volume", "/tmp", "--", "x"], 2, "/tmp"),
        (["create", "gold", "--image", "i", "--rootfs", "/", "--", "x"], 2, "exclude"),
        (["create", "gold", "--canary", "GET", "--", "x"], 2, "GET"),
        (["create", "a/b", "--", "x"], 2, "a/b"),
        (["create", "gold"], 2, "no model"),
        (["create", "--", "x"], 2, "no name"),
        (["create", "gold", "--rootfs", "/nonexistent", "--", "x"], 6, "/nonexistent"),
        (["inspect"], 2, "NAME"),
        (["inspect", "absent"], 6, "no golden named absent"),
        (["inspect", "../x"], 2, "../x"),
        (["verify", "absent"], 6, "absent"),
        (["verify"], 2, "NAME"),
        (["export", "absent", "file"], 6, "absent"),
        (["export", "gold"], 2, "FILE"),
        (["rm"], 2, "NAME"),
        (["stop"], 2, "REPLICA"),
        (["logs", "gold", "--tail", "-1"], 2, "-1"),
        (["logs", "gold", "--failed"], 6, "gold"),
        (["completion", "tcsh"], 2, "tcsh"),
        (["ls", "--format", "xml"], 2, "xml"),
        (["--config", "/nonexistent.toml", "ls"], 6, "/nonexistent.toml"),
        (["restore", "gold", "--ignore-identity", "colour"], 2, "colour"),
        (["restore", "gold", "--trust"], 2, "--import"),
        (["restore", "gold", "--digest", "0" * 64], 2, "--import"),
        (["import", "file"], 2, "--trust"),
        (["import", "file", "--trust"], 2, "--digest"),
        (["import", "file", "--trust", "--digest", "none"], 2, "none"),
        (["logs", "gold", "--follow", "--failed"], 2, "exclude"),
    ],
)
def test_exit_codes_of_wrong_input(machine: Layout, words: list[str], code: int, says: str) -> None:
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert says in done.stderr


def test_a_wrong_environment_is_named(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCKPT_STORE__SIZE", "big")
    done = run("ls")
    assert done.returncode == 2 and "GPUCKPT_STORE__SIZE" in done.stderr


def test_an_error_says_what_why_and_what_to_do(machine: Layout) -> None:
    publish(machine)
    lines = run("inspect", "absent").stderr.splitlines()
    assert lines[0] == "error: no golden named absent"
    assert lines[1].startswith("  why:    ") and "gold" in lines[1]
    assert lines[2] == "  remedy: gpuckpt ls"


@pytest.mark.parametrize("format_option", [["--format", "json"], ["--format=json"]])
def test_an_error_as_json(machine: Layout, format_option: list[str]) -> None:
    done = run("inspect", "absent", *format_option)
    document = json.loads(done.stdout)
    assert done.returncode == 6 and done.stderr == ""
    assert document["version"] == 1
    assert document["error"]["kind"] == "NotFoundError" and document["error"]["exit_code"] == 6
    assert set(document["error"]) == {"kind", "exit_code", "message", "cause", "remedy", "log", "log_path"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_130_and_what_it_had_begun(
    machine: Layout, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    folder = machine.state / "begun"
    # Started under nohup(1) we would ignore a closed terminal, and so would the command, as it should.
    signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    def interrupted(self: Layout) -> list[str]:
        folder.mkdir()
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # an impatient user's second one does not cut the roll-back short
            folder.rmdir()
        return []

    monkeypatch.setattr(Layout, "names", interrupted)
    done = run("ls")
    assert done.returncode == 130 and "interrupted" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ls", "--format", "json", "--no-such-option"], "--no-such-option"),
        (["inspect", "--format=json"], "NAME"),
        (["xyzzy", "--format", "json"], "xyzzy"),
        (["logs", "gold", "--follow", "--format", "json"], "exclude"),
    ],
)
def test_wrong_words_as_json(machine: Layout, words: list[str], says: str) -> None:
    done = run(*words)
    document = json.loads(done.stdout)
    assert done.returncode == 2 and done.stderr == ""
    assert document["error"]["kind"] == "UsageError" and says in document["error"]["message"]


def test_a_hangup_that_is_to_be_ignored_stays_ignored(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def hung_up(self: Layout) -> list[str]:
        signal.raise_signal(signal.SIGHUP)
        return []

    monkeypatch.setattr(Layout, "names", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("ls").returncode == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "uid", "code", "says"),
    [
        (errno.EACCES, 1000, 4, "must run as root"),
        (errno.EPERM, 1000, 4, "/some/file: Operation not permitted"),
        (errno.EACCES, 0, 1, "error: /some/file: Permission denied"),
        (errno.EIO, 0, 1, "error: /some/file: Input/output error"),
        (errno.ENOSPC, 0, 11, "no space left for /some/file"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    machine: Layout, monkeypatch: pytest.MonkeyPatch, number: int, uid: int, code: int, says: str
) -> None:
    def fail(self: Layout) -> list[str]:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(Layout, "names", fail)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    done = run("ls")
    assert done.returncode == code and says in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3
    document = json.loads(run("ls", "--format", "json").stdout)
    assert document["error"]["exit_code"] == code


def test_closed_streams_are_no_files_of_ours(machine: Layout, tmp_path: Path) -> None:
    publish(machine)
    code = (
        "import os, sys; os.close(0); os.close(1); os.close(2)\n"
        "sys.stdin = sys.stdout = sys.stderr = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from gpuckpt.cli import main\n"
        "try: main(['ls'])\n"
        f"finally: open({str(tmp_path / 'names')!r}, 'w').write(' '.join(map(os.readlink, ('/proc/self/fd/0', "
        "'/proc/self/fd/1', '/proc/self/fd/2'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "names").read_text() == "/dev/null /dev/null /dev/null"


def test_colours_are_for_terminals_and_not_for_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("click.echo", lambda *_, **options: shown.append(options.get("color")))
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        render.show_error(UsageError("wrong", cause="because", remedy="do"), as_json=False)
    assert shown == [None] * 3 + [False] * 3


def test_cells_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table(["A", "B"], [("[bold]x[/bold]", "[/]"), ("sum", "[red]")], bold_last=True)
    assert "[bold]x[/bold]" in (out := capsys.readouterr().out)
    assert "[/]" in out and "[red]" in out


def test_a_server_s_own_format_option_is_not_ours(machine: Layout) -> None:
    done = run("create", "a/b", "--", "serve", "--format", "json")
    assert done.returncode == 2 and done.stdout == "" and "a/b" in done.stderr


# --- commands that only read ----------------------------------------------------------------------------------


def test_ls(machine: Layout) -> None:
    empty = run("ls")
    assert empty.returncode == 0 and empty.stdout == "" and "no goldens yet" in empty.stderr
    publish(machine)
    (machine.goldens / "broken").mkdir()
    shown = run("ls").stdout
    assert "gold" in shown and "broken" in shown and "damaged" in shown
    goldens = {one["name"]: one for one in json.loads(run("ls", "--format", "json").stdout)["goldens"]}
    assert goldens["gold"]["image_bytes"] == sample_manifest().sizes.total and goldens["gold"]["trouble"] is None
    assert goldens["broken"]["trouble"] and goldens["broken"]["image_bytes"] is None


@dataclass
class Logs:
    """Containers whose logs grow from one look to the next, and that end with the last."""

    texts: list[str]
    shown: int = 0

    def logs(self, container: str, *, most: int | None = None) -> str:
        self.shown += 1
        return self.texts[min(self.shown, len(self.texts)) - 1]


def replica_of(machine: Layout, name: str, golden: str) -> Replica:
    folder = machine.replicas / name
    folder.mkdir()
    made = Replica(name, golden, folder, state="ready")
    made.save()
    return made


def with_logs(monkeypatch: pytest.MonkeyPatch, layout: Layout, *texts: str) -> None:
    containers = Logs(list(texts))
    work = SimpleNamespace(layout=layout, containers=containers)
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: work)
    monkeypatch.setattr("gpuckpt.cli.logs._PAUSE", 0)
    monkeypatch.setattr(
        "gpuckpt.golden.replica.status", lambda *_: "running" if containers.shown < len(texts) - 1 else "exited"
    )


def test_logs_lose_nothing_between_two_looks(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    replica_of(machine, "one", "gold")
    with_logs(monkeypatch, machine, "a\nb\n", "a\nb\nc", "a\nb\ncd\n", "a\nb\ncd\nlast words\n")
    done = run("logs", "one", "--follow", "--tail", "1")
    assert (done.returncode, done.stdout) == (0, "b\ncd\nlast words\n")


def test_logs_that_begin_anew_are_shown_as_a_whole(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    replica_of(machine, "one", "gold")
    with_logs(monkeypatch, machine, "old, and long\n", "new\n", "new\n")
    assert run("logs", "one", "-f").stdout == "old, and long\nnew\n"


@pytest.mark.parametrize(
    ("tail", "lines"), [([], ["a", "b"]), (["-n", "1"], ["b"]), (["-n", "0"], []), (["-n", "9"], ["a", "b"])]
)
def test_logs_as_json(machine: Layout, monkeypatch: pytest.MonkeyPatch, tail: list[str], lines: list[str]) -> None:
    replica_of(machine, "one", "gold")
    with_logs(monkeypatch, machine, "a\nb\n")
    document = json.loads(run("logs", "one", "--format", "json", *tail).stdout)
    assert document == {"version": 1, "replica": "one", "lines": lines}


def test_kept_logs_are_those_of_exactly_that_name(machine: Layout) -> None:
    for name in ("a-server", "a-b-server", "b-a-server", "a-server-restore", "a-checkpoint"):
        (machine.logs / f"20260101-000000-{name}.log").write_text(f"{name} 1\n{name} 2\n")
    document = json.loads(run("logs", "a", "--failed", "--format", "json", "--tail", "1").stdout)
    assert [one["lines"] for one in document["failed"]] == [["a-server 2"], ["a-checkpoint 2"]]
    assert run("logs", "a-b", "--failed").stdout == "a-b-server 1\na-b-server 2\n"
    assert run("logs", "a", "--failed", "--tail", "0").stdout == ""
    assert run("logs", "a.*", "--failed").returncode == 6


def test_ls_shows_replicas_whose_golden_is_gone(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    replica_of(machine, "orphan", "lost")
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: None)
    monkeypatch.setattr("gpuckpt.golden.catalogue.states", lambda tools: {"orphan": "running"})
    done = run("ls")
    assert done.returncode == 0 and "orphan (running)" in done.stdout and "lost" in done.stdout
    document = json.loads(run("ls", "--format", "json").stdout)
    assert document["goldens"] == []
    assert document["replicas_without_golden"] == [{"name": "orphan", "golden": "lost", "state": "running"}]


def test_inspect(machine: Layout) -> None:
    folder = publish(machine)
    assert "serve" in run("inspect", "gold").stdout
    document = json.loads(run("inspect", "gold", "--format", "json").stdout)
    assert document["version"] == 1 and document["name"] == "gold" and document["folder"] == str(folder)
    assert document["processes"] == [{"pid": 1, "parent": 0, "name": "serve", "threads": 1, "pages_bytes": 8192}]
    assert "files" not in document


def test_a_damaged_manifest(machine: Layout) -> None:
    (publish(machine) / "manifest.json").write_text("{")
    assert run("inspect", "gold").returncode == 8


def test_df(machine: Layout) -> None:
    publish(machine)
    document = json.loads(run("df", "--format", "json").stdout)
    (golden,) = document["goldens"]
    assert golden["name"] == "gold" and golden["apparent"] >= 8192
    assert document["store"]["mounted"] is False
    assert run("df").returncode == 0


@pytest.fixture
def without_podman(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Commands that ask podman about replicas find none; the store's tmpfs is a plain folder."""
    monkeypatch.setattr(
        "gpuckpt.golden.tools.tools", lambda settings, report=None, **_: SimpleNamespace(layout=machine, report=report)
    )
    monkeypatch.setattr("gpuckpt.host.tmpfs.ensure", lambda store: False)
    monkeypatch.setattr("gpuckpt.criu.images.undecodable", lambda images: [])
    machine.prepare_store()
    return machine


def test_tiers_as_a_user_sees_them(without_podman: Layout) -> None:
    publish(without_podman)

    def tiers() -> list[list[str]]:
        return [one["tiers"] for one in json.loads(run("ls", "--format", "json").stdout)["goldens"]]

    saved = run("move", "gold", "--to", "disk", "--keep")
    assert saved.returncode == 0 and "gold: on disk (8.0 KiB" in saved.stdout, saved.stderr
    assert tiers() == [["tmpfs", "disk"]] and "tmpfs+disk" in run("ls").stdout
    again = run("move", "gold", "--to", "disk", "--keep")
    assert again.returncode == 3 and "already" in again.stderr
    assert run("verify", "gold").stdout.count("whole") == 2
    assert "tmpfs+disk" in run("inspect", "gold").stdout
    document = json.loads(run("df", "--format", "json").stdout)
    assert [one["tier"] for one in document["goldens"]] == ["tmpfs", "disk"] and document["disk"]["free"] > 0
    shown = run("df").stdout
    assert f"disk {without_podman.disk}: " in shown
    assert "removed gold from the tmpfs" in run("rm", "gold", "--tier", "tmpfs").stdout
    assert tiers() == [["disk"]] and run("rm", "gold", "--tier", "tmpfs").returncode == 6
    loaded = json.loads(run("move", "gold", "--to", "tmpfs", "--format", "json").stdout)["moved"]
    assert [(one["name"], one["to"], one["kept"], one["shared"]) for one in loaded] == [("gold", "tmpfs", False, 0)]
    assert tiers() == [["tmpfs"]]
    run("move", "gold", "--to", "disk", "--keep")
    assert "on disk alone" in run("move", "gold", "--to", "disk").stdout
    run("rm", "gold")
    assert tiers() == []


def test_verify_names_what_is_damaged(machine: Layout) -> None:
    folder = publish(machine)
    (folder / "images" / "pages-1.img").write_bytes(b"x" + bytes(8191))
    done = run("verify", "gold")
    assert done.returncode == 8 and "pages-1.img has changed" in done.stderr


def test_what_verify_found_is_found_by_a_restore(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that moved no time, as of memory gone bad, is behind the seal's back until somebody has read it."""
    folder = publish(machine)
    golden = manifests.read(folder)
    image = folder / "images" / "pages-1.img"
    image.write_bytes(b"x" + bytes(image.stat().st_size - 1))
    seal.write(folder)
    assert seal.broken(folder, golden) == []
    assert run("verify", "gold").returncode == 8
    assert seal.broken(folder, golden) != [] and seal.fits(folder)


def test_export_writes_a_file_and_says_its_digest(machine: Layout, tmp_path: Path) -> None:
    publish(machine)
    document = json.loads(run("export", "gold", "gold.tar", "--format", "json").stdout)
    assert document["bytes"] == (tmp_path / "gold.tar").stat().st_size and len(document["blake3"]) == 64
    assert run("export", "gold", "gold.tar").returncode == 7


def test_a_reader_that_goes_away_is_no_error(machine: Layout) -> None:
    publish(machine)
    line = f"{sys.executable} -m gpuckpt config show | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def shell(line: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `gpuckpt` is ours; its status is that of the first command that fails."""
    line = f'set -o pipefail; gpuckpt() {{ {sys.executable} -m gpuckpt "$@"; }}; {line}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False, env=env)


def test_readers_that_are_gone_and_full_devices(machine: Layout) -> None:
    for words in ("config show", "config show --format json", "--help"):
        done = shell(f"gpuckpt {words} | true")
        assert (done.returncode, done.stderr) == (0, "")
    assert shell("gpuckpt inspect absent 2>/dev/full").returncode == 6
    full = shell("gpuckpt config show >/dev/full")
    assert full.returncode == 11 and "no space left" in full.stderr
    ascii_only = shell("gpuckpt inspect 'gö\xff'", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 2 and "Traceback" not in ascii_only.stderr


def test_an_unexpected_error_is_one_line_and_a_file(
    machine: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Layout) -> list[str]:
        raise KeyError("odd")

    monkeypatch.setattr(Layout, "names", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = run("ls")
    assert done.returncode == 1 and "unexpected error, please report it" in done.stderr
    assert "KeyError: 'odd'" in done.stderr and "Traceback" not in done.stderr
    (kept,) = tmp_path.glob("gpuckpt-*.txt")
    assert str(kept) in done.stderr and kept.stat().st_mode & 0o777 == 0o600 and "Traceback" in kept.read_text()
    error = json.loads(run("ls", "--format", "json").stdout)["error"]
    assert error["exit_code"] == 1 and Path(error["log_path"]).is_file()


def test_a_fifo_is_no_configuration(machine: Layout, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero"):
        done = run("--config", path, "ls")
        assert done.returncode == 2 and "not a regular file" in done.stderr


def test_no_space_names_the_mount(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Layout) -> list[str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/proc/some/file")

    monkeypatch.setattr(Layout, "names", fail)
    assert "mounted on /proc is full" in run("ls").stderr


def test_a_golden_named_twice_is_removed_once(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(machine)
    removed: list[str] = []
    monkeypatch.setattr("gpuckpt.golden.sweep.sweep", lambda *_: [])
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: SimpleNamespace(layout=machine))
    monkeypatch.setattr("gpuckpt.golden.catalogue.remove", lambda work, name, force, tier: removed.append(name))
    assert run("rm", "gold", "gold").returncode == 0 and removed == ["gold"]


@pytest.mark.parametrize("file", ["-", "store/gold.tar"])
def test_export_where_no_archive_belongs(machine: Layout, file: str) -> None:
    publish(machine)
    done = run("export", "gold", file)
    assert done.returncode == 2 and "remedy" in done.stderr


def test_an_empty_prompt_is_named(machine: Layout) -> None:
    done = run("create", "gold", "--prompt", "", "--", "--model", "/x")
    assert done.returncode == 2 and "flag --prompt" in done.stderr


# --- the options of create ------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "workload": "auto",
    "rootfs": None,
    "env": (),
    "volume": (),
    "workdir": None,
    "shm_size": "1GiB",
    "health_path": "/health",
    "warmup_request": (),
    "canary": None,
    "no_canary": False,
    "leave_running": False,
    "tcp_established": False,
    "replace": False,
    "mode": "copy",
}


def parsed(
    *arguments: str, name: str | None = "gold", create: dict[str, Any] | None = None, **options: Any
) -> CreateRequest:
    settings = Settings(create=Create(**(create or {})))
    return request_from(settings, name, arguments or ("serve",), OPTIONS | options)


def refused(*arguments: str, **options: Any) -> GpuckptError:
    with pytest.raises((UsageError, NotFoundError)) as caught:
        parsed(*arguments, **options)
    assert caught.value.remedy
    return caught.value


def test_a_plain_request() -> None:
    request = parsed("serve", "--fast")
    assert (request.name, request.arguments, request.rootfs) == ("gold", ("serve", "--fast"), Path("/"))
    assert request.canary and not request.replace and request.shm_size == 1 << 30


def test_the_name_may_come_from_the_settings() -> None:
    assert parsed(name=None, create={"name": "site"}).name == "site"
    assert "no name" in refused(name=None).message


@pytest.mark.parametrize(
    ("arguments", "workload", "kind"),
    [
        (("serve",), "auto", "http"),
        (("--model", "a/b"), "auto", "vllm"),
        (("a/b",), "vllm", "vllm"),
        (("--odd",), "http", "http"),
    ],
)
def test_the_kind_of_server(arguments: tuple[str, ...], workload: str, kind: str) -> None:
    assert parsed(*arguments, workload=workload).adapter.record.kind == kind


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8000", Port(host_ip="127.0.0.1", host_port=8000, container_port=8000)),
        ("8080:80", Port(host_ip="127.0.0.1", host_port=8080, container_port=80)),
        ("0.0.0.0:8080", Port(host_ip="0.0.0.0", host_port=8080, container_port=8080)),
        ("10.0.0.1:8080:80", Port(host_ip="10.0.0.1", host_port=8080, container_port=80)),
        ("[::1]:8080:80", Port(host_ip="::1", host_port=8080, container_port=80)),
        ("[::1]:8080", Port(host_ip="::1", host_port=8080, container_port=8080)),
    ],
)
def test_ports(text: str, port: Port) -> None:
    assert parsed(create={"publish": text}).publish == port


def test_environment() -> None:
    assert parsed(env=("A=1", "B=", "C=x=y")).env == {"A": "1", "B": "", "C": "x=y"}
    for wrong in ("A", "=1", "", "A=\udcff", "A\udcff=1", "A=\0"):
        refused(env=(wrong,)).message.encode()


def test_arguments_that_no_program_can_take() -> None:
    for wrong in ("a\0b", "\udcff"):
        refused("serve", wrong).message.encode()


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = parsed(volume=(f"{tmp_path}:/a", ".:/b:rw", "data:/c", f"{tmp_path}:/d:ro"))
    folder = str(tmp_path)
    assert request.mounts == (
        Mount(source=folder, destination="/a", read_only=True),
        Mount(source=folder, destination="/b", read_only=False),
        Mount(source=folder, destination="/d", read_only=True),
    )
    assert request.volumes == (Volume(name="data", destination="/c"),)
    for wrong in ("/tmp", "/tmp:", "/tmp:relative", f"{tmp_path}:/a:rx", "a b:/c", "/nonexistent:/a", ":/a"):
        refused(volume=(wrong,))


def test_requests_of_the_canary_and_the_warm_up() -> None:
    request = parsed(canary='post /ask {"a b": 1}', warmup_request=("GET /x",))
    record = request.adapter.record
    assert record.canary_request == Request(method="POST", path="/ask", body='{"a b": 1}')
    assert record.warmup_requests == (Request(method="GET", path="/x"),)
    for wrong in ("GET", "GET x", "", "/x"):
        refused(canary=wrong or " ")
    for wrong in ("GET /ü", "G\x01T /", "GET /\x7f", "POST / \udcff", "GÉT /"):
        refused(canary=wrong).message.encode()
        refused(warmup_request=(wrong,))
    assert "--health-path" in refused(health_path="/hälth").message
    assert parsed(canary="POST / ü").adapter.record.canary_request == Request(method="POST", path="/", body="ü")


def test_the_size_of_shared_memory() -> None:
    assert parsed(shm_size="64M").shm_size == 64 << 20
    for wrong in ("lots", "0", "9999T"):
        assert "--shm-size" in refused(shm_size=wrong).message


def test_the_root_file_system(tmp_path: Path) -> None:
    assert parsed(rootfs=str(tmp_path)).rootfs == tmp_path
    refused(rootfs=str(tmp_path / "absent"))
    refused(rootfs="/", create={"image": "site"})


def test_no_arguments_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code in (0, 2)
    shown = capsys.readouterr()
    assert "Usage: gpuckpt" in shown.out + shown.err
    assert "Traceback" not in shown.err
