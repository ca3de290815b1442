"""What unit tests share."""

from __future__ import annotations

import pytest

from gpuckpt.checks import Check


@pytest.fixture(autouse=True)
def _long_socket_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's temporary folders have longer names than a Unix socket may have; fakes bind none."""
    monkeypatch.setattr("gpuckpt.golden.replica.LONGEST_SOCKET", 4096)


@pytest.fixture(autouse=True)
def _no_podman_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor starts podman's service to see whether it answers; unit tests start nothing that outlives them."""
    answer = Check("containers.service", "podman service", "ok", "answers", "a fake")
    monkeypatch.setattr("gpuckpt.containers.service.check", lambda run, criu, runtime: answer)
