"""Bringing a replica back: the order of events, what is refused and why, and that nothing is left when it fails."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.containers.api import PodmanError
from gpuckpt.containers.podman import container_name
from gpuckpt.errors import (
    BusyError,
    GpuckptError,
    IncompatibleError,
    InterruptedByUser,
    NotFoundError,
    OutOfSpaceError,
    PreflightError,
    RestoreError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import identity
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.assembly import seccomp_digest
from gpuckpt.golden.prepare import Options
from gpuckpt.golden.restore import Restored, RestoreRequest, restore
from gpuckpt.golden.sweep import sweep
from gpuckpt.golden.verify import verify
from gpuckpt.host import identity as host
from gpuckpt.manifest import Address, BaseFiles, Manifest, Port, Ulimit, Volume
from gpuckpt.store import locks, seal
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.endpoint import RequestFailed
from tests.fakes import NEVER, World, publish, tools_for

WHOLE_ORDER = [
    "stage: checks",
    "stage: container",
    "mount root",
    "create container",
    "prepare container",
    "inspect container",
    "renew entropy",
    "stage: restore",
    "huge pages on",
    "restore",
    "bind threads",
    "huge pages off",
    "stage: canary",
    "replay canary",
]
HERE = host.machine()
AFTER_CHECKS = [event for event in WHOLE_ORDER[1:] if event != "huge pages off"]


def note(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def put(world: World, **changes: Any) -> Manifest:
    """Publish a golden that fits this machine, but for ``changes`` of its manifest."""
    folder = publish(world.layout)
    (folder / "rootfs" / "srv").mkdir(parents=True, exist_ok=True)
    (folder / "rootfs" / "srv" / "written").write_text("by the server")
    publish(world.layout)
    golden = manifests.read(folder)
    fitting = {
        "launch": replace(golden.launch, seccomp_blake3=seccomp_digest(mapped=False), rootfs=str(world.base)),
        "identity": replace(
            golden.identity,
            kernel=HERE.kernel,
            machine=HERE.machine,
            cpu_flags=HERE.cpu_flags,
            base=BaseFiles(digest="1", files={"/lib/libc.so": note(world.base / "lib/libc.so")}),
        ),
        "canary": replace(golden.canary, body_blake3="forty-two") if golden.canary else None,
    }
    golden = replace(golden, **(fitting | changes))
    golden.write(folder)
    seal.write(folder)
    return golden


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine of fakes with the golden “gold” in its store."""
    made = tools_for(tmp_path)
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda record: made.adapter)
    put(made)
    return made


def restored(world: World, **options: Any) -> Restored:
    names = [name for name in options if name in Options.__dataclass_fields__]
    part = Options(**{name: options.pop(name) for name in names})
    return restore(RestoreRequest("gold", options=part, **options), world.tools, PhaseTable())


def refused(world: World, kind: type[GpuckptError], code: int, **options: Any) -> GpuckptError:
    """The error of a restore of which nothing may be left, and the golden as it was."""
    with pytest.raises(kind) as caught:
        restored(world, **options)
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert world.left_over() == []
    assert world.layout.names() == ["gold"]
    assert locks.is_free(world.layout.replica_locks, "replica", "gold") and locks.is_free(
        world.layout.golden_locks, "golden", "gold"
    )
    return caught.value


# --- the good case --------------------------------------------------------------------------------------------


def test_everything_happens_once_and_in_order(world: World) -> None:
    result = restored(world)
    assert world.journal.events == WHOLE_ORDER
    assert (result.replica.tier, result.replica.memory) == ("tmpfs", "copy")
    assert (result.canary_match, result.fallback_reason) == (True, None)
    assert result.replica.state == "ready" and replicas.load(world.layout.replicas / "gold") == result.replica
    assert world.containers.containers[container_name("gold")].status == "running"


def test_the_phase_table_adds_up_to_the_wall_time(world: World) -> None:
    result = restored(world)
    rows = {row.name: row.seconds for row in result.phases.rows()}
    assert {"checks", "container", "criu: read images", "runtime: hand over", "first token", "canary"} <= set(rows)
    assert sum(rows.values()) == pytest.approx(result.phases.wall_seconds, abs=1e-6)
    assert result.ttft_s is not None and 0 < result.ttft_s <= result.phases.wall_seconds


