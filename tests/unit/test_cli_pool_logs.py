"""``gpuckpt pool logs``: of a replica, of a model, and of those that come later."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gpuckpt.golden.replica import Replica
from gpuckpt.service.view import GoldenView
from gpuckpt.store.layout import Layout
from tests.fake_pool import FakePool, model, replica, view
from tests.pool_commands import as_json, do, states


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


def test_logs_of_a_server_that_is_started(qwen: FakePool, servers: _Servers) -> None:
    qwen.view = view(
        model("qwen", golden=GoldenView(name="lone", tier="none", bytes=0), replicas=[replica("q.3", "starting")])
    )
    servers.looks = {"gpuckpt-lone": 9}
    assert do("logs", "qwen").stdout.splitlines() == ["lone │ e0", "lone │ e1", "lone │ e2"]


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
