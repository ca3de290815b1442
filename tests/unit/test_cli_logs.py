"""gpuckpt logs: nothing is lost between two looks, and kept logs are those of exactly one name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from gpuckpt.store.layout import Layout
from tests.command_line import replica_of, run


@dataclass
class Logs:
    """Containers whose logs grow from one look to the next, and that end with the last."""

    texts: list[str]
    shown: int = 0

    def logs(self, container: str, *, most: int | None = None) -> str:
        self.shown += 1
        return self.texts[min(self.shown, len(self.texts)) - 1]


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


def test_a_replica_that_has_printed_nothing(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    replica_of(machine, "one", "gold")
    with_logs(monkeypatch, machine, "")
    done = run("logs", "one")
    assert (done.returncode, done.stdout) == (0, "") and "one has printed nothing yet" in done.stderr
    with_logs(monkeypatch, machine, "a\n")
    assert run("logs", "one", "--tail", "0").stderr == ""
