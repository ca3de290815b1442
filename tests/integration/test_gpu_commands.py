"""What users and the pool do with servers on a GPU, by gpuckpt's commands and its daemon.

They ask the helper's real code at its real socket; the GPU behind it is a toy (toy_gpu.py), in this process.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuckpt import __version__, proc
from gpuckpt.cuda.checks import driver_version
from gpuckpt.cuda.helper import Helper
from tests.integration.conftest import HERE, Bench
from tests.integration.pooling import ask, pool
from tests.integration.test_gpu_choreography import FIRST, SECOND, SERVER, device, gpus, held, known_to_cdi
from tests.integration.toy_gpu import MIB, ToyDriver

__all__ = ["device", "gpus"]  # fixtures
MIB_EACH = 32  # of two processes
ALL = 2 * MIB_EACH


@pytest.fixture
def driver(bench: Bench, gpus: Path) -> Iterator[ToyDriver]:
    """Behind the helper of this gpuckpt: commands find it where it listens, and start none."""
    made = ToyDriver(gpus)
    path = bench.folder / "run" / "cuda" / f"helper-{__version__}.sock"
    path.parent.mkdir(parents=True)
    serving = threading.Thread(target=Helper(made, path).serve, daemon=True)
    serving.start()
    while not path.exists():
        time.sleep(0.01)
    yield made
    path.unlink()
    serving.join(10)


def words(gpus: Path, device: str) -> list[str]:
    """What follows `gpuckpt create NAME`."""
    mounts = ["--volume", f"{HERE}:{HERE}", "--volume", f"{gpus}:{gpus}:rw"]
    server = ["/usr/bin/python3", str(SERVER), "{socket}", str(gpus), str(MIB_EACH)]
    return [*mounts, "--gpu", device, "--canary", "GET /digest", "--", *server]


def test_commands_move_device_state(bench: Bench, gpus: Path, driver: ToyDriver, device: str) -> None:
    name = bench.name()
    made = bench.ok("create", name, "--format", "json", *words(gpus, device)).json
    assert {"GPU: lock", "GPU: checkpoint"} <= {phase["name"] for phase in made["phases"]}
    forget(gpus)
    golden = bench.ok("inspect", name, "--format", "json").json
    assert [(one["uuid"], one["bytes"]) for one in golden["gpu"]["devices"]] == [(FIRST, ALL * MIB)]

    restored = bench.ok("restore", name, "--format", "json").json
    assert restored["canary_match"] is True
    assert {"GPU: restore", "GPU: unlock"} <= {phase["name"] for phase in restored["phases"]}
    assert held(gpus) == {FIRST: ALL, SECOND: 0}
    before = bench.get(name, "/digest")

    down = bench.ok("suspend", name, "--format", "json").json
    assert (down["replica"], down["state"], down["gpu_bytes"]) == (name, "standby", ALL * MIB)
    assert held(gpus) == {FIRST: 0, SECOND: 0}
    again = bench.run("suspend", name)
    assert again.code == 3 and "is a standby already" in again.err

    # Somebody else has the memory now: it waits as long as it is told to, and stays what it is.
    for folder in gpus.iterdir():
        (folder / "somebody").write_bytes(bytes(100 * MIB))
    driver.capacity = (100 + ALL + 200) * MIB  # which it would fit into but for the driver's own
    full = bench.run("wake", name, "--gpu-wait", "0.5s")
    assert full.code == 11 and f"{ALL} MiB of GPU memory are needed, and were not free within 0.5 s" in full.err
    driver.capacity = 200 * MIB
    small = bench.run("wake", name)
    assert small.code == 5 and f"Toy GPU (200 MiB); it needs {ALL + 256} MiB" in small.err
    assert held(gpus) == {FIRST: 100, SECOND: 100}
    driver.capacity = 2000 * MIB
    forget(gpus)
    up = bench.ok("wake", name, "--format", "json").json
    assert (up["state"], up["gpu_bytes"]) == ("running", ALL * MIB)
    assert bench.get(name, "/digest") == before
    bench.ok("stop", name)
    assert bench.left() == []


def test_models_take_turns_on_a_gpu_that_has_room_for_one(
    bench: Bench, gpus: Path, driver: ToyDriver, device: str
) -> None:
    create = json.dumps(["--workload", "http", *words(gpus, device)])
    rules = 'idle_freeze = "1h"\nidle_release = "1h"'
    tables = [f'[models.{one}]\ngolden = "{bench.name(one)}"\ncreate = {create}\n{rules}' for one in "ab"]
    with pool(bench, f'[budget]\ngpu = "{ALL + 20}MiB"', *tables) as made:
        digests: dict[str, str] = {}
        for one in "ababab":
            answer = ask(made, f"/upstream/{one}/digest", timeout=180)
            assert answer.status == 200, answer.body
            assert digests.setdefault(one, answer.body.decode()) == answer.body.decode()
            here = [each for model in "ab" for each in made.model(model).replicas if each.pid]
            # What it has, NVML would say: one is awake, the other holds nothing.
            assert sorted((each.phase, on_gpu(driver, each.pid)) for each in here) in (
                [("hot", ALL)],
                [("hot", ALL), ("standby", 0)],
            )
        assert sorted(each.phase for one in "ab" for each in made.model(one).replicas) == ["hot", "standby"]


@pytest.mark.skipif(driver_version() is not None, reason="CDI's “all” is that of this machine's GPUs")
def test_models_share_two_gpus(bench: Bench, gpus: Path, driver: ToyDriver) -> None:
    create = json.dumps(["--workload", "http", *words(gpus, "all")])
    rules = 'idle_freeze = "1h"\nidle_release = "1h"'
    tables = [f'[models.{one}]\ngolden = "{bench.name(one)}"\ncreate = {create}\n{rules}' for one in "abc"]
    with known_to_cdi("all"), pool(bench, f'[budget]\ngpu = "{ALL + 20}MiB"', *tables) as made:

        def where(one: str) -> list[str]:
            """The GPUs that the model's replicas are on: as the pool says, and as the driver does."""
            said = [uuid for each in made.model(one).replicas for uuid, count in each.gpus.items() if count]
            here = [each.pid for each in made.model(one).replicas if each.pid]
            assert said == [uuid for pid in here for uuid in (FIRST, SECOND) if on_gpu(driver, pid, uuid)]
            return said

        digests = {one: ask(made, f"/upstream/{one}/digest", timeout=90).body for one in "abc"}
        # All are made on the first. One may stay there, another goes to the second; the third takes the place of who
        # has been idle for the longest.
        ask(made, "/upstream/a/digest", timeout=90)
        ask(made, "/upstream/b/digest", timeout=90)
        assert sorted(where("a") + where("b")) == [FIRST, SECOND] and where("c") == []
        left = where("a")
        assert ask(made, "/upstream/c/digest", timeout=90).body == digests["c"]
        assert where("c") == left and where("a") == [] and len(where("b")) == 1
        # Back on the other one, with the same bytes.
        other = where("b")
        assert ask(made, "/upstream/a/digest", timeout=90).body == digests["a"]
        assert where("a") == other and where("b") == [] and where("c") == left
        assert [gpu.used // MIB for gpu in made.view().gpus] == [ALL, ALL]


def on_gpu(driver: ToyDriver, first: int | None, uuid: str | None = None) -> int:
    """MiB that a process and those below it hold on a GPU, or on all."""
    assert first
    held = [driver.memory(pid) for pid in proc.processes_below(first)]
    return sum(count for each in held for gpu, count in each.items() if uuid in (None, gpu)) // MIB


def forget(gpus: Path) -> None:
    """What processes of the past held: a driver would have freed it with them."""
    for folder in gpus.iterdir():
        for file in folder.iterdir():
            file.unlink()