def test_the_container_is_what_the_golden_records(world: World) -> None:
    restored(world)
    spec = world.containers.containers[container_name("gold")].spec
    golden = manifests.read(world.layout.golden("gold"))
    assert spec.launch == golden.launch
    assert (str(world.layout.replicas / "gold" / "socket"), "/run/gpuckpt", False) in spec.binds
    layers = world.overlay.mounted[world.layout.replicas / "gold"]
    assert layers == ((world.base,), world.layout.goldens / "gold" / "rootfs")


def test_the_golden_is_read_where_it_lies(world: World) -> None:
    restored(world)
    view = world.containers.containers[container_name("gold")].bundle / "checkpoint"
    images = world.layout.goldens / "gold" / "images"
    assert {entry.resolve() for entry in view.iterdir()} == set(images.iterdir())
    golden = manifests.read(world.layout.golden("gold"))
    assert seal.broken(world.layout.golden("gold"), golden) == []


def test_without_canary_only_health_is_waited_for(world: World) -> None:
    result = restored(world, canary=False)
    assert (result.canary_match, result.first_token_ns, result.ttft_s) == (None, None, None)
    assert world.journal.events[-2:] == ["stage: health", "health"]


def test_a_golden_without_canary_is_waited_for(world: World) -> None:
    put(world, canary=None)
    assert restored(world).canary_match is None
    assert "replay canary" not in world.journal.events


def test_huge_pages_are_left_alone_when_asked(world: World) -> None:
    restored(world, huge_pages=False)
    assert not [event for event in world.journal.events if "huge" in event]


def test_a_socket_that_does_not_answer_yet_is_asked_again(world: World) -> None:
    world.adapter.silent = 2
    assert restored(world).canary_match
    assert world.journal.events.count("replay canary") == 3


def test_keep_leaves_criu_s_log_in_the_replica_s_folder(world: World) -> None:
    result = restored(world, keep=True)
    assert (result.replica.folder / "criu" / "restore.log").read_text() == "restored\n"


def test_ignoring_the_rootfs_leaves_the_golden_s_layer_out(world: World) -> None:
    restored(world, ignore_rootfs=True)
    assert world.overlay.mounted[world.layout.replicas / "gold"] == ((world.base,), None)


@pytest.mark.parametrize(
    ("options", "ip", "mac"),
    [
        ({}, "10.88.0.7", "02:00:00:00:00:07"),
        ({"ignore_static_ip": True}, "", "02:00:00:00:00:07"),
        ({"ignore_static_mac": True}, "10.88.0.7", ""),
    ],
)
def test_the_recorded_address_is_taken_unless_ignored(
    world: World, options: dict[str, bool], ip: str, mac: str
) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    port = Port(host_ip="", host_port=8000, container_port=80)
    put(world, launch=replace(launch, port=port), address=Address(ip="10.88.0.7", mac="02:00:00:00:00:07"))
    result = restored(world, **options)
    spec = world.containers.containers[container_name("gold")].spec
    assert ((spec.ip or ""), (spec.mac or "")) == (ip, mac)
    assert str(result.replica.endpoint) == "http://127.0.0.1:8000"


@pytest.mark.parametrize("ignore", [False, True])
def test_volumes_that_are_not_here_are_made_and_filled(world: World, ignore: bool) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    data = world.layout.goldens / "gold" / "volumes" / "data"
    data.mkdir(parents=True)
    (data / "rows").write_text("1")
    volumes = (Volume(name="data", destination="/data"),)
    put(world, launch=replace(launch, volumes=volumes))
    result = restored(world, ignore_volumes=ignore)
    assert (world.containers.volumes["data"] / "rows").exists() is not ignore
    assert result.replica.volumes == (), "they are the user's now"
    replicas.stop(world.tools, "gold")
    assert world.left_over() == ["volume data"]


