"""The guest server's weights kept outside its image, on a CPU: dumped without them, and bit for bit the same."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Bench

pytestmark = [pytest.mark.vllm]  # needs the server environment

_BODY = {"model": "lively", "prompt": "def main(arguments):", "max_tokens": 8, "temperature": 0, "logprobs": 2}


def create(bench: Bench, name: str, model: Path, *options: str) -> dict[str, Any]:
    words = ("--workload", "guest", "--weights", "outside", *options, "--format", "json", "--")
    return bench.ok("create", name, *words, "--model", str(model), "--served-model-name", "lively").json


def answer(bench: Bench, replica: str, timeout: float = 120) -> Any:
    found = bench.endpoint(replica).request("POST", "/v1/completions", json.dumps(_BODY), timeout=timeout)
    assert found.status == 200, found.body
    return json.loads(found.body)["choices"]


def files(bench: Bench, name: str) -> list[Path]:
    folder = bench.store / "goldens" / name
    return [folder / "memory" / file for file in json.loads((folder / "manifest.json").read_text())["weights"]]


def test_goldens_replicas_standbys(bench: Bench, lively_model: Path) -> None:
    name, other = bench.name(), bench.name("other")
    made = create(bench, name, lively_model)
    assert made["weights"] == "outside"
    (file,) = files(bench, name)
    weight = (lively_model / "model.safetensors").stat().st_size
    assert file.stat().st_size > weight and file.stat().st_mode & 0o777 == 0o400
    shown = bench.ok("inspect", name, "--format", "json").json
    assert shown["sizes"]["weights"] == file.stat().st_size

    # Another golden of the model has the same file; removing one leaves it to the other.
    create(bench, other, lively_model)
    assert [path.stat().st_ino for path in files(bench, other)] == [file.stat().st_ino]
    bench.ok("rm", other)
    assert bench.ok("verify", name).code == 0

    clones = [bench.name("a"), bench.name("b")]
    done = bench.ok("restore", name, "--as", clones[0], "--as", clones[1], "--format", "json").json
    assert [one["canary_match"] for one in done["replicas"]] == [True, True]
    assert {"weights: map", "weights: stream"} <= {row["name"] for row in done["replicas"][0]["phases"]}
    before = answer(bench, clones[0])

    # A request that comes to a standby waits, and is answered as any other.
    bench.ok("suspend", clones[0])
    assert bench.run("suspend", clones[0]).code == 3
    for words in (("session", "ls", clones[0]), ("restore", name, "--as", clones[0])):
        refused = bench.run(*words, timeout=120)
        assert refused.code == 7 and f"gpuckpt wake {clones[0]}" in refused.err
    late: list[Any] = []
    asking = threading.Thread(target=lambda: late.append(answer(bench, clones[0])))
    asking.start()
    time.sleep(0.5)
    assert late == [] and answer(bench, clones[1]) == before
    bench.ok("wake", clones[0])
    asking.join()
    assert late == [before]
    bench.ok("stop", *clones)

    # From disk, and from an archive.
    bench.ok("move", name, "--to", "disk")
    assert bench.ok("restore", name, "--format", "json").json["canary_match"] is True
    assert answer(bench, name) == before
    bench.ok("stop", name)
    archive = bench.folder / "golden.tar"
    digest = bench.ok("export", name, str(archive), "--format", "json").json["blake3"]
    bench.ok("rm", name)
    bench.ok("import", str(archive), "--trust", "--digest", digest)
    assert bench.ok("restore", name, "--format", "json").json["canary_match"] is True
    assert answer(bench, name) == before
    bench.ok("stop", name)

    # Bytes that are not those that were written are found before a process is there.
    (file,) = files(bench, name)
    with file.open("r+b") as handle:
        handle.seek(file.stat().st_size - 100)
        handle.write(os.urandom(10))
    damaged = bench.run("restore", name)
    assert damaged.code == 8 and "memory/" in damaged.err
    assert bench.left() == []


def test_a_server_that_cannot(bench: Bench) -> None:
    words = bench.creation(bench.name(), options=("--weights", "outside", "--canary", "GET /digest"))
    done = bench.run(*words)
    assert done.code == 9 and "has no control socket" in done.err and "--weights image" in done.err
    assert bench.left() == [] and bench.goldens() == []


def test_a_replica_that_was_killed_on_its_way(bench: Bench) -> None:
    """Frozen by a command that died before it could say so: it is woken all the same."""
    name = bench.name()
    bench.create(name)
    bench.ok("restore", name)
    record = bench.folder / "state" / "replicas" / name / "replica.json"
    kept = json.loads(record.read_text())
    assert kept["standby"] is None
    record.write_text(json.dumps(kept | {"standby": {"processes": [], "devices": [], "visible": [], "given": False}}))
    assert bench.ok("suspend", name, "--format", "json").json["state"] == "standby"
    assert bench.ok("wake", name, "--format", "json").json["state"] == "running"
    assert bench.get(name, "/digest")
    bench.ok("stop", name)
    assert bench.left() == []
