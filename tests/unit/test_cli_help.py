"""The helps of the command line, and its list of commands."""

from __future__ import annotations

import os
import time

import pytest
from click.testing import CliRunner

from gpuckpt.cli import COMMANDS, cli, main
from gpuckpt.store.layout import Layout
from tests.command_line import started


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


def test_no_arguments_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code in (0, 2)
    shown = capsys.readouterr()
    assert "Usage: gpuckpt" in shown.out + shown.err
    assert "Traceback" not in shown.err
