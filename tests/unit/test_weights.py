"""Weights and caches that a server gives back before it is frozen, and takes again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec import structs

from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    DaemonUnreachableError,
    GpuckptError,
    OutOfSpaceError,
    RestoreError,
    VerificationError,
)
from gpuckpt.golden import tiers
from gpuckpt.store import seal
from gpuckpt.store.digests import digest_file
from gpuckpt.workload.base import MEMORY_FOLDER
from gpuckpt.workload.control import ControlAbsent, ControlRefused, Woken
from tests.cuda_fake import gpu
from tests.fakes import World
from tests.gpu_world import (
    REFUSED,
    FakeControl,
    frozen,
    made,
    record,
    restored,
    server,
    steps,
    suspend,
    vllm,
    wake,
    world,
)
from tests.opened import left_open, opened

__all__ = ["frozen", "server", "vllm", "world"]  # fixtures

# --- weights outside the image -------------------------------------------------------------------------------------


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
    begun, noted = threading.Event(), world.driver.before

    def note(step: str, pid: int) -> None:
        if step == "unlock":
            begun.wait(20)  # a thread may begin late: the processes wait for it here, and it for nothing
        noted(step, pid)
        if step == "carry":
            begun.set()

    world.driver.before = note
    before = opened()
    restored(world)
    events = world.journal.events
    assert events.index("carry 0") < events.index("unlock 4242")
    assert server.carried == [server.content]
    assert not left_open(before)


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
        handles = sum("device memory" in target for _, target in opened())
        seen.append((len(carried), handles))
        if carried:
            raise ControlRefused("there is no room", cause="8 GB are free")
        return original(files)

    monkeypatch.setattr(server, "wake", wake)
    assert restored(world).canary_match is True
    assert seen == [(1, 1), (0, 0)]
    assert "there is no room: 8 GB are free" in world.report.notes[0]


def test_a_restore_that_fails_lets_go_of_what_was_carried(world: World, server: FakeControl) -> None:
    made(world, weights="outside")
    before = opened()
    world.driver.refuse["restore", 4242] = REFUSED
    with pytest.raises(RestoreError):
        restored(world)
    for thread in threading.enumerate():
        if thread.name == "gpuckpt-carried":  # nobody else waits for it
            thread.join(60)
    assert not left_open(before)
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


# --- caches, where weights stay in the image -----------------------------------------------------------------------


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


# --- where weights lie meanwhile ------------------------------------------------------------------------------------


def test_a_golden_may_come_into_another_tier_while_its_replica_sleeps(
    world: World, server: FakeControl, frozen: set[str]
) -> None:
    made(world, weights="outside")
    tiers.move(world.tools, "gold", "disk", keep=False)
    restored(world)
    tiers.move(world.tools, "gold", "tmpfs", keep=True)
    suspend(world)
    assert server.sleeping
    wake(world)
    assert not server.sleeping and server.read == [server.content]
    # One that fails half-way has them again, too.
    world.driver.refuse["checkpoint", 4242] = REFUSED
    with pytest.raises(CheckpointError, match="checkpoint failed") as caught:
        suspend(world)
    assert "the server runs on" in str(caught.value.remedy)
    assert not server.sleeping and record(world).standby is None


def test_a_server_that_was_started_cold_keeps_its_weights(world: World, server: FakeControl, frozen: set[str]) -> None:
    made(world, weights="outside")
    world.driver.processes[4242].state = "running"
    world.journal.trouble["restore"] = RestoreError("CRIU cannot")
    assert restored(world, p=1, fallback="cold").replica.tier == "cold"
    server.sleeping = False
    suspend(world)
    assert not server.sleeping
    assert any("keeps its weights" in note for note in world.report.notes)
    assert steps(world)[-3:] == ["lock 4242", "checkpoint 4242", "freeze"]
    wake(world)
    assert record(world).standby is None


def test_what_a_standby_is_to_have_again_does_not_go(world: World, server: FakeControl, frozen: set[str]) -> None:
    made(world, weights="outside", leave_running=True)
    assert record(world).tier == "cold"
    seen = world.containers.folder.parent / "root" / MEMORY_FOLDER.lstrip("/")
    seen.unlink()  # a mount goes along when its folder is renamed
    seen.symlink_to(world.layout.golden("gold") / "memory")
    suspend(world)
    assert server.sleeping and record(world).needs(["tmpfs"])
    with pytest.raises(BusyError, match="running replicas use it"):
        tiers.move(world.tools, "gold", "disk", keep=False)
    wake(world)
    assert not record(world).needs(["tmpfs"])
    tiers.move(world.tools, "gold", "disk", keep=False)
    suspend(world)  # nothing of its golden is shown to it any more
    assert not server.sleeping
    wake(world)


def test_weights_that_were_distrusted_are_read_once(
    world: World, server: FakeControl, frozen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(world, weights="outside")
    restored(world)
    seal.distrust(world.layout.golden("gold"))
    read: list[Path] = []

    def reading(path: Path) -> str:
        read.append(path)
        return digest_file(path)

    monkeypatch.setattr(seal, "digest_file", reading)
    for _ in range(3):
        suspend(world)
        wake(world)
    assert len(read) == 1


# --- creations that must not be published ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "trouble", "said"),
    [
        ("wake caches", ControlRefused("no room"), "take them again: no room"),
        (
            "wake caches",
            DaemonUnreachableError("late", cause="nothing came within 600 s"),
            "take them again: it failed",
        ),
        ("replay canary", DaemonUnreachableError("the server ended"), "the server ended"),
    ],
)
def test_a_server_that_stays_asleep_is_no_golden(
    world: World, vllm: FakeControl, event: str, trouble: GpuckptError, said: str
) -> None:
    world.journal.trouble[event] = trouble
    with pytest.raises(GpuckptError, match=said) as caught:
        made(world, weights="image")
    if trouble.cause:
        assert trouble.cause in str(caught.value.cause)
    assert (world.left_over(), world.layout.names()) == ([], [])


def test_a_server_that_does_not_save_in_time_is_told_with_the_reason(world: World, server: FakeControl) -> None:
    world.journal.trouble["save"] = DaemonUnreachableError("no answer", cause="nothing came within 1800 s")
    with pytest.raises(CheckpointError) as caught:
        made(world, weights="outside")
    assert "nothing came within 1800 s" in str(caught.value.cause) and "--weights image" in str(caught.value.remedy)


def test_a_server_that_ends_when_it_wakes_is_not_said_to_hold_anything(
    world: World, server: FakeControl, frozen: set[str]
) -> None:
    made(world, weights="outside")
    restored(world)
    suspend(world)

    def ends(files: Sequence[int], carried: Sequence[int] = (), *, caches: bool = False) -> Woken:
        world.driver.processes.clear()
        next(iter(world.containers.containers.values())).status = "exited"
        raise DaemonUnreachableError("it ended")

    server.wake = ends  # type: ignore[method-assign]
    with pytest.raises(RestoreError, match="failed when it was to take its memory again"):
        wake(world)
    assert not any("holds its GPU memory" in note for note in world.report.notes)
