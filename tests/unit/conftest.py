"""What unit tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _long_socket_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's temporary folders have longer names than a Unix socket may have; fakes bind none."""
    monkeypatch.setattr("gpuckpt.golden.replica.LONGEST_SOCKET", 4096)
