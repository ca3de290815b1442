"""Goldens in tiers: copied whole or not at all, found in the fastest, sealed across a reboot."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.containers import rootfs
from gpuckpt.errors import (
    BusyError,
    GpuckptError,
    InterruptedByUser,
    NotFoundError,
    NothingToDo,
    OutOfSpaceError,
    UsageError,
    VerificationError,
)
from gpuckpt.golden import catalogue, tiers
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.sweep import orphans, sweep
from gpuckpt.host import hugepages
from gpuckpt.store import copying, digests, locks, seal
from gpuckpt.store.layout import Layout, Tier
from gpuckpt.timing import PhaseTable
from tests.fakes import FakeReporter, Journal, World, publish, tools_for
from tests.leftovers import replica_of
from tests.restoring import put

ROOT = os.geteuid() == 0
EXTENT = b"extent" * 1000
NAME = f"{digests.digest_bytes(EXTENT)[:40]}.extent"
CONTENTS = {f"memory/{NAME}": EXTENT, "memory/1.small": b"small", "images/pages-1.img": bytes(8192)}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(hugepages, "MODE", tmp_path / "no-huge-pages")
    return tools_for(tmp_path)


def golden(world: World, name: str = "gold") -> Path:
    """A golden with memory files and a written layer that has something of everything."""
    layer = world.layout.goldens / name / "rootfs"
    layer.mkdir(parents=True)
    (layer / "folder").mkdir(mode=0o750)
    (layer / "folder" / "file").write_text("written")
    (layer / "folder" / "file").chmod(0o640)
    os.link(layer / "folder" / "file", layer / "again")
    (layer / "link").symlink_to("folder")
    os.mkfifo(layer / "pipe")
    if ROOT:
        os.mknod(layer / "deleted", stat.S_IFCHR | 0o000, os.makedev(0, 0))
        os.setxattr(layer / "folder", "trusted.overlay.opaque", b"y")
        os.chown(layer / "folder" / "file", 1000, 1001)
    os.utime(layer / "folder", ns=(1, 10**18))
    return publish(world.layout, name, CONTENTS)


def place(world: World, to: Tier = "disk", name: str = "gold") -> tiers.Placed:
    return tiers.place(world.layout, name, to, world.report)


def nothing_staged(world: World) -> bool:
    return not [*world.layout.staging_of("disk").iterdir(), *world.layout.staging_of("tmpfs").iterdir()]


# --- copying --------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_in_everything(world: World, tmp_path: Path) -> None:
    source, target = golden(world), tmp_path / "a" / "copy"
    copied = copying.copy_tree(source, target, durable=True)
    assert digests.record(target) == digests.record(source)
    assert copied.digests == {one: digests.digest_file(source / one) for one in copied.digests}
    assert {"rootfs/again", f"memory/{NAME}", "manifest.json"} <= set(copied.digests)
    layer = target / "rootfs"
    assert (layer / "again").samefile(layer / "folder" / "file")
    assert (layer / "folder").stat().st_mtime_ns == 10**18
    assert (layer / "link").is_symlink() and stat.S_ISFIFO((layer / "pipe").stat().st_mode)


def test_holes_stay_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(16 << 20)
        file.write(b"x" * 5000)
    (source / "empty").touch()
    with (source / "hole").open("wb") as file:
        file.truncate(5000)
    copied = copying.copy_tree(source, tmp_path / "target")
    for name in ("sparse", "empty", "hole"):
        assert copied.digests[name] == digests.digest_file(tmp_path / "target" / name)
        assert (tmp_path / "target" / name).stat().st_size == (source / name).stat().st_size
    assert (tmp_path / "target" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert copied.bytes < 1 << 20


def test_one_failure_ends_the_whole_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(20):
        (source / str(number)).write_bytes(bytes(1 << 20))
    pwrite, written = os.pwrite, count()

    def full(handle: int, data: memoryview, at: int) -> int:
        if next(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        copying.copy_tree(source, tmp_path / "target")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(bytes(9 << 20))
    seen: list[int] = []
    copying.copy_tree(source, tmp_path / "target", progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 9 << 20 <= copying.allocated(source)


# --- from one tier into the other -----------------------------------------------------------------------------


def test_a_golden_goes_to_disk_and_comes_back(world: World) -> None:
    source = golden(world)
    record = digests.record(source)
    placed = place(world)
    assert placed.folder == world.layout.disk / "gold" and placed.shared == 0
    assert placed.copied == sum(
        len(data) for data in ((source / one).read_bytes() for one in record.files if one != "rootfs/again")
    )
    assert list(world.layout.tiers("gold")) == ["tmpfs", "disk"]
    assert world.layout.locate("gold") == (source, "tmpfs")
    catalogue.remove(world.tools, "gold", tier="tmpfs")
    assert world.layout.locate("gold") == (placed.folder, "disk") and world.layout.names() == ["gold"]
    assert seal.broken(placed.folder, manifests.read(placed.folder)) == []
    place(world, "tmpfs")
    assert digests.record(source) == record and nothing_staged(world)
    assert (source / "manifest.json").stat().st_mode & 0o777 == 0o600


def test_a_golden_that_is_there_already(world: World) -> None:
    golden(world)
    with pytest.raises(NothingToDo):
        place(world, "tmpfs")
    place(world)
    with pytest.raises(NothingToDo):
        place(world)
    with pytest.raises(NothingToDo):
        tiers.move(world.tools, "gold", "disk", keep=True)
    assert tiers.move(world.tools, "gold", "disk", keep=False) is None
    assert list(world.layout.tiers("gold")) == ["disk"]
    with pytest.raises(NothingToDo):
        tiers.move(world.tools, "gold", "disk", keep=False)
    with pytest.raises(NotFoundError):
        tiers.move(world.tools, "silver", "disk", keep=False)


@pytest.mark.parametrize("file", [f"memory/{NAME}", "images/pages-1.img", "manifest.json", "rootfs/folder/file"])
def test_a_damaged_golden_is_not_copied(world: World, file: str) -> None:
    folder = golden(world)
    path = folder / file
    data = bytearray(path.read_bytes())
    data[20 % len(data)] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(VerificationError):
        place(world)
    assert list(world.layout.tiers("gold")) == ["tmpfs"] and nothing_staged(world)


def test_missing_files_and_changed_marks_are_damage_too(world: World) -> None:
    folder = golden(world)
    (folder / "rootfs" / "folder").chmod(0o777)
    with pytest.raises(VerificationError) as caught:
        place(world)
    assert "owners, modes or marks" in str(caught.value.cause)
    (folder / "memory" / "1.small").unlink()
    with pytest.raises(VerificationError) as caught:
        place(world)
    assert "1.small is missing" in str(caught.value.cause)


def test_no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    golden(world)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OutOfSpaceError, match="needs"):
        place(world)
    monkeypatch.undo()
    place(world)
    catalogue.remove(world.tools, "gold", tier="tmpfs")
    monkeypatch.setattr(tiers, "available_memory", lambda: 4096)
    with pytest.raises(OutOfSpaceError) as caught:
        place(world, "tmpfs")
    assert "from disk" in str(caught.value.remedy) and nothing_staged(world)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutOfSpaceError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (InterruptedByUser("interrupted"), InterruptedByUser),
    ],
)
@pytest.mark.parametrize("where", ["copy_tree", "sync"])
def test_nothing_is_left_when_a_copy_fails(
    world: World, monkeypatch: pytest.MonkeyPatch, trouble: BaseException, kind: type[BaseException], where: str
) -> None:
    golden(world)
    original: Any = getattr(copying, where)

    def fail(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        raise trouble

    monkeypatch.setattr(copying, where, fail)
    with pytest.raises(kind):
        place(world)
    assert nothing_staged(world)
    if where == "copy_tree":
        assert list(world.layout.tiers("gold")) == ["tmpfs"]


def test_while_a_golden_is_copied_it_is_restored_but_not_removed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    golden(world)
    original = copying.copy_tree

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        with locks.shared(world.layout.golden_locks, "golden", "gold"):
            pass  # as a restore does
        with pytest.raises(BusyError):
            catalogue.remove(world.tools, "gold")
        with pytest.raises(BusyError):
            place(world)
        assert orphans(world.layout) == ([], []), "what is being copied belongs to somebody"
        return original(*arguments, **options)

    monkeypatch.setattr(copying, "copy_tree", meanwhile)
    place(world)


def test_a_killed_copy_is_swept(world: World) -> None:
    golden(world)
    for tier in ("tmpfs", "disk"):
        folder = world.layout.staging_of(tier) / "gold"
        folder.mkdir()
        (folder / "half").touch()
    assert sweep(world.settings, lambda: pytest.fail("podman is not needed")) == [
        "removed the half-made golden gold",
        "removed the half-made golden gold",
    ]
    assert nothing_staged(world) and world.layout.names() == ["gold"]


def test_a_disk_in_the_store_is_none(world: World) -> None:
    golden(world)
    layout = Layout(world.layout.store, world.layout.state, world.layout.run, world.layout.store / "disk")
    with pytest.raises(UsageError, match="lies in the store"):
        tiers.place(layout, "gold", "disk", FakeReporter(Journal()))


def test_a_golden_in_use_stays_in_its_tier(world: World) -> None:
    golden(world)
    for name, tier in (("one", "tmpfs"), ("two", "disk")):
        replica = replica_of(world, name, "running")
        Replica(name, "gold", replica.folder, state="ready", tier=tier).save()
    with pytest.raises(BusyError, match="one") as caught:
        tiers.move(world.tools, "gold", "disk", keep=False)
    assert "two" not in caught.value.message and list(world.layout.tiers("gold")) == ["tmpfs"]
    tiers.move(world.tools, "gold", "disk", keep=True)
    with pytest.raises(BusyError):
        catalogue.remove(world.tools, "gold", tier="tmpfs")
    catalogue.remove(world.tools, "gold", tier="tmpfs", force=True)
    assert [path.name for path in world.layout.replicas.iterdir()] == ["two"]
    with pytest.raises(BusyError):
        catalogue.remove(world.tools, "gold")
    with pytest.raises(NotFoundError, match="not in the tier tmpfs"):
        catalogue.remove(world.tools, "gold", tier="tmpfs")


def intact(folder: Path) -> set[str]:
    """The files that are as they were when they were sealed."""
    notes, device = seal.notes_of(folder), folder.stat().st_dev
    here = digests.entries(folder)
    return {name for name, (_, status) in here.items() if notes.get(name) == seal.note(status, device)}


# --- extents that goldens share -------------------------------------------------------------------------------


def test_equal_extents_are_stored_once(world: World) -> None:
    golden(world)
    golden(world, "silver")
    place(world)
    before = (world.layout.disk / "gold" / "seal.json").read_text()
    placed = place(world, name="silver")
    assert placed.shared == len(EXTENT)
    extent = world.layout.disk / "silver" / "memory" / NAME
    assert extent.stat().st_nlink == 2 and (extent.parent / "1.small").stat().st_nlink == 1
    assert (world.layout.disk / "gold" / "seal.json").read_text() != before
    rows = {(one.name, one.tier): one.allocated for one in catalogue.usage(world.layout)[0]}
    assert rows["silver", "disk"] < rows["gold", "disk"]
    # Links that come and go leave the other golden's seal whole.
    folder = world.layout.disk / "gold"
    assert f"memory/{NAME}" in intact(folder)
    catalogue.remove(world.tools, "silver")
    assert f"memory/{NAME}" in intact(folder) and extent.exists() is False


def test_a_damaged_extent_is_not_shared(world: World) -> None:
    golden(world)
    golden(world, "silver")
    folder = place(world).folder
    (folder / "memory" / NAME).write_bytes(b"X" + EXTENT[1:])
    assert place(world, name="silver").shared == 0
    assert f"memory/{NAME}" not in intact(folder), "linking must not vouch for what was written before"
    (folder / "manifest.json").write_text("{}")
    catalogue.remove(world.tools, "silver", tier="disk")
    assert place(world, name="silver").shared == 0


# --- seals and reboots ----------------------------------------------------------------------------------------


def test_a_seal_names_no_device_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden(world)
    document = json.loads((folder / "seal.json").read_text())
    assert folder.stat().st_dev not in {number for note in document["files"].values() for number in note}
    assert intact(folder) == set(document["files"])
    real = os.statvfs(folder)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_fsid=real.f_fsid + 1))
    assert intact(folder) == set(), "another file system has inodes of its own"
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_fsid=0))
    assert seal.broken(folder, manifests.read(folder)) == []
    assert json.loads((folder / "seal.json").read_text())["file_system"].startswith("device")
    assert intact(folder) == set(document["files"])


def test_a_seal_of_an_earlier_version_is_renewed(world: World) -> None:
    folder = golden(world)
    path = folder / "seal.json"
    document = json.loads(path.read_text())
    del document["file_system"]
    path.write_text(json.dumps(document))
    assert intact(folder) == set() and seal.fits(folder)
    assert seal.broken(folder, manifests.read(folder)) == []
    assert intact(folder) == set(document["files"])


# --- what others make of tiers --------------------------------------------------------------------------------


def test_a_golden_is_restored_from_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda record: world.adapter)
    put(world)
    tiers.move(world.tools, "gold", "disk", keep=False)
    restored = restore(RestoreRequest("gold"), world.tools, PhaseTable())
    assert restored.replica.tier == "disk"
    (layers,) = world.overlay.mounted.values()
    assert layers[1] == world.layout.disk / "gold" / "rootfs"


def test_a_layer_inside_the_base_is_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda record: world.adapter)
    monkeypatch.setattr(rootfs, "nested", lambda layer, base: layer.is_relative_to(world.layout.disk))
    put(world)
    tiers.move(world.tools, "gold", "disk", keep=False)
    restored = restore(RestoreRequest("gold"), world.tools, PhaseTable())
    (layers,) = world.overlay.mounted.values()
    assert layers[1] is None
    assert (restored.replica.folder / "upper" / "srv" / "written").read_text() == "by the server"


def test_which_layers_lie_inside_one_another(tmp_path: Path) -> None:
    base, layer = tmp_path / "base", tmp_path / "base" / "a" / "layer"
    layer.mkdir(parents=True)
    (tmp_path / "link").symlink_to(layer)
    assert rootfs.nested(layer, [base]) and rootfs.nested(tmp_path / "link", [tmp_path / "a", base]) is True
    assert not rootfs.nested(base, [layer])
    assert not rootfs.nested(Path("/proc/self"), [Path("/")]), "a mount of its own"


def test_two_goldens_of_one_name(world: World) -> None:
    """What a creation leaves that was killed between its publishing and the removal of the golden it replaced."""
    golden(world)
    place(world)
    shutil.rmtree(world.layout.goldens / "gold")
    golden(world)
    manifest = structs.replace(manifests.read(world.layout.goldens / "gold"), created="later")
    manifest.write(world.layout.goldens / "gold")
    seal.write(world.layout.goldens / "gold")
    with pytest.raises(BusyError, match="another golden named gold"):
        place(world, "tmpfs")
    assert manifests.read(place(world).folder).created == "later" and nothing_staged(world)


def test_the_disk_tier_may_be_anywhere(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run", tmp_path / "disk")
    layout.prepare()
    assert [*layout.golden_locks] == [tmp_path / "disk" / ".locks"]
    layout.prepare_store()
    assert [*layout.golden_locks] == [tmp_path / "disk" / ".locks", tmp_path / "store" / "locks"]
    assert layout.names() == [] and layout.disk.stat().st_mode & 0o777 == 0o700
    for folder in (layout.disk / "locks", layout.goldens / "b"):
        folder.mkdir()
    assert layout.names() == ["b", "locks"]
    with locks.exclusive(layout.golden_locks[1:], "golden", "b"), pytest.raises(BusyError):
        locks.exclusive(layout.golden_locks, "golden", "b").__enter__()
    assert locks.is_free(layout.golden_locks, "golden", "b"), "a lock that was not got in all folders is held in none"
    with pytest.raises(NotFoundError) as caught:
        layout.golden("a")
    assert isinstance(caught.value, GpuckptError) and "b, locks" in str(caught.value.cause)
