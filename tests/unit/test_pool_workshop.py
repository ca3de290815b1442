"""The hands, where a replica ends under them, or the GPUs do not answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpuckpt.config import Settings
from gpuckpt.containers.podman import Container
from gpuckpt.errors import CheckpointError, GpuckptError, OutOfSpaceError, RestoreError
from gpuckpt.golden.replica import Replica
from gpuckpt.pool import workshop
from gpuckpt.pool.hands import Source
from gpuckpt.pool.workshop import Workshop
from gpuckpt.proc import Result


def ended(name: str) -> Container:
    return Container("1d", name, "exited", 0, 137, Path("/nonexistent"), None, None, {})


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("gpuckpt.golden.replica.stop", lambda tools, name: found.append(name))
    return found


def hands(tmp_path: Path) -> Workshop:
    made = Workshop(Settings(), {"m": Source("g")})
    tools: Any = SimpleNamespace(
        containers=SimpleNamespace(inspect=ended), layout=SimpleNamespace(replicas=tmp_path / "replicas")
    )
    made._tools = tools
    return made


def test_gpus_that_cannot_be_asked_are_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = hands(tmp_path)
    answers: list[Any] = [
        GpuckptError("no driver"),
        GpuckptError("no driver"),
        OSError("full"),
        (),
        GpuckptError("gone"),
    ]

    def gpus() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    tools: Any = made._tools
    tools.devices = SimpleNamespace(gpus=gpus)
    with caplog.at_level("INFO", "gpuckpt.pool"):
        assert [asyncio.run(made.gpus([])) for _ in range(5)] == [None, None, None, ((), {}), None]
    said = [record.getMessage() for record in caplog.records if "GPUs" in record.getMessage()]
    assert [one.rpartition(": ")[2] for one in said] == ["no driver", "full", "the GPUs can be asked again", "gone"]


def test_a_replica_that_ends_behind_its_restore_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[str]
) -> None:
    replica = Replica("g.1", "g", tmp_path)
    monkeypatch.setattr(workshop, "restore", lambda request, tools, phases: SimpleNamespace(replica=replica, gpus=()))
    made = hands(tmp_path)
    # Not one that holds all of the machine's memory, which is what lies below process 0.
    with pytest.raises(RestoreError, match=r"g\.1 has ended"):
        made._restore("g", "g.1", ())
    assert stopped == ["g.1"]
    made.close()


@pytest.mark.parametrize(
    "error", [FileNotFoundError("cgroup.events"), OSError(19, "No such device"), GpuckptError("x")]
)
def test_a_replica_that_ends_while_it_is_adopted_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[str], error: Exception
) -> None:
    folder = tmp_path / "replicas" / "g.1"
    folder.mkdir(parents=True)
    Replica("g.1", "g", folder, state="ready", keeper="pool").save()

    def frozen(pid: int, container: str) -> bool:
        raise error

    monkeypatch.setattr("gpuckpt.containers.freezer.frozen", frozen)
    made = hands(tmp_path)
    assert made._left("g") == ([], []) and stopped == ["g.1"]
    made.close()


@pytest.mark.parametrize(
    ("result", "kind", "says", "lacking"),
    [
        ((-9, "", "working\n"), CheckpointError, "ended by SIGKILL; the kernel does that when memory runs out", 0),
        ((-15, "", ""), CheckpointError, "ended by SIGTERM", 0),
        ((9, "no JSON", "error: it broke\n"), CheckpointError, "error: it broke", 0),
        ((9, "", ""), CheckpointError, "it gave no reason", 0),
        ((9, '{"version": 1, "error": {"message": "m", "cause": null, "log": []}}', "noise"), CheckpointError, "m", 0),
        ((9, '{"error": {"message": "m", "cause": "c", "log": ["a", "b"]}}', ""), CheckpointError, "m: c: b", 0),
        ((11, '{"error": {"message": "full", "lacking": 7}}', ""), OutOfSpaceError, "full", 7),
    ],
)
def test_why_a_golden_could_not_be_made(
    result: tuple[int, str, str], kind: type[GpuckptError], says: str, lacking: int
) -> None:
    error = workshop._not_made("g", Result(("gpuckpt",), *result))
    assert type(error) is kind and error.message == "golden g could not be made"
    assert says in (error.cause or "") and error.remedy and getattr(error, "lacking", 0) == lacking
