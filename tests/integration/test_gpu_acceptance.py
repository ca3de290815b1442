"""The acceptance on a GPU: its dry run to the end, and those of its probes that need no GPU, on the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_context
from benchmarks.environment import prefix
from benchmarks.gpu_context import Context
from benchmarks.gpu_steps import NAMES, STEPS
from benchmarks.harness import ROOT
from benchmarks.workspace import Workspace, workspace
from gpuckpt.cuda.driver import Gpu
from tests import stub_driver


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    """Where the acceptance's steps work."""
    with workspace(store_size="2GiB") as made:
        yield made


def step(
    name: str, space: Workspace, arguments: Sequence[str] | None = None, *, program: Path | None = None
) -> dict[str, Any]:
    """One step's answer, by the process that does it in a run; ``program``: a prefix with NVIDIA's program."""
    found = next(one for one in STEPS if one.name == name)
    file = space.folder / f"{name}.json"
    until = time.monotonic() + found.limit
    words = found.arguments if arguments is None else tuple(arguments)
    context = Context(name, found.work, False, until, program or prefix(), space.disk, space.folder, arguments=words)
    gpu_context.write(context, file)
    argv = [sys.executable, "-m", "benchmarks.gpu_step", str(file)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=found.limit, check=False)
    assert done.returncode == 0
    answer: dict[str, Any] = json.loads(gpu_context.answer_file(file).read_text())
    return answer


def test_a_dry_run_comes_to_its_end(tmp_path: Path) -> None:
    before = set(Path("/var/tmp").glob("gpuckpt-bench-*"))
    argv = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert document["dry"] is True and document["status"] == "complete"
    assert {name: one["status"] for name, one in document["steps"].items()} == dict.fromkeys(NAMES, "ok")
    assert all(one["dry"] for one in document["steps"].values())
    assert not any(target["value"] for target in document["targets"])
    assert "dry run" in (tmp_path / "gpu-dry.md").read_text()
    figures = {f"gpu-dry-{word}{suffix}" for word in ("suspend", "servers", "memory") for suffix in (".png", ".svg")}
    assert {file.name for file in tmp_path.iterdir()} == {"gpu-dry.json", "gpu-dry.md", *figures}
    assert set(Path("/var/tmp").glob("gpuckpt-bench-*")) <= before


@pytest.mark.parametrize("name", ["probe.criu", "probe.criu-cpu", "probe.podman"])
def test_a_probe_finds_what_works_here(space: Workspace, name: str) -> None:
    answer = step(name, space)
    assert (answer["status"], answer["reason"]) == ("ok", None)
    if name == "probe.criu-cpu":
        assert answer["data"]["image_bytes"] > answer["data"]["bytes"]
    if name == "probe.podman":
        assert answer["data"]["canary_match"] is True


def test_a_probe_of_what_is_not_here_says_so(space: Workspace) -> None:
    answer = step("probe.driver", space)
    if not Path("/proc/driver/nvidia/version").exists():
        assert answer["status"] == "failed" and answer["reason"]


# ---------------------------------------------------------------------- on a stand-in for the driver


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> stub_driver.World:
    """NVIDIA's libraries as every process of a run finds them, with a device of 80 GB."""
    built = tmp_path / "libraries"
    built.mkdir()
    world = stub_driver.World(tmp_path / "world", stub_driver.build(built))
    world.device(Gpu("GPU-00000000-0000-0000-0000-000000000001", "NVIDIA H100 80GB HBM3", 80 << 30, 80 << 30))
    (built / "world").write_text(str(world.folder))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(built))
    return world


@pytest.mark.stubs
def test_a_process_that_holds_device_memory_goes_round(space: Workspace, stand_in: stub_driver.World) -> None:
    answer = step("probe.driver", space)
    assert (answer["status"], answer["reason"]) == ("ok", None)
    found = answer["data"]
    assert found["through"] == "helper" and found["cuda"] == "13.0" and found["driver"] == "570.86.15"
    assert found["device_bytes"] == 128 << 20 and found["suspended_device_bytes"] == 0
    assert list(found["steps_s"]) == ["lock", "checkpoint", "restore", "unlock"]


@pytest.mark.stubs
def test_what_is_suspended_is_dumped_and_restored(space: Workspace, stand_in: stub_driver.World) -> None:
    answer = step("probe.criu-cuda", space)
    assert (answer["status"], answer["reason"]) == ("ok", None)
    # Its device memory is in the image, and came back with it: the process itself has summed it.
    assert answer["data"]["image_bytes"] > answer["data"]["bytes"]
    assert [call.split()[0] for call in stand_in.calls()] == ["lock", "checkpoint", "restore", "unlock"]


@pytest.mark.stubs
def test_phases_are_measured_by_size(space: Workspace, stand_in: stub_driver.World) -> None:
    answer = step("phases.small", space, ["0.02", "0.05", "100"])
    assert (answer["status"], answer["reason"]) == ("ok", None)
    sizes = answer["data"]["sizes"]
    assert list(sizes) == ["0.02", "0.05"] and "GB of the device are free" in answer["data"]["left_out"]["100"]
    for name, one in sizes.items():
        assert set(one["device_bytes"]["suspended"]) == {0}
        assert all(held >= float(name) * 1e9 for held in one["device_bytes"]["before"] + one["device_bytes"]["after"])
        assert one["checkpoint_gbps"]["n"] == one["restore_s"]["n"] == 3


@pytest.mark.stubs
def test_the_helper_and_the_program_do_the_same(space: Workspace, stand_in: stub_driver.World) -> None:
    answer = step("phases.program", space, program=stand_in.folder)
    assert (answer["status"], answer["reason"]) == ("ok", None)
    assert answer["data"]["helper"]["cycle_s"]["n"] == answer["data"]["program"]["cycle_s"]["n"] == 5


@pytest.mark.stubs
def test_a_driver_that_refuses_is_told_with_its_words(space: Workspace, stand_in: stub_driver.World) -> None:
    stand_in.refuse("init", code=999)
    answer = step("probe.driver", space)
    assert answer["status"] == "failed" and "CUDA_ERROR_UNKNOWN" in answer["reason"]
