"""What commands leave when they are killed, and who still works: locks, replicas, containers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpuckpt.containers.podman import OWNER, container_name
from gpuckpt.golden.replica import Replica
from gpuckpt.host import hugepages
from tests.fakes import World, tools_for

HOLDER = """
import sys
from pathlib import Path
from gpuckpt.store import locks
with locks.exclusive(Path(sys.argv[1]), sys.argv[2], sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, kind: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a name until the end of the ``with``."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), kind, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
    finally:
        child.communicate()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(hugepages, "MODE", tmp_path / "no-huge-pages")
    return tools_for(tmp_path)


def half_made(world: World, name: str) -> None:
    """What a killed creation leaves: images without a manifest, and a running container."""
    (world.layout.staging / name / "images").mkdir(parents=True)
    folder = world.layout.replicas / name
    folder.mkdir()
    Replica(name, name, folder).save()
    world.overlay.mount(folder, [world.base])


def replica_of(world: World, name: str, status: str | None, *, golden: str = "gold") -> Replica:
    """A ready replica whose container is in ``status``, or gone."""
    folder = world.layout.replicas / name
    folder.mkdir()
    made = Replica(name, golden, folder, state="ready")
    made.save()
    world.overlay.mount(folder, [world.base])
    if status:
        ours(world, name, status)
    return made


def ours(world: World, name: str, status: str) -> None:
    container = world.containers.foreign(container_name(name), replica=name)
    container.spec.labels[OWNER] = str(world.layout.state)
    container.status = status
