"""What unit tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuckpt.checks import Check
from gpuckpt.sessions import Client
from gpuckpt.store.layout import Layout
from tests.fake_guest import FakeGuest, fake_guest
from tests.fake_pool import FakePool, fake_pool


@pytest.fixture(autouse=True)
def _long_socket_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's temporary folders have longer names than a Unix socket may have; fakes bind none."""
    monkeypatch.setattr("gpuckpt.golden.replica.LONGEST_SOCKET", 4096)


@pytest.fixture(autouse=True)
def _no_podman_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor starts podman's service to see whether it answers; unit tests start nothing that outlives them."""
    answer = Check("containers.service", "podman service", "ok", "answers", "a fake")
    monkeypatch.setattr("gpuckpt.containers.service.check", lambda run, criu, runtime: answer)


@pytest.fixture
def guest() -> Iterator[FakeGuest]:
    """One on a Unix socket."""
    with fake_guest() as made:
        yield made


@pytest.fixture
def client(guest: FakeGuest) -> Client:
    """A client of it."""
    return Client(f"unix:{guest.path}", timeout=60)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A machine of our own below ``tmp_path``, named in the environment; the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GPUCKPT_")]:
        monkeypatch.delenv(name)
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    for key, path in {"STORE__PATH": layout.store, "PATHS__STATE": layout.state, "PATHS__RUN": layout.run}.items():
        monkeypatch.setenv(f"GPUCKPT_{key}", str(path))
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("GPUCKPT_CONFIG", str(tmp_path / "empty.toml"))
    layout.prepare()
    return layout


@pytest.fixture
def pool(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePool]:
    """The daemon that the environment names."""
    with fake_pool() as made:
        monkeypatch.setenv("GPUCKPT_POOL_SOCKET", str(made.path))
        monkeypatch.setattr("gpuckpt.cli.pool._PAUSE", 0.01)
        monkeypatch.setattr("gpuckpt.cli.pool_logs._PAUSE", 0.01)
        yield made
