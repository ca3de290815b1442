"""What contract tests share: stand-ins for NVIDIA's driver, compiled once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import stub_driver
from tests.stub_driver import World


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the libraries and cuda-checkpoint."""
    return stub_driver.build(tmp_path_factory.mktemp("stubs"))


@pytest.fixture(scope="module")
def _world(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("world"), built)
    yield made
    if (made.folder / "helper.pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(made.helper_pid(), signal.SIGTERM)


@pytest.fixture
def world(_world: World) -> World:
    """One for all tests of a module, so that they share a helper; empty."""
    _world.clear()
    return _world


@pytest.fixture
def programs(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same with its nvidia-smi where programs are looked for."""
    monkeypatch.setattr("gpuckpt.proc._PATH", f"{world.bin}:/usr/bin:/bin")
    return world
