"""Goldens whose memory is mapped: same memory, nothing stale, nothing served from a damaged file."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from gpuckpt.store import seal
from tests.integration.conftest import Bench

MAPPED = ("--mode", "mapped")


def test_mapped_memory_is_the_same_and_is_not_written(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, "--megabytes", "64", options=MAPPED)
    shown = bench.ok("inspect", name, "--format", "json").json
    assert shown["memory"]["mode"] == "mapped"
    assert shown["memory"]["mapped"] > 64 << 20
    assert shown["sizes"]["cpu_pages"] < 8 << 20  # 2 MiB, more or less: most of it what a first answer writes
    assert all(row["reason"] and row["bytes"] for row in shown["memory"]["copied"])
    digests = {name: record["size"] for name, record in _files(bench, name).items()}
    for _ in range(2):
        restored = bench.ok("restore", name, "--format", "json").json
        assert (restored["memory"], restored["canary_match"]) == ("mapped", True)
        # What one replica writes is its own: the next begins where the golden ended.
        assert [bench.get(name, "/count") for _ in range(2)] == ["1", "2"]
        bench.ok("stop", name)
    assert bench.left() == []
    assert {name: record["size"] for name, record in _files(bench, name).items()} == digests
    bench.ok("verify", name)


@pytest.mark.parametrize("mode", ["mapped", "copy"])
def test_empty_tmpfs_mounts_come_back_without_archives(bench: Bench, mode: str) -> None:
    name = bench.name()
    bench.create(name, options=("--mode", mode))
    images = bench.store / "goldens" / name / "images"
    assert not any(_members(path) == ["."] for path in images.glob("tmpfs-dev-*"))
    bench.ok("restore", name)

    def described(command: str) -> str:
        words = ["podman", "exec", f"gpuckpt-{name}", "sh", "-c", command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert described("stat -c '%F %a %u %g' /dev/shm; ls -A /dev/shm") == "directory 1777 0 0\n"
    assert "size=1048576k" in described("grep ' /dev/shm ' /proc/self/mountinfo")
    masked = described("grep -E ' /(proc/acpi|sys/firmware) ' /proc/self/mountinfo")
    assert len(masked.splitlines()) == 2 and all(" ro" in line for line in masked.splitlines()), masked


def _members(archive: Path) -> list[str]:
    with tarfile.open(archive, "r:gz") as tar:
        return tar.getnames()


def _files(bench: Bench, name: str) -> dict[str, dict[str, int]]:
    memory = bench.store / "goldens" / name / "memory"
    return {path.name: {"size": path.stat().st_size} for path in memory.iterdir()}


def test_dropped_memory_is_never_stale(bench: Bench) -> None:
    mapped, copied = bench.name("mapped"), bench.name("copied")
    bench.create(mapped, options=MAPPED)
    bench.ok("restore", mapped)
    assert bench.get(mapped, "/drop") == "refused: errno 22"
    assert bench.get(mapped, "/grow") == "refused: errno 12"
    bench.create(copied, options=("--mode", "copy"))
    bench.ok("restore", copied)
    assert bench.get(copied, "/drop") == "zeros"
    assert bench.get(copied, "/grow") == "zeros"


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_memory_file_is_refused(bench: Bench, damage: str) -> None:
    name = bench.name()
    bench.create(name, options=MAPPED)
    path = max((bench.store / "goldens" / name / "memory").iterdir(), key=lambda file: file.stat().st_size)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 4096)
    else:
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"!")
    for command in ("restore", "verify"):
        failed = bench.run(command, name)
        assert failed.code == 8, failed.err
        assert path.name in failed.err
    assert bench.left() == []


def test_two_goldens_share_equal_memory(bench: Bench) -> None:
    one, two = bench.name("one"), bench.name("two")
    for name in (one, two):
        bench.create(name, "--megabytes", "64", options=MAPPED)
    shared = bench.ok("inspect", two, "--format", "json").json["memory"]["shared"]
    memory = bench.store / "goldens" / two / "memory"
    linked = [path for path in memory.iterdir() if path.stat().st_nlink > 1]
    assert 32 << 20 < sum(path.stat().st_size for path in linked) <= shared
    bench.ok("rm", one)
    bench.ok("verify", two)
    bench.ok("restore", two)
    assert bench.get(two, "/health") == "ok"


def test_an_archive_of_mapped_memory(bench: Bench) -> None:
    name, other = bench.name(), bench.name("other")
    bench.create(name, options=MAPPED)
    archive = bench.folder / "golden.tar"
    digest = bench.ok("export", name, str(archive), "--format", "json").json["blake3"]
    bench.ok("import", str(archive), "--name", other, "--trust", "--digest", digest)
    bench.ok("restore", other)
    assert bench.get(other, "/digest") == bench_digest(bench, name)


def bench_digest(bench: Bench, name: str) -> str:
    bench.ok("restore", name)
    return bench.get(name, "/digest")


@pytest.mark.parametrize("mode", ["auto", "mapped"])
def test_the_store_becomes_full_in_the_rewrite(bench: Bench, mode: str) -> None:
    name = bench.name()
    hook = bench.folder / "hooks.d" / "post-dump" / "10-fill"
    hook.parent.mkdir(parents=True)
    # Leaves room for the end of the dump, but not for the memory files.
    hook.write_text(
        f"#!/bin/sh\nhead -c $(( $(stat -f -c '%a*%S' {bench.store}) - 20000000 )) /dev/zero > {bench.store}/filler\n"
    )
    hook.chmod(0o755)
    done = bench.run(
        *bench.creation(name, "--megabytes", "64", options=("--mode", mode)), env={"GPUCKPT_STORE__SIZE": "256MiB"}
    )
    assert done.code == (11 if mode == "mapped" else 0), done.err
    assert "copied, not mapped" in done.err
    assert bench.left() == []
    Path(bench.store, "filler").unlink()
    # The dump is there as it was, and says why it is copied.
    memory = bench.ok("inspect", name, "--format", "json").json["memory"]
    assert (memory["mode"], "no room" in memory["reason"]) == ("copy", True)
    assert list((bench.store / "goldens" / name / "memory").iterdir()) == []
    bench.ok("verify", name)
    bench.ok("restore", name)
    assert bench.get(name, "/health") == "ok"


def test_killed_in_the_rewrite(bench: Bench) -> None:
    name = bench.name()
    memory = bench.store / "staging" / name / "memory"
    for _ in range(10):
        child = bench.start(*bench.creation(name, "--megabytes", "512", options=("--mode", "auto")))
        while child.poll() is None and not list(memory.glob("*")):
            time.sleep(0.005)
        child.kill()
        child.communicate()
        if child.returncode == -signal.SIGKILL:
            break
        assert child.returncode == 0  # it was quicker: once more
        bench.ok("rm", name)
    bench.run("prune")
    assert bench.left() == []
    assert bench.goldens() == []


def test_a_link_leaves_the_other_seal_whole(bench: Bench) -> None:
    one, two = bench.name("one"), bench.name("two")
    bench.create(one, "--megabytes", "64", options=MAPPED)
    bench.create(two, "--megabytes", "64", options=MAPPED)
    folders = [bench.store / "goldens" / name for name in (one, two)]
    inodes = [{path.stat().st_ino for path in (folder / "memory").iterdir()} for folder in folders]
    assert inodes[0] & inodes[1]
    for folder in folders:
        for relative, noted in seal.notes_of(folder).items():
            assert noted == seal.note((folder / relative).lstat(), folder.stat().st_dev), relative
