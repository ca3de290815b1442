"""Bringing a replica back: the order of events, what the container is, and what a stop takes along."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.containers.podman import container_name
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.sweep import sweep
from gpuckpt.manifest import Address, Port, Volume
from gpuckpt.store import locks, seal
from tests.fakes import World
from tests.restoring import WHOLE_ORDER, put, refused, restored, world

__all__ = ["world"]  # a fixture


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
