"""The command line when something is wrong: exit codes, and what is said to people and to programs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from gpuckpt.store.layout import Layout
from tests.command_line import run, started
from tests.fakes import publish


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


def test_a_server_s_own_format_option_is_not_ours(machine: Layout) -> None:
    done = run("create", "a/b", "--", "serve", "--format", "json")
    assert done.returncode == 2 and done.stdout == "" and "a/b" in done.stderr


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
