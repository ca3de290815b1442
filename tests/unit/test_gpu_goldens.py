"""Device state and weights of goldens: what happens in which order, and what is left when any of it goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.containers import freezer
from gpuckpt.criu import images as criu_images
from gpuckpt.cuda import nodes
from gpuckpt.cuda.driver import DriverError
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    GpuFullError,
    IncompatibleError,
    InterruptedByUser,
    NotFoundError,
    NothingToDo,
    OutOfSpaceError,
    PreflightError,
    RestoreError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import replica as replicas
from gpuckpt.golden import standby, weights
from gpuckpt.golden.create import Created, create
from gpuckpt.golden.mapping import Outcome
from gpuckpt.golden.restore import Restored, RestoreRequest, restore
from gpuckpt.golden.standby import Changed
from gpuckpt.manifest import Memory, Mount, Process
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.control import Control, ControlAbsent, ControlRefused, Woken
from tests.cuda_fake import MIB, gpu
from tests.fakes import World, tools_for

REFUSED = DriverError("CUDA_ERROR_NOT_SUPPORTED", "")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine of fakes with one server, whose first process holds a gigabyte on the only GPU."""
    monkeypatch.setattr(criu_images, "regular_files", lambda folder: {"/lib/libc.so"})
    process = Process(pid=1, parent=0, name="serve", threads=2, pages_bytes=8192)
    monkeypatch.setattr(criu_images, "processes", lambda folder: (process,))
    monkeypatch.setattr(criu_images, "capabilities", lambda folder: ("CAP_CHOWN",))
    monkeypatch.setattr(criu_images, "sockets", lambda folder: ())
    monkeypatch.setattr(criu_images, "shared_memory_bytes", lambda folder: (4096, 0))
    monkeypatch.setattr("gpuckpt.golden.identity.driver_version", lambda: "570.86.15")
    monkeypatch.setattr("gpuckpt.golden.gpu.driver_version", lambda: "570.86.15")
    found = tools_for(tmp_path)
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda workload: found.adapter)
    monkeypatch.setattr(nodes, "specifications", lambda folders=None: [Path("/etc/cdi/nvidia.yaml")])
    monkeypatch.setattr(standby, "adapter", lambda workload: found.adapter)
    found.on_gpu(p4242=1024)
    return found


