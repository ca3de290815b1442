"""A restore that fails: nothing is left of it, and the cause is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.containers.api import PodmanError
from gpuckpt.errors import GpuckptError, InterruptedByUser, PreflightError, RestoreError, VerificationError
from gpuckpt.golden import replica as replicas
from gpuckpt.manifest import Address, Port, Volume
from gpuckpt.workload.endpoint import RequestFailed
from tests.fakes import NEVER, World
from tests.restoring import AFTER_CHECKS, put, refused, restored, world

__all__ = ["world"]  # a fixture


@pytest.mark.parametrize(
    ("event", "kind", "late"),
    [(event, InterruptedByUser, late) for event in AFTER_CHECKS for late in (False, True)]
    + [(event, kind, False) for event in AFTER_CHECKS for kind in (GpuckptError, RuntimeError) if "stage" not in event],
)
def test_nothing_is_left_when_a_step_fails(world: World, event: str, kind: type[BaseException], late: bool) -> None:
    error = kind("it failed")
    world.journal.trouble[event] = error
    world.journal.late = late
    with pytest.raises((GpuckptError, InterruptedByUser, RuntimeError)) as caught:
        restored(world)
    assert not world.journal.trouble, "the step never came"
    assert world.left_over() == []
    if kind is InterruptedByUser:
        assert caught.value is error, "an interrupt must not turn into another failure"


@pytest.mark.parametrize("event", ["create volume", "create container", "restore", "replay canary"])
@pytest.mark.parametrize("late", [False, True])
def test_volumes_that_a_failed_restore_brought_go_again(world: World, event: str, late: bool) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    volumes = (Volume(name="old", destination="/old"), Volume(name="data", destination="/data"))
    put(world, launch=replace(launch, volumes=volumes))
    world.containers.create_volume("old")
    world.journal.trouble[event] = GpuckptError("no")
    world.journal.late = late
    with pytest.raises(GpuckptError):
        restored(world)
    assert world.left_over() == ["volume old"]


def test_volumes_are_recorded_before_they_are_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment, the next sweep knows of them."""
    launch = manifests.read(world.layout.golden("gold")).launch
    put(world, launch=replace(launch, volumes=(Volume(name="data", destination="/data"),)))
    really = world.containers.create_volume

    def watched(name: str) -> Path:
        record = replicas.load(world.layout.replicas / "gold")
        assert record is not None and record.volumes == ("data",)
        return really(name)

    monkeypatch.setattr(world.containers, "create_volume", watched)
    restored(world)
    assert "data" in world.containers.volumes


def test_a_runtime_that_ignores_our_options(world: World) -> None:
    world.containers.ignores_options = True
    assert "org.criu.config" in str(refused(world, PreflightError, 4).remedy)


def test_an_address_that_is_taken(world: World) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    port = Port(host_ip="", host_port=8000, container_port=80)
    put(world, launch=replace(launch, port=port), address=Address(ip="10.88.0.7", mac=""))
    world.journal.trouble["prepare container"] = PodmanError("refused", status=500, cause="address in use")
    error = refused(world, RestoreError, 10)
    assert error.cause == "address in use" and "10.88.0.7" in str(error.remedy)


def test_another_answer_to_the_canary(world: World) -> None:
    world.adapter.answers = ["forty-three"]
    error = refused(world, VerificationError, 8)
    assert "forty-three" in str(error.cause) and "--no-canary" in str(error.remedy)


def test_huge_pages_are_put_back_when_the_restore_fails(world: World) -> None:
    world.journal.trouble["restore"] = GpuckptError("no")
    refused(world, RestoreError, 10)
    assert "huge pages off" in world.journal.events


def test_a_failed_restore_shows_criu_s_own_words(world: World) -> None:
    line = "(00.2) Error (criu/files-reg.c:2): File lib/libc.so has bad size 5"
    world.containers.criu_log = f"fine\n{line}\n"
    world.journal.trouble["restore"] = GpuckptError("podman: exit status 1")
    error = refused(world, RestoreError, 10)
    assert error.log == (line,) and "has changed since" in str(error.cause)
    assert error.log_path is not None and line in Path(error.log_path).read_text()


@pytest.mark.parametrize("stage", ["pre-restore", "post-restore", "post-resume"])
def test_a_failing_hook_stops_the_restore_and_its_output_is_shown(world: World, stage: str) -> None:
    hook = world.hook(stage, "echo port taken; exit 4")
    error = refused(world, RestoreError, 10)
    assert "stopped by a hook" in error.message
    assert str(hook) in error.message and "status 4" in error.message
    assert error.log == ("port taken",)


def test_a_server_that_dies_after_the_restore(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.adapter, "silent", NEVER)
    kill: Callable[..., dict[str, int]] = world.containers.restore

    def dying(container: str, owner: Path, *, tcp_established: bool, limit: float) -> dict[str, int]:
        kill(container, owner, tcp_established=tcp_established, limit=limit)
        world.containers.containers[container].status = "exited"
        return {}

    monkeypatch.setattr(world.containers, "restore", dying)
    error = refused(world, RestoreError, 10)
    assert error.log == ("listening", "ready")
    assert "exit code" in str(error.cause)


def test_a_server_that_answers_the_canary_with_an_error(world: World) -> None:
    world.journal.trouble["replay canary"] = RequestFailed("POST / answered 500", status=500, cause="broken")
    error = refused(world, RestoreError, 10)
    assert "500" in f"{error.message} {error.cause}" and "broken" in str(error.cause)
