"""Calls to podman's service: when one is tried again, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuckpt.containers.api import Api
from gpuckpt.errors import DaemonUnreachableError
from tests.fakes import UnixServer, response


def test_a_service_that_ended_is_started_again_before_anything_is_sent(tmp_path: Path) -> None:
    tried: list[str] = []
    with UnixServer(tmp_path / "podman.sock", lambda asked: response(200, {"Id": "abc"})) as server:
        hidden = server.path.rename(tmp_path / "hidden.sock")

        def reconnect() -> None:
            tried.append("again")
            hidden.rename(server.path)

        assert Api(server.path, reconnect=reconnect).call("POST", "/x") == {"Id": "abc"}
    assert tried == ["again"] and len(server.asked) == 1


def test_a_service_that_does_not_come_back_is_tried_once(tmp_path: Path) -> None:
    tried: list[str] = []
    with pytest.raises(DaemonUnreachableError):
        Api(tmp_path / "absent", reconnect=lambda: tried.append("again")).call("GET", "/x")
    assert tried == ["again"]


def test_what_was_sent_is_not_sent_again(tmp_path: Path) -> None:
    with UnixServer(tmp_path / "podman.sock", lambda asked: b"") as server, pytest.raises(DaemonUnreachableError):
        Api(server.path, reconnect=lambda: pytest.fail("it was connected")).call("POST", "/x")
    assert len(server.asked) == 1
