"""Making a golden: what happens in which order, and that nothing is left when any of it goes wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.containers.api import PodmanError
from gpuckpt.containers.podman import container_name
from gpuckpt.criu import images as criu_images
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    IncompatibleError,
    InterruptedByUser,
    NotFoundError,
    OutOfSpaceError,
    PreflightError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import profile, tiers
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.create import Created, create
from gpuckpt.golden.sweep import sweep
from gpuckpt.manifest import Mount, Port, Process, Volume
from gpuckpt.store import layout, locks, seal
from gpuckpt.timing import PhaseTable
from tests.fakes import IMAGES, NEVER, World, tools_for

WHOLE_ORDER = [
    "stage: container",
    "mount root",
    "create container",
    "start container",
    "stage: server start",
    "health",
    "inspect container",
    "stage: first token",
    "first token",
    "stage: warm-up",
    "warm up",
    "stage: canary",
    "record canary",
    "stage: quiesce",
    "quiesce",
    "inspect container",
    "measure memory",
    "stage: dump",
    "dump",
    "stage: rewrite",
    "stage: digests",
    "stage: publish",
    "remove container",
    "unmount root",
]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine of fakes; CRIU's images, which only CRIU can make, read as those of one small process."""
    monkeypatch.setattr(criu_images, "regular_files", lambda folder: {"/lib/libc.so", "/srv/written", "/dev/null"})
    monkeypatch.setattr(
        criu_images,
        "processes",
        lambda folder: (Process(pid=1, parent=0, name="serve", threads=2, pages_bytes=8192),),
    )
    monkeypatch.setattr(criu_images, "capabilities", lambda folder: ("CAP_CHOWN",))
    monkeypatch.setattr(criu_images, "sockets", lambda folder: ("unix /run/gpuckpt/server.sock listening",))
    monkeypatch.setattr(criu_images, "shared_memory_bytes", lambda folder: (4096, 0))
    return tools_for(tmp_path)


def made(world: World, name: str = "gold", **changes: object) -> Created:
    return create(world.request(name, **changes), world.tools, PhaseTable())


# --- the good case --------------------------------------------------------------------------------------------


def test_everything_happens_once_and_in_order(world: World) -> None:
    result = made(world)
    assert world.journal.events == WHOLE_ORDER
    assert world.left_over() == []
    assert world.layout.names() == ["gold"]
    assert result.folder == world.layout.goldens / "gold"
    assert result.replica is None


def test_the_golden_is_whole_sealed_and_private(world: World) -> None:
    folder = made(world).folder
    golden = manifests.read(folder)
    assert {f"images/{name}" for name in IMAGES} | {"rootfs/srv/written"} == set(golden.files)
    assert (folder / "rootfs/srv/written").read_text() == "by the server"
    assert seal.broken(folder, golden) == []
    assert folder.stat().st_mode & 0o077 == 0
    assert all((folder / "images" / name).stat().st_mode & 0o077 == 0 for name in IMAGES)
    assert (folder / "manifest.json").stat().st_mode & 0o077 == 0


def test_the_manifest_says_what_was_made(world: World) -> None:
    golden = made(world, env={"MODE": "test"}, shm_size=123).manifest
    assert golden == manifests.read(world.layout.goldens / "gold")
    assert golden.launch.argv == ("serve", "--fast")
    assert golden.launch.env["SERVER"] == "fake" and golden.launch.env["MODE"] == "test"
    assert golden.launch.capabilities == ("CAP_CHOWN",)
    assert golden.launch.shm_size == 123
    assert golden.affinity == {"0": (7, 9)}
    # Held files: of the base by size and time, not what the golden itself carries, nor the kernel's.
    assert set(golden.identity.base.files) == {"/lib/libc.so"}
    assert golden.canary is not None and golden.canary.body_blake3 == "forty-two"
    assert golden.sizes.cpu_pages == 8192 - 4096 and golden.sizes.shared_memory == 4096
    assert golden.sizes.rootfs == len("by the server")
    on_disk = sum((world.layout.goldens / "gold" / name).stat().st_size for name in golden.files)
    assert golden.sizes.total == on_disk
    assert golden.cold_ttft_s > 0


