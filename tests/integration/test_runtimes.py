"""Runtimes that manage their own memory, in mapped goldens: what they take as new is zeros, what they hold stays."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.integration.conftest import Bench
from tests.integration.programs import HERE, STORED, creation, freeze, get, memory, restored, tool


def test_go_reads_zeros_in_new_memory(bench: Bench, tmp_path: Path) -> None:
    program = tmp_path / "churn"
    where = {"GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path), "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    subprocess.run([tool("go"), "build", "-o", program, HERE / "churn.go"], env=os.environ | where, check=True)
    name = freeze(bench, str(program), "{socket}", warmup=("/churn",))
    shown = memory(bench, name)
    assert shown["mapped"] > 48 << 20
    assert sum(shown["copied"].values()) < STORED
    for replica in restored(bench, name):
        for _ in range(2):
            answer = get(bench, replica, "/churn").split()
            assert int(answer[1]) > 16 << 20  # given back to the kernel, as the runtime believes


def test_node_runs_in_copied_goldens_only(bench: Bench) -> None:
    """V8 takes it as fatal that memory cannot be dropped, whatever the error is: it ends, it never reads old bytes."""
    server = (tool("node"), str(HERE / "churn.js"), "{socket}")
    refused = bench.run(*creation(bench, *server, warmup=("/churn",)))
    assert refused.code == 5 and "cannot be mapped" in refused.err, refused.err
    assert bench.left() == [] and bench.goldens() == []
    # Unless one insists, such a server is started once more, under the ordinary profile.
    name = freeze(bench, *server, warmup=("/churn",), mode="auto")
    assert bench.ok("inspect", name, "--format", "json").json["memory"]["mode"] == "copy"
    for replica in restored(bench, name):
        for _ in range(2):
            get(bench, replica, "/churn")
