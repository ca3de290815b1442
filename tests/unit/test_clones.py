"""Clones of one golden: made ahead or at once, side by side, each itself."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gpuckpt.containers.podman import container_name
from gpuckpt.criu import view
from gpuckpt.errors import BusyError, GpuckptError, PreflightError, RestoreError, UsageError, VerificationError
from gpuckpt.golden import catalogue, prepare, several
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.assembly import hostname
from gpuckpt.golden.prepare import Options
from gpuckpt.golden.restore import Restored, RestoreRequest, from_opened, restore
from gpuckpt.golden.several import restore_all
from gpuckpt.golden.sweep import sweep
from gpuckpt.host import entropy
from gpuckpt.manifest import Address, Port, Volume
from gpuckpt.store import locks
from gpuckpt.timing import PhaseTable
from tests.fakes import World
from tests.restoring import put, world

__all__ = ["world"]  # the fixture


def clones(world: World, *names: str, **options: Any) -> tuple[list[Restored], list[tuple[str, GpuckptError]]]:
    return restore_all([RestoreRequest("gold", replica=one, **options) for one in names], world.tools, PhaseTable())


# --- side by side ---------------------------------------------------------------------------------------------


def test_each_clone_is_a_container_of_its_own(world: World) -> None:
    ready, failed = clones(world, "one", "two", "three")
    assert not failed and [one.replica.name for one in ready] == ["one", "two", "three"]
    assert all(one.canary_match and one.ttft_s is not None for one in ready)
    specs = [world.containers.containers[container_name(name)].spec for name in ("one", "two", "three")]
    assert [spec.hostname for spec in specs] == ["one", "two", "three"]
    assert len({spec.rootfs for spec in specs}) == 3
    layers = {world.overlay.mounted[world.layout.replicas / name] for name in ("one", "two", "three")}
    assert layers == {((world.base,), world.layout.goldens / "gold" / "rootfs")}, "the written files are shared"


def test_each_clone_has_an_identity_with_a_seed_of_its_own(world: World) -> None:
    clones(world, "one", "two")
    found = [json.loads((world.layout.replicas / name / "socket/identity").read_text()) for name in ("one", "two")]
    assert [(one["replica"], one["golden"]) for one in found] == [("one", "gold"), ("two", "gold")]
    assert len({one["seed"] for one in found}) == 2 and all(len(bytes.fromhex(one["seed"])) == 32 for one in found)


def test_a_replica_restored_again_has_another_seed(world: World) -> None:
    seeds = set()
    for _ in range(2):
        restore(RestoreRequest("gold"), world.tools, PhaseTable())
        seeds.add((world.layout.replicas / "gold/socket/identity").read_text())
        replicas.stop(world.tools, "gold")
    assert len(seeds) == 2


def test_the_machine_is_checked_once(world: World) -> None:
    clones(world, "one", "two")
    assert world.journal.events.count("stage: checks") == 1


def test_one_that_fails_takes_no_other_with_it(world: World) -> None:
    restore(RestoreRequest("gold", replica="two"), world.tools, PhaseTable())
    ready, failed = clones(world, "one", "two", "three")
    assert [one.replica.name for one in ready] == ["one", "three"]
    assert [(name, type(error)) for name, error in failed] == [("two", BusyError)]


def test_an_interrupt_while_they_are_started_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a thread's start and the pool's note of it: the pool does not wait for that one."""
    begun, free, ended = threading.Event(), threading.Event(), list[str]()
    original = from_opened

    def slow(request: RestoreRequest, *rest: Any) -> Restored:
        begun.set()
        assert free.wait(60)
        try:
            return original(request, *rest)
        finally:
            ended.append(str(request.replica))

    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any) -> Any:  # type: ignore[override]
            super().submit(*args)
            assert begun.wait(60)
            self._threads = set()
            raise KeyboardInterrupt

        def shutdown(self, *args: Any, **options: Any) -> None:
            super().shutdown(*args, **options)
            free.set()

    monkeypatch.setattr(several, "from_opened", slow)
    monkeypatch.setattr(several, "ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        clones(world, "one", "two")
    assert ended == ["one"] and not list(world.layout.replicas.iterdir()) and not world.containers.containers


def test_a_damaged_golden_is_nobody_s(world: World) -> None:
    path = next((world.layout.golden("gold") / "images").iterdir())
    path.write_bytes(b"something else")
    with pytest.raises(VerificationError):
        clones(world, "one", "two")
    assert world.left_over() == []


def test_with_fallback_each_is_started_cold(world: World) -> None:
    path = next((world.layout.golden("gold") / "images").iterdir())
    path.write_bytes(b"something else")
    ready, failed = clones(world, "one", "two", fallback="cold")
    assert not failed and [one.replica.tier for one in ready] == ["cold", "cold"]
    assert all(isinstance(one.fallback_reason, VerificationError) for one in ready)


def test_only_the_one_that_bears_the_golden_s_name_takes_its_address(world: World) -> None:
    put(world, address=Address(ip="10.88.0.7", mac="02:00:00:00:00:07"))
    clones(world, "gold", "other")
    own, other = (world.containers.containers[container_name(name)].spec for name in ("gold", "other"))
    assert (own.ip, own.mac) == ("10.88.0.7", "02:00:00:00:00:07")
    assert (other.ip or "", other.mac or "") == ("", "")


def test_each_publishes_a_port_of_its_own(world: World) -> None:
    golden = put(world)
    port = Port(host_ip="127.0.0.1", host_port=8000, container_port=80)
    put(world, launch=structs.replace(golden.launch, port=port))
    wanted = Port(host_ip="127.0.0.1", host_port=8001, container_port=8001)
    made = restore(
        RestoreRequest("gold", replica="other", options=Options(publish=wanted)), world.tools, PhaseTable()
    ).replica
    assert world.containers.containers[container_name("other")].spec.launch.port == Port(
        host_ip="127.0.0.1", host_port=8001, container_port=80
    )
    assert made.endpoint.port == 8001


def test_a_port_for_a_golden_without_one(world: World) -> None:
    wanted = Port(host_ip="127.0.0.1", host_port=8001, container_port=8001)
    with pytest.raises(UsageError, match="publishes no port"):
        restore(RestoreRequest("gold", options=Options(publish=wanted)), world.tools, PhaseTable())
    assert world.left_over() == []


# --- made ahead -----------------------------------------------------------------------------------------------


def ahead(world: World, number: int, **options: Any) -> list[str]:
    return [one.name for one in prepare.prepare_ahead(world.tools, "gold", number, Options(**options))]


def test_what_is_prepared_waits_without_processes(world: World) -> None:
    assert ahead(world, 2) == ["gold", "gold-2"]
    found = catalogue.entries(world.layout, catalogue.states(world.tools))
    assert found[0].replicas == (("gold", "prepared"), ("gold-2", "prepared"))
    assert not any("restore" in event for event in world.journal.events)


def test_preparing_again_makes_only_what_is_missing(world: World) -> None:
    ahead(world, 2)
    world.journal.events.clear()
    assert ahead(world, 3) == ["gold", "gold-2", "gold-3"]
    assert world.journal.events.count("create container") == 1


def test_a_running_replica_s_name_is_passed_over(world: World) -> None:
    restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert ahead(world, 1) == ["gold-2"]


def test_a_restore_takes_what_is_prepared(world: World) -> None:
    ahead(world, 2)
    world.journal.events.clear()
    names = [restore(RestoreRequest("gold"), world.tools, PhaseTable()).replica.name for _ in range(2)]
    assert names == ["gold", "gold-2"]
    assert "create container" not in world.journal.events[: world.journal.events.index("replay canary")]


def test_a_restore_that_names_a_prepared_one_takes_it(world: World) -> None:
    ahead(world, 2)
    world.journal.events.clear()
    restore(RestoreRequest("gold", replica="gold-2"), world.tools, PhaseTable())
    assert "create container" not in world.journal.events


def test_one_prepared_with_other_options_is_made_anew(world: World) -> None:
    ahead(world, 1, ignore_rootfs=True)
    restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert world.overlay.mounted[world.layout.replicas / "gold"] == (
        (world.base,),
        world.layout.goldens / "gold" / "rootfs",
    )


def test_one_prepared_for_another_golden_of_that_name_is_made_anew(world: World) -> None:
    ahead(world, 1)
    put(world, gpuckpt="another")
    world.journal.events.clear()
    restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert "create container" in world.journal.events


def test_one_whose_mount_a_reboot_took_is_made_anew(world: World) -> None:
    ahead(world, 1)
    world.overlay.mounted.clear()
    restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert world.overlay.mounted


def test_of_several_that_restore_at_once_each_takes_one(world: World) -> None:
    prepare.prepare_ahead(world.tools, "gold", 3, Options())
    with locks.exclusive(world.layout.replica_locks, "replica", "gold"):  # somebody restores into it right now
        made = restore(RestoreRequest("gold"), world.tools, PhaseTable()).replica
    assert made.name == "gold-2"


def test_one_whose_container_was_pruned_is_made_anew(world: World) -> None:
    (waiting,) = prepare.prepare_ahead(world.tools, "gold", 1, Options())
    del world.containers.containers[waiting.container]
    shutil.rmtree(waiting.bundle)
    assert restore(RestoreRequest("gold"), world.tools, PhaseTable()).canary_match


def test_a_refused_restore_takes_nothing(world: World) -> None:
    prepare.prepare_ahead(world.tools, "gold", 1, Options())
    path = next((world.layout.golden("gold") / "images").iterdir())
    path.write_bytes(b"something else")
    with pytest.raises(VerificationError):
        restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert [one.name for one in prepare.prepared(world.tools, "gold")] == ["gold"]


def test_names_of_other_goldens_are_passed_over(world: World) -> None:
    shutil.copytree(world.layout.goldens / "gold", world.layout.goldens / "gold-2")
    made = prepare.prepare_ahead(world.tools, "gold", 2, Options())
    assert [one.name for one in made] == ["gold", "gold-3"]


def test_hooks_are_those_of_the_restore_not_of_the_preparation(world: World) -> None:
    prepare.prepare_ahead(world.tools, "gold", 1, Options())
    hook = world.settings.paths.hooks / "post-restore" / "anybody"
    hook.parent.mkdir(parents=True, exist_ok=True)
    hook.touch(mode=0o777)
    hook.chmod(0o777)
    with pytest.raises(PreflightError, match="can be changed by others"):
        restore(RestoreRequest("gold"), world.tools, PhaseTable())


def test_a_prepared_one_owns_no_volume(world: World) -> None:
    """Another replica may have filled the volume by the time that this one is removed."""
    golden = put(world)
    put(world, launch=structs.replace(golden.launch, volumes=(Volume(name="data", destination="/data"),)))
    prepare.prepare_ahead(world.tools, "gold", 1, Options())
    assert world.containers.volume("data") is not None
    replicas.stop(world.tools, "gold")
    assert world.containers.volume("data") is not None


def test_host_names_of_similar_replicas_differ() -> None:
    assert hostname("a-b") == "a-b"
    assert len({hostname(name) for name in ("a-b", "a.b", "A-b", "a_b")}) == 4


def test_a_failed_restore_leaves_nothing_of_a_prepared_one(world: World) -> None:
    ahead(world, 1)
    world.journal.trouble["restore"] = GpuckptError("no")
    with pytest.raises(RestoreError):
        restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert world.left_over() == []


def test_sweep_leaves_prepared_ones_and_prune_takes_those_of_no_use(world: World) -> None:
    ahead(world, 2)
    assert sweep(world.settings, lambda: world.tools) == []
    world.overlay.mounted.pop(world.layout.replicas / "gold-2")
    assert catalogue.prune(world.settings, lambda: world.tools, dry_run=False) == ["removed the dead replica gold-2"]
    assert [one.name for one in prepare.prepared(world.tools, "gold")] == ["gold"]


def test_removing_a_golden_removes_what_was_prepared(world: World) -> None:
    ahead(world, 2)
    catalogue.remove(world.tools, "gold")
    assert world.left_over() == []


def test_a_failed_preparation_leaves_nothing(world: World) -> None:
    world.journal.trouble["prepare container"] = GpuckptError("no")
    with pytest.raises(GpuckptError):
        ahead(world, 1)
    assert world.left_over() == []


def test_only_one_can_be_prepared_for_a_published_port(world: World) -> None:
    golden = put(world)
    port = Port(host_ip="127.0.0.1", host_port=8000, container_port=80)
    put(world, launch=structs.replace(golden.launch, port=port))
    with pytest.raises(UsageError, match="only one"):
        ahead(world, 2)
    assert ahead(world, 1) == ["gold"]


# --- the kernel's part ----------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_be_reseeded_is_said(world: World) -> None:
    world.journal.trouble["renew entropy"] = PermissionError(1, "Operation not permitted")
    restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert any("could not be reseeded" in line for line in world.report.notes)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may reseed the kernel")
def test_reseeding_the_kernel() -> None:
    entropy.renew()  # raises where it may not


# --- a view of the images -------------------------------------------------------------------------------------


def utsns(path: Path, host: str, domain: str) -> None:
    message = b"\x0a" + bytes([len(host)]) + host.encode() + b"\x12" + bytes([len(domain)]) + domain.encode()
    path.write_bytes(b"\x19\x43\x56\x54\x03\x32\x47\x54" + struct.pack("<I", len(message)) + message)


def test_the_view_differs_in_the_host_name_alone(tmp_path: Path) -> None:
    pycriu = pytest.importorskip("pycriu")
    images = tmp_path / "images"
    images.mkdir()
    (images / "core-1.img").write_bytes(b"registers")
    utsns(images / "utsns-9.img", "golden", "example.org")
    view.make(tmp_path / "view", images, hostname="clone-7")
    with (tmp_path / "view" / "utsns-9.img").open("rb") as file:
        (entry,) = pycriu.images.load(file)["entries"]
    assert entry == {"nodename": "clone-7", "domainname": "example.org"}
    link = tmp_path / "view" / "core-1.img"
    assert link.read_bytes() == b"registers" and not link.readlink().is_absolute()
    with (images / "utsns-9.img").open("rb") as file:
        assert pycriu.images.load(file)["entries"][0]["nodename"] == "golden", "the golden's own is as it was"


@pytest.mark.parametrize("data", [b"", b"\x19\x43\x56\x54\x03\x32\x47\x54\x05\x00\x00\x00\x0a\x09ab"])
def test_a_damaged_image_of_the_host_name(tmp_path: Path, data: bytes) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "utsns-9.img").write_bytes(data)
    with pytest.raises(VerificationError, match="host name"):
        view.make(tmp_path / "view", images, hostname="clone-7")
