"""The store: names and private folders, locks, exchange, digests, seals, and sweeping up after killed commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.containers.podman import OWNER, container_name
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    GpuckptError,
    NotFoundError,
    NothingToDo,
    PreflightError,
    UsageError,
)
from gpuckpt.golden import catalogue
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.sweep import orphans, sweep
from gpuckpt.golden.tools import Tools
from gpuckpt.host import hugepages
from gpuckpt.paths import private_folder
from gpuckpt.store import digests, locks, seal
from gpuckpt.store.layout import Layout, check_name, exchange
from tests.fakes import World, publish, tools_for

# --- names and folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "7", "qwen-0.5b", "A_b.c-d", "x" * 40])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", ".a", "a.", "-a", "a-", "a b", "a\n", "a\0b", "ä", "x" * 41, "a:b"]
)
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_a_private_folder_is_made_and_closed(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o755)
    assert private_folder(made).stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PreflightError, match="must run as root") as caught:
        private_folder(tmp_path)
    assert "belongs to user" in str(caught.value.cause)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(PreflightError, match="is not a folder"):
        private_folder(tmp_path / "store")


@pytest.mark.parametrize("inside", ["link", "link/store"])
def test_links_count_by_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if os.geteuid() == 0:
        private_folder(tmp_path / inside)  # root's own link
        os.lchown(tmp_path / "link", 1000, 1000)
    with pytest.raises(PreflightError, match="symbolic link that is not root's"):
        private_folder(tmp_path / inside)


def test_the_layout_lists_whole_goldens_only(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    assert layout.names() == []
    layout.prepare()
    assert not layout.store.exists(), "before its tmpfs is mounted, folders would be made below it"
    layout.prepare_store()
    for folder in (layout.goldens / "b", layout.goldens / "a", layout.staging / "half"):
        folder.mkdir()
    (layout.goldens / "file").touch()
    (layout.goldens / "link").symlink_to(layout.goldens / "a")
    assert layout.names() == ["a", "b"]
    for name in ("link", "file", "half"):
        with pytest.raises(NotFoundError, match=name):
            layout.golden(name)
    with pytest.raises(UsageError):
        layout.golden("../staging/half")


def test_exchange(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1").touch()
    (tmp_path / "other").mkdir()
    exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other" / "1").exists() and not list((tmp_path / "one").iterdir())
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "absent")


# --- locks ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from gpuckpt.store import locks
with locks.exclusive(Path(sys.argv[1]), sys.argv[2], sys.argv[3]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(folder: Path, kind: str, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a name until the end of the ``with``."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), kind, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
    finally:
        child.communicate()


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, "golden", "gold") as child:
        with pytest.raises(BusyError) as caught, locks.exclusive(tmp_path, "golden", "gold"):
            pass
        assert str(child.pid) in str(caught.value.cause)
        with pytest.raises(BusyError), locks.shared(tmp_path, "golden", "gold"):
            pass
        assert not locks.is_free(tmp_path, "golden", "gold")
        assert locks.is_free(tmp_path, "golden", "silver") and locks.is_free(tmp_path, "replica", "gold")
    assert locks.is_free(tmp_path, "golden", "gold")


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, "golden", "gold") as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert locks.is_free(tmp_path, "golden", "gold")


def test_readers_share_and_keep_a_writer_out(tmp_path: Path) -> None:
    with locks.shared(tmp_path, "golden", "gold"), locks.shared(tmp_path, "golden", "gold"):
        assert locks.is_free(tmp_path, "golden", "gold"), "what lies half-made beside readers is nobody's"
        with pytest.raises(BusyError), locks.exclusive(tmp_path, "golden", "gold"):
            pass


def test_two_may_ask_at_once(tmp_path: Path) -> None:
    """Each would otherwise take the other for a living transaction, and both leave the orphan."""
    together = threading.Barrier(2)

    def ask(_: int) -> list[bool]:
        together.wait()
        return [locks.is_free(tmp_path, "golden", "gold") for _ in range(500)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(answers) for answers in pool.map(ask, range(2)))


def test_somebody_who_only_asks_does_not_keep_a_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = locks.shared(tmp_path, "golden", "gold")
    asks.__enter__()
    monkeypatch.setattr("time.sleep", lambda seconds: asks.__exit__(None, None, None))  # gone the next moment
    with locks.exclusive(tmp_path, "golden", "gold"):
        assert not locks.is_free(tmp_path, "golden", "gold")


def test_a_lock_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locks.exclusive(tmp_path, "golden", "gold"):
        raise ZeroDivisionError
    assert locks.is_free(tmp_path, "golden", "gold")


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "golden-gold.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), locks.exclusive(tmp_path, "golden", "gold"):
        pass
    assert not (tmp_path / "victim").exists()


# --- digests --------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with a file, an empty one, one in a folder, links to a file, a folder and nothing, and a pipe."""
    folder = tmp_path / "tree"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "file").write_bytes(b"content")
    (folder / "empty").touch()
    (folder / "deep" / "er" / "file").write_bytes(b"deep")
    (folder / "to-file").symlink_to("file")
    (folder / "to-folder").symlink_to("deep")
    (folder / "to-nothing").symlink_to("/nonexistent")
    os.mkfifo(folder / "pipe")
    for name in digests.OWN:
        (folder / name).write_text("{}")
    return folder


