"""Signals, streams that are closed, full or gone, and what terminals are shown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.cli import render
from gpuckpt.errors import UsageError
from gpuckpt.store.layout import Layout
from tests.command_line import ROOT, run
from tests.fakes import publish


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