def test_volumes_that_are_here_are_left_alone(world: World) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    (world.containers.create_volume("data") / "rows").write_text("newer")
    put(world, launch=replace(launch, volumes=(Volume(name="data", destination="/data"),)))
    restored(world)
    assert (world.containers.volumes["data"] / "rows").read_text() == "newer"
    replicas.stop(world.tools, "gold")
    assert "data" in world.containers.volumes


def test_stopping_removes_everything_but_the_golden(world: World) -> None:
    restored(world)
    assert replicas.stop(world.tools, "gold")
    assert world.left_over() == []
    assert world.layout.names() == ["gold"]
    with pytest.raises(NotFoundError):
        replicas.stop(world.tools, "gold")


def test_only_a_dead_replica_is_stopped_when_asked_so(world: World) -> None:
    restored(world)
    for status in ("running", "paused"):
        world.containers.containers[container_name("gold")].status = status
        assert not replicas.stop(world.tools, "gold", only_dead=True)
    world.containers.containers[container_name("gold")].status = "exited"
    assert replicas.stop(world.tools, "gold", only_dead=True)
    assert world.left_over() == []


def test_a_replica_that_somebody_works_on_is_not_stopped(world: World) -> None:
    restored(world)
    with locks.exclusive(world.layout.replica_locks, "replica", "gold"), pytest.raises(BusyError):
        replicas.stop(world.tools, "gold")
    assert world.containers.containers[container_name("gold")].status == "running"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("event", ["remove container", "unmount root"])
def test_a_stop_that_is_stuck_goes_on_later(world: World, event: str, late: bool) -> None:
    restored(world)
    world.journal.trouble[event] = GpuckptError("podman is stuck")
    world.journal.late = late
    with pytest.raises(GpuckptError, match="podman is stuck"):
        replicas.stop(world.tools, "gold")
    found = replicas.load(world.layout.replicas / "gold")
    assert found is not None and found.state == "removing", "from now on it is swept"
    assert sweep(world.settings, lambda: world.tools) == ["removed the half-made replica gold"]
    assert world.left_over() == []


def test_a_container_of_another_gpuckpt_is_in_the_way(world: World) -> None:
    foreign = world.containers.foreign(container_name("gold"))
    refused(world, BusyError, 7)
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"


def test_a_container_of_another_gpuckpt_that_took_the_name_is_not_stopped(world: World) -> None:
    replica = restored(world).replica
    foreign = world.containers.foreign(container_name("gold"))
    assert replicas.status(world.tools, replica) == "gone" and not replicas.alive(world.tools, replica)
    replicas.stop(world.tools, "gold")
    assert world.left_over() == []
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"


# --- when it goes wrong ---------------------------------------------------------------------------------------


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

    def dying(container: str, *, tcp_established: bool) -> dict[str, int]:
        kill(container, tcp_established=tcp_established)
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


# --- what does not fit ----------------------------------------------------------------------------------------


def other_kernel(golden: Manifest) -> Manifest:
    return replace(golden, identity=replace(golden.identity, kernel="0.0.1"))


def identity_with(golden: Manifest, **changes: Any) -> Any:
    return replace(golden.identity, **changes)


@pytest.mark.parametrize(
    ("field", "changes", "says"),
    [
        ("kernel", {"kernel": "0.0.1"}, "0.0.1"),
        ("machine", {"machine": "pdp11"}, "pdp11"),
        ("criu", {"criu": "3.0"}, "the golden's is 3.0"),
        ("runtime", {"runtime": "crun"}, "the golden's is crun"),
        ("cpu", {"cpu_flags": (*HERE.cpu_flags, "amx9")}, "amx9"),
        ("base", {"base": BaseFiles(digest="1", files={"/app": "1:1"})}, "/app has changed"),
        ("base", {"base": BaseFiles(digest="1", files={"/gone": "1:1"})}, "/gone is missing"),
    ],
)
def test_each_field_of_the_identity_is_compared(world: World, field: str, changes: dict[str, Any], says: str) -> None:
    golden = manifests.read(world.layout.golden("gold"))
    put(world, identity=identity_with(golden, **changes))
    error = refused(world, IncompatibleError, 5)
    assert error.message.endswith(f"in: {field}") and says in str(error.cause)
    assert f"--ignore-identity {field}" in str(error.remedy)
    assert "create container" not in world.journal.events
    assert restored(world, ignore_identity=(field,)).canary_match


