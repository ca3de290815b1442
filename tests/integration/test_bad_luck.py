"""Bad input and bad luck: one clear error with its cause, remedy and exit code, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from msgspec.structs import replace

from gpuckpt import proc
from gpuckpt.containers.leftovers import restores
from tests.integration.conftest import GPUCKPT, PATIENCE, THP, Bench, Halt


def hook(bench: Bench, stage: str, script: str) -> None:
    path = bench.folder / "hooks.d" / stage / "10-test"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def test_wrong_model_path(bench: Bench) -> None:
    failed = bench.run("create", bench.name(), "--", "--model", "/no/such/model")
    assert failed.code == 6
    assert "no model at /no/such/model" in failed.err
    assert bench.left() == []


def test_server_that_ends_while_starting(bench: Bench) -> None:
    failed = bench.run(*bench.creation(bench.name(), "--exit-at-once"))
    assert failed.code == 9
    assert "the moon is in the wrong phase" in failed.err
    assert "exit code 3" in failed.err
    assert bench.left() == []
    assert "wrong phase" in bench.ok("logs", "--failed", bench.name()).out


def test_command_that_does_not_exist(bench: Bench) -> None:
    failed = bench.run("create", bench.name(), "--", "/no/such/program")
    assert failed.code == 9
    assert "/no/such/program" in failed.err
    assert bench.left() == []


def test_server_that_never_gets_healthy(bench: Bench) -> None:
    failed = bench.run(*bench.creation(bench.name(), "--never-healthy", options=("--start-timeout", "2s")))
    assert failed.code == 13
    assert "not healthy within 2 s" in failed.err
    assert bench.left() == []


def test_server_that_dies_while_warmed_up(bench: Bench) -> None:
    options = ("--canary", "GET /digest", "--warmup-request", "GET /fatal")
    failed = bench.run(*bench.creation(bench.name(), "--crash-on", "/fatal", options=options))
    assert failed.code == 9
    assert "asked for the forbidden path" in failed.err
    assert bench.left() == []


def test_canary_that_does_not_repeat(bench: Bench) -> None:
    failed = bench.run(*bench.creation(bench.name(), options=("--canary", "GET /random")))
    assert failed.code == 8
    assert "--no-canary" in failed.err
    assert bench.left() == []


def test_store_too_small(bench: Bench) -> None:
    small = {"GPUCKPT_STORE__SIZE": "16MiB"}
    failed = bench.run(*bench.creation(bench.name(), "--megabytes", "64"), env=small)
    assert failed.code == 11
    assert "store.size" in failed.err
    assert bench.left() == []


def test_store_that_becomes_full_in_the_middle(bench: Bench) -> None:
    hook(bench, "pre-dump", f"dd if=/dev/zero of={bench.store}/filler bs=1M count=100 2>/dev/null; exit 0")
    failed = bench.run(*bench.creation(bench.name(), "--megabytes", "64"), env={"GPUCKPT_STORE__SIZE": "128MiB"})
    assert failed.code == 11, failed.err
    assert "did not fit" in failed.err
    assert ".log" in failed.err
    assert bench.left() == []
    assert bench.goldens() == []


def test_process_that_criu_cannot_dump(bench: Bench) -> None:
    failed = bench.run(
        *bench.creation(bench.name(), "--deleted-file", str(1 << 20)), env={"GPUCKPT_CRIU__GHOST_LIMIT": "4096"}
    )
    assert failed.code == 9
    assert "ghost" in failed.err.lower()  # CRIU's own key line
    assert "whole log:" in failed.err
    log = failed.err.split("whole log: ")[1].split()[0]
    assert "Error (" in Path(log).read_text()
    assert bench.left() == []


# What is happening when the signal comes: a line of progress that was just printed, or a hook that waits.
_MOMENTS = ["container", "server start", "first token", "dump"]


@pytest.mark.parametrize("moment", _MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_create_that_is_interrupted(bench: Bench, moment: str, number: signal.Signals) -> None:
    name = bench.name()
    server: tuple[str, ...] = ("--megabytes", "64")
    if moment == "server start":
        server = ("--never-healthy",)
    halt = Halt(bench, "pre-dump")  # it cannot end before the signal comes
    child = bench.start(*bench.creation(name, *server))
    try:
        if moment == "dump":
            halt.wait(child)
        else:
            assert child.stderr is not None
            wanted = {"server start": "container"}.get(moment, moment)
            for line in child.stderr:
                if line.strip().startswith(wanted):
                    break
            if moment == "server start":
                time.sleep(0.3)
        child.send_signal(number)
        if number == signal.SIGKILL:
            child.wait()
        halt.go()
        child.communicate(timeout=PATIENCE)
    finally:
        child.kill()
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        assert bench.goldens() == []  # the store never shows it
        swept = bench.run("prune")
        assert swept.code == 0, swept.err
    else:
        assert child.returncode == 130
    assert bench.left() == []
    assert bench.goldens() == []
    bench.create(name)
    assert bench.goldens() == [name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_restore_that_is_interrupted(bench: Bench, number: signal.Signals) -> None:
    name = bench.name()
    bench.create(name, options=("--mode", "copy"))  # only copying borrows huge pages
    halt = Halt(bench, "pre-restore")
    before = THP.read_text()
    child = bench.start("restore", name)
    halt.wait(child)
    assert "[always]" in THP.read_text()
    child.send_signal(number)
    if number == signal.SIGKILL:
        child.wait()
    halt.go()
    child.communicate(timeout=PATIENCE)
    if number == signal.SIGKILL:
        assert bench.run("prune").code == 0
    else:
        assert child.returncode == 130
    assert bench.left() == []
    assert THP.read_text() == before
    bench.ok("restore", name)
    assert bench.get(name, "/health") == "ok"


def test_a_criu_that_hangs_is_ended_by_the_next_command(bench: Bench) -> None:
    """podman's service outlives the command that asked it, and would hold the container's lock for as long."""
    name = bench.name()
    bench.create(name)
    halt = Halt(bench, "pre-restore")
    child = bench.start("restore", name)
    halt.wait(child)
    (runtime,) = restores(f"gpuckpt-{name}")
    criu = [pid for pid in proc.processes_below(runtime) if pid != runtime]
    assert criu
    for pid in criu:
        os.kill(pid, signal.SIGSTOP)
    child.kill()
    child.communicate()
    halt.go()
    bench.ok("restore", name)  # which ends in five minutes, or has failed
    assert bench.get(name, "/health") == "ok"


def test_a_hook_that_hangs_is_ended(bench: Bench) -> None:
    name = bench.name()
    reached = bench.folder / "reached"
    hook(bench, "pre-dump", f"touch {reached}; exec sleep 4999")
    child = bench.start(*bench.creation(name))
    until(reached.exists)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert bench.left() == []
    failed = bench.run(*bench.creation(name), env={"GPUCKPT_CRIU__HOOK_TIMEOUT": "1s"})
    assert failed.code == 9
    assert "did not end within 1 s" in failed.err
    assert bench.left() == []


def test_a_manifest_that_was_edited(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    manifest = bench.store / "goldens" / name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"user": ""', '"user": "nobody"', 1))
    for command in ("verify", "restore", "verify"):
        failed = bench.run(command, name)
        assert failed.code == 8, (command, failed.err)
        assert "manifest.json has changed" in failed.err


def test_a_state_folder_with_a_long_path(bench: Bench) -> None:
    deep = bench.folder / ("d" * 100)
    failed = bench.run(*bench.creation(bench.name()), env={"GPUCKPT_PATHS__STATE": str(deep)})
    assert failed.code == 2
    assert "socket's path would be too long" in failed.err


def test_lower_limits_of_one_shell_do_not_stay(bench: Bench) -> None:
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -n 512; exec "$@"', "bash", *GPUCKPT, "prune"],
        env=bench.env,
        capture_output=True,
        check=False,
    )
    assert limited.returncode == 3
    bench.create(bench.name())


def test_the_next_command_sweeps_without_being_asked(bench: Bench) -> None:
    name, other = bench.name(), bench.name("other")
    halt = Halt(bench, "pre-dump")
    child = bench.start(*bench.creation(name))
    halt.wait(child)
    child.kill()
    child.communicate()
    halt.go()
    done = bench.create(other)
    assert f"removed the half-made golden {name}" in done.err
    assert bench.left() == []


def _pages(bench: Bench, name: str) -> Path:
    return max((bench.store / "goldens" / name / "images").glob("pages-*.img"), key=lambda path: path.stat().st_size)


def test_truncated_golden(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    pages = _pages(bench, name)
    os.truncate(pages, pages.stat().st_size - 4096)
    for command in ("verify", "restore", "export"):
        words = (name, str(bench.folder / "x.tar")) if command == "export" else (name,)
        failed = bench.run(command, *words)
        assert failed.code == 8, (command, failed.err)
        assert pages.name in failed.err
    assert bench.left() == []
    assert not (bench.folder / "x.tar").exists()


def test_bit_flip(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    pages = _pages(bench, name)
    status = pages.stat()
    with pages.open("r+b") as file:
        file.seek(12345)
        byte = file.read(1)[0]
        file.seek(12345)
        file.write(bytes([byte ^ 4]))
    os.utime(pages, ns=(status.st_atime_ns, status.st_mtime_ns))  # as if nothing had happened
    for command in ("verify", "restore"):
        failed = bench.run(command, name)
        assert failed.code == 8, (command, failed.err)
        assert pages.name in failed.err
    with pages.open("r+b") as file:
        file.seek(12345)
        file.write(bytes([byte]))
    bench.ok("verify", name)
    bench.ok("restore", name)


def test_undecodable_image_with_a_right_digest(bench: Bench) -> None:
    """A golden that was damaged before it was digested: CRIU's own decoder finds it."""
    from gpuckpt import manifest as manifests
    from gpuckpt.store import digests

    name = bench.name()
    bench.create(name)
    folder = bench.store / "goldens" / name
    (folder / "images" / "pstree.img").write_bytes(b"\0" * 64)
    files = digests.record(folder).files
    replace(manifests.read(folder), files=files).write(folder)
    failed = bench.run("verify", name)
    assert failed.code == 8
    assert "pstree.img cannot be decoded" in failed.err


