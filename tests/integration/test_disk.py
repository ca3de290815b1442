"""Goldens on disk: saved whole or not at all, restored after the memory is gone, staged back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import GPUCKPT, PATIENCE, Bench

MAPPED = ("--mode", "mapped")


def disk(bench: Bench) -> Path:
    return bench.folder / "state" / "goldens"


def lose_memory(bench: Bench) -> None:
    """What a reboot does to the store."""
    subprocess.run(["umount", bench.store], check=True)


def tiers(bench: Bench) -> dict[str, list[str]]:
    return {one["name"]: one["tiers"] for one in bench.ok("ls", "--format", "json").json["goldens"]}


def staged(bench: Bench) -> list[Path]:
    return [*disk(bench).glob(".staging/*"), *bench.store.glob("staging/*")]


def save(bench: Bench, name: str) -> dict[str, int]:
    moved: dict[str, int] = bench.ok("move", name, "--to", "disk", "--keep", "--format", "json").json["moved"][0]
    return moved


@pytest.mark.parametrize("mode", ["mapped", "copy"])
def test_a_golden_survives_the_loss_of_the_memory(bench: Bench, mode: str) -> None:
    name, note = bench.name(), "/var/tmp/note-of-the-server"
    bench.create(name, "--note", note, options=("--mode", mode))
    save(bench, name)
    assert tiers(bench) == {name: ["tmpfs", "disk"]}
    lose_memory(bench)
    assert tiers(bench) == {name: ["disk"]}
    restored = bench.ok("restore", name, "--format", "json").json
    assert (restored["tier"], restored["memory"], restored["canary_match"]) == ("disk", mode, True)
    assert not os.path.ismount(bench.store), "nothing was staged"
    # The server's own file is there, and what one replica writes is its own.
    assert bench.get(name, f"/read{note}") == "written before the dump"
    assert [bench.get(name, "/count") for _ in range(2)] == ["1", "2"]
    failed = bench.run("rm", name, "--tier", "disk")
    assert failed.code == 7 and "running replicas" in failed.err
    bench.ok("stop", name)
    bench.ok("verify", name)
    assert bench.left() == []
    bench.ok("restore", name)
    assert bench.get(name, "/count") == "1"
    bench.ok("stop", name)
    bench.ok("rm", name)
    assert tiers(bench) == {} and staged(bench) == []


def test_a_golden_is_staged_again(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, options=MAPPED)
    bench.ok("move", name, "--to", "disk")
    assert tiers(bench) == {name: ["disk"]} and list(bench.store.glob("goldens/*")) == []
    lose_memory(bench)
    restored = bench.ok("restore", name, "--stage", "--format", "json").json
    assert (restored["tier"], restored["canary_match"]) == ("tmpfs", True)
    assert "stage" in [row["name"] for row in restored["phases"]]
    assert tiers(bench) == {name: ["tmpfs", "disk"]}
    failed = bench.run("move", name, "--to", "disk")
    assert failed.code == 7 and "--keep" in failed.err, "the replica uses the files in the tmpfs"
    bench.ok("rm", name, "--tier", "disk")
    bench.ok("stop", name)
    assert bench.ok("verify", name, "--format", "json").json["verified"][0]["tier"] == "tmpfs"


def test_a_terminal_sees_bytes_and_rate(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, "--deleted-file", str(256 << 20), options=MAPPED)
    # script(1) makes a terminal.
    words = ["script", "-qec", " ".join([*GPUCKPT, "move", name, "--to", "disk"]), "/dev/null"]
    shown = subprocess.run(words, env=bench.env | {"TERM": "xterm"}, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout
    assert "of about" in shown.stdout and "/s" in shown.stdout


def give_up_in_the_middle(bench: Bench, name: str, to: str, number: signal.Signals, begun: str) -> int:
    """Send the signal to a move when such files are there; returns its exit status. If it was quicker, once more."""
    other = "disk" if to == "tmpfs" else "tmpfs"
    folders = disk(bench) / ".staging", bench.store / "staging"
    for _ in range(10):
        child = bench.start("move", name, "--to", to)
        while child.poll() is None and not any(list(folder.glob(begun)) for folder in folders):
            pass
        child.send_signal(number)
        child.communicate()
        if child.returncode != 0:
            return child.returncode
        bench.ok("move", name, "--to", other)
    pytest.fail("each time it was at its end already")


@pytest.mark.parametrize("to", ["disk", "tmpfs"])
def test_a_killed_move_is_swept(bench: Bench, to: str) -> None:
    name = bench.name()
    bench.create(name, "--deleted-file", str(256 << 20), options=MAPPED)
    if to == "tmpfs":
        bench.ok("move", name, "--to", "disk")
    before = tiers(bench)
    give_up_in_the_middle(bench, name, to, signal.SIGKILL, "*/memory/*")
    assert staged(bench) != [] and tiers(bench) == before
    bench.ok("restore", name)
    assert staged(bench) == []
    bench.ok("stop", name)
    bench.ok("move", name, "--to", to)
    assert tiers(bench) == {name: [to]}


def test_an_interrupted_move_leaves_nothing(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, "--deleted-file", str(256 << 20), options=MAPPED)
    code = give_up_in_the_middle(bench, name, "disk", signal.SIGINT, "*")
    assert code == 130 and staged(bench) == [] and tiers(bench) == {name: ["tmpfs"]}


def test_a_full_disk(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, "--deleted-file", str(64 << 20), options=MAPPED)
    small = bench.folder / "small"
    small.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=0700", "small", small], check=True)
    elsewhere = {"GPUCKPT_STORE__DISK": str(small)}
    failed = bench.run("move", name, "--to", "disk", env=elsewhere)
    assert failed.code == 11 and "MiB free" in failed.err
    # There seems to be room, but it ends in the middle of the copy: no inodes are left.
    subprocess.run(["mount", "-o", "remount,size=200m,nr_inodes=20", small], check=True)
    failed = bench.run("move", name, "--to", "disk", env=elsewhere)
    assert failed.code == 11 and "became full" in failed.err
    assert list(small.glob(".staging/*")) == [] and tiers(bench) == {name: ["tmpfs"]}
    subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "marks"])
def test_damage_on_disk_is_found(bench: Bench, damage: str) -> None:
    name = bench.name()
    bench.create(name, "--note", "/var/tmp/note", options=MAPPED)
    bench.ok("move", name, "--to", "disk")
    folder = disk(bench) / name
    path = max((folder / "memory").iterdir(), key=lambda file: file.stat().st_size)
    status = path.stat()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 4096)
    elif damage == "changed":
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"!")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path = next(path for path in (folder / "rootfs").rglob("note"))
        path.chmod(0o777)
    for words in (["restore", name], ["verify", name], ["move", name, "--to", "tmpfs"]):
        failed = bench.run(*words)
        assert failed.code == 8, failed.err
        assert damage == "marks" or path.name in failed.err
    assert tiers(bench) == {name: ["disk"]} and bench.left() == []


def test_two_goldens_share_extents_on_disk(bench: Bench) -> None:
    # Equal servers lay out their heaps differently; one golden under two names is surely the same.
    one, two = bench.name("one"), bench.name("two")
    bench.create(one, "--megabytes", "64", options=MAPPED)
    archive = bench.folder / "golden.tar"
    digest = bench.ok("export", one, str(archive), "--format", "json").json["blake3"]
    bench.ok("import", str(archive), "--name", two, "--trust", "--digest", digest)
    assert save(bench, one)["shared"] == 0
    second = save(bench, two)
    assert second["shared"] > 60 << 20 and second["bytes"] < 30 << 20
    extents = list((disk(bench) / two / "memory").glob("*.extent"))
    assert extents and all(path.stat().st_nlink == 2 for path in extents)
    # Neither the link nor its removal makes the other golden's bytes doubtful.
    for command in (None, ("rm", two)):
        if command:
            bench.ok(*command)
        seal = json.loads((disk(bench) / one / "seal.json").read_text())
        for path in (disk(bench) / one / "memory").iterdir():
            assert seal["files"][f"memory/{path.name}"][4] == path.stat().st_ctime_ns
    lose_memory(bench)
    bench.ok("verify", one)
    bench.ok("restore", one)
    assert bench.get(one, "/health") == "ok"


def test_export_from_disk(bench: Bench) -> None:
    name, other = bench.name(), bench.name("other")
    bench.create(name, options=MAPPED)
    bench.ok("move", name, "--to", "disk")
    lose_memory(bench)
    archive = bench.folder / "golden.tar.zst"
    digest = bench.ok("export", name, str(archive), "--zstd", "--format", "json").json["blake3"]
    bench.ok("import", str(archive), "--name", other, "--trust", "--digest", digest)
    assert tiers(bench) == {name: ["disk"], other: ["tmpfs"]}
    taken = bench.run("import", str(archive), "--name", name, "--trust", "--digest", digest)
    assert taken.code == 7, "a name is one golden's in all tiers"


def test_a_replaced_golden_does_not_come_back_from_disk(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    bench.ok("move", name, "--to", "disk")
    assert bench.run(*bench.creation(name)).code == 7
    bench.create(name, options=("--replace",))
    assert tiers(bench) == {name: ["tmpfs"]} and staged(bench) == []


def test_another_device_number_after_a_reboot(bench: Bench) -> None:
    """A golden's own file system: its layer is shared, not copied, and a new number does not cost a second reading."""
    name, image, mount = bench.name(), bench.folder / "image", bench.folder / "mounted"
    other = bench.folder / "other"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(512 << 20)
    other.write_bytes(bytes(1 << 20))
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    elsewhere = {"GPUCKPT_STORE__DISK": str(mount / "goldens")}
    bench.create(name, "--note", "/var/tmp/note", options=MAPPED)
    bench.ok("move", name, "--to", "disk", env=elsewhere)
    seal, before = mount / "goldens" / name / "seal.json", mount.stat().st_dev
    sealed = seal.stat().st_mtime_ns
    loop = output("findmnt", "-no", "SOURCE", str(mount))
    subprocess.run(["umount", mount], check=True)
    limit = time.monotonic() + PATIENCE
    while output("losetup", "-j", str(image)):  # the kernel lets go of it when it has time
        assert time.monotonic() < limit
        time.sleep(0.02)
    subprocess.run(["losetup", loop, other], check=True)
    try:
        subprocess.run(["mount", "-o", "loop", image, mount], check=True)
        assert mount.stat().st_dev != before, "the first loop device was free again"
        restored = bench.ok("restore", name, "--format", "json", env=elsewhere).json
        assert (restored["tier"], restored["canary_match"]) == ("disk", True)
        assert bench.get(name, "/read/var/tmp/note") == "written before the dump"
        assert list((bench.folder / "state" / "replicas" / name / "upper").rglob("note")) == []
        assert seal.stat().st_mtime_ns == sealed, "a seal is renewed when files had to be read"
        bench.ok("stop", name, env=elsewhere)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
    subprocess.run(["umount", mount], check=True)


def output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