def test_every_difference_is_named_at_once(world: World) -> None:
    golden = manifests.read(world.layout.golden("gold"))
    put(world, identity=identity_with(golden, kernel="0.0.1", criu="3.0"))
    assert refused(world, IncompatibleError, 5).message.endswith("in: kernel, criu")
    assert refused(world, IncompatibleError, 5, ignore_identity=("kernel",)).message.endswith("in: criu")


def test_a_processor_with_more_features_is_fine(world: World) -> None:
    golden = manifests.read(world.layout.golden("gold"))
    put(world, identity=identity_with(golden, cpu_flags=HERE.cpu_flags[1:]))
    assert restored(world).canary_match


def test_another_image_of_the_same_name(world: World) -> None:
    golden = manifests.read(world.layout.golden("gold"))
    launch = replace(golden.launch, image="site", rootfs=None)
    put(world, launch=launch, identity=identity_with(golden, base=identity.base_of_image("sha256:old")))
    world.containers.images["site"] = "sha256:new"
    error = refused(world, IncompatibleError, 5)
    assert "sha256:new" in str(error.cause) and "sha256:old" in str(error.cause)
    world.containers.images["site"] = "sha256:old"
    assert restored(world).canary_match
    layers = world.overlay.mounted[world.layout.replicas / "gold"][0]
    assert layers == world.containers.image_layers("site")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_a_damaged_golden_is_not_restored(world: World, damage: str) -> None:
    path = world.layout.goldens / "gold" / "images" / "pages-1.img"
    if damage == "flip":
        path.write_bytes(b"\x01" + path.read_bytes()[1:])
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "remove":
        path.unlink()
    else:
        path = path.with_name("extra.img")
        path.write_bytes(b"")
    error = refused(world, VerificationError, 8)
    assert path.name in str(error.cause)
    assert "create container" not in world.journal.events


def test_a_damaged_manifest(world: World) -> None:
    (world.layout.goldens / "gold" / "manifest.json").write_text('{"format": 1}')
    refused(world, VerificationError, 8)


@pytest.mark.parametrize(
    ("field", "changes", "says"),
    [
        ("seccomp", {"seccomp_blake3": "0" * 64}, "seccomp profile differs"),
        ("limits", {"ulimits": (Ulimit(name="nofile", soft=9, hard=2**40),)}, str(2**40)),
        ("capabilities", {"capabilities": ("CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_77")}, "CAP_77 CAP_SYS_ADMIN"),
    ],
)
def test_what_the_processes_were_given_is_compared(
    world: World, field: str, changes: dict[str, Any], says: str
) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    put(world, launch=replace(launch, **changes))
    error = refused(world, IncompatibleError, 5)
    assert error.message.endswith(f"in: {field}") and says in str(error.cause)
    assert f"--ignore-identity {field}" in str(error.remedy)
    assert "create container" not in world.journal.events
    assert "CAP_CHOWN" not in str(error.cause), "what every container holds is not worth a word"
    assert restored(world, ignore_identity=(field,)).canary_match


def test_lower_limits_and_the_default_capabilities_are_fine(world: World) -> None:
    launch = manifests.read(world.layout.golden("gold")).launch
    limits = (Ulimit(name="nofile", soft=64, hard=64), Ulimit(name="stack", soft=2**50, hard=2**50))
    capabilities = tuple(sorted(identity.DEFAULT_CAPABILITIES))
    put(world, launch=replace(launch, ulimits=limits, capabilities=capabilities))
    assert restored(world).canary_match


@pytest.mark.parametrize("driver", [None, "570.1"])
def test_another_driver(world: World, monkeypatch: pytest.MonkeyPatch, driver: str | None) -> None:
    golden = manifests.read(world.layout.golden("gold"))
    put(world, identity=identity_with(golden, driver="580.2"))
    monkeypatch.setattr(identity, "driver_version", lambda: driver)
    error = refused(world, IncompatibleError, 5)
    assert error.message.endswith("in: driver") and (driver or "absent") in str(error.cause)
    monkeypatch.setattr(identity, "driver_version", lambda: "580.2")
    assert restored(world).canary_match


