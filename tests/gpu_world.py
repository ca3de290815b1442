"""A machine of fakes with a GPU, a server on it, and what tests of its goldens do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.containers import freezer
from gpuckpt.criu import images as criu_images
from gpuckpt.cuda import nodes
from gpuckpt.cuda.driver import DriverError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden import standby, weights
from gpuckpt.golden.create import Created, create
from gpuckpt.golden.restore import Restored, RestoreRequest, restore
from gpuckpt.golden.standby import Changed
from gpuckpt.manifest import Process
from gpuckpt.timing import PhaseTable
from gpuckpt.workload.control import Woken
from tests.cuda_fake import MIB
from tests.fakes import World, tools_for

REFUSED = DriverError("CUDA_ERROR_NOT_SUPPORTED", "")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine of fakes with one server, whose first process holds a gigabyte on the only GPU."""
    monkeypatch.setattr(criu_images, "regular_files", lambda folder: {"/lib/libc.so"})
    process = Process(pid=1, parent=0, name="serve", threads=2, pages_bytes=8192)
    monkeypatch.setattr(criu_images, "processes", lambda folder: (process,))
    monkeypatch.setattr(criu_images, "capabilities", lambda folder: ("CAP_CHOWN",))
    monkeypatch.setattr(criu_images, "sockets", lambda folder: ())
    monkeypatch.setattr(criu_images, "shared_memory_bytes", lambda folder: (4096, 0))
    monkeypatch.setattr("gpuckpt.golden.identity.driver_version", lambda: "570.86.15")
    monkeypatch.setattr("gpuckpt.golden.gpu.driver_version", lambda: "570.86.15")
    found = tools_for(tmp_path)
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda workload: found.adapter)
    monkeypatch.setattr(nodes, "specifications", lambda folders=None: [Path("/etc/cdi/nvidia.yaml")])
    monkeypatch.setattr(standby, "adapter", lambda workload: found.adapter)
    found.on_gpu(p4242=1024)
    return found


@pytest.fixture
def frozen(world: World, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of containers that are frozen; freezing and thawing are in the journal."""
    found: set[str] = set()

    def freeze(pid: int, container: str) -> None:
        with world.journal.step("freeze"):
            found.add(container)

    def thaw(pid: int, container: str) -> None:
        with world.journal.step("thaw"):
            found.discard(container)

    monkeypatch.setattr(freezer, "freeze", freeze)
    monkeypatch.setattr(freezer, "thaw", thaw)
    monkeypatch.setattr(freezer, "frozen", lambda pid, container: container in found)
    return found


def made(world: World, **changes: Any) -> Created:
    return create(world.request(**({"gpus": ("all",), "mode": "copy"} | changes)), world.tools, PhaseTable())


def restored(world: World, **changes: Any) -> Restored:
    """Restore the golden; the dumped process is gone, and CRIU brings one back whose state is in host memory."""
    if "p" not in changes:
        world.driver.processes[4242].state = "checkpointed"
    changes.pop("p", None)
    return restore(RestoreRequest("gold", **changes), world.tools, PhaseTable())


def steps(world: World) -> list[str]:
    """What the driver, CRIU, the freezer and the server did, in order."""
    words = ("lock", "checkpoint", "restore", "unlock", "dump", "freeze", "thaw", "save", "sleep", "wake", "replay")
    return [event for event in world.journal.events if event.startswith(words)]


def free(world: World) -> int:
    return sum(one.free for one in world.driver.devices.values()) // MIB


def ready(world: World) -> None:
    """A replica that answers."""
    made(world)
    restored(world)
    world.journal.events.clear()


def suspend(world: World, name: str = "gold") -> Changed:
    return standby.suspend(world.tools, name, manifests.read(world.layout.golden("gold")), PhaseTable())


def wake(world: World, name: str = "gold", timeout: float = 0.0) -> Changed:
    golden = manifests.read(world.layout.golden("gold"))
    return standby.wake(world.tools, name, golden, PhaseTable(), timeout=timeout)


def record(world: World) -> replicas.Replica:
    return replicas.by_name(world.layout.replicas, "gold")


@pytest.fixture
def running(world: World) -> World:
    """The same with a replica that answers."""
    ready(world)
    return world


class FakeControl:
    """A server that writes and reads its weights as it is told to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.content = b"w" * 5000
        self.number = 1
        self.read: list[bytes] = []
        self.carried: list[bytes] = []
        self.told: str | None = None
        self.sleeping = False

    def ranks(self) -> int:
        return self.number

    def save(self, files: Sequence[int]) -> list[int]:
        with self.world.journal.step("save"):
            return [os.pwrite(handle, self.content, 0) for handle in files]

    def sleep(self, *, caches: bool = False) -> int:
        with self.world.journal.step("sleep caches" if caches else "sleep"):
            self.sleeping = True
        return len(self.content)

    def wake(self, files: Sequence[int], carried: Sequence[int] = (), *, caches: bool = False) -> Woken:
        with self.world.journal.step("wake caches" if caches else "wake"):
            self.read = [os.pread(handle, 1 << 20, 0) for handle in files]
            self.carried = [os.pread(handle, 1 << 20, 0) for handle in carried]
            self.sleeping = False
        return Woken(len(self.content), {"map": 0.0, "copy" if carried else "stream": 0.0}, self.told)


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    found = FakeControl(world)
    monkeypatch.setattr(weights, "control", lambda replica, **limits: found)
    return found


@pytest.fixture
def vllm(world: World, server: FakeControl) -> FakeControl:
    """The server is vLLM's."""
    world.adapter._record = structs.replace(world.adapter.record, kind="vllm")
    return server
