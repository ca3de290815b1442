"""The main job with a small server: create, look, verify, restore, stop, remove; and each option that changes it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3

from tests.integration.conftest import PATIENCE, PREFIX, THP, Bench, Halt, free_ports


@pytest.mark.parametrize(("mode", "memory"), [("auto", "mapped"), ("copy", "copy")])
def test_from_create_to_rm(bench: Bench, mode: str, memory: str) -> None:
    name = bench.name()
    created = bench.create(name, options=("--format", "json", "--mode", mode)).json
    assert (created["name"], created["memory"]) == (name, memory)
    assert created["canary"] is True
    assert created["image_bytes"] > 8 << 20
    assert sum(row["seconds"] for row in created["phases"]) == pytest.approx(created["wall_s"], abs=1e-4)
    assert bench.left() == []
    assert bench.goldens() == [name]

    shown = bench.ok("inspect", name, "--format", "json").json
    assert shown["memory"]["mode"] == memory
    assert shown["sizes"]["cpu_pages"] + shown["sizes"]["mapped_pages"] > 8 << 20
    assert shown["sizes"]["gpu"] == 0
    assert {"name", "pid", "threads", "pages_bytes", "parent"} <= shown["processes"][0].keys()
    assert any("listening" in line and "server.sock" in line for line in shown["sockets"]), shown["sockets"]
    assert shown["identity"]["kernel"] == os.uname().release
    assert "CAP_SYS_ADMIN" not in shown["launch"]["capabilities"]
    assert name in bench.ok("inspect", name).out
    assert bench.ok("verify", name, "--format", "json").json["verified"][0]["ok"] is True

    before = THP.read_text()
    unaccounted: list[float] = []
    # The phases make up the time; a machine that was busy with others may have taken its share of one restore.
    while len(unaccounted) < 2 or (min(unaccounted) >= 0.05 and len(unaccounted) < 10):
        restored = bench.ok("restore", name, "--format", "json").json
        assert restored["canary_match"] is True
        assert (restored["tier"], restored["memory"]) == ("tmpfs", memory)
        assert sum(row["seconds"] for row in restored["phases"]) == pytest.approx(restored["wall_s"], abs=1e-4)
        assert restored["phases"][-1]["name"] == "unaccounted"
        unaccounted.append(abs(restored["phases"][-1]["seconds"]) / restored["wall_s"])
        assert THP.read_text() == before
        # The counter shows that the process goes on from its frozen state, and each time from the same one.
        assert [bench.get(name, "/count") for _ in range(2)] == ["1", "2"]
        assert bench.ok("logs", name).code == 0
        again = bench.run("restore", name)
        assert again.code == 7
        assert "already running" in again.err
        listed = bench.ok("ls", "--format", "json").json["goldens"][0]
        (replica,) = listed["replicas"]
        assert (replica["name"], replica["state"]) == (name, "running")
        assert replica["listens"] == f"unix:{bench.folder}/state/replicas/{name}/socket/server.sock"
        bench.ok("stop", name)
        assert bench.left() == []
    assert min(unaccounted) < 0.05
    assert bench.ok("df", "--format", "json").json["goldens"][0]["allocated"] > 8 << 20
    bench.ok("rm", name)
    assert bench.goldens() == []
    assert bench.run("restore", name).code == 6
    assert bench.run("inspect", name).code == 6
    assert bench.run("prune").code == 3


def test_original_keeps_running(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, options=("--leave-running",))
    assert bench.get(name, "/count") == "1"
    assert bench.run("restore", name).code == 7
    refused = bench.run("rm", name)
    assert refused.code == 7
    assert "--force" in refused.err
    bench.ok("rm", "--force", name)
    assert bench.left() == []


def test_written_files_come_back(bench: Bench) -> None:
    name = bench.name()
    bench.create(name, "--note", "/var/tmp/note.txt")
    bench.ok("restore", name)
    assert bench.get(name, "/read/var/tmp/note.txt") == "written before the dump"
    bench.ok("stop", name)
    bench.ok("restore", name, "--ignore-rootfs")
    assert "No such file" in bench.get(name, "/read/var/tmp/note.txt")


def test_volumes(bench: Bench) -> None:
    name, volume = bench.name(), bench.name("volume")
    try:
        bench.create(name, "--note", "/data/note.txt", options=("--volume", f"{volume}:/data"))
        # The volume came with the original and went with it; its content is in the golden.
        assert subprocess.run(["podman", "volume", "exists", volume], check=False).returncode == 1
        bench.ok("restore", name)
        assert bench.get(name, "/read/data/note.txt") == "written before the dump"
        bench.ok("stop", name)
        subprocess.run(["podman", "volume", "rm", "-f", volume], check=True, capture_output=True)
        bench.ok("restore", name, "--ignore-volumes")
        assert "No such file" in bench.get(name, "/read/data/note.txt")
        bench.ok("stop", name)
    finally:
        subprocess.run(["podman", "volume", "rm", "-f", volume], check=False, capture_output=True)


def test_open_connections(bench: Bench) -> None:
    closed, kept = bench.name("closed"), bench.name("kept")
    bench.create(closed)
    bench.ok("restore", closed)
    assert bench.get(closed, "/health") == "ok"
    refused = bench.run("restore", closed, "--tcp-established")
    assert refused.code in (2, 7)
    bench.create(kept, options=("--tcp-established",))
    bench.ok("restore", kept, "--tcp-established")
    assert bench.get(kept, "/tcp") == "ping"


def test_published_port(bench: Bench) -> None:
    name = bench.name()
    (port,) = free_ports(1)
    bench.create(name, options=("--publish", f"{port}:8000"))
    for options in ((), ("--ignore-static-ip", "--ignore-static-mac")):
        restored = bench.ok("restore", name, "--format", "json", *options).json
        assert restored["url"] == f"http://127.0.0.1:{port}"
        for _ in range(2):
            answer = subprocess.run(
                ["curl", "-sfm", "60", f"http://127.0.0.1:{port}/health"], capture_output=True, text=True, check=True
            )
            assert answer.stdout == "ok"
            # One that wants the same port is refused, and does not cut off who has it.
            refused = bench.run("restore", name, "--as", bench.name("second"), *options)
            assert refused.code == 7 and f"port {port} cannot be published" in refused.err
        bench.ok("stop", name)
    assert bench.left() == []


def test_hooks_run_at_every_stage(bench: Bench) -> None:
    name = bench.name()
    record = bench.folder / "record"
    stages = ("pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume")
    for stage in stages:
        hook = bench.folder / "hooks.d" / stage / "10-note"
        hook.parent.mkdir(parents=True)
        hook.write_text(f'#!/bin/sh\necho "$GPUCKPT_STAGE $GPUCKPT_GOLDEN" >> {record}\n')
        hook.chmod(0o755)
    bench.create(name)
    bench.ok("restore", name)
    assert record.read_text().splitlines() == [f"{stage} {name}" for stage in stages]


@pytest.mark.parametrize("stage", ["pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume"])
def test_a_failing_hook_fails_the_operation(bench: Bench, stage: str) -> None:
    name = bench.name()
    hook = bench.folder / "hooks.d" / stage / "10-refuse"
    hook.parent.mkdir(parents=True)
    hook.write_text("#!/bin/sh\necho the budget is spent\nexit 4\n")
    hook.chmod(0o755)
    dump = stage.endswith("dump")
    if dump:
        failed = bench.run(*bench.creation(name))
    else:
        bench.create(name)
        failed = bench.run("restore", name)
    assert failed.code == (9 if dump else 10), failed.err
    assert "10-refuse ended with status 4" in failed.err
    assert "the budget is spent" in failed.err
    assert bench.left() == []
    assert bench.goldens() == ([] if dump else [name])


def test_a_hooks_folder_of_others_is_refused(bench: Bench) -> None:
    hooks = bench.folder / "hooks.d"
    hooks.mkdir(mode=0o777)
    hooks.chmod(0o777)
    refused = bench.run(*bench.creation(bench.name()))
    assert refused.code == 4
    assert "hooks folder" in refused.err
    assert "chmod go-w" in refused.err
    assert bench.left() == []


def test_export_and_import(bench: Bench) -> None:
    name, other = bench.name(), bench.name("other")
    bench.create(name, "--note", "/var/tmp/note.txt")
    for zstd in ((), ("--zstd",)):
        archive = bench.folder / f"golden{len(zstd)}.tar"
        written = bench.ok("export", name, str(archive), "--format", "json", *zstd).json
        assert archive.stat().st_mode & 0o077 == 0
        untrusted = bench.run("import", str(archive), "--name", other)
        assert untrusted.code == 2
        assert "--trust" in untrusted.err
        wrong = bench.run("import", str(archive), "--name", other, "--trust", "--digest", "00" * 32)
        assert wrong.code == 8
        assert bench.goldens() == [name]
        bench.ok("import", str(archive), "--name", other, "--trust", "--digest", written["blake3"])
        bench.ok("restore", other)
        assert bench.get(other, "/read/var/tmp/note.txt") == "written before the dump"
        bench.ok("rm", "--force", other)
    damaged = bench.folder / "damaged.tar"
    content = bytearray((bench.folder / "golden0.tar").read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert bench.run("import", str(damaged), "--name", other, "--trust").code == 2, "trust needs a digest"
    # Even with the right digest of the wrong file: the manifest's digests are compared, too.
    digest = blake3(content).hexdigest()
    refused = bench.run("import", str(damaged), "--name", other, "--trust", "--digest", digest)
    assert refused.code == 8
    digest = blake3((bench.folder / "golden0.tar").read_bytes()).hexdigest()
    restored = bench.ok("restore", "--import", str(bench.folder / "golden0.tar"), "--trust", "--digest", digest, other)
    assert other in restored.out
    assert bench.get(other, "/health") == "ok"


def test_fallback_cold_and_identity(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    _edit(bench, name, "kernel", "5.10.0-other")
    refused = bench.run("restore", name)
    assert refused.code == 5
    assert "kernel" in refused.err
    assert "5.10.0-other" in refused.err
    assert bench.left() == []
    bench.ok("restore", name, "--ignore-identity", "kernel")
    bench.ok("stop", name)
    cold = bench.ok("restore", name, "--fallback", "cold", "--format", "json").json
    assert cold["tier"] == "cold"
    assert cold["fallback"]["exit_code"] == 5
    assert bench.get(name, "/count") == "1"
    bench.ok("stop", name)
    assert bench.left() == []


def _edit(bench: Bench, name: str, field: str, value: str) -> None:
    from gpuckpt.store import seal

    folder = bench.store / "goldens" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"][field] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    seal.write(folder)


def test_another_criu_is_refused(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    other = bench.folder / "criu-other"
    other.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "Version: 9.9" || exec {PREFIX}/bin/criu "$@"\n')
    other.chmod(0o755)
    refused = bench.run("restore", name, "--criu", str(other))
    assert refused.code == 5
    assert "criu is 9.9" in refused.err
    bench.ok("restore", name, "--criu", str(other), "--ignore-identity", "criu", "--keep")
    assert (bench.folder / "state" / "replicas" / name / "criu" / "restore.log").stat().st_size > 0


def test_an_image_that_podman_holds(bench: Bench, small_image: str) -> None:
    name = bench.name()
    server = str(Path(__file__).parent / "server.py")
    bench.ok(
        "create", name, "--image", small_image, "--volume", f"{server}:/server.py",
        "--canary", "GET /digest", "--", "/usr/bin/python3", "/server.py", "{socket}", "--note", "/note.txt",
    )  # fmt: skip
    bench.ok("restore", name)
    assert bench.get(name, "/read/note.txt") == "written before the dump"
    bench.ok("stop", name)
    assert bench.left() == []
    missing = bench.run("create", bench.name("x"), "--image", "localhost/no-such-image", "--", "/bin/true")
    assert missing.code == 6
    assert "podman pull" in missing.err


@pytest.fixture(scope="session")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with the distribution's Python, made of this machine's own files."""
    name = "localhost/gpuckpt-test-python"
    python = os.path.realpath("/usr/bin/python3")
    version = Path(python).name
    listed = subprocess.run(
        ["ldd", python, *map(str, Path(f"/usr/lib/{version}/lib-dynload").glob("*.so"))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    libraries = sorted({word for word in listed.split() if word.startswith("/") and not word.endswith(":")})
    root = tmp_path_factory.mktemp("image") / "root"
    (root / "var" / "tmp").mkdir(parents=True)
    subprocess.run(["cp", "-rL", "--parents", "/usr/bin/python3", f"/usr/lib/{version}", *libraries, root], check=True)
    archive = root.with_suffix(".tar")
    subprocess.run(["tar", "-C", root, "--exclude=__pycache__", "-cf", archive, "."], check=True)
    subprocess.run(["podman", "import", "-q", str(archive), name], check=True, capture_output=True)
    return name


def test_two_creates_of_one_name(bench: Bench) -> None:
    name = bench.name()
    halt = Halt(bench, "pre-dump")
    first = bench.start(*bench.creation(name))
    halt.wait(first)
    second = bench.run(*bench.creation(name))
    halt.go()
    assert second.code == 7
    assert "another command" in second.err
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0
    third = bench.run(*bench.creation(name))
    assert third.code == 7
    assert "--replace" in third.err
    bench.create(name, options=("--replace",))
    assert bench.goldens() == [name]