def test_every_field_of_the_identity_can_be_ignored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever differs, the message names an option, whose values the command line takes from FIELDS."""
    golden = manifests.read(world.layout.golden("gold"))
    every = identity_with(
        golden,
        kernel="0.0.1",
        machine="pdp11",
        cpu_flags=("amx9",),
        criu="3.0",
        runtime="crun",
        driver="580.2",
        base=BaseFiles(digest="1", files={"/gone": "1:1"}),
    )
    given = {
        "seccomp_blake3": "0" * 64,
        "ulimits": (Ulimit(name="nofile", soft=9, hard=2**40),),
        "capabilities": ("CAP_SYS_ADMIN",),
    }
    put(world, identity=every, launch=replace(golden.launch, **given))
    monkeypatch.setattr(identity, "driver_version", lambda: None)
    error = refused(world, IncompatibleError, 5)
    assert set(error.message.partition("in: ")[2].split(", ")) == set(identity.FIELDS)
    assert restored(world, ignore_identity=identity.FIELDS).canary_match


@pytest.mark.parametrize("damage", ["mode", "owner", "attribute", "whiteout", "folder"])
def test_a_layer_with_other_marks_is_not_restored(world: World, damage: str) -> None:
    """The bytes of all files are right, and yet the server would see another file system."""
    folder = world.layout.golden("gold")
    before = manifests.read(folder)
    layer = folder / "rootfs"
    whiteout = stat.S_IFCHR if os.geteuid() == 0 else stat.S_IFIFO
    os.mknod(layer / "deleted", whiteout | 0o600, os.makedev(0, 0))
    (layer / "opaque").mkdir()
    put(world, launch=before.launch)
    if damage == "mode":
        (layer / "srv" / "written").chmod(0o4755)
    elif damage == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(layer / "srv" / "written", 1000, 1000)
    elif damage == "attribute":
        try:
            os.setxattr(layer / "opaque", "user.overlay.opaque", b"y")
        except OSError:
            pytest.skip("this file system keeps no extended attributes")
    elif damage == "whiteout":
        (layer / "deleted").unlink()
    else:
        (layer / "opaque").rmdir()
    assert "owners, modes or marks" in str(refused(world, VerificationError, 8).cause)
    with pytest.raises(VerificationError) as caught:
        verify(folder)
    assert any("owners, modes or marks" in line for line in caught.value.log)


def test_not_enough_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.restore.available_memory", lambda: 8191)
    refused(world, OutOfSpaceError, 11)


def test_connections_that_the_golden_does_not_hold(world: World) -> None:
    refused(world, UsageError, 2, tcp_established=True)


def test_no_such_golden(world: World) -> None:
    with pytest.raises(NotFoundError) as caught:
        restore(RestoreRequest("silver"), world.tools, PhaseTable())
    assert caught.value.exit_code == 6 and "gold" in str(caught.value.cause)


def test_a_name_that_leaves_the_store(world: World) -> None:
    with pytest.raises(UsageError):
        restore(RestoreRequest("../goldens/gold"), world.tools, PhaseTable())


def test_a_golden_that_is_being_made_or_removed(world: World) -> None:
    with locks.exclusive(world.layout.golden_locks, "golden", "gold"), pytest.raises(BusyError):
        restored(world)
    assert world.left_over() == []


def test_a_replica_that_runs_already_is_not_disturbed(world: World) -> None:
    replica = restored(world).replica
    with pytest.raises(BusyError) as caught:
        restored(world, fallback="cold")
    assert caught.value.exit_code == 7 and "gpuckpt stop gold" in str(caught.value.remedy)
    assert replicas.status(world.tools, replica) == "running"


def test_a_replica_that_died_makes_room(world: World) -> None:
    restored(world)
    world.containers.containers[container_name("gold")].status = "exited"
    assert restored(world).canary_match
    del world.containers.containers[container_name("gold")]  # podman rm -f
    assert restored(world).canary_match


# --- fallback -------------------------------------------------------------------------------------------------


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
