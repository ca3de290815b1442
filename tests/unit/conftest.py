"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpuckpt.checks import Check
from gpuckpt.sessions import Client
from tests.fake_guest import FakeGuest, fake_guest


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
    return Client(f"unix:{guest.path}", timeout=5)