def test_the_phase_table_shows_criu_s_stages_and_adds_up(world: World) -> None:
    result = made(world)
    rows = {row.name: row.seconds for row in result.phases.rows()}
    assert {"container", "server start", "podman: dump", "criu: dump memory", "copy written files", "publish"} <= set(
        rows
    )
    assert sum(rows.values()) == pytest.approx(result.phases.wall_seconds, abs=1e-6)
    assert min(rows.values()) >= 0


def test_without_canary_none_is_recorded(world: World) -> None:
    assert made(world, canary=False).manifest.canary is None
    assert "record canary" not in world.journal.events


def test_a_published_port_records_the_address_to_come_back_to(world: World) -> None:
    golden = made(world, publish=Port(host_ip="", host_port=8000, container_port=80)).manifest
    assert golden.address is not None and golden.address.ip == "10.88.0.7"


def test_volumes_are_copied_while_the_processes_are_frozen(world: World) -> None:
    volume = world.containers.create_volume("data")
    (volume / "rows").write_text("1")
    made(world, volumes=(Volume(name="data", destination="/data"),))
    assert (world.layout.goldens / "gold/volumes/data/rows").read_text() == "1"
    assert "data" in world.containers.volumes, "a volume that was there before stays"


@pytest.mark.parametrize("leave_running", [False, True])
def test_volumes_that_are_not_there_are_made_for_the_server(
    world: World, monkeypatch: pytest.MonkeyPatch, leave_running: bool
) -> None:
    recorded: list[tuple[str, ...]] = []
    really = world.containers.create_volume

    def watched(name: str) -> Path:
        record = replicas.load(world.layout.replicas / "gold")
        assert record is not None
        recorded.append(record.volumes)
        return really(name)

    monkeypatch.setattr(world.containers, "create_volume", watched)
    volumes = (Volume(name="data", destination="/data"), Volume(name="cache", destination="/cache"))
    result = made(world, volumes=volumes, leave_running=leave_running)
    assert recorded == [("data",), ("data", "cache")], "killed at any moment, the next sweep knows of them"
    assert (result.folder / "volumes" / "data").is_dir() and (result.folder / "volumes" / "cache").is_dir()
    if result.replica is None:
        assert world.left_over() == []
    else:
        replicas.stop(world.tools, "gold")
        assert world.left_over() == ["volume data", "volume cache"], "what a server left running wrote outlives it"


def test_an_image_s_own_settings_are_taken(world: World) -> None:
    world.containers.images["site"] = "sha256:aa"
    golden = made(world, image="site").manifest
    assert golden.launch.image == "site" and golden.launch.rootfs is None
    assert golden.launch.argv == ("/entry", "serve", "--fast")
    assert golden.launch.env["LANG"] == "C.UTF-8" and golden.launch.user == "app"
    assert golden.identity.base.digest == "sha256:aa"
    assert world.left_over() == []


def test_leave_running_keeps_the_server_as_a_ready_replica(world: World) -> None:
    result = made(world, leave_running=True)
    assert result.replica is not None and result.replica.state == "ready"
    assert world.containers.containers[container_name("gold")].status == "running"
    assert "unmount root" not in world.journal.events
    assert replicas.load(world.layout.replicas / "gold") == result.replica


