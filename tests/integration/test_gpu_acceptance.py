"""The acceptance on a GPU: its dry run to the end, and those of its probes that need no GPU, on the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_context
from benchmarks.environment import prefix
from benchmarks.gpu_context import Context
from benchmarks.gpu_steps import NAMES, STEPS
from benchmarks.harness import ROOT
from benchmarks.workspace import Workspace, workspace


@pytest.fixture(scope="module")
def space() -> Iterator[Workspace]:
    """Where the acceptance's steps work."""
    with workspace(store_size="2GiB") as made:
        yield made


def step(name: str, space: Workspace) -> dict[str, Any]:
    """One step's answer, by the process that does it in a run."""
    found = next(one for one in STEPS if one.name == name)
    file = space.folder / f"{name}.json"
    until = time.monotonic() + found.limit
    context = Context(name, found.work, False, until, prefix(), space.disk, space.folder, arguments=found.arguments)
    gpu_context.write(context, file)
    argv = [sys.executable, "-m", "benchmarks.gpu_step", str(file)]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=found.limit, check=False)
    assert done.returncode == 0
    answer: dict[str, Any] = json.loads(gpu_context.answer_file(file).read_text())
    return answer


def test_a_dry_run_comes_to_its_end(tmp_path: Path) -> None:
    before = set(Path("/var/tmp").glob("gpuckpt-bench-*"))
    argv = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
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