def test_damaged_manifest(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    (bench.store / "goldens" / name / "manifest.json").write_text('{"format": 1, "name": 5}')
    assert bench.run("restore", name).code == 8
    assert "damaged" in bench.ok("ls").out
    bench.ok("rm", name)


def test_golden_of_a_changed_root_file_system(bench: Bench) -> None:
    name = bench.name()
    script = bench.folder / "srv"
    script.mkdir()
    copy = script / "held.py"
    copy.write_text(
        (Path(__file__).parent / "server.py").read_text().replace("counter = 0", "held = open(__file__); counter = 0")
    )
    bench.ok(
        "create", name, "--volume", f"{script}:{script}", "--canary", "GET /digest",
        "--", "/usr/bin/python3", str(copy), "{socket}",
    )  # fmt: skip
    copy.write_text(copy.read_text() + "\n# changed\n")
    failed = bench.run("restore", name)
    assert failed.code == 5
    assert "held.py has changed" in failed.err


def test_dead_replica_is_replaced_and_pruned(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    bench.ok("restore", name)
    subprocess.run(["podman", "kill", f"gpuckpt-{name}"], check=True, capture_output=True)
    until(lambda: bench.ok("ls", "--format", "json").json["goldens"][0]["replicas"][0]["state"] == "exited")
    bench.ok("restore", name)
    subprocess.run(["podman", "rm", "-f", "-t", "0", f"gpuckpt-{name}"], check=True, capture_output=True)
    assert "gone" in bench.ok("ls").out
    assert f"dead replica {name}" in bench.ok("prune").out
    assert bench.left() == []


def test_archives_that_are_none(bench: Bench) -> None:
    def trusted(file: Path) -> tuple[str, ...]:
        return "import", str(file), "--trust", "--digest", blake3(file.read_bytes()).hexdigest()

    text = bench.folder / "text"
    text.write_text("not an archive")
    assert bench.run(*trusted(text)).code == 8
    assert bench.run("import", str(bench.folder / "missing"), "--trust", "--digest", "0" * 64).code == 6
    name = bench.name()
    bench.create(name)
    archive = bench.folder / "a.tar"
    bench.ok("export", name, str(archive))
    assert bench.run("export", name, str(archive)).code == 7
    assert bench.run(*trusted(archive)).code == 7
    os.truncate(archive, archive.stat().st_size // 2)
    assert bench.run(*trusted(archive), "--name", bench.name("half")).code == 8
    assert bench.left() == []


def test_usage_errors(bench: Bench) -> None:
    for words, said in (
        (("create", "bad/name", "--", "/bin/true"), "cannot be a name"),
        (("create", bench.name()), "no model"),
        (("create", bench.name(), "extra", "--", "/bin/true"), "one word too many"),
        (("create", bench.name(), "--env", "NOEQUALS", "--", "/bin/true"), "NAME=VALUE"),
        (("create", bench.name(), "--publish", "99999", "--", "/bin/true"), "publish"),
        (("create", bench.name(), "--rootfs", "/", "--image", "x", "--", "/bin/true"), "exclude"),
        (("rm",), "Missing argument"),
        (("stopp",), "Did you mean"),
    ):
        failed = bench.run(*words)
        assert failed.code == 2, (words, failed.err)
        assert said in failed.err, (words, failed.err)
        assert "Traceback" not in failed.err
    assert bench.left() == []