# --- when it goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "kind", "late"),
    [(event, InterruptedByUser, late) for event in WHOLE_ORDER for late in (False, True)]
    + [(event, kind, False) for event in WHOLE_ORDER for kind in (GpuckptError, RuntimeError) if "stage" not in event],
)
def test_nothing_is_left_when_a_step_fails(world: World, event: str, kind: type[BaseException], late: bool) -> None:
    error = kind("it failed")
    world.journal.trouble[event] = error
    world.journal.late = late
    with pytest.raises((GpuckptError, InterruptedByUser, RuntimeError)) as caught:
        made(world)
    assert not world.journal.trouble, "the step never came"
    assert world.left_over() == []
    assert world.layout.names() == []
    assert locks.is_free(world.layout.golden_locks, "golden", "gold") and locks.is_free(
        world.layout.replica_locks, "replica", "gold"
    )
    if kind is InterruptedByUser:
        assert caught.value is error, "an interrupt must not turn into another failure"


@pytest.mark.parametrize("leave_running", [False, True])
def test_publishing_is_last(world: World, monkeypatch: pytest.MonkeyPatch, leave_running: bool) -> None:
    """When the golden gets its name, its server is removed, or ready for good: nothing that may fail comes after."""

    def fails(staging: Path, target: Path) -> Path:
        assert staging.is_dir() and not target.exists()
        kept = replicas.load(world.layout.replicas / "gold")
        assert (kept is not None and kept.state == "ready") if leave_running else kept is None
        raise OSError("no")

    monkeypatch.setattr("gpuckpt.golden.create._publish", fails)
    with pytest.raises(OSError, match="no"):
        made(world, leave_running=leave_running, volumes=(Volume(name="data", destination="/data"),))
    assert world.left_over() == []
    assert world.layout.names() == []


@pytest.mark.parametrize("event", ["remove container", "unmount root"])
def test_a_stuck_removal_keeps_the_record_and_the_next_sweep_finishes_it(world: World, event: str) -> None:
    """The first error is the one to know; what the roll-back could not do is said beside it, and done later."""
    world.journal.trouble |= {"warm up": GpuckptError("first"), event: GpuckptError("podman is stuck")}
    with pytest.raises(CheckpointError) as caught:
        made(world, volumes=(Volume(name="data", destination="/data"),))
    assert "first" in str(caught.value.cause)
    assert any("podman is stuck" in note and "replica gold" in note for note in world.report.notes)
    stuck = {
        "remove container": f"container {container_name('gold')}",
        "unmount root": f"mount {world.layout.replicas / 'gold'}",
    }
    assert world.left_over() == [stuck[event], f"folder {world.layout.replicas / 'gold'}"]
    record = replicas.load(world.layout.replicas / "gold")
    assert record is not None and record.state == "removing" and record.volumes == ("data",)
    assert sweep(world.settings, lambda: world.tools) == ["removed the half-made replica gold"]
    assert world.left_over() == []


def test_a_server_that_cannot_be_removed_publishes_nothing(world: World) -> None:
    world.journal.trouble["remove container"] = GpuckptError("podman is stuck")
    with pytest.raises(GpuckptError, match="podman is stuck"):
        made(world)
    assert world.layout.names() == []
    assert world.left_over() == [], "the roll-back tried once more"


def test_a_runtime_that_ignores_our_options(world: World) -> None:
    """Its dump may look well, but the written files are not in it, and no hook ran."""
    world.containers.ignores_options = True
    with pytest.raises(PreflightError) as caught:
        made(world)
    assert caught.value.exit_code == 4 and "org.criu.config" in str(caught.value.remedy)
    assert "dump" in world.journal.events
    assert world.left_over() == []
    assert world.layout.names() == []


def test_a_container_of_another_gpuckpt_is_in_the_way(world: World) -> None:
    foreign = world.containers.foreign(container_name("gold"))
    with pytest.raises(BusyError) as caught:
        made(world)
    assert caught.value.exit_code == 7
    assert world.left_over() == []
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"


def test_what_podman_refuses_at_the_start(world: World) -> None:
    world.journal.trouble["start container"] = PodmanError("refused", status=500, cause="address in use")
    with pytest.raises(CheckpointError) as caught:
        made(world)
    assert caught.value.cause == "address in use" and "could not be started" in caught.value.message
    assert world.left_over() == []


