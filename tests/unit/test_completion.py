"""The completion scripts, and what a shell is told when it asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gpuckpt.cli import cli
from gpuckpt.cli.complete import golden_names, replica_names
from gpuckpt.errors import UsageError


def asked(words: str, position: int, **environ: str) -> list[str]:
    """What the program itself answers to bash."""
    env = {
        **os.environ,
        "_GPUCKPT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpuckpt"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


Names = Callable[[click.Context, click.Parameter, str], list[str]]


def names(root: list[str], incomplete: str, of: Names = golden_names) -> list[str]:
    # As click does it: the group's callback is not called, so there is no ctx.obj.
    with cli.make_context("gpuckpt", [*root, "rm"], resilient_parsing=True) as ctx:
        return of(ctx, click.Argument(["name"]), incomplete)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "llama-2", "qwen", ".staging"):
        (tmp_path / "store/goldens" / name).mkdir(parents=True)
    (tmp_path / "store/goldens/llama-file").touch()
    monkeypatch.setenv("GPUCKPT_STORE__PATH", str(tmp_path / "store"))
    monkeypatch.setenv("GPUCKPT_STORE__DISK", str(tmp_path / "disk"))
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -o nosort"), ("zsh", "#compdef"), ("fish", "complete --no")]
)
def test_scripts(shell: str, sign: str) -> None:
    for args, env in ([shell], {}), ([], {"SHELL": f"/usr/bin/{shell}"}):
        script = CliRunner().invoke(cli, ["completion", *args], env=env, catch_exceptions=False).stdout
        assert sign in script and f"_GPUCKPT_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize("shell", ["/bin/tcsh", "", None])
def test_no_script_for_other_shells(shell: str | None) -> None:
    error = CliRunner().invoke(cli, ["completion"], env={"SHELL": shell}).exception
    assert isinstance(error, UsageError) and "bash|zsh|fish" in str(error.remedy)


def test_the_program_answers_bash() -> None:
    assert asked("gpuckpt config sh", 2) == ["show"]
    assert asked("gpuckpt config show --format ", 4) == ["table", "json"]
    assert asked("gpuckpt --env", 1) == ["--env-file"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_with_the_script(tmp_path: Path) -> None:
    program = tmp_path / "gpuckpt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gpuckpt "$@"\n')
    program.chmod(0o755)
    script = """eval "$(gpuckpt completion bash)"
    complete -p gpuckpt
    COMP_WORDS=(gpuckpt completion ""); COMP_CWORD=2
    _gpuckpt_completion gpuckpt; echo "${COMPREPLY[@]}" """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["complete -o nosort -F _gpuckpt_completion gpuckpt", "bash zsh fish"]


def test_golden_names_are_folders_that_are_finished(store: Path) -> None:
    assert names([], "") == ["llama", "llama-2", "qwen"]
    assert names([], "ll") == ["llama", "llama-2"]


def test_golden_names_of_every_tier(store: Path) -> None:
    for name in ("llama", "mistral", ".locks"):
        (store.parent / "disk" / name).mkdir(parents=True)
    assert names([], "") == ["llama", "llama-2", "mistral", "qwen"]


def test_replica_names_are_those_of_stop_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUCKPT_PATHS__STATE", str(tmp_path / "state"))
    assert names([], "", replica_names) == []
    for name in ("one", "other", ".making"):
        (tmp_path / "state/replicas" / name).mkdir(parents=True)
    assert names([], "", replica_names) == ["one", "other"]
    for command in ("stop", "logs"):
        assert asked(f"gpuckpt {command} ot", 2) == ["other"]


def test_golden_names_heed_the_root_options(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUCKPT_STORE__PATH")
    Path("a.toml").write_text(f'[store]\npath = "{store}"\n')
    assert names(["--config", "a.toml"], "q") == ["qwen"]
    monkeypatch.setenv("GPUCKPT_CONFIG", "a.toml")
    assert names([], "q") == ["qwen"]


def test_golden_names_never_raise(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(["--config", "no.toml"], "") == []
    monkeypatch.setenv("GPUCKPT_STORE__PATH", str(store / "no"))
    assert names([], "") == []
    monkeypatch.setenv("GPUCKPT_STORE__PTH", "x")
    assert names([], "") == []


def test_starting_stays_cheap() -> None:
    code = "import gpuckpt.cli.completion, gpuckpt.cli.complete, gpuckpt.cli.context, gpuckpt.cli.config, sys; "
    code += "print(sorted({'msgspec', 'rich', 'podman', 'gpuckpt.config'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
