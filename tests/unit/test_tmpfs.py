"""The store's tmpfs: recognised, mounted once, refused where it cannot be trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuckpt import proc
from gpuckpt.config import Store
from gpuckpt.errors import PreflightError
from gpuckpt.host import tmpfs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own folders as root")


def _may_mount() -> bool:
    capabilities = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    )
    return bool(int(capabilities.split()[1], 16) >> 21 & 1)


mounts = pytest.mark.skipif(not _may_mount(), reason="needs CAP_SYS_ADMIN to mount")


def mountinfo(folder: Path, *lines: str) -> Path:
    file = folder / "mountinfo"
    file.write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n" + "".join(line + "\n" for line in lines))
    return file


def tmpfs_line(path: str, options: str = "rw,size=1024k,mode=700,huge=within_size", kind: str = "tmpfs") -> str:
    return f"90 27 0:77 / {path} rw,nosuid shared:5 - {kind} gpuckpt-store {options}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    settings = Store(path=tmp_path / "deep" / "gpuckpt-store", size=1 << 20)
    yield settings
    while tmpfs.info(settings.path):
        proc.run(["umount", settings.path])


def test_info_reads_options_and_the_topmost_mount(tmp_path: Path) -> None:
    there = tmp_path / "a b"
    there.mkdir()
    escaped = str(there).replace(" ", r"\040")
    found = tmpfs.info(there, mountinfo=mountinfo(tmp_path, tmpfs_line(escaped, "rw"), tmpfs_line(escaped)))
    assert found is not None
    assert (found.source, found.huge, found.options["size"]) == ("gpuckpt-store", "within_size", "1024k")
    assert found.used + found.free <= found.size
    covered = mountinfo(tmp_path, tmpfs_line(escaped), tmpfs_line(escaped, kind="ext4"))
    assert tmpfs.info(there, mountinfo=covered) is None


def test_info_is_about_exactly_that_path(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert tmpfs.info(tmp_path / "in", mountinfo=mountinfo(tmp_path, tmpfs_line(str(tmp_path)))) is None
    assert tmpfs.info(tmp_path / "absent", mountinfo=mountinfo(tmp_path)) is None


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684096 kB\nMemFree:  1 kB\nMemAvailable:   23000000 kB\n")
    assert tmpfs.available_memory(meminfo=meminfo) == 23000000 * 1024
    assert tmpfs.memory_total(meminfo=meminfo) == 24684096 * 1024


def test_the_mount_is_private_and_without_huge_pages_where_the_kernel_has_none(tmp_path: Path) -> None:
    store = Store(path=Path("/x y"), size=10_000_000)
    command = tmpfs.mount_command(store, thp=tmp_path)
    assert command[-2:] == ["gpuckpt-store", "/x y"]
    assert command[4].split(",") == [
        "size=9998336",
        "mode=0700",
        "uid=0",
        "gid=0",
        "nosuid",
        "nodev",
        "huge=within_size",
    ]
    assert "huge" not in " ".join(tmpfs.mount_command(store, thp=tmp_path / "absent"))
    assert int(tmpfs.mount_command(Store(), thp=tmp_path)[4].split(",")[0][5:]) <= tmpfs.memory_total() * 0.8


@as_root
@mounts
def test_ensure_mounts_once_even_when_many_ask(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        mounted = list(pool.map(lambda _: tmpfs.ensure(store), range(8)))
    assert sorted(mounted) == [False] * 7 + [True]
    assert sum(str(store.path) in line for line in Path("/proc/self/mountinfo").read_text().splitlines()) == 1
    found = tmpfs.info(store.path)
    assert found is not None
    assert (found.size, found.source) == (1 << 20, "gpuckpt-store")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700


@as_root
@mounts
def test_the_check_mounts_and_closes_what_is_ours(store: Store) -> None:
    before = tmpfs.check(store)
    assert before.verdict == "warn" and before.apply is not None and before.mend is not None
    assert before.mend.startswith(f"mkdir -p -m 0700 {store.path} && mount -t tmpfs -o size=1048576,")
    before.apply()
    store.path.chmod(0o755)
    after = tmpfs.check(store)
    assert after.verdict == "fail" and "0755" in after.why and after.apply is not None
    after.apply()
    assert tmpfs.check(store).verdict == "warn"  # 1 MiB is too little for any golden
    assert "can still be stored" in tmpfs.check(store).why


@as_root
def test_a_folder_with_files_is_refused(store: Store) -> None:
    store.path.mkdir(parents=True)
    (store.path / "thesis.tex").touch()
    with pytest.raises(PreflightError, match="is not a tmpfs and holds files"):
        tmpfs.ensure(store)
    check = tmpfs.check(store)
    assert check.verdict == "fail" and check.apply is None


@as_root
def test_a_link_or_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    link = tmp_path / "link"
    link.symlink_to("mine")
    tmpfs._refuse_untrusted(link / "store")  # root's own link may lead anywhere
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with pytest.raises(PreflightError, match="symbolic link that is not root's"):
        tmpfs.ensure(Store(path=link / "store"))
    os.chown(tmp_path / "mine", 65534, 65534)
    with pytest.raises(PreflightError, match="folder that is not root's"):
        tmpfs.ensure(Store(path=tmp_path / "mine" / "store"))
    os.chown(tmp_path / "mine", 0, 0)
    (tmp_path / "mine").chmod(0o777)
    with pytest.raises(PreflightError, match="others than root may change"):
        tmpfs.ensure(Store(path=tmp_path / "mine" / "store"))
    assert not (tmp_path / "mine" / "store").exists()


@as_root
@pytest.mark.parametrize(("target", "message"), [("loop", "is a loop"), ("/proc/version", "not a folder")])
def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(PreflightError, match=message):
        tmpfs.ensure(Store(path=tmp_path / "loop" / "store"))


def test_a_failed_mount_says_what_mount_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(argv: list[str], **_: object) -> proc.Result:
        raise proc.CommandError("mount failed with status 32", log=("mount: permission denied.",))

    monkeypatch.setattr(tmpfs, "_refuse_untrusted", lambda path: None)
    monkeypatch.setattr(proc, "run", refuse)
    with pytest.raises(PreflightError) as raised:
        tmpfs.ensure(store)
    assert raised.value.exit_code == 4
    assert raised.value.cause == "mount: permission denied."
    assert "gpuckpt-store" in (raised.value.remedy or "")
