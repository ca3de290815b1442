"""Device state of goldens: what happens in which order, and what is left when any of it goes wrong."""

from __future__ import annotations

import threading
import time
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.containers import freezer
from gpuckpt.cuda import nodes
from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import (
    CheckpointError,
    GpuckptError,
    GpuFullError,
    IncompatibleError,
    InterruptedByUser,
    NotFoundError,
    OutOfSpaceError,
    PreflightError,
    RestoreError,
    UsageError,
)
from gpuckpt.golden import replica as replicas
from gpuckpt.golden import weights
from gpuckpt.golden.mapping import Outcome
from gpuckpt.golden.restore import RestoreRequest
from gpuckpt.golden.several import restore_all
from gpuckpt.manifest import Memory, Mount
from gpuckpt.timing import PhaseTable
from tests.cuda_fake import MIB, gpu
from tests.fakes import World
from tests.gpu_world import (
    REFUSED,
    FakeControl,
    free,
    frozen,
    made,
    record,
    restored,
    running,
    server,
    steps,
    suspend,
    wake,
    world,
)
from tests.interrupts import interrupts

__all__ = ["frozen", "running", "server", "world"]  # fixtures

# --- goldens with device state -------------------------------------------------------------------------------------


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


# --- restores ------------------------------------------------------------------------------------------------------


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


# --- how a container is given GPUs ---------------------------------------------------------------------------------


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


# --- mapped, or copied after all -----------------------------------------------------------------------------------


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


# --- bad luck ------------------------------------------------------------------------------------------------------


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


def test_an_interrupt_ends_the_wait_for_room_of_several(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made(world)
    world.driver.processes[4242].state = "checkpointed"
    world.driver.devices[gpu(0).uuid] = gpu(0, free=100)
    requests = [RestoreRequest("gold", replica=name, gpu_wait=60.0) for name in ("one", "two")]
    main, looking, waited_for = threading.get_ident(), set[int](), threading.Event()
    gpus = world.driver.gpus

    def looked() -> tuple[Gpu, ...]:
        """Interrupt once both look for room, of which there is none, and are waited for."""
        if threading.get_ident() != main and len(looking) < 2:
            looking.add(threading.get_ident())
            if len(looking) == 2 and waited_for.wait(60):
                interrupt()
        return gpus()

    def waiting(running: Any) -> Any:
        waited_for.set()
        return as_completed(running)

    monkeypatch.setattr(world.driver, "gpus", looked)
    monkeypatch.setattr("gpuckpt.golden.several.as_completed", waiting)

    began = time.monotonic()
    with interrupts() as interrupt, pytest.raises(InterruptedByUser, match=r"^interrupted$"):
        restore_all(requests, world.tools, PhaseTable())
    assert time.monotonic() - began < 50  # not the sixty that they would wait
    assert replicas.all_of(world.layout.replicas) == []


def test_pipes_that_another_mount_hides_are_none(world: World, tmp_path: Path) -> None:
    for name in ("host/nvidia-mps", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "host/nvidia-mps/control").touch()
    host = Mount(source=str(tmp_path / "host"), destination="/tmp")
    made(world, mounts=(host, Mount(source=str(tmp_path / "empty"), destination="/tmp/nvidia-mps")))