def test_digests_are_blake3_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"  # of blake3's own test vectors
    assert digests.digest_file(tmp_path / "file") == digests.digest_bytes(b"abc") == known


def test_files_and_links_are_recorded(tree: Path) -> None:
    seen: list[int] = []
    found = digests.record(tree, seen.append)
    assert {name: record.size for name, record in found.files.items()} == {"file": 7, "empty": 0, "deep/er/file": 4}
    assert found.links == {"to-file": "file", "to-folder": "deep", "to-nothing": "/nonexistent"}
    assert seen[-1] == 11
    assert digests.differences(tree, found.files, found.links, contents=True) == []


def test_known_digests_are_not_made_again(tree: Path) -> None:
    found = digests.record(tree, known={"file": "made before"})
    assert found.files["file"].blake3 == "made before" and found.files["empty"].blake3 == digests.digest_bytes(b"")


def test_names_are_kept_as_text_that_tells_them_apart() -> None:
    """JSON holds text only; the kernel's names are bytes."""
    names = [b"plain", "größe ☃".encode(), b"\xff", b"\\xff", b"\\\xff", b"\xc3\x28", b"\\", b"a\nb"]
    keys = [digests.key(os.fsdecode(name)) for name in names]
    assert keys[:2] == ["plain", "größe ☃"]
    assert len(set(keys)) == len(names), "two names must not become one"
    for text in keys:
        assert json.loads(json.dumps(text).encode()) == text


def test_files_whose_names_are_not_utf8(tree: Path) -> None:
    (tree / os.fsdecode(b"\xff")).write_bytes(b"odd")
    (tree / r"\xff").write_bytes(b"even")
    (tree / os.fsdecode(b"link\xfe")).symlink_to(os.fsdecode(b"\xfe"))
    found = digests.record(tree)
    assert found.links["link\\xfe"] == "\\xfe"
    assert {record.size for record in found.files.values()} >= {3, 4}
    assert digests.differences(tree, found.files, found.links, contents=True) == []
    (tree / os.fsdecode(b"\xff")).write_bytes(b"ODD")
    assert len(digests.differences(tree, found.files, found.links, contents=True)) == 1


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A golden's folder with a written layer: a file, a mark of a deleted one, and a replaced folder."""
    folder = tmp_path / "tree"
    (folder / "rootfs" / "opaque").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "volumes" / "data").mkdir(parents=True)
    (folder / "rootfs" / "file").write_bytes(b"content")
    os.mkfifo(folder / "rootfs" / "mark")
    return folder


def recreate_as(kind: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "rootfs" / "mark").unlink()
        os.mknod(folder / "rootfs" / "mark", kind | 0o644, os.makedev(0, 0))

    return change


