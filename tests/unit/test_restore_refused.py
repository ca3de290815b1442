"""What does not fit is not restored: another machine, a damaged golden, a name that is taken."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.containers.podman import container_name
from gpuckpt.errors import BusyError, IncompatibleError, NotFoundError, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden import identity
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.verify import verify
from gpuckpt.manifest import BaseFiles, Ulimit
from gpuckpt.store import locks
from gpuckpt.timing import PhaseTable
from tests.fakes import World
from tests.restoring import HERE, identity_with, put, refused, restored, world

__all__ = ["world"]  # a fixture


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
    monkeypatch.setattr("gpuckpt.golden.fitness.available_memory", lambda: 8191)
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
