"""Prune and rm: strays go, and what somebody works on stays; also when several remove at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuckpt.containers.podman import container_name
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, NothingToDo
from gpuckpt.golden import catalogue
from gpuckpt.golden.tools import Tools
from gpuckpt.store import locks
from tests.fakes import World, publish
from tests.leftovers import half_made, ours, replica_of, world

__all__ = ["world"]  # a fixture


def snapshot(world: World) -> tuple[object, ...]:
    """All that a command could have changed."""
    files = sorted(str(path) for path in world.folder.rglob("*") if path.parent.name not in ("locks", ".locks"))
    return files, dict(world.containers.containers), dict(world.overlay.mounted)


def litter(world: World) -> None:
    half_made(world, "half")
    replica_of(world, "dead", "exited")
    replica_of(world, "gone", None)
    replica_of(world, "alive", "running")
    replica_of(world, "frozen", "paused")
    ours(world, "stray", "running")
    world.containers.foreign(container_name("theirs"), replica="theirs")
    replica_of(world, "renamed", None)
    world.containers.foreign(container_name("renamed"), replica="renamed")


def test_prune(world: World) -> None:
    litter(world)
    assert catalogue.prune(world.settings, lambda: world.tools, dry_run=False) == [
        "removed the half-made replica half",
        "removed the half-made golden half",
        "removed the dead replica dead",
        "removed the dead replica gone",
        "removed the dead replica renamed",
        "removed the stray container of stray",
    ]
    names = [container_name(name) for name in ("alive", "frozen", "renamed", "theirs")]
    assert sorted(world.containers.containers) == names
    assert {path.name for path in world.layout.replicas.iterdir()} == {"alive", "frozen"}
    with pytest.raises(NothingToDo):
        catalogue.prune(world.settings, lambda: world.tools, dry_run=False)


def test_a_dry_run_changes_nothing(world: World) -> None:
    litter(world)
    before = snapshot(world)
    would = catalogue.prune(world.settings, lambda: world.tools, dry_run=True)
    assert snapshot(world) == before
    assert all(line.startswith("would remove") for line in would)
    done = catalogue.prune(world.settings, lambda: world.tools, dry_run=False)
    assert {line.removeprefix("would remove ") for line in would} == {line.removeprefix("removed ") for line in done}


def test_prune_leaves_alone_what_somebody_works_on(world: World) -> None:
    replica_of(world, "dead", "exited")
    ours(world, "stray", "running")
    before = snapshot(world)
    with (
        locks.exclusive(world.layout.replica_locks, "replica", "dead"),
        locks.exclusive(world.layout.replica_locks, "replica", "stray"),
        pytest.raises(NothingToDo),
    ):
        catalogue.prune(world.settings, lambda: world.tools, dry_run=False)
    assert snapshot(world) == before


def test_a_replica_made_while_prune_looks_is_no_stray(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(world.layout)
    replica_of(world, "dead", "exited")

    def looking(tools: Tools) -> dict[str, str]:
        replica_of(world, "fresh", "running")
        return states(tools)

    states = catalogue.states
    monkeypatch.setattr(catalogue, "states", looking)
    assert catalogue.prune(world.settings, lambda: world.tools, dry_run=False) == ["removed the dead replica dead"]
    assert container_name("fresh") in world.containers.containers


def test_rm_takes_stopped_replicas_along_and_running_ones_when_forced(world: World) -> None:
    publish(world.layout)
    replica_of(world, "one", "running")
    replica_of(world, "two", "exited")
    replica_of(world, "other", "exited", golden="silver")
    before = snapshot(world)
    with pytest.raises(BusyError) as caught:
        catalogue.remove(world.tools, "gold")
    assert caught.value.exit_code == 7 and "gpuckpt stop one" in str(caught.value.remedy)
    assert snapshot(world) == before
    catalogue.remove(world.tools, "gold", force=True)
    assert world.layout.names() == [] and list(world.containers.containers) == [container_name("other")]
    assert [path.name for path in world.layout.replicas.iterdir()] == ["other"]
    with pytest.raises(NotFoundError):
        catalogue.remove(world.tools, "gold")


@pytest.mark.parametrize("force", [False, True])
def test_rm_leaves_a_container_of_another_gpuckpt_alone(world: World, force: bool) -> None:
    publish(world.layout)
    replica_of(world, "gold", None)
    foreign = world.containers.foreign(container_name("gold"))
    catalogue.remove(world.tools, "gold", force=force)
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"
    assert world.left_over() == [] and world.layout.names() == []


def test_two_who_remove_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first has not ended."""
    publish(world.layout)
    replica_of(world, "gold", "exited")
    really = world.overlay.unmount
    second: list[BaseException] = []

    def slow(folder: Path) -> None:
        with pytest.raises(BusyError) as caught:
            catalogue.remove(world.tools, "gold")
        second.append(caught.value)
        really(folder)

    monkeypatch.setattr(world.overlay, "unmount", slow)
    catalogue.remove(world.tools, "gold")
    assert len(second) == 1
    assert world.left_over() == [] and world.layout.names() == []


def test_many_who_remove_at_once(world: World) -> None:
    together = threading.Barrier(4)

    def remove(_: int) -> str:
        together.wait()
        try:
            catalogue.remove(world.tools, "gold")
        except GpuckptError as error:
            return type(error).__name__
        return "removed"

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            publish(world.layout)
            replica_of(world, "gold", "exited")
            ended = list(pool.map(remove, range(4)))
            assert ended.count("removed") == 1 and set(ended) <= {"removed", "BusyError", "NotFoundError"}
            assert world.left_over() == [] and world.layout.names() == []