def set_attribute(folder: Path) -> None:
    try:
        os.setxattr(folder / "rootfs" / "opaque", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("this file system keeps no extended attributes")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "rootfs" / "mark").unlink(),
        recreate_as(stat.S_IFREG),
        lambda folder: (folder / "rootfs" / "file").chmod(0o4755),
        lambda folder: (folder / "rootfs" / "opaque").rmdir(),
        lambda folder: (folder / "rootfs" / "opaque").chmod(0o777),
        lambda folder: (folder / "rootfs").chmod(0o700),
        lambda folder: (folder / "rootfs" / "more").mkdir(),
        lambda folder: (folder / "volumes" / "data").chmod(0o700),
        lambda folder: (folder / "rootfs" / "mark").rename(folder / "rootfs" / "marked"),
        set_attribute,
    ],
)
def test_attributes_tell_what_digests_do_not(layer: Path, change: Callable[[Path], object]) -> None:
    before = digests.attributes(layer)
    assert digests.attributes(layer) == before
    change(layer)
    assert digests.attributes(layer) != before
    found = digests.differences(layer, digests.record(layer).files, {}, contents=True, attributes_blake3=before)
    assert found == ["owners, modes or marks of the written files (rootfs, volumes) have changed"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and gives files away")
def test_owners_and_overlayfs_s_marks_are_attributes(layer: Path) -> None:
    seen = {digests.attributes(layer)}
    recreate_as(stat.S_IFCHR)(layer)
    seen.add(digests.attributes(layer))
    os.chown(layer / "rootfs" / "file", 1000, 0)
    seen.add(digests.attributes(layer))
    os.chown(layer / "rootfs" / "file", 0, 1000)
    seen.add(digests.attributes(layer))
    os.setxattr(layer / "rootfs" / "opaque", "trusted.overlay.opaque", b"y")
    seen.add(digests.attributes(layer))
    os.setxattr(layer / "rootfs" / "opaque", "trusted.overlay.opaque", b"n")
    seen.add(digests.attributes(layer))
    assert len(seen) == 6


def test_what_is_no_attribute(layer: Path) -> None:
    """Bytes have digests; times change by themselves; CRIU's images and sockets have nothing to do with the layer."""
    before = digests.attributes(layer)
    (layer / "rootfs" / "file").write_bytes(b"other")
    os.utime(layer / "rootfs" / "file", ns=(1, 1))
    (layer / "images" / "more").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(layer / "rootfs" / "socket"))
        assert digests.attributes(layer) == before, "a server makes its sockets again; archives do not carry them"


def flip(path: Path) -> None:
    path.write_bytes(b"C" + path.read_bytes()[1:])


def test_differences_are_named(tree: Path) -> None:
    recorded = digests.record(tree)

    def found(*, contents: bool = True) -> list[str]:
        return digests.differences(tree, recorded.files, recorded.links, contents=contents)

    flip(tree / "file")
    assert found(contents=False) == []
    assert found() == ["file has changed: its digest differs from the recorded one"]
    (tree / "file").write_bytes(b"conten")
    assert found(contents=False) == ["file has 6 bytes, 7 were recorded"]
    (tree / "file").unlink()
    assert found() == ["file is missing"]
    (tree / "file").symlink_to("deep/er/file")
    assert found() == ["file is missing"]
    (tree / "file").unlink()
    (tree / "file").write_bytes(b"content")
    assert found() == []
    (tree / "to-file").unlink()
    (tree / "to-file").symlink_to("elsewhere")
    assert found() == ["the link to-file is missing or points elsewhere"]
    (tree / "to-file").unlink()
    (tree / "to-file").symlink_to("file")
    (tree / "deep" / "extra").touch()
    (tree / "deep" / "link").symlink_to("extra")
    assert sorted(found()) == [
        "deep/extra was not there when the golden was made",
        "deep/link was not there when the golden was made",
    ]


# --- seals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    layout.prepare()
    layout.prepare_store()
    folder = publish(layout, contents={"images/pages-1.img": bytes(8192), "rootfs/a": b"a"})
    (folder / "rootfs" / "link").symlink_to("a")
    return publish(layout, contents={})


