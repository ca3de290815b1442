"""Replicas that are suspended and woken, and what becomes of them when that goes wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuckpt.containers import freezer
from gpuckpt.cuda.driver import DriverError
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DeadlineError,
    GpuFullError,
    InterruptedByUser,
    NotFoundError,
    NothingToDo,
    RestoreError,
)
from gpuckpt.golden import replica as replicas
from tests.cuda_fake import gpu
from tests.fakes import World
from tests.gpu_world import (
    REFUSED,
    free,
    frozen,
    record,
    running,
    steps,
    suspend,
    wake,
    world,
)

__all__ = ["frozen", "running", "world"]  # fixtures


def test_a_standby_holds_no_gpu_memory_and_wakes_to_it(running: World, frozen: set[str]) -> None:
    down = suspend(running)
    assert steps(running) == ["lock 4242", "checkpoint 4242", "freeze"]
    assert (down.gpu_bytes, free(running), len(frozen)) == (1 << 30, 80_000, 1)
    kept = record(running).standby
    assert kept is not None and kept.processes == (4242,) and kept.devices[0][2] == 1 << 30
    running.journal.events.clear()
    up = wake(running)
    assert steps(running) == ["thaw", "restore 4242", "unlock 4242"]
    assert (up.gpu_bytes, free(running), frozen) == (1 << 30, 80_000 - 1024, set())
    assert record(running).standby is None
    rows = {row.name for row in up.phases.rows()}
    assert {"thaw", "GPU: room", "GPU: restore", "GPU: unlock"} <= rows


def test_what_is_a_standby_or_awake_already_is_said(running: World, frozen: set[str]) -> None:
    with pytest.raises(NothingToDo, match="is awake already"):
        wake(running)
    suspend(running)
    with pytest.raises(NothingToDo, match="is a standby"):
        suspend(running)


def test_a_replica_that_does_not_run_can_be_neither(running: World, frozen: set[str]) -> None:
    next(iter(running.containers.containers.values())).status = "exited"
    for change in (suspend, wake):
        with pytest.raises(BusyError, match="does not run"):
            change(running)


def test_requests_end_before_the_driver_is_asked(running: World, frozen: set[str]) -> None:
    running.journal.trouble["quiesce"] = DeadlineError("busy")
    with pytest.raises(DeadlineError):
        suspend(running)
    assert steps(running) == []
    assert record(running).standby is None


@pytest.mark.parametrize(
    ("step", "error"),
    [*((step, REFUSED) for step in ("lock 4242", "checkpoint 4242", "freeze")), ("freeze", InterruptedByUser("stop"))],
)
def test_a_suspend_that_fails_leaves_it_running(
    running: World, frozen: set[str], step: str, error: BaseException
) -> None:
    running.journal.trouble[step] = error
    with pytest.raises((CheckpointError, DriverError, InterruptedByUser)):
        suspend(running)
    assert running.driver.processes[4242].state == "running"
    assert (record(running).standby, frozen) == (None, set())
    assert free(running) == 80_000 - 1024


def test_without_room_it_stays_a_standby(running: World, frozen: set[str]) -> None:
    suspend(running)
    running.driver.devices[gpu(0).uuid] = gpu(0, free=10)
    with pytest.raises(GpuFullError):
        wake(running)
    assert len(frozen) == 1 and record(running).standby is not None
    running.driver.devices[gpu(0).uuid] = gpu(0)
    wake(running)
    assert running.driver.processes[4242].state == "running"


def test_a_wake_that_the_driver_refuses_can_be_tried_again(running: World, frozen: set[str]) -> None:
    suspend(running)
    running.driver.refuse["restore", 4242] = REFUSED
    with pytest.raises(RestoreError):
        wake(running)
    assert len(frozen) == 1 and record(running).standby is not None
    running.driver.refuse.clear()
    wake(running)
    assert running.driver.processes[4242].state == "running"


@pytest.mark.parametrize("state", ["running", "locked", "checkpointed"])
def test_one_that_was_killed_on_its_way_down_can_be_woken_or_suspended(
    running: World, frozen: set[str], state: Any
) -> None:
    kept = replicas.Standby((4242,), ((gpu(0).uuid, gpu(0).name, 1 << 30),))
    for change, after in ((wake, "running"), (suspend, "checkpointed")):
        replace(record(running), standby=kept).save()
        running.driver.processes[4242].state = state
        change(running)
        assert running.driver.processes[4242].state == after
        assert (record(running).standby is None) == (after == "running")


def test_a_standby_comes_back_on_another_gpu(running: World, frozen: set[str]) -> None:
    suspend(running)
    running.driver.devices = {one.uuid: one for one in (gpu(0, free=100), gpu(1), gpu(2, free=20_000))}
    wake(running)
    assert running.driver.processes[4242].bytes == {gpu(1).uuid: 1 << 30}


def test_a_server_whose_memory_cannot_be_counted_runs_on(running: World) -> None:
    original = running.driver.memory

    def memory(pid: int) -> dict[str, int]:
        if running.driver.processes[pid].state == "checkpointed":
            raise DriverError("NVML_ERROR_UNKNOWN", "")
        return original(pid)

    running.driver.memory = memory  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="nobody can tell") as caught:
        running.tools.devices.suspend(4242, [4242])
    assert "the server runs on" in str(caught.value.remedy)
    assert running.driver.processes[4242].state == "running"
    running.driver.refuse["restore", 4242] = REFUSED
    with pytest.raises(CheckpointError) as caught:
        running.tools.devices.suspend(4242, [4242])
    assert "could not be resumed" in str(caught.value.remedy)


def test_why_a_wake_fails_is_told_even_of_one_that_has_ended(
    running: World, frozen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suspend(running)
    running.driver.refuse["restore", 4242] = REFUSED

    def gone(pid: int, container: str) -> None:
        raise NotFoundError("the container has no process any more")

    monkeypatch.setattr(freezer, "freeze", gone)
    with pytest.raises(RestoreError, match="restore failed"):
        wake(running)
