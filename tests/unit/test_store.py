"""The store: names and private folders, locks, exchange, digests, seals, and sweeping up after killed commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.errors import BusyError, NotFoundError, PreflightError, UsageError
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.sweep import orphans, sweep
from gpuckpt.host import hugepages
from gpuckpt.store import digests, locks, seal
from gpuckpt.store.layout import Layout, check_name, exchange, private_folder
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
    with pytest.raises(PreflightError, match="belongs to user"):
        private_folder(tmp_path)


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
    with pytest.raises(PreflightError, match="symbolic link of user"):
        private_folder(tmp_path / inside)


def test_the_layout_lists_whole_goldens_only(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run")
    assert layout.names() == []
    layout.prepare()
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
    files, links = digests.record(tree, seen.append)
    assert {name: record.size for name, record in files.items()} == {"file": 7, "empty": 0, "deep/er/file": 4}
    assert links == {"to-file": "file", "to-folder": "deep", "to-nothing": "/nonexistent"}
    assert seen[-1] == 11
    assert digests.differences(tree, files, links, contents=True) == []


def flip(path: Path) -> None:
    path.write_bytes(b"C" + path.read_bytes()[1:])


def test_differences_are_named(tree: Path) -> None:
    files, links = digests.record(tree)

    def found(*, contents: bool = True) -> list[str]:
        return digests.differences(tree, files, links, contents=contents)

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
    folder = publish(layout, contents={"images/pages-1.img": bytes(8192), "rootfs/a": b"a"})
    (folder / "rootfs" / "link").symlink_to("a")
    return publish(layout, contents={})


def broken(folder: Path) -> list[str]:
    recorded = manifests.read(folder)
    return seal.broken(folder, recorded.files, recorded.links)


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
    launch = recorded.launch.model_copy(update={"argv": ("evil",)})
    recorded.model_copy(update={"launch": launch}).write(golden)
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
    with held_elsewhere(world.layout.locks, "golden", "gold") as child:
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
        held_elsewhere(world.layout.locks, "golden", "gold"),
        held_elsewhere(world.layout.locks, "replica", "gold"),
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
    fresh = world.settings.model_copy(
        update={"paths": world.settings.paths.model_copy(update={"run": tmp_path / "fresh"})}
    )
    assert sweep(fresh, lambda: world.tools) == []
    assert (tmp_path / "fresh" / "locks").is_dir()