def broken(folder: Path) -> list[str]:
    return seal.broken(folder, manifests.read(folder))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read to compare their digests."""
    names: list[str] = []

    def digest(path: Path) -> str:
        names.append(path.name)
        return digests.digest_file(path)

    monkeypatch.setattr(seal, "digest_file", digest)
    return names


def test_an_untouched_golden_is_not_read(golden: Path, read: list[str]) -> None:
    assert broken(golden) == []
    assert read == []


def test_a_file_that_was_written_is_read_again_once(golden: Path, read: list[str]) -> None:
    path = golden / "rootfs" / "a"
    path.write_bytes(b"a")
    assert broken(golden) == [] and read == ["a"]
    assert broken(golden) == [] and read == ["a"], "the seal was renewed"


def test_a_time_stamp_that_was_put_back_does_not_hide_a_write(golden: Path) -> None:
    path = golden / "images" / "pages-1.img"
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x01")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert broken(golden) == ["images/pages-1.img has changed: its digest differs from the recorded one"]
    assert broken(golden) != [], "a broken golden must not be sealed"


def test_truncated_missing_and_extra_files(golden: Path) -> None:
    os.truncate(golden / "images" / "pages-1.img", 4096)
    assert "4096 bytes, 8192 were recorded" in " ".join(broken(golden))
    (golden / "images" / "pages-1.img").unlink()
    assert broken(golden) == ["images/pages-1.img is missing"]
    (golden / "images" / "pages-1.img").write_bytes(bytes(8192))
    assert broken(golden) == []
    (golden / "images" / "more").touch()
    assert broken(golden) == ["images/more was not there when the golden was made"]


def test_a_changed_manifest_breaks_the_seal(golden: Path) -> None:
    recorded = manifests.read(golden)
    launch = replace(recorded.launch, argv=("evil",))
    replace(recorded, launch=launch).write(golden)
    assert broken(golden) == ["manifest.json has changed since the golden was sealed"]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": 5, "manifest": 7}', '{"files": {}}'])
def test_without_a_usable_seal_everything_is_read(golden: Path, read: list[str], text: str | None) -> None:
    path = golden / "seal.json"
    path.unlink() if text is None else path.write_text(text)
    assert broken(golden) == []
    assert sorted(read) == ["a", "pages-1.img"]
    assert broken(golden) == [] and len(read) == 2


def test_a_copied_golden_is_read_again(golden: Path, read: list[str]) -> None:
    copy = golden.with_name("copy")
    subprocess.run(["cp", "-a", golden, copy], check=True)
    assert broken(copy) == []
    assert sorted(read) == ["a", "pages-1.img"]


# --- sweep ----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(hugepages, "MODE", tmp_path / "no-huge-pages")
    return tools_for(tmp_path)


def half_made(world: World, name: str) -> None:
    """What a killed creation leaves: images without a manifest, and a running container."""
    (world.layout.staging / name / "images").mkdir(parents=True)
    folder = world.layout.replicas / name
    folder.mkdir()
    Replica(name, name, folder).save()
    world.overlay.mount(folder, [world.base])


def test_nothing_to_sweep_needs_no_podman(world: World) -> None:
    publish(world.layout)
    folder = world.layout.replicas / "gold"
    folder.mkdir()
    Replica("gold", "gold", folder, state="ready").save()
    assert sweep(world.settings, lambda: pytest.fail("podman is not needed")) == []
    assert folder.is_dir() and world.layout.names() == ["gold"]


def test_what_a_killed_process_left_is_removed(world: World) -> None:
    with held_elsewhere(world.layout.golden_locks[0], "golden", "gold") as child:
        half_made(world, "gold")
        child.kill()
        child.wait()
        assert sweep(world.settings, lambda: world.tools) == [
            "removed the half-made replica gold",
            "removed the half-made golden gold",
        ]
    assert world.left_over() == []


def test_what_a_living_process_makes_stays(world: World) -> None:
    half_made(world, "gold")
    with (
        held_elsewhere(world.layout.golden_locks[0], "golden", "gold"),
        held_elsewhere(world.layout.replica_locks, "replica", "gold"),
    ):
        assert orphans(world.layout) == ([], [])
        assert sweep(world.settings, lambda: pytest.fail("nothing is to be removed")) == []
    assert (world.layout.staging / "gold" / "images").is_dir() and (world.layout.replicas / "gold").is_dir()


def test_a_replica_folder_without_a_record_is_removed(world: World) -> None:
    (world.layout.replicas / "gold").mkdir()
    assert sweep(world.settings, lambda: world.tools) == ["removed the half-made replica gold"]
    assert world.left_over() == []


def test_sweeping_makes_the_folders_of_a_fresh_machine(tmp_path: Path) -> None:
    world = tools_for(tmp_path / "one")
    fresh = replace(world.settings, paths=replace(world.settings.paths, state=tmp_path / "fresh"))
    assert sweep(fresh, lambda: world.tools) == []
    assert (tmp_path / "fresh" / "locks").is_dir() and (tmp_path / "fresh" / "replicas").is_dir()


def test_a_stuck_thing_is_said_and_does_not_keep_the_rest(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        half_made(world, name)
    world.journal.trouble["remove container"] = GpuckptError("podman is stuck")
    really = shutil.rmtree

    def stuck(path: Path, **options: Any) -> None:
        if path == world.layout.staging / "b":
            raise OSError("the file is odd")
        really(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stuck)
        assert sweep(world.settings, lambda: world.tools) == [
            "could not remove the half-made replica a: podman is stuck",
            "removed the half-made replica b",
            "removed the half-made golden a",
            "could not remove the half-made golden b: the file is odd",
        ]
    assert sweep(world.settings, lambda: world.tools) == [
        "removed the half-made replica a",
        "removed the half-made golden b",
    ]
    assert world.left_over() == []


def test_a_podman_that_does_not_start_is_said_only(world: World) -> None:
    half_made(world, "gold")

    def no_tools() -> Tools:
        raise DaemonUnreachableError("podman does not start")

    assert sweep(world.settings, no_tools) == [
        "could not remove the half-made replica gold: podman does not start",
        "removed the half-made golden gold",
    ]


def test_a_name_that_is_taken_in_between_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    half_made(world, "gold")
    monkeypatch.setattr(locks, "is_free", lambda *which: True)
    with (
        locks.exclusive(world.layout.golden_locks, "golden", "gold"),
        locks.exclusive(world.layout.replica_locks, "replica", "gold"),
    ):
        assert sweep(world.settings, lambda: world.tools) == []
    assert (world.layout.staging / "gold").is_dir() and (world.layout.replicas / "gold").is_dir()


def test_sweeping_leaves_containers_of_another_gpuckpt_alone(world: World) -> None:
    half_made(world, "gold")
    foreign = world.containers.foreign(container_name("gold"))
    assert len(sweep(world.settings, lambda: world.tools)) == 2
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"


# --- prune and rm ---------------------------------------------------------------------------------------------


def replica_of(world: World, name: str, status: str | None, *, golden: str = "gold") -> Replica:
    """A ready replica whose container is in ``status``, or gone."""
    folder = world.layout.replicas / name
    folder.mkdir()
    made = Replica(name, golden, folder, state="ready")
    made.save()
    world.overlay.mount(folder, [world.base])
    if status:
        ours(world, name, status)
    return made


def ours(world: World, name: str, status: str) -> None:
    container = world.containers.foreign(container_name(name), replica=name)
    container.spec.labels[OWNER] = str(world.layout.state)
    container.status = status


def snapshot(world: World) -> tuple[object, ...]:
    """All that a command could have changed."""
    files = sorted(str(path) for path in world.folder.rglob("*") if path.parent.name not in ("locks", ".locks"))
    return files, dict(world.containers.containers), dict(world.overlay.mounted)


def litter(world: World) -> None:
    half_made(world, "half")
    replica_of(world, "dead", "exited")
    replica_of(world, "gone", None)
    replica_of(world, "alive", "running")
    replica_of(world, "frozen", "paused")
    ours(world, "stray", "running")
    world.containers.foreign(container_name("theirs"), replica="theirs")
    replica_of(world, "renamed", None)
    world.containers.foreign(container_name("renamed"), replica="renamed")


def test_prune(world: World) -> None:
    litter(world)
    assert catalogue.prune(world.settings, lambda: world.tools, dry_run=False) == [
        "removed the half-made replica half",
        "removed the half-made golden half",
        "removed the dead replica dead",
        "removed the dead replica gone",
        "removed the dead replica renamed",
        "removed the stray container of stray",
    ]
    names = [container_name(name) for name in ("alive", "frozen", "renamed", "theirs")]
    assert sorted(world.containers.containers) == names
    assert {path.name for path in world.layout.replicas.iterdir()} == {"alive", "frozen"}
    with pytest.raises(NothingToDo):
        catalogue.prune(world.settings, lambda: world.tools, dry_run=False)


def test_a_dry_run_changes_nothing(world: World) -> None:
    litter(world)
    before = snapshot(world)
    would = catalogue.prune(world.settings, lambda: world.tools, dry_run=True)
    assert snapshot(world) == before
    assert all(line.startswith("would remove") for line in would)
    done = catalogue.prune(world.settings, lambda: world.tools, dry_run=False)
    assert {line.removeprefix("would remove ") for line in would} == {line.removeprefix("removed ") for line in done}


def test_prune_leaves_alone_what_somebody_works_on(world: World) -> None:
    replica_of(world, "dead", "exited")
    ours(world, "stray", "running")
    before = snapshot(world)
    with (
        locks.exclusive(world.layout.replica_locks, "replica", "dead"),
        locks.exclusive(world.layout.replica_locks, "replica", "stray"),
        pytest.raises(NothingToDo),
    ):
        catalogue.prune(world.settings, lambda: world.tools, dry_run=False)
    assert snapshot(world) == before


def test_a_replica_made_while_prune_looks_is_no_stray(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(world.layout)
    replica_of(world, "dead", "exited")

    def looking(tools: Tools) -> dict[str, str]:
        replica_of(world, "fresh", "running")
        return states(tools)

    states = catalogue.states
    monkeypatch.setattr(catalogue, "states", looking)
    assert catalogue.prune(world.settings, lambda: world.tools, dry_run=False) == ["removed the dead replica dead"]
    assert container_name("fresh") in world.containers.containers


def test_rm_takes_stopped_replicas_along_and_running_ones_when_forced(world: World) -> None:
    publish(world.layout)
    replica_of(world, "one", "running")
    replica_of(world, "two", "exited")
    replica_of(world, "other", "exited", golden="silver")
    before = snapshot(world)
    with pytest.raises(BusyError) as caught:
        catalogue.remove(world.tools, "gold")
    assert caught.value.exit_code == 7 and "gpuckpt stop one" in str(caught.value.remedy)
    assert snapshot(world) == before
    catalogue.remove(world.tools, "gold", force=True)
    assert world.layout.names() == [] and list(world.containers.containers) == [container_name("other")]
    assert [path.name for path in world.layout.replicas.iterdir()] == ["other"]
    with pytest.raises(NotFoundError):
        catalogue.remove(world.tools, "gold")


@pytest.mark.parametrize("force", [False, True])
def test_rm_leaves_a_container_of_another_gpuckpt_alone(world: World, force: bool) -> None:
    publish(world.layout)
    replica_of(world, "gold", None)
    foreign = world.containers.foreign(container_name("gold"))
    catalogue.remove(world.tools, "gold", force=force)
    assert world.containers.containers == {container_name("gold"): foreign} and foreign.status == "running"
    assert world.left_over() == [] and world.layout.names() == []


def test_two_who_remove_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes while the first has not ended."""
    publish(world.layout)
    replica_of(world, "gold", "exited")
    really = world.overlay.unmount
    second: list[BaseException] = []

    def slow(folder: Path) -> None:
        with pytest.raises(BusyError) as caught:
            catalogue.remove(world.tools, "gold")
        second.append(caught.value)
        really(folder)

    monkeypatch.setattr(world.overlay, "unmount", slow)
    catalogue.remove(world.tools, "gold")
    assert len(second) == 1
    assert world.left_over() == [] and world.layout.names() == []


def test_many_who_remove_at_once(world: World) -> None:
    together = threading.Barrier(4)

    def remove(_: int) -> str:
        together.wait()
        try:
            catalogue.remove(world.tools, "gold")
        except GpuckptError as error:
            return type(error).__name__
        return "removed"

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            publish(world.layout)
            replica_of(world, "gold", "exited")
            ended = list(pool.map(remove, range(4)))
            assert ended.count("removed") == 1 and set(ended) <= {"removed", "BusyError", "NotFoundError"}
            assert world.left_over() == [] and world.layout.names() == []