@pytest.fixture
def frozen(world: World, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of containers that are frozen; freezing and thawing are in the journal."""
    found: set[str] = set()

    def freeze(pid: int, container: str) -> None:
        with world.journal.step("freeze"):
            found.add(container)

    def thaw(pid: int, container: str) -> None:
        with world.journal.step("thaw"):
            found.discard(container)

    monkeypatch.setattr(freezer, "freeze", freeze)
    monkeypatch.setattr(freezer, "thaw", thaw)
    monkeypatch.setattr(freezer, "frozen", lambda pid, container: container in found)
    return found


def made(world: World, **changes: Any) -> Created:
    return create(world.request(**({"gpus": ("all",), "mode": "copy"} | changes)), world.tools, PhaseTable())


def restored(world: World, **changes: Any) -> Restored:
    """Restore the golden; the dumped process is gone, and CRIU brings one back whose state is in host memory."""
    if "p" not in changes:
        world.driver.processes[4242].state = "checkpointed"
    changes.pop("p", None)
    return restore(RestoreRequest("gold", **changes), world.tools, PhaseTable())


def steps(world: World) -> list[str]:
    """What the driver, CRIU, the freezer and the server did, in order."""
    words = ("lock", "checkpoint", "restore", "unlock", "dump", "freeze", "thaw", "save", "sleep", "wake", "replay")
    return [event for event in world.journal.events if event.startswith(words)]


def free(world: World) -> int:
    return sum(one.free for one in world.driver.devices.values()) // MIB


# --- goldens with device state --------------------------------------------------------------------------------


def test_device_state_leaves_before_the_dump_and_the_golden_says_what_it_was(world: World) -> None:
    golden = made(world).manifest
    assert steps(world) == ["lock 4242", "checkpoint 4242", "dump"]
    assert golden.gpu is not None
    device = gpu(0)
    assert [(one.uuid, one.name, one.bytes) for one in golden.gpu.devices] == [(device.uuid, device.name, 1 << 30)]
    assert golden.gpu.processes == (4242,)  # as the container calls it
    assert golden.identity.driver == "570.86.15"
    assert golden.launch.gpus == ("all",)
    assert free(world) == 80_000
    assert {"GPU: lock", "GPU: checkpoint"} <= {row.name for row in golden.phases}
    assert world.left_over() == []


def test_a_server_without_a_gpu_has_none_of_it(world: World) -> None:
    golden = made(world, gpus=()).manifest
    assert (golden.gpu, golden.identity.driver, golden.launch.gpus) == (None, None, ())
    assert steps(world) == ["dump"]


def test_a_server_that_does_not_use_its_gpu_is_told_of(world: World) -> None:
    world.driver.processes.clear()
    with pytest.raises(CheckpointError, match="without using CUDA"):  # NVML's, say
        made(world)
    (world.folder / "proc" / "4242" / "fd" / "3").unlink()
    world.report.notes.clear()
    assert made(world).manifest.gpu is None
    assert "holds no memory there" in world.report.notes[0]


def test_all_processes_of_a_server_leave_together(world: World) -> None:
    world.on_gpu(p4243=2048, p4244=512)
    made(world)
    order = steps(world)
    assert set(order[:3]) == {"lock 4242", "lock 4243", "lock 4244"}
    assert set(order[3:6]) == {"checkpoint 4242", "checkpoint 4243", "checkpoint 4244"}
    assert order[6:] == ["dump"]


def test_left_running_it_comes_back(world: World) -> None:
    made(world, leave_running=True)
    assert steps(world) == ["lock 4242", "checkpoint 4242", "dump", "restore 4242", "unlock 4242"]
    assert world.driver.processes[4242].state == "running"


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_what_the_driver_refuses_ends_the_creation_with_the_server_as_it_was(world: World, step: str) -> None:
    world.driver.refuse[step, 4242] = REFUSED
    with pytest.raises(CheckpointError, match=f"{step} failed") as caught:
        made(world)
    assert "the server runs on" in str(caught.value.remedy)
    assert world.driver.processes[4242].state == "running"
    assert "dump" not in steps(world)
    assert (world.left_over(), world.layout.names()) == ([], [])


@pytest.mark.parametrize("error", [CheckpointError("no"), InterruptedByUser("interrupted")])
def test_a_dump_that_fails_puts_the_state_back(world: World, error: BaseException) -> None:
    world.journal.trouble["dump"] = error
    with pytest.raises(type(error)):
        made(world)
    assert steps(world) == ["lock 4242", "checkpoint 4242", "dump", "restore 4242", "unlock 4242"]
    assert world.driver.processes[4242].state == "running"
    assert (world.left_over(), world.layout.names()) == ([], [])


def test_room_is_kept_while_the_dump_goes_on(world: World) -> None:
    """Somebody else who asks for the room meanwhile does not get it."""
    world.driver.devices[gpu(0).uuid] = gpu(0, free=400, memory=2048)
    seen: list[BaseException] = []
    original = world.containers.checkpoint

    def dump(container: str, *, leave_running: bool, tcp_established: bool) -> dict[str, int]:
        held = [manifests.Held(gpu(0).uuid, gpu(0).name, 1024 * MIB)]
        with pytest.raises(GpuFullError) as caught, world.tools.devices.reserve(held):
            pass
        seen.append(caught.value)
        return original(container, leave_running=leave_running, tcp_established=tcp_established)

    world.containers.checkpoint = dump  # type: ignore[method-assign]
    made(world, leave_running=True)
    assert len(seen) == 1


def test_a_process_that_only_asks_about_gpus_is_named(world: World) -> None:
    files = world.folder / "proc" / "4243" / "fd"
    files.mkdir(parents=True)
    (files / "7").symlink_to("/dev/nvidiactl")
    world.driver.processes[4243] = replace(world.driver.processes[4242], bytes={}, state="running")
    original = world.driver.state
    world.driver.state = lambda pid: None if pid == 4243 else original(pid)  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="without using CUDA") as caught:
        made(world)
    assert "process 4243: /dev/nvidiactl" in str(caught.value.cause)
    assert world.driver.processes[4242].state == "running"


def test_a_divided_gpu_is_refused_before_anything_is_tried(world: World) -> None:
    world.driver.devices[gpu(0).uuid] = gpu(0, mig=True)
    with pytest.raises(CheckpointError, match="part of a GPU"):
        made(world)
    assert steps(world) == []


@pytest.mark.parametrize("env", [{}, {"CUDA_MPS_PIPE_DIRECTORY": "/run/mps/pipes"}])
def test_a_gpu_that_is_shared_through_mps_is_refused(world: World, tmp_path: Path, env: dict[str, str]) -> None:
    where = "/run/mps" if env else "/tmp"
    pipes = tmp_path / "host" / ("pipes" if env else "nvidia-mps")
    pipes.mkdir(parents=True)
    mount = Mount(source=str(tmp_path / "host"), destination=where)
    made(world, mounts=(mount,), env=env, name="before")  # no daemon
    (pipes / "control").touch()
    with pytest.raises(CheckpointError, match="MPS") as caught:
        made(world, mounts=(mount,), env=env)
    assert f"is mounted at {where}" in str(caught.value.cause)
    assert world.layout.names() == ["before"]


def test_memory_that_stays_on_the_device_is_found(world: World) -> None:
    world.driver.memory = lambda pid: {gpu(0).uuid: 7 * MIB}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="still holds GPU memory") as caught:
        made(world)
    assert "7 MiB" in str(caught.value.cause) and "the server runs on" in str(caught.value.remedy)
    assert world.driver.processes[4242].state == "running"


# --- restores -------------------------------------------------------------------------------------------------


def test_device_state_comes_back_before_the_first_answer(world: World) -> None:
    made(world)
    world.journal.events.clear()
    done = restored(world)
    assert steps(world) == ["restore", "restore 4242", "unlock 4242", "replay canary"]
    assert done.canary_match is True
    assert free(world) == 80_000 - 1024
    assert {"GPU: restore", "GPU: unlock"} <= {row.name for row in done.phases.rows()}
    assert not list((world.folder / "run" / "room").glob("*.json"))


def test_a_replica_comes_back_on_another_gpu(world: World) -> None:
    made(world)
    first, second = gpu(0, free=100), gpu(1)
    world.driver.devices = {one.uuid: one for one in (first, second)}
    restored(world)
    assert world.driver.processes[4242].bytes == {second.uuid: 1024 * MIB}


def test_a_replica_that_sees_one_gpu_only_comes_back_there(world: World) -> None:
    made(world, gpus=("0",))
    world.driver.devices = {one.uuid: one for one in (gpu(0, free=100), gpu(1))}
    with pytest.raises(GpuFullError):
        restored(world)


@pytest.mark.parametrize(("loaded", "said"), [(None, "there is no GPU to give"), ("570.1", "does not answer")])
def test_without_a_gpu_nothing_is_started(
    world: World, monkeypatch: pytest.MonkeyPatch, loaded: str | None, said: str
) -> None:
    def absent() -> Any:
        raise PreflightError("NVIDIA's driver does not answer")

    monkeypatch.setattr(world.driver, "gpus", absent)
    monkeypatch.setattr("gpuckpt.golden.gpu.driver_version", lambda: loaded)
    with pytest.raises(PreflightError, match=said):
        made(world)
    assert "create container" not in world.journal.events


def test_a_driver_that_a_sandbox_hides_is_asked_all_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.gpu.driver_version", lambda: None)
    assert made(world).manifest.gpu is not None


@pytest.mark.parametrize("device", [gpu(0, name="NVIDIA L4"), gpu(0, mig=True), gpu(0, memory=1000)])
def test_a_golden_that_can_never_fit_is_refused(world: World, device: Any) -> None:
    made(world)
    world.driver.devices = {device.uuid: device}
    world.journal.events.clear()
    with pytest.raises(IncompatibleError, match="no GPU for it"):
        restored(world)
    assert "create container" not in world.journal.events
    assert world.left_over() == []


def test_another_driver_is_another_machine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made(world)
    monkeypatch.setattr("gpuckpt.golden.identity.driver_version", lambda: "580.1")
    with pytest.raises(IncompatibleError, match="driver"):
        restored(world)


def test_without_room_nothing_is_touched(world: World) -> None:
    made(world)
    world.driver.devices[gpu(0).uuid] = gpu(0, free=1200)  # the context has no room beside it
    world.journal.events.clear()
    with pytest.raises(GpuFullError, match="1024 MiB of GPU memory are needed"):
        restored(world)
    assert "create container" not in world.journal.events
    assert world.left_over() == []


def test_who_waits_for_room_in_vain_is_told(world: World) -> None:
    made(world)
    world.driver.devices[gpu(0).uuid] = gpu(0, free=10)
    with pytest.raises(GpuFullError, match="not free within"):
        restored(world, gpu_wait=0.2)


@pytest.mark.parametrize("step", ["restore", "unlock"])
def test_a_replica_whose_state_cannot_come_back_leaves_nothing(world: World, step: str) -> None:
    made(world)
    world.driver.refuse[step, 4242] = REFUSED
    with pytest.raises(RestoreError, match=f"{step} failed"):
        restored(world)
    assert world.left_over() == []
    assert not list((world.folder / "run" / "room").glob("*.json"))


def test_a_process_that_did_not_come_back_is_named(world: World) -> None:
    world.on_gpu(p4243=100)
    made(world)
    del world.driver.processes[4243]
    with pytest.raises(RestoreError, match="are not there") as caught:
        restored(world)
    assert "4243" in str(caught.value.cause)
    assert world.left_over() == []


# --- standbys -------------------------------------------------------------------------------------------------


def ready(world: World) -> None:
    """A replica that answers."""
    made(world)
    restored(world)
    world.journal.events.clear()


def suspend(world: World, name: str = "gold") -> Changed:
    return standby.suspend(world.tools, name, manifests.read(world.layout.golden("gold")), PhaseTable())


def wake(world: World, name: str = "gold", timeout: float = 0.0) -> Changed:
    golden = manifests.read(world.layout.golden("gold"))
    return standby.wake(world.tools, name, golden, PhaseTable(), timeout=timeout)


def record(world: World) -> replicas.Replica:
    return replicas.by_name(world.layout.replicas, "gold")


@pytest.fixture
def running(world: World) -> World:
    """The same with a replica that answers."""
    ready(world)
    return world


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


# --- weights outside the image --------------------------------------------------------------------------------


class FakeControl:
    """A server that writes and reads its weights as it is told to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.content = b"w" * 5000
        self.number = 1
        self.read: list[bytes] = []
        self.carried: list[bytes] = []
        self.told: str | None = None
        self.sleeping = False

    def ranks(self) -> int:
        return self.number

    def save(self, files: Sequence[int]) -> list[int]:
        with self.world.journal.step("save"):
            return [os.pwrite(handle, self.content, 0) for handle in files]

    def sleep(self, *, caches: bool = False) -> int:
        with self.world.journal.step("sleep caches" if caches else "sleep"):
            self.sleeping = True
        return len(self.content)

    def wake(self, files: Sequence[int], carried: Sequence[int] = (), *, caches: bool = False) -> Woken:
        with self.world.journal.step("wake caches" if caches else "wake"):
            self.read = [os.pread(handle, 1 << 20, 0) for handle in files]
            self.carried = [os.pread(handle, 1 << 20, 0) for handle in carried]
            self.sleeping = False
        return Woken(len(self.content), {"map": 0.0, "copy" if carried else "stream": 0.0}, self.told)


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    found = FakeControl(world)
    monkeypatch.setattr(weights, "control", lambda replica, **limits: found)
    return found


def test_weights_are_written_tried_and_left_out(world: World, server: FakeControl) -> None:
    golden = made(world, weights="outside").manifest
    order = ["save", "sleep", "wake", "replay canary", "sleep", "lock 4242", "checkpoint 4242", "dump"]
    assert steps(world) == order
    assert server.read == [server.content]
    (name,) = golden.weights
    file = world.layout.golden("gold") / "memory" / name
    assert file.read_bytes() == server.content
    assert file.stat().st_mode & 0o777 == 0o400
    assert golden.sizes.weights == 5000 and golden.sizes.mapped_pages == 0
    assert golden.files[f"memory/{name}"].blake3.startswith(name.removesuffix(".extent"))
    assert not (world.layout.golden("gold") / "weights").exists()
    assert world.left_over() == []


def test_goldens_of_one_model_share_its_weights(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    world.driver.processes[4242].state = "running"
    made(world, name="other", weights="outside")
    one, other = (next((world.layout.golden(name) / "memory").iterdir()) for name in ("gold", "other"))
    assert one.stat().st_ino == other.stat().st_ino


def test_each_process_has_a_file_of_its_own(world: World, server: FakeControl) -> None:
    server.number = 3
    golden = made(world, weights="outside").manifest
    assert len(golden.weights) == 3 and len(set(golden.weights)) == 1  # of one content
    assert golden.sizes.weights == 5000


def test_left_running_the_server_reads_them_again(world: World, server: FakeControl) -> None:
    made(world, weights="outside", leave_running=True)
    assert steps(world)[-3:] == ["restore 4242", "unlock 4242", "wake"]
    assert not server.sleeping


def test_weights_come_back_after_the_device_state(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    world.journal.events.clear()
    done = restored(world)
    assert steps(world) == ["restore", "restore 4242", "unlock 4242", "wake", "replay canary"]
    assert server.read == [server.content]
    assert {"weights: map", "weights: wait", "weights: copy"} <= {row.name for row in done.phases.rows()}


def test_weights_are_on_their_way_before_the_processes_are(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    world.journal.events.clear()
    before = set(os.listdir("/proc/self/fd"))
    restored(world)
    events = world.journal.events
    assert events.index("carry 0") < events.index("unlock 4242")
    assert server.carried == [server.content]
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("why", ["no room", "no way", "refused", "not usable", "two ranks"])
def test_weights_that_cannot_be_carried_are_read(world: World, server: FakeControl, why: str) -> None:
    if why == "two ranks":
        server.number = 2
    made(world, weights="outside")
    if why == "no room":
        world.driver.devices[gpu(0).uuid] = gpu(0, free=1024 + 256)
    if why == "no way":
        world.driver.shares = False
    if why == "refused":
        world.driver.refuse["carry", 0] = REFUSED
    if why == "not usable":
        server.told = "another device"
    done = restored(world)
    assert done.canary_match is True
    assert bool(server.carried) is (why == "not usable")
    notes = {"refused": "were not carried ahead", "not usable": "could not be used: another device"}
    assert [notes[why] in note for note in world.report.notes] == ([True] if why in notes else [])


def test_a_server_without_room_for_both_reads_once_the_carried_memory_is_free(
    world: World, server: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(world, weights="outside")
    original, seen = server.wake, list[tuple[int, int]]()

    def wake(files: Sequence[int], carried: Sequence[int] = (), *, caches: bool = False) -> Woken:
        opened = sum("device memory" in target for target in _open_files())
        seen.append((len(carried), opened))
        if carried:
            raise ControlRefused("there is no room", cause="8 GB are free")
        return original(files)

    monkeypatch.setattr(server, "wake", wake)
    assert restored(world).canary_match is True
    assert seen == [(1, 1), (0, 0)]
    assert "there is no room: 8 GB are free" in world.report.notes[0]


def _open_files() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which they are listed
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_a_restore_that_fails_lets_go_of_what_was_carried(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    before = set(os.listdir("/proc/self/fd"))
    world.driver.refuse["restore", 4242] = REFUSED
    with pytest.raises(RestoreError):
        restored(world)
    time.sleep(0.05)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not list((world.folder / "run" / "room").glob("*.json"))


def test_a_standby_gives_them_back_and_reads_them_again(world: World, server: FakeControl, frozen: set[str]) -> None:
    made(world, weights="outside")
    restored(world)
    world.journal.events.clear()
    suspend(world)
    wake(world)
    order = ["sleep", "lock 4242", "checkpoint 4242", "freeze", "thaw", "restore 4242", "unlock 4242", "wake"]
    assert steps(world) == order


@pytest.mark.parametrize("step", ["sleep", "lock 4242", "checkpoint 4242", "freeze"])
def test_a_suspend_that_fails_leaves_a_server_with_its_weights(
    world: World, server: FakeControl, frozen: set[str], step: str
) -> None:
    made(world, weights="outside")
    restored(world)
    world.journal.trouble[step] = ControlRefused("no") if step == "sleep" else REFUSED
    with pytest.raises(GpuckptError):
        suspend(world)
    assert not server.sleeping
    assert (world.driver.processes[4242].state, frozen, record(world).standby) == ("running", set(), None)


@pytest.mark.parametrize("event", ["save", "sleep", "wake"])
def test_a_server_that_cannot_has_them_in_its_image(world: World, server: FakeControl, event: str) -> None:
    """By itself it starts once more; asked for them outside, the creation fails."""
    world.journal.trouble[event] = ControlRefused("it cannot", cause="not now")
    with pytest.raises(CheckpointError, match="cannot keep its weights outside its image: it cannot"):
        made(world, weights="outside")
    assert (world.left_over(), world.layout.names()) == ([], [])
    world.driver.processes[4242].state = "running"
    world.journal.trouble[event] = ControlRefused("it cannot", cause="not now")
    able = structs.replace(world.adapter.record, kind="guest")
    world.adapter._record = able
    golden = made(world).manifest
    assert golden.weights == ()
    assert world.report.notes == [
        "starting once more, with the weights in the image:"
        " the server cannot keep its weights outside its image: it cannot: not now"
    ]
    assert world.journal.events.count("start container") == 3


def test_a_server_without_a_control_socket_has_them_in_its_image(world: World, server: FakeControl) -> None:
    world.adapter._record = structs.replace(world.adapter.record, kind="guest")
    world.journal.trouble["save"] = ControlAbsent("nobody", cause="no such file")
    assert made(world).manifest.weights == ()
    assert "it has no control socket: no such file" in world.report.notes[0]


def test_a_server_that_ends_when_it_is_told_to_sleep_is_shown(world: World, server: FakeControl) -> None:
    world.containers.log = "Traceback\nOSError: out of luck\n"
    world.journal.trouble["sleep"] = DaemonUnreachableError("the server ended while it was told to sleep")
    with pytest.raises(CheckpointError, match="it failed") as caught:
        made(world, weights="outside")
    assert "told to sleep" in str(caught.value.cause)
    assert caught.value.log[-1] == "OSError: out of luck" and caught.value.log_path


def test_weights_that_do_not_answer_alike_stay_in_the_image(world: World, server: FakeControl) -> None:
    world.adapter.answers = ["forty-two", "forty-three", "forty-two"]
    with pytest.raises(VerificationError, match="weights that were read again"):
        made(world, weights="outside")
    world.driver.processes[4242].state = "running"
    world.adapter._record = structs.replace(world.adapter.record, kind="guest")
    world.adapter.answers = ["forty-two", "forty-three", "forty-two"]
    assert made(world).manifest.weights == ()


def test_a_full_store_is_no_reason_to_put_them_into_the_image(world: World, server: FakeControl) -> None:
    world.adapter._record = structs.replace(world.adapter.record, kind="guest")
    world.journal.trouble["save"] = ControlRefused("it could not be written", cause="No space left on device")
    with pytest.raises(OutOfSpaceError, match="no room in the store for the model's weights"):
        made(world)


def test_by_themselves_weights_are_outside_on_a_gpu_only(world: World, server: FakeControl) -> None:
    assert made(world).manifest.weights == ()  # an http server
    world.adapter._record = structs.replace(world.adapter.record, kind="guest")
    for changes, outside in (
        ({"gpus": ()}, False),
        ({"canary": False}, False),
        ({"weights": "image"}, False),
        ({}, True),
    ):
        world.driver.processes[4242].state = "running"
        golden = made(world, name=f"g{len(world.layout.names())}", **changes).manifest
        assert bool(golden.weights) == outside


# --- the control socket ---------------------------------------------------------------------------------------


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Callable[[bytes | None], tuple[Control, list[Any]]]]:
    """A server on a Unix socket that answers every request with the same bytes; what it was asked, and its files."""
    asked: list[Any] = []
    sockets: list[socket.socket] = []

    def start(answer: bytes | None) -> tuple[Control, list[Any]]:
        path = tmp_path / "control.sock"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()
        sockets.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                line, files, _, _ = socket.recv_fds(connection, 4096, 16)
                asked.append((json.loads(line), [os.pread(handle, 100, 0) for handle in files]))
                for handle in files:
                    os.close(handle)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        return Control(path, timeout=0.3), asked

    yield start
    for one in sockets:
        one.close()


def test_files_go_along_with_a_request(listening: Any, tmp_path: Path) -> None:
    control, asked = listening(b'{"bytes": 7, "phases": {"map": 0.5}}\n')
    (tmp_path / "w").write_bytes(b"weights")
    with (tmp_path / "w").open("rb") as file:
        assert control.wake([file.fileno()]) == Woken(7, {"map": 0.5})
    assert asked == [({"do": "wake"}, [b"weights"])]


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (b'{"error": {"message": "no", "cause": "why"}}\n', ControlRefused, "no"),
        (b'{"error": "no"}\n', ControlRefused, "no"),
        (b"nonsense\n", ControlRefused, "not understood"),
        (b"[1]\n", ControlRefused, "not understood"),
        (b'{"ranks": "two"}\n', ControlRefused, "not understood"),
        (b'{"ranks": Infinity}\n', ControlRefused, "not understood"),
        (b'{"ranks": -1}\n', ControlRefused, "not understood"),
        (b"[" * 100_000 + b"\n", ControlRefused, "not understood"),
        (b'{"error": null}\n', ControlRefused, "gives no reason"),
        (b'{"error": {"message": "\\u001b[31mred"}}\n', ControlRefused, "�\\[31mred"),
        (b"", DaemonUnreachableError, "ended while it was told to ranks"),
        (None, DaemonUnreachableError, "does not answer on its control socket"),
    ],
)
def test_what_a_server_may_answer(listening: Any, answer: bytes | None, kind: type[GpuckptError], said: str) -> None:
    control, _ = listening(answer)
    with pytest.raises(kind, match=said):
        control.ranks()


@pytest.mark.parametrize("phases", ["NaN", "Infinity", "-1", '"x"', "1e300"])
def test_times_that_are_none(listening: Any, phases: str) -> None:
    control, _ = listening(b'{"bytes": 1, "phases": {"map": %s}}\n' % phases.encode())
    with pytest.raises(ControlRefused, match="not understood"):
        control.wake([])


@pytest.mark.parametrize("answer", ['{"bytes": [1, 2]}', '{"bytes": [-1]}', '{"bytes": [true]}', '{"bytes": 1}'])
def test_counts_that_are_none(listening: Any, tmp_path: Path, answer: str) -> None:
    control, _ = listening(answer.encode() + b"\n")
    (tmp_path / "w").touch()
    with (tmp_path / "w").open("rb") as file, pytest.raises(ControlRefused, match="not understood"):
        control.save([file.fileno()])


def test_a_link_to_another_server_s_socket_is_not_followed(listening: Any, tmp_path: Path) -> None:
    listening(b'{"ranks": 1}\n')
    (tmp_path / "link").symlink_to("control.sock")
    with pytest.raises(DaemonUnreachableError, match="control socket"):
        Control(tmp_path / "link").ranks()


def test_its_path_may_be_longer_than_a_sockets_address(listening: Any, tmp_path: Path) -> None:
    listening(b'{"ranks": 1}\n')
    far = tmp_path / ("x" * 150)
    far.mkdir()
    (tmp_path / "control.sock").rename(far / "control.sock")
    assert Control(far / "control.sock").ranks() == 1


def test_a_server_that_says_what_it_has_not_written(world: World, server: FakeControl) -> None:
    original = server.save
    server.save = lambda files: [count + 1 for count in original(files)]  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="has written what it has not"):
        made(world, weights="outside")


def test_weights_that_have_changed_are_not_given_up_and_not_taken(
    world: World, server: FakeControl, frozen: set[str]
) -> None:
    made(world, weights="outside")
    restored(world)
    (file,) = (world.layout.golden("gold") / "memory").iterdir()
    content = file.read_bytes()
    suspend(world)
    for change in (wake, suspend):
        file.chmod(0o600)
        file.write_bytes(b"x" * len(content))
        file.chmod(0o400)
        before = list(steps(world))
        with pytest.raises(VerificationError, match="damaged"):
            change(world)
        assert steps(world) == before
        file.chmod(0o600)
        file.write_bytes(content)
        file.chmod(0o400)
        if change is wake:
            wake(world)


def test_a_server_that_cannot_read_its_weights_is_a_standby_again(
    world: World, server: FakeControl, frozen: set[str]
) -> None:
    made(world, weights="outside")
    restored(world)
    suspend(world)
    world.driver.shares = False
    world.journal.trouble["wake"] = ControlRefused("no")
    with pytest.raises(RestoreError, match="could not read its weights"):
        wake(world)
    assert (world.driver.processes[4242].state, len(frozen)) == ("checkpointed", 1)
    wake(world)
    assert (world.driver.processes[4242].state, frozen, record(world).standby) == ("running", set(), None)


def test_a_server_without_the_socket_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="control socket"):
        Control(tmp_path / "none").sleep()


def test_options_that_contradict_each_other() -> None:
    from tests.unit.test_cli_create import parsed

    for options, said in (
        ({"weights": "outside", "no_canary": True}, "needs a canary"),
        ({"cuda_graphs": True}, "servers on a GPU"),
        ({"gpus": ("all", "0")}, "names every GPU"),
        ({"gpus": ("a b",)}, "names no GPU"),
    ):
        with pytest.raises(UsageError, match=said):
            parsed("serve", **options)
    assert parsed("serve", gpus=("0", "0", "1")).gpus == ("0", "1")


# --- how a container is given GPUs ----------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Any]:
    """A machine with two GPUs, whose minor numbers are not their indices."""
    dev, driver, cdi = (tmp_path / name for name in ("dev", "driver", "cdi"))
    for folder in (dev, cdi):
        folder.mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (dev / name).touch()
    for bus, uuid, minor in (("0000:01:00.0", "GPU-a", 1), ("0000:02:00.0", "GPU-b", 0)):
        (driver / "gpus" / bus).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H100\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n"
        (driver / "gpus" / bus / "information").write_text(text)
    return {"dev": dev, "driver": driver, "cdi": (cdi,)}


def test_without_a_specification_the_device_files_are_given(two: dict[str, Any]) -> None:
    def given(*names: str) -> list[str]:
        return [Path(path).name for path in nodes.devices(names, image=False, **two)]

    assert given() == []
    assert given("all") == ["nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm"]
    assert given("0") == given("GPU-a") == ["nvidia1", "nvidiactl", "nvidia-uvm"]
    with pytest.raises(NotFoundError, match="no GPU 2") as caught:
        given("2")
    assert "0 (GPU-a), 1 (GPU-b)" in str(caught.value.cause)


def test_libraries_that_are_mounted_one_by_one_are_found(tmp_path: Path) -> None:
    lines = [
        "21 1 0:20 / / rw - overlay overlay rw",
        "31 21 8:1 /a /usr/lib/x86_64-linux-gnu/libcuda.so.570.86.15 ro - ext4 /dev/sda1 ro",
        "32 21 8:1 /b /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.570.86.15 ro - ext4 /dev/sda1 ro",
        "33 21 8:1 /c /usr/bin/nvidia-smi ro - ext4 /dev/sda1 ro",
        "34 21 0:5 /d /dev/nvidia0 rw - devtmpfs devtmpfs rw",
        "35 21 0:4 /e /proc/driver/nvidia ro - proc proc ro",
        "36 21 8:1 /f /srv/models rw - ext4 /dev/sda1 rw",
        f"37 21 8:1 /g {tmp_path}/nvidia ro - ext4 /dev/sda1 ro",
        f"38 21 8:1 /h {tmp_path}/nvidia-data ro - ext4 /dev/sda1 ro",
    ]
    (tmp_path / "nvidia" / "lib64").mkdir(parents=True)
    (tmp_path / "nvidia" / "lib64" / "libcuda.so.1").touch()
    (tmp_path / "nvidia-data").mkdir()
    (tmp_path / "mountinfo").write_text("\n".join(lines))
    names = [Path(path).name for path in nodes.libraries(tmp_path / "mountinfo")]
    assert names == ["libcuda.so.570.86.15", "libnvidia-ml.so.570.86.15", "nvidia-smi", "nvidia"]


def test_an_image_needs_a_specification(two: dict[str, Any]) -> None:
    with pytest.raises(PreflightError, match="no CDI specification"):
        nodes.devices(("all",), image=True, **two)
    (two["cdi"][0] / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    for image in (True, False):
        assert nodes.devices(("all", "GPU-a"), image=image, **two) == ("nvidia.com/gpu=all", "nvidia.com/gpu=GPU-a")


def test_a_machine_without_a_driver_has_no_gpus_to_give(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be given GPUs"):
        nodes.devices(("all",), image=False, dev=tmp_path, driver=tmp_path, cdi=())


# --- mapped, or copied after all ------------------------------------------------------------------------------


@pytest.fixture
def mapped(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Goldens whose memory is mapped; their images cannot be rewritten here, and need not be."""
    done = Outcome(Memory(mode="mapped", mappings=1), {})
    monkeypatch.setattr("gpuckpt.golden.mapping.map_memory", lambda tools, staging, forced: done)
    monkeypatch.setattr("gpuckpt.golden.profile.unfit", lambda programs: None)
    monkeypatch.setattr("gpuckpt.golden.trial.keep_copied", lambda tools, staging, memory, pages: memory)
    return world


def test_the_trial_puts_the_state_back_and_reads_the_weights(mapped: World, server: FakeControl) -> None:
    golden = made(mapped, mode="auto", weights="outside").manifest
    assert golden.memory.mode == "mapped"
    assert steps(mapped)[-6:] == ["dump", "restore", "restore 4242", "unlock 4242", "wake", "replay canary"]
    assert golden.gpu is not None and golden.gpu.carried == golden.gpu.bytes == 1 << 30  # a fake gives nothing up


def test_a_golden_that_is_only_wrong_mapped_is_copied(mapped: World) -> None:
    mapped.journal.trouble["restore 4242"] = REFUSED
    original = mapped.containers.start

    def start(container: str) -> None:
        original(container)
        mapped.driver.processes[4242].state = "running"

    mapped.containers.start = start  # type: ignore[method-assign]
    golden = made(mapped, mode="auto").manifest
    assert golden.memory.mode == "copy"
    assert "to be copied, not mapped: the golden cannot be restored" in mapped.report.notes[0]
    assert mapped.left_over() == []
    mapped.driver.processes[4242].state = "running"
    mapped.journal.trouble["restore 4242"] = REFUSED
    with pytest.raises(CheckpointError, match="cannot be restored"):
        made(mapped, name="other", mode="mapped")


# --- caches, where weights stay in the image ------------------------------------------------------------------


@pytest.fixture
def vllm(world: World, server: FakeControl) -> FakeControl:
    """The server is vLLM's."""
    world.adapter._record = structs.replace(world.adapter.record, kind="vllm")
    return server


def test_caches_are_given_back_where_weights_stay(world: World, vllm: FakeControl, frozen: set[str]) -> None:
    golden = made(world, weights="image").manifest
    given = ["sleep caches", "wake caches", "replay canary", "sleep caches"]
    assert steps(world) == [*given, "lock 4242", "checkpoint 4242", "dump"]
    assert golden.caches and golden.weights == ()
    world.journal.events.clear()
    done = restored(world)
    assert steps(world) == ["restore", "restore 4242", "unlock 4242", "wake caches", "replay canary"]
    assert "caches: map" in {row.name for row in done.phases.rows()}
    world.journal.events.clear()
    suspend(world)
    wake(world)
    down = ["sleep caches", "lock 4242", "checkpoint 4242", "freeze"]
    assert steps(world) == [*down, "thaw", "restore 4242", "unlock 4242", "wake caches"]


def test_caches_that_cannot_be_given_back_are_carried_and_told_of(world: World, vllm: FakeControl) -> None:
    world.journal.trouble["sleep caches"] = ControlRefused("no sleep mode", cause="it was switched off")
    golden = made(world, weights="image").manifest
    assert not golden.caches
    assert world.report.notes == ["the server's caches are in its image: no sleep mode: it was switched off"]


def test_caches_that_change_an_answer_end_the_creation(world: World, vllm: FakeControl) -> None:
    world.adapter.answers = ["forty-two", "forty-three"]
    with pytest.raises(VerificationError, match="given its caches back"):
        made(world, weights="image")
    assert (world.left_over(), world.layout.names()) == ([], [])


def test_weights_that_cannot_be_outside_leave_the_caches_to_give_back(world: World, vllm: FakeControl) -> None:
    world.journal.trouble["save"] = ControlRefused("it cannot")
    golden = made(world).manifest
    assert golden.caches and golden.weights == ()


# --- bad luck -------------------------------------------------------------------------------------------------


def test_one_that_was_killed_before_it_gave_up_most_of_the_gpu_is_woken(running: World, frozen: set[str]) -> None:
    uuid = gpu(0).uuid
    running.driver.processes[4242].bytes = {uuid: 50_000 * MIB}
    running.driver.devices[uuid] = gpu(0, free=30_000)
    kept = replicas.Standby((4242,), ((uuid, gpu(0).name, 50_000 * MIB),), (uuid,))
    replace(record(running), standby=kept).save()
    wake(running)
    assert record(running).standby is None and running.driver.processes[4242].state == "running"


@pytest.mark.parametrize("state", ["failed", None])
def test_a_standby_whose_state_is_lost_is_not_awake(running: World, frozen: set[str], state: Any) -> None:
    suspend(running)
    if state is None:
        del running.driver.processes[4242]
    else:
        running.driver.processes[4242].state = state
    with pytest.raises(RestoreError, match="lost") as caught:
        wake(running)
    assert "stop the replica" in (caught.value.remedy or "")
    assert record(running).standby is not None and len(frozen) == 1


def test_a_standby_of_which_a_process_has_gone_is_not_awake(running: World, frozen: set[str]) -> None:
    suspend(running)
    kept = record(running)
    assert kept.standby is not None
    replace(kept, standby=replace(kept.standby, processes=(4242, 99))).save()
    with pytest.raises(RestoreError, match="are not there"):
        wake(running)


def test_an_interrupt_in_the_midst_of_freezing_thaws_before_the_state_comes_back(
    running: World, frozen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running.journal.trouble["freeze"] = InterruptedByUser("interrupted")
    running.journal.late = True
    thawed: list[bool] = []
    original = running.driver.before

    def before(step: str, pid: int) -> None:
        thawed.append(not frozen)
        original(step, pid)

    running.driver.before = before

    def freeze(pid: int, container: str) -> None:
        frozen.add(container)
        try:
            with running.journal.step("freeze"):
                pass
        except BaseException:
            frozen.discard(container)  # as the real one
            raise

    monkeypatch.setattr(freezer, "freeze", freeze)
    with pytest.raises(InterruptedByUser):
        suspend(running)
    assert all(thawed)
    assert (record(running).standby, running.driver.processes[4242].state) == (None, "running")


@pytest.fixture
def blind(world: World) -> World:
    """NVML knows the server's processes by other ids."""
    world.driver.memory = lambda pid: {}  # type: ignore[method-assign]
    return world


def test_where_nvml_names_no_processes_what_became_free_counts(blind: World, frozen: set[str]) -> None:
    golden = made(blind).manifest
    assert golden.gpu is not None
    assert [(one.uuid, one.bytes) for one in golden.gpu.devices] == [(gpu(0).uuid, 1 << 30)]
    assert "what became free without it" in blind.report.notes[0]
    blind.driver.devices[gpu(0).uuid] = gpu(0, free=1000)
    with pytest.raises(GpuFullError):
        restored(blind)
    blind.driver.devices[gpu(0).uuid] = gpu(0)
    restored(blind)
    down = suspend(blind)
    assert down.gpu_bytes == 1 << 30
    kept = record(blind).standby
    assert kept is not None and kept.devices[0][2] == 1 << 30
    assert wake(blind).gpu_bytes == 1 << 30


def test_where_nobody_can_tell_what_a_server_holds_there_is_no_golden(blind: World) -> None:
    blind.driver.processes[4242].bytes = {}
    with pytest.raises(CheckpointError, match="nobody can tell"):
        made(blind)
    assert blind.driver.processes[4242].state == "running"
    assert (blind.left_over(), blind.layout.names()) == ([], [])


def test_weights_that_a_container_shows_are_the_golden_s(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    (file,) = (world.layout.golden("gold") / "memory").iterdir()
    other = world.folder / "other" / "memory"
    other.mkdir(parents=True)
    (other / file.name).write_bytes(b"x")
    world.tools = structs.replace(world.tools, root_of=lambda pid: world.folder / "meddled")
    seen = world.folder / "meddled" / "run"
    seen.mkdir(parents=True)
    (seen / "gpuckpt-memory").symlink_to(other)
    with pytest.raises(RestoreError, match="other weights than the golden's"):
        restored(world)
    assert world.left_over() == []


def test_room_is_asked_for_before_weights_are_written(
    world: World, server: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(bytes(5000))
    world.adapter._record = structs.replace(world.adapter.record, kind="guest", model=str(tmp_path / "model"))
    monkeypatch.setattr(weights, "available_memory", lambda: 4000)
    with pytest.raises(OutOfSpaceError, match="no room in the store") as caught:
        made(world)
    assert caught.value.lacking == 1000
    assert "save" not in world.journal.events


def test_a_canary_that_fails_in_the_rehearsal_is_no_end(world: World, server: FakeControl) -> None:
    world.adapter._record = structs.replace(world.adapter.record, kind="guest")
    world.journal.trouble["replay canary"] = GpuckptError("the server answers 500")
    assert made(world).manifest.weights == ()
    assert "the server answers 500" in world.report.notes[0]


def test_a_gpu_that_stays_full_is_no_reason_to_start_cold(world: World) -> None:
    made(world)
    world.driver.devices[gpu(0).uuid] = gpu(0, free=10)
    with pytest.raises(GpuFullError):
        restored(world, gpu_wait=0.1, fallback="cold")
