"""What is shown and kept of a server that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuckpt.errors import CheckpointError, GpuckptError
from gpuckpt.golden import catalogue, failures
from gpuckpt.golden.replica import Replica
from tests.fakes import tools_for


class Ended:
    """A container that is no more; its log, which is there when it was waited for, and what was asked of it."""

    def __init__(self, log: str, code: int, *, whole: bool = True) -> None:
        self.log, self.exit_code, self.alive, self.whole = log, code, False, whole
        self.asked: list[float | None] = []

    def wait_for_log(self, container: str, timeout: float) -> None:
        self.asked.append(timeout)
        self.whole = True

    def logs(self, container: str, *, most: int | None = None) -> str:
        self.asked.append(most)
        return self.log if self.whole else ""

    def inspect(self, container: str) -> Ended:
        return self


def failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, *, ending: bool = False) -> GpuckptError:
    """What is said of a server in such a container."""
    world = tools_for(tmp_path)
    for name in ("wait_for_log", "logs", "inspect"):
        monkeypatch.setattr(world.containers, name, getattr(ended, name))
    replica = Replica("one", "gold", world.layout.replicas / "one")
    return failures.server_failure(world.tools, replica, "it ended", kind=CheckpointError, ending=ending)


@pytest.mark.parametrize(
    ("log", "code", "remedy"),
    [("no module x\n", 1, "last lines say why"), ("", 1, "printed nothing"), ("started\n", 0, "in the foreground")],
)
def test_the_remedy_fits_how_the_server_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, code: int, remedy: str
) -> None:
    ended = Ended(log, code)
    error = failure(tmp_path, monkeypatch, ended)
    assert remedy in str(error.remedy) and str(code) in str(error.cause)
    assert ended.asked == [4 << 20] and error.log == tuple(log.splitlines())
    assert bool(error.log_path) == bool(log)


def test_the_last_words_of_a_server_whose_connection_broke_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Ended("last words\n", 7, whole=False)
    error = failure(tmp_path, monkeypatch, ended, ending=True)
    assert error.log == ("last words",) and "exit code 7" in str(error.cause)
    assert ended.asked == [2.0, 4 << 20]


def test_nothing_is_shown_of_a_container_that_is_gone(tmp_path: Path) -> None:
    world = tools_for(tmp_path)
    replica = Replica("one", "gold", world.layout.replicas / "one")
    error = failures.server_failure(world.tools, replica, "it broke", kind=CheckpointError, ending=True)
    assert (error.log, error.cause) == ((), "the container is gone")


def test_only_the_end_of_a_log_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tools_for(tmp_path)
    monkeypatch.setattr(failures, "_LARGEST", 4)
    (tmp_path / "long.log").write_text("0123456789")
    for text in ("0123456789", tmp_path / "long.log"):
        kept = failures.keep_log(world.tools, "one-server", text)
        assert kept and kept.read_text() == "6789" and kept.stat().st_mode & 0o777 == 0o600


def test_labels_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tools_for(tmp_path)
    found = [
        {"state": "running", "labels": {"gpuckpt.replica": name} if name else {}} for name in ("one", "../../etc", "")
    ]
    monkeypatch.setattr(world.containers, "list", lambda owner: found)
    assert catalogue.states(world.tools) == {"one": "running"}


def test_the_first_of_several_errors_is_told_where_only_the_last_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = "(EngineCore pid=7) ERROR core.py:9 ValueError: Available memory is less than desired"
    log = [first, *(f"  File {number}" for number in range(30)), "RuntimeError: initialization failed. See above"]
    error = failure(tmp_path, monkeypatch, Ended("\n".join(log), 1))
    assert str(error.cause).endswith("its first error: ValueError: Available memory is less than desired")
    told = failure(tmp_path / "other", monkeypatch, Ended("\n".join([first, "bye"]), 1))
    assert "first error" not in str(told.cause)  # it is shown
