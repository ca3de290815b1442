"""Goldens of a server with device state, with real containers, CRIU and the Container Device Interface.

Only the GPU is a toy: its memory is files, its driver signals. What is shown is that processes are found again behind
new ids, that nothing is moved while it is frozen, and that what was held is held again, wherever it comes back.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.config_load import load
from gpuckpt.cuda.devices import Devices
from gpuckpt.errors import GpuFullError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.create import create
from gpuckpt.golden.launch import CreateRequest
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.standby import suspend, wake
from gpuckpt.golden.tools import Tools, open_store, tools
from gpuckpt.manifest import Mount, Request, Workload
from gpuckpt.timing import PhaseTable
from gpuckpt.workload import Http
from tests.integration.conftest import HERE, Bench
from tests.integration.toy_gpu import MIB, ToyDriver

SERVER = HERE / "programs" / "gpu_server.py"
FIRST, SECOND = "GPU-00000000", "GPU-11111111"


@pytest.fixture
def device() -> Iterator[str]:
    """What CDI calls a device that only this test has: a file that counts as NVIDIA's control device."""
    name = f"toy{uuid.uuid4().hex[:8]}"
    with known_to_cdi(name):
        yield name


@contextmanager
def known_to_cdi(name: str) -> Iterator[None]:
    node = {"path": "/dev/nvidiactl", "hostPath": "/dev/zero", "type": "c", "major": 1, "minor": 5}
    edits = {"deviceNodes": [node], "hooks": [{"hookName": "createContainer", "path": "/bin/true", "args": ["true"]}]}
    folder = Path("/run/cdi")
    folder.mkdir(exist_ok=True)
    file = folder / f"gpuckpt-test-{name}.json"
    devices = [{"name": name, "containerEdits": edits}]
    file.write_text(json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices}))
    try:
        yield
    finally:
        file.unlink()


@pytest.fixture
def gpus(bench: Bench) -> Path:
    folder = bench.folder / "gpus"
    for name in (FIRST, SECOND):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture
def driver(gpus: Path) -> ToyDriver:
    return ToyDriver(gpus)


@pytest.fixture
def work(bench: Bench, driver: ToyDriver) -> Tools:
    environ = {name: value for name, value in bench.env.items() if name.startswith("GPUCKPT_")}
    settings = load(None, environ=environ, env_file=None, flags={}).settings
    open_store(settings)
    return structs.replace(tools(settings), devices=Devices(lambda: driver, bench.folder / "room"))


def request(bench: Bench, gpus: Path, device: str, mib: int = 64) -> CreateRequest:
    server = Http(Workload(kind="http", canary_request=Request(method="GET", path="/digest")))
    return CreateRequest(
        name=bench.name(),
        adapter=server,
        arguments=("/usr/bin/python3", str(SERVER), "{socket}", str(gpus), str(mib)),
        mounts=(
            Mount(source=str(HERE), destination=str(HERE)),
            Mount(source=str(gpus), destination=str(gpus), read_only=False),
        ),
        gpus=(device,),
    )


def held(gpus: Path) -> dict[str, int]:
    """MiB on each device."""
    return {one.name: sum(file.stat().st_size for file in one.iterdir()) // MIB for one in sorted(gpus.iterdir())}


def test_device_state_goes_round(bench: Bench, gpus: Path, driver: ToyDriver, work: Tools, device: str) -> None:
    name = bench.name()
    golden = create(request(bench, gpus, device), work, PhaseTable()).manifest
    # Frozen, tried once, and gone.
    once = ["lock"] * 2 + ["checkpoint"] * 2
    again = ["restore"] * 2 + ["unlock"] * 2
    assert driver.calls == [*once, *again]
    assert golden.gpu is not None and len(golden.gpu.processes) == 2
    assert [(one.uuid, one.bytes) for one in golden.gpu.devices] == [(FIRST, 128 * MIB)]
    for file in (gpus / FIRST).iterdir():  # what the trial held: a driver would have freed it with the process
        file.unlink()

    # Two replicas side by side, each with state of its own behind other process ids.
    for replica in ("a", "b"):
        done = restore(RestoreRequest(name, replica=bench.name(replica)), work, PhaseTable())
        assert done.canary_match
    assert held(gpus) == {FIRST: 256, SECOND: 0}

    # One goes to sleep and comes back; a request that comes meanwhile is not lost.
    first = bench.name("a")
    down = suspend(work, first, golden, PhaseTable())
    assert down.gpu_bytes == 128 * MIB
    assert held(gpus) == {FIRST: 128, SECOND: 0}
    assert bench.ok("ls", "--format", "json").json["goldens"][0]["replicas"][0]["state"] == "standby"
    before = bench.get(bench.name("b"), "/digest")
    up = wake(work, first, golden, PhaseTable())
    assert up.gpu_bytes == 128 * MIB
    assert bench.get(first, "/digest") == before
    assert {row.name for row in up.phases.rows()} >= {"thaw", "GPU: restore", "GPU: unlock"}

    # The device is full by now, for a third one and for who comes back.
    suspend(work, first, golden, PhaseTable())
    driver.capacity = 450 * MIB
    with pytest.raises(GpuFullError):
        restore(RestoreRequest(name, replica=bench.name("c")), work, PhaseTable())
    with pytest.raises(GpuFullError):
        wake(work, first, golden, PhaseTable())
    driver.capacity = 2000 * MIB
    wake(work, first, golden, PhaseTable())
    assert bench.get(first, "/digest") == before
    for replica in ("a", "b"):
        bench.ok("stop", bench.name(replica))
    assert bench.left() == []


def test_state_moves_to_another_device(bench: Bench, gpus: Path, driver: ToyDriver, work: Tools, device: str) -> None:
    name = bench.name()
    create(request(bench, gpus, device), work, PhaseTable())
    for file in (gpus / FIRST).iterdir():
        file.unlink()
    # The container sees all devices, as `--gpu all` has it.
    folder = work.layout.golden(name)
    golden = manifests.read(folder)
    golden = structs.replace(golden, launch=structs.replace(golden.launch, gpus=("all",)))
    (gpus / FIRST / "somebody").write_bytes(bytes(1700 * MIB))
    with work.devices.reserve(golden.gpu.devices if golden.gpu else (), ("all",)) as chosen:
        assert chosen == {FIRST: SECOND}
    (gpus / FIRST / "somebody").unlink()
    # Asleep on the first one, awake on the second.
    restore(RestoreRequest(name), work, PhaseTable())
    before = bench.get(name, "/digest")
    suspend(work, name, golden, PhaseTable())
    (gpus / FIRST / "somebody").write_bytes(bytes(1700 * MIB))
    wake(work, name, golden, PhaseTable())
    (gpus / FIRST / "somebody").unlink()
    assert held(gpus) == {FIRST: 0, SECOND: 128}
    assert bench.get(name, "/digest") == before
    assert replicas.by_name(work.layout.replicas, name).standby is None
    bench.ok("stop", name)
    assert bench.left() == []
