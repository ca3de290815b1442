"""A cold start in place of a restore that fails: when it is made, and when it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.containers.podman import container_name
from gpuckpt.errors import (
    GpuckptError,
    IncompatibleError,
    InterruptedByUser,
    PreflightError,
    RestoreError,
    UsageError,
    VerificationError,
)
from tests.fakes import NEVER, World
from tests.restoring import identity_with, put, refused, restored, world

__all__ = ["world"]  # a fixture


def damaged(world: World) -> None:
    (world.layout.goldens / "gold" / "images" / "pages-1.img").write_bytes(b"")


def incompatible(world: World) -> None:
    put(world, identity=identity_with(manifests.read(world.layout.golden("gold")), kernel="0.0.1"))


def restore_fails(world: World) -> None:
    world.journal.trouble["restore"] = GpuckptError("no")


def create_fails(world: World) -> None:
    world.journal.trouble["create container"] = GpuckptError("no")


def options_ignored(world: World) -> None:
    world.containers.ignores_options = True


def hook_fails(world: World) -> None:
    world.hook("post-restore", "exit 1")


def answers_differently(world: World) -> None:
    world.adapter.answers = ["forty-three"]


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (damaged, VerificationError),
        (options_ignored, PreflightError),
        (incompatible, IncompatibleError),
        (create_fails, GpuckptError),
        (restore_fails, RestoreError),
        (hook_fails, RestoreError),
        (answers_differently, VerificationError),
    ],
)
def test_with_fallback_the_server_is_started_cold(
    world: World, trouble: Callable[[World], None], kind: type[GpuckptError]
) -> None:
    trouble(world)
    result = restored(world, fallback="cold")
    assert result.replica.tier == "cold" and type(result.fallback_reason) is kind
    assert result.first_token_ns is not None and result.canary_match is None
    assert world.journal.events[-6:] == [
        "create container",
        "start container",
        "stage: cold: server start",
        "health",
        "stage: cold: first token",
        "first token",
    ]
    assert list(world.overlay.mounted.values()) == [((world.base,), None)], (
        "a cold start does not see the golden's files"
    )
    assert world.containers.containers[container_name("gold")].status == "running"
    assert result.replica.state == "ready"
    assert "starting cold" in world.report.notes[0]


def test_an_interrupt_is_no_reason_for_a_cold_start(world: World) -> None:
    world.journal.trouble["restore"] = InterruptedByUser("interrupted")
    with pytest.raises(InterruptedByUser):
        restored(world, fallback="cold")
    assert "start container" not in world.journal.events
    assert world.left_over() == []


def test_a_wrong_request_is_no_reason_for_a_cold_start(world: World) -> None:
    refused(world, UsageError, 2, tcp_established=True, fallback="cold")
    assert "start container" not in world.journal.events


def test_a_fallback_that_fails_too_leaves_nothing(world: World) -> None:
    restore_fails(world)
    world.containers.dies_on_start = True
    world.adapter.unhealthy = NEVER
    error = refused(world, RestoreError, 10, fallback="cold")
    assert error.log == ("listening", "ready")
