"""Sweeping up after killed commands: what they left goes, what the living make stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt.containers.podman import container_name
from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.sweep import orphans, sweep
from gpuckpt.golden.tools import Tools
from gpuckpt.store import locks
from tests.fakes import World, publish, tools_for
from tests.leftovers import half_made, held_elsewhere, world

__all__ = ["world"]  # a fixture


def test_nothing_to_sweep_needs_no_podman(world: World) -> None:
    publish(world.layout)
    folder = world.layout.replicas / "gold"
    folder.mkdir()
    Replica("gold", "gold", folder, state="ready").save()
    assert sweep(world.settings, lambda: pytest.fail("podman is not needed")) == []
    assert folder.is_dir() and world.layout.names() == ["gold"]


def test_what_a_killed_process_left_is_removed(world: World) -> None:
    with held_elsewhere(world.layout.golden_locks[0], "golden", "gold") as child:
        half_made(world, "gold")
        child.kill()
        child.wait()
        assert sweep(world.settings, lambda: world.tools) == [
            "removed the half-made replica gold",
            "removed the half-made golden gold",
        ]
    assert world.left_over() == []


def test_what_a_living_process_makes_stays(world: World) -> None:
    half_made(world, "gold")
    with (
        held_elsewhere(world.layout.golden_locks[0], "golden", "gold"),
        held_elsewhere(world.layout.replica_locks, "replica", "gold"),
    ):
        assert orphans(world.layout) == ([], [])
        assert sweep(world.settings, lambda: pytest.fail("nothing is to be removed")) == []
    assert (world.layout.staging / "gold" / "images").is_dir() and (world.layout.replicas / "gold").is_dir()


def test_a_replica_folder_without_a_record_is_removed(world: World) -> None:
    (world.layout.replicas / "gold").mkdir()
    assert sweep(world.settings, lambda: world.tools) == ["removed the half-made replica gold"]
    assert world.left_over() == []


def test_sweeping_makes_the_folders_of_a_fresh_machine(tmp_path: Path) -> None:
    world = tools_for(tmp_path / "one")
    fresh = replace(world.settings, paths=replace(world.settings.paths, state=tmp_path / "fresh"))
    assert sweep(fresh, lambda: world.tools) == []
    assert (tmp_path / "fresh" / "locks").is_dir() and (tmp_path / "fresh" / "replicas").is_dir()


def test_a_stuck_thing_is_said_and_does_not_keep_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        half_made(world, name)
    world.journal.trouble["remove container"] = GpuckptError("podman is stuck")
    really = shutil.rmtree

    def stuck(path: Path, **options: Any) -> None:
        if path == world.layout.staging / "b":
            raise OSError("the file is odd")
        really(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stuck)
        assert sweep(world.settings, lambda: world.tools) == [
            "could not remove the half-made replica a: podman is stuck",
            "removed the half-made replica b",
            "removed the half-made golden a",
            "could not remove the half-made golden b: the file is odd",
        ]
    assert sweep(world.settings, lambda: world.tools) == [
        "removed the half-made replica a",
        "removed the half-made golden b",
    ]
    assert world.left_over() == []


def test_a_podman_that_does_not_start_is_said_only(world: World) -> None:
    half_made(world, "gold")

    def no_tools() -> Tools:
        raise DaemonUnreachableError("podman does not start")

    assert sweep(world.settings, no_tools) == [
        "could not remove the half-made replica gold: podman does not start",
        "removed the half-made golden gold",
    ]


def test_a_name_that_is_taken_in_between_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    half_made(world, "gold")
    monkeypatch.setattr(locks, "is_free", lambda *which: True)
    with (
        locks.exclusive(world.layout.golden_locks, "golden", "gold"),
        locks.exclusive(world.layout.replica_locks, "replica", "gold"),
    ):
        assert sweep(world.settings, lambda: world.tools) == []
    assert (world.layout.staging / "gold").is_dir() and (world.layout.replicas / "gold").is_dir()


def test_sweeping_leaves_containers_of_another_gpuckpt_alone(world: World) -> None:
    half_made(world, "gold")
    foreign = world.containers.foreign(container_name("gold"))
    assert len(sweep(world.settings, lambda: world.tools)) == 2
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"