def test_a_server_that_dies_is_shown_with_its_last_lines(world: World) -> None:
    world.containers.dies_on_start = True
    world.containers.log = "starting\nno such model\n"
    world.adapter.unhealthy = NEVER
    with pytest.raises(CheckpointError) as caught:
        made(world)
    error = caught.value
    assert error.exit_code == 9
    assert error.log == ("starting", "no such model")
    assert error.cause == "the container ended with exit code 3"
    assert error.log_path is not None and Path(error.log_path).read_text() == world.containers.log
    assert Path(error.log_path).stat().st_mode & 0o077 == 0
    assert world.left_over() == []


def test_a_server_that_never_gets_healthy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.serving._POLL", 0.001)
    world.adapter.unhealthy = NEVER
    with pytest.raises(DeadlineError) as caught:
        made(world, start_timeout=0.02)
    assert caught.value.exit_code == 13 and caught.value.log == ("listening", "ready")
    assert world.left_over() == []


def test_a_server_may_take_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.serving._POLL", 0.001)
    world.adapter.unhealthy = 3
    made(world)
    assert world.journal.events.count("health") == 4


@pytest.mark.parametrize("kind", [GpuckptError, DaemonUnreachableError])
def test_a_server_that_fails_at_the_warm_up(world: World, kind: type[GpuckptError]) -> None:
    world.journal.trouble["warm up"] = kind("GET / failed", cause="out of memory")
    with pytest.raises(CheckpointError) as caught:
        made(world)
    assert caught.value.exit_code == 9
    assert "GET / failed; out of memory" in str(caught.value.cause)
    assert caught.value.log == ("listening", "ready")
    # One whose connection broke is ending; one that answers is not.
    assert ("wait for log" in world.journal.events) == (kind is DaemonUnreachableError)


@pytest.mark.parametrize(("event", "kind"), [("record canary", VerificationError), ("quiesce", DeadlineError)])
def test_what_is_not_the_server_s_fault_keeps_its_class(world: World, event: str, kind: type[GpuckptError]) -> None:
    error = kind("no")
    world.journal.trouble[event] = error
    with pytest.raises(kind) as caught:
        made(world)
    assert caught.value is error
    assert world.left_over() == []


@pytest.mark.parametrize("event", ["create volume", "start container", "dump", "stage: publish"])
@pytest.mark.parametrize("late", [False, True])
def test_volumes_of_a_failed_creation_go_and_those_before_it_stay(world: World, event: str, late: bool) -> None:
    (world.containers.create_volume("old") / "rows").write_text("1")
    world.journal.trouble[event] = GpuckptError("it failed")
    world.journal.late = late
    with pytest.raises(GpuckptError):
        made(world, volumes=(Volume(name="old", destination="/old"), Volume(name="new", destination="/new")))
    assert world.left_over() == ["volume old"]
    assert (world.containers.volumes["old"] / "rows").read_text() == "1"


def test_a_failed_dump_shows_criu_s_own_words(world: World) -> None:
    world.containers.criu_log = "(00.1) fine\n(00.2) Error (criu/sk-inet.c:188): Connected TCP socket\n"
    world.journal.trouble["dump"] = GpuckptError("podman: exit status 1")
    with pytest.raises(CheckpointError) as caught:
        made(world)
    assert caught.value.log == ("(00.2) Error (criu/sk-inet.c:188): Connected TCP socket",)
    assert "open TCP connection" in str(caught.value.cause)
    assert caught.value.log_path is not None
    assert Path(caught.value.log_path).read_text() == world.containers.criu_log


def test_a_dump_that_fills_the_store(world: World) -> None:
    world.containers.criu_log = "(00.2) Error (criu/page-xfer.c:1): Can't write pages: No space left on device\n"
    world.journal.trouble["dump"] = GpuckptError("podman: exit status 1")
    with pytest.raises(OutOfSpaceError) as caught:
        made(world)
    assert caught.value.exit_code == 11


