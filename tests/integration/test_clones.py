"""Many replicas of one golden: at once, prepared ahead, each with its own name, files, port and identity."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gpuckpt.golden import replica as replicas
from tests.integration.conftest import PATIENCE, Bench, Halt, free_ports


def restored(bench: Bench, golden: str, *names: str) -> dict[str, dict[str, object]]:
    words = [word for name in names for word in ("--as", name)]
    document = bench.ok("restore", golden, *words, "--format", "json").json
    assert document["golden"] == golden and not document["failed"] and document["wall_s"] > 0
    return {one["replica"]: one for one in document["replicas"]}


@pytest.mark.parametrize("mode", ["mapped", "copy"])
def test_clones_side_by_side(bench: Bench, mode: str) -> None:
    golden = bench.name()
    note = "/var/tmp/gpuckpt-note"
    bench.create(golden, "--note", note, "--megabytes", "64", options=("--mode", mode))
    names = [bench.name(f"c{number}") for number in range(4)]
    made = restored(bench, golden, *names)
    assert list(made) == names
    assert all(one["canary_match"] and one["memory"] == mode for one in made.values())
    assert len({one["container"] for one in made.values()}) == 4
    # Each is itself ...
    assert [bench.get(name, "/hostname") for name in names] == names
    identities = [json.loads(bench.get(name, "/read/run/gpuckpt/identity")) for name in names]
    assert [one["replica"] for one in identities] == names and len({one["seed"] for one in identities}) == 4
    # ... (they woke with one random state, which only the lifecycle check makes four) ...
    assert len({bench.get(name, "/random-unchecked") for name in names}) == 1
    assert len({bench.get(name, "/random") for name in names}) == 4
    assert len({bench.get(name, "/random-unchecked") for name in names}) == 4
    # ... what one does, no other sees ...
    assert [bench.get(names[0], "/count") for _ in range(3)] == ["1", "2", "3"]
    assert bench.get(names[1], "/count") == "1"
    # ... and what the golden had written, all have.
    assert {bench.get(name, f"/read{note}") for name in names} == {"written before the dump"}
    bench.ok("stop", *names)
    assert bench.left() == []
    bench.ok("verify", golden)


def test_prepared_replicas_are_restored_without_making_a_container(bench: Bench) -> None:
    golden = bench.name()
    bench.create(golden, options=("--mode", "mapped"))
    prepared = bench.ok("restore", golden, "--prepare", "2", "--format", "json").json
    assert prepared["prepared"] == [golden, f"{golden}-2"]
    (shown,) = bench.ok("ls", "--format", "json").json["goldens"]
    assert [one["state"] for one in shown["replicas"]] == ["prepared", "prepared"]
    for name in (golden, f"{golden}-2"):
        one = bench.ok("restore", golden, "--format", "json").json
        assert (one["replica"], one["canary_match"]) == (name, True)
        assert "container" not in {row["name"] for row in one["phases"]}
        assert bench.get(name, "/hostname") == name
    bench.ok("stop", golden)
    assert bench.ok("restore", golden, "--format", "json").json["replica"] == golden
    bench.ok("rm", "--force", golden)
    assert bench.left() == []


def test_what_was_prepared_for_a_replaced_golden_is_not_used(bench: Bench) -> None:
    golden = bench.name()
    bench.create(golden, "--megabytes", "8", options=("--mode", "mapped"))
    bench.ok("restore", golden, "--prepare", "2")
    bench.create(golden, "--megabytes", "16", options=("--mode", "mapped", "--replace"))
    (shown,) = bench.ok("ls", "--format", "json").json["goldens"]
    assert shown["replicas"] == []
    assert bench.ok("restore", golden, "--format", "json").json["canary_match"]


def halted_while_making(bench: Bench, golden: str, names: list[str], stage: str) -> tuple[subprocess.Popen[str], Halt]:
    """A restore that was halted (SIGSTOP) as soon as one of the replicas was at the stage. None is ready: a hook waits.

    ``made``: it is recorded; ``prepared``: it has its container, and its processes are about to be restored.
    """
    hook = Halt(bench, "pre-restore")
    child = bench.start("restore", golden, *(word for name in names for word in ("--as", name)))
    limit = time.monotonic() + PATIENCE

    def found() -> list[replicas.Replica]:
        loaded = [replicas.load(bench.folder / "state" / "replicas" / name) for name in names]
        return [one for one in loaded if one is not None]

    while not any(one.state == "making" and (one.bundle or stage == "made") for one in found()):
        assert child.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    child.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < limit
        time.sleep(0.001)
    assert {one.state for one in found()} == {"making"}
    return child, hook


@pytest.mark.parametrize("stage", ["made", "prepared"])
def test_a_restore_that_is_killed_leaves_the_other_replicas_alone(bench: Bench, stage: str) -> None:
    golden = bench.name()
    bench.create(golden, options=("--mode", "mapped"))
    kept = bench.name("kept")
    bench.ok("restore", golden, "--as", kept)
    names = [bench.name(f"k{number}") for number in range(3)]
    child, hook = halted_while_making(bench, golden, names, stage)
    child.kill()
    child.communicate()
    hook.go()
    bench.run("prune")
    assert bench.get(kept, "/health") == "ok"
    # None was ready: nothing is left of them, and their names are free.
    running = [one["name"] for one in bench.ok("ls", "--format", "json").json["goldens"][0]["replicas"]]
    assert running == [kept]
    assert list(restored(bench, golden, *names)) == names
    bench.ok("stop", kept, *names)
    assert bench.left() == []


@pytest.mark.parametrize("stage", ["made", "prepared"])
def test_an_interrupt_takes_all_of_them_back(bench: Bench, stage: str) -> None:
    golden = bench.name()
    bench.create(golden, options=("--mode", "mapped"))
    names = [bench.name(f"i{number}") for number in range(3)]
    child, hook = halted_while_making(bench, golden, names, stage)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGCONT)
    hook.go()
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, err
    assert bench.left() == []


def test_clones_with_ports_of_their_own(bench: Bench) -> None:
    golden = bench.name()
    ports = free_ports(2)
    bench.create(golden, options=("--publish", f"{ports[0]}:8000", "--mode", "mapped"))
    names = [bench.name("p0"), bench.name("p1")]
    words = [word for name, port in zip(names, ports, strict=True) for word in ("--as", name, "--publish", str(port))]
    document = bench.ok("restore", golden, *words, "--format", "json").json
    assert [one["url"] for one in document["replicas"]] == [f"http://127.0.0.1:{port}" for port in ports]
    for name, port in zip(names, ports, strict=True):
        answer = subprocess.run(
            ["curl", "-sf", f"http://127.0.0.1:{port}/hostname"], capture_output=True, text=True, check=True
        )
        assert answer.stdout == name
    refused = bench.run("restore", golden, "--as", bench.name("p2"), "--as", bench.name("p3"), "--publish", "9000")
    assert refused.code == 2 and "1 ports for 2 replicas" in refused.err
    bench.ok("stop", *names)
    assert bench.left() == []