@pytest.mark.parametrize("stage", ["pre-dump", "post-dump"])
def test_a_failing_hook_stops_the_dump_and_its_output_is_shown(world: World, stage: str) -> None:
    hook = world.hook(stage, "echo not now; exit 3")
    with pytest.raises(CheckpointError) as caught:
        made(world)
    assert str(hook) in caught.value.message and "status 3" in caught.value.message
    assert "stopped by a hook" in caught.value.message
    assert caught.value.log == ("not now",)
    assert world.left_over() == []


def test_a_copy_that_fills_the_store(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of written files runs in the action script; CRIU only knows that the script failed."""
    programs = world.folder / "bin"
    programs.mkdir()
    (programs / "cp").write_text("#!/bin/sh\necho cp: error writing x: No space left on device >&2\nexit 1\n")
    (programs / "cp").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(OutOfSpaceError) as caught:
        made(world)
    assert caught.value.exit_code == 11 and "copying the written files" in caught.value.message
    assert "No space left" in caught.value.log[0]
    assert world.left_over() == []


@pytest.mark.parametrize("short", ["store", "memory"])
def test_no_space_is_noticed_before_the_dump(world: World, monkeypatch: pytest.MonkeyPatch, short: str) -> None:
    if short == "store":
        usage = shutil.disk_usage(world.folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4095))
    else:
        monkeypatch.setattr("gpuckpt.golden.create.available_memory", lambda: 4095)
    with pytest.raises(OutOfSpaceError) as caught:
        made(world)
    assert caught.value.exit_code == 11
    assert "dump" not in world.journal.events
    assert world.left_over() == []


def test_a_missing_image_is_noticed_before_anything_is_made(world: World) -> None:
    with pytest.raises(NotFoundError):
        made(world, image="absent")
    assert world.journal.events == []
    assert world.left_over() == []


# --- servers that cannot live where memory is mapped ----------------------------------------------------------


def test_v8_is_started_once_more_to_be_copied(world: World) -> None:
    world.containers.programs = {"/usr/bin/node", "/usr/lib/libc.so.6"}
    result = made(world)
    assert not result.manifest.launch.mapped and result.manifest.memory.mode == "copy"
    assert world.journal.events.count("start container") == 2 and world.left_over() == []
    assert any("V8" in line and "copied" in line for line in world.report.notes)


def test_a_server_that_dies_of_the_profile_is_started_once_more(world: World) -> None:
    world.containers.dies_when_mapped = 133
    world.adapter.unhealthy = 1
    result = made(world)
    assert not result.manifest.launch.mapped and any("SIGTRAP" in line for line in world.report.notes)


def test_a_server_that_just_ends_is_not(world: World) -> None:
    world.containers.dies_when_mapped = 1
    world.adapter.unhealthy = 1
    with pytest.raises(CheckpointError, match="ended"):
        made(world)
    assert world.journal.events.count("start container") == 1 and world.left_over() == []


@pytest.mark.parametrize("dies", [0, 134])
def test_who_insists_on_mapping_is_refused(world: World, dies: int) -> None:
    world.containers.programs = {"/usr/lib/x86_64-linux-gnu/libnode.so.108"}
    world.containers.dies_when_mapped = dies
    world.adapter.unhealthy = 1 if dies else 0
    with pytest.raises(IncompatibleError, match="cannot be mapped"):
        made(world, mode="mapped")
    assert world.left_over() == []


def test_who_asks_for_a_copy_gets_one_at_once(world: World) -> None:
    world.containers.programs = {"/usr/bin/node"}
    assert not made(world, mode="copy").manifest.launch.mapped
    assert world.journal.events.count("start container") == 1


@pytest.mark.parametrize(
    "path", ["/opt/venv/bin/python3.11", "/usr/lib/libnodejs-notes.txt", "/srv/node/server.py", "/usr/bin/nodeenv"]
)
def test_what_is_not_v8(path: str) -> None:
    assert profile.unfit({path}) is None


# --- names ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken(world: World) -> None:
    made(world)
    world.journal.events.clear()
    with pytest.raises(BusyError) as caught:
        made(world)
    assert caught.value.exit_code == 7 and "--replace" in str(caught.value.remedy)
    assert world.journal.events == []


def test_a_name_that_another_command_is_making(world: World) -> None:
    with locks.exclusive(world.layout.golden_locks, "golden", "gold"), pytest.raises(BusyError):
        made(world)
    assert world.journal.events == []


def test_a_replica_of_that_name_is_running(world: World) -> None:
    made(world, leave_running=True)
    with pytest.raises(BusyError) as caught:
        made(world, replace=True)
    assert "gpuckpt stop gold" in str(caught.value.remedy)
    assert world.containers.containers[container_name("gold")].status == "running"
    assert manifests.read(world.layout.golden("gold")).name == "gold"


def test_a_golden_with_running_replicas_is_not_replaced(world: World) -> None:
    """They stand on its written files."""
    made(world, leave_running=True)
    # The same, under another name.
    record = world.layout.replicas / "gold"
    record.rename(world.layout.replicas / "other")
    world.containers.containers[container_name("other")] = world.containers.containers.pop(container_name("gold"))
    with pytest.raises(BusyError, match="running replicas: other") as caught:
        made(world, replace=True)
    assert caught.value.remedy == "stop them first: gpuckpt stop other"


@pytest.mark.parametrize("inside", [False, True])
def test_gpuckpt_s_own_folders_are_not_given_away(world: World, inside: bool) -> None:
    folder = world.layout.state / "replicas" if inside else world.layout.state.parent
    with pytest.raises(UsageError, match="cannot be given to the server"):
        made(world, mounts=(Mount(source=str(folder), destination="/data"),))
    assert world.left_over() == []


def replaced(world: World) -> str:
    world.adapter.answers = ["another"]
    made(world, replace=True)
    golden = manifests.read(world.layout.golden("gold"))
    assert golden.canary is not None
    return golden.canary.body_blake3


def test_a_name_is_taken_in_every_tier(world: World) -> None:
    made(world)
    tiers.move(world.tools, "gold", "disk", keep=False)
    with pytest.raises(BusyError, match="exists already"):
        made(world)
    made(world, replace=True)
    assert list(world.layout.tiers("gold")) == ["tmpfs"], "the old one must not come back after a reboot"
    assert list(world.layout.staging_of("disk").iterdir()) == []


def test_replace_changes_the_golden_in_one_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = made(world).folder.stat().st_ino
    seen: list[int] = []

    def watched(one: Path, other: Path) -> None:
        seen.append(other.stat().st_ino)
        layout.exchange(one, other)
        seen.append(other.stat().st_ino)

    monkeypatch.setattr("gpuckpt.golden.create.exchange", watched)
    assert replaced(world) == "another"
    assert seen[0] == old and seen[1] != old
    assert world.left_over() == []


@pytest.mark.parametrize("event", ["start container", "record canary", "dump", "stage: publish"])
def test_replace_keeps_the_old_golden_when_the_new_one_fails(world: World, event: str) -> None:
    old = made(world).manifest
    world.adapter.answers = ["another"]
    world.journal.trouble[event] = GpuckptError("it failed")
    with pytest.raises(GpuckptError):
        made(world, replace=True)
    folder = world.layout.golden("gold")
    golden = manifests.read(folder)
    assert golden == old
    assert seal.broken(folder, golden) == []
    assert world.left_over() == []


def test_what_a_killed_command_left_under_the_name_goes_first(world: World) -> None:
    (world.layout.staging / "gold" / "images").mkdir(parents=True)
    (world.layout.staging / "gold" / "images" / "stale.img").write_text("stale")
    half = world.layout.replicas / "gold"
    half.mkdir()
    (half / "upper").mkdir()
    (half / "upper" / "stale").write_text("stale")
    golden = made(world).manifest
    assert not [name for name in golden.files if "stale" in name]
    assert world.left_over() == []
