"""What every driver does, without a GPU and with one: the same tests, unchanged, for all.

- fake: what unit tests use;
- stub: cuda-bindings and NVML in the helper, over stand-ins for NVIDIA's libraries;
- program: cuda-checkpoint and nvidia-smi, stand-ins as well;
- real: tried where NVIDIA's driver is loaded and gpuckpt's GPU packages are installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from gpuckpt.cuda.checks import driver_version
from gpuckpt.cuda.choice import bindings_installed
from gpuckpt.cuda.driver import Driver, DriverError
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.suspend import resume, suspend
from gpuckpt.errors import CheckpointError
from tests.cuda_fake import FakeDriver
from tests.cuda_fake import gpu as made_up
from tests.stub_driver import World

MIB = 1 << 20
HELD = 256  # MiB that each process holds

# A process that has a pattern in device memory, and says on demand what is there.
_HOLDER = """
import sys
from cuda.bindings import driver
def ok(answer):
    assert answer[0] == driver.CUresult.CUDA_SUCCESS, answer[0]
    return answer[1] if len(answer) > 1 else None
ok(driver.cuInit(0))
context = ok(driver.cuDevicePrimaryCtxRetain(ok(driver.cuDeviceGet(0))))
ok(driver.cuCtxSetCurrent(context))
size = int(sys.argv[1]) << 20
memory = ok(driver.cuMemAlloc(size))
ok(driver.cuMemsetD32(memory, int(sys.argv[2]), size // 4))
ok(driver.cuCtxSynchronize())
print("ready", flush=True)
held = bytearray(size)
for line in sys.stdin:
    ok(driver.cuMemcpyDtoH(held, memory, size))
    print(sum(held[:: 4096]), held == held[:4] * (size // 4), flush=True)
"""


@dataclass
class Subject:
    """A driver, processes that hold device memory, and what one of them says is there."""

    driver: Driver
    pids: list[int]
    content: Callable[[int], str]


def _real() -> Iterator[Subject]:
    if driver_version() is None:
        pytest.skip("no NVIDIA driver is loaded")
    if not bindings_installed():
        pytest.skip("gpuckpt's GPU packages are not installed")
    from gpuckpt.cuda.bindings import Bindings

    started = [
        subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(HELD), str(7 + number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

        def content(pid: int) -> str:
            process = next(one for one in started if one.pid == pid)
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("?\n")
            process.stdin.flush()
            return process.stdout.readline()

        yield Subject(Bindings(), [process.pid for process in started], content)
    finally:
        for process in started:
            process.kill()
            process.wait()


def _fake() -> Iterator[Subject]:
    made = FakeDriver()
    for pid in (11, 12):
        made.start(pid, HELD)
    yield Subject(made, [11, 12], lambda pid: f"{pid} True\n")


def _stub(world: World) -> Subject:
    world.device(made_up(0))
    for pid in (11, 12):
        world.start(pid, {made_up(0).uuid: HELD * MIB})
    # It has no memory that something could be in.
    return Subject(world.remote(world.folder / "helper.sock"), [11, 12], lambda pid: f"{pid} True\n")


@pytest.fixture(
    params=[
        "fake",
        pytest.param("stub", marks=pytest.mark.stubs),
        pytest.param("program", marks=pytest.mark.stubs),
        "real",
    ]
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "real":
        yield from _real()
    elif request.param == "fake":
        yield from _fake()
    elif request.param == "stub":
        yield _stub(request.getfixturevalue("world"))
    else:
        world: World = request.getfixturevalue("programs")
        made = _stub(world)
        made.driver = Program(world.bin / "cuda-checkpoint")
        yield made


def test_states_follow_one_another(subject: Subject) -> None:
    driver, pid = subject.driver, subject.pids[0]
    assert driver.state(pid) == "running"
    driver.lock(pid, 10)
    assert driver.state(pid) == "locked"
    driver.checkpoint(pid)
    assert driver.state(pid) == "checkpointed"
    driver.restore(pid, {})
    assert driver.state(pid) == "locked"
    driver.unlock(pid)
    assert driver.state(pid) == "running"


def test_a_process_without_cuda_has_no_state(subject: Subject) -> None:
    assert subject.driver.state(os.getppid()) is None


@pytest.mark.parametrize("step", ["checkpoint", "restore", "unlock"])
def test_steps_out_of_order_are_refused(subject: Subject, step: str) -> None:
    driver, pid = subject.driver, subject.pids[0]
    with pytest.raises(DriverError):
        driver.restore(pid, {}) if step == "restore" else getattr(driver, step)(pid)
    assert driver.state(pid) == "running"


def test_device_memory_is_free_while_they_are_suspended(subject: Subject) -> None:
    driver, pids = subject.driver, subject.pids
    before = {gpu.uuid: gpu.free for gpu in driver.gpus()}
    held = [driver.memory(pid) for pid in pids]
    assert all(sum(one.values()) >= HELD * MIB for one in held)
    suspend(driver, pids)
    assert all(not driver.memory(pid) for pid in pids)
    freed = sum(gpu.free - before[gpu.uuid] for gpu in driver.gpus())
    assert freed >= len(pids) * HELD * MIB
    resume(driver, pids)
    assert all(sum(driver.memory(pid).values()) >= HELD * MIB for pid in pids)


def test_what_is_on_the_device_is_what_it_was_ten_times_over(subject: Subject) -> None:
    driver, pids = subject.driver, subject.pids
    wanted = [subject.content(pid) for pid in pids]
    assert all(said.endswith("True\n") for said in wanted)
    for _ in range(10):
        suspend(driver, pids)
        resume(driver, pids)
        assert [subject.content(pid) for pid in pids] == wanted


def test_one_that_cannot_be_suspended_leaves_the_other_running(subject: Subject) -> None:
    driver, (first, second) = subject.driver, subject.pids
    driver.lock(second, 10)  # by another program, as far as suspend() knows
    with pytest.raises(CheckpointError):
        suspend(driver, [first, second])
    assert driver.state(first) == "running" and driver.state(second) == "locked"
    driver.unlock(second)
    assert subject.content(first).endswith("True\n") and subject.content(second).endswith("True\n")


def test_devices_and_the_driver_have_names(subject: Subject) -> None:
    for gpu in subject.driver.gpus():
        assert gpu.uuid.startswith("GPU-") and gpu.name and 0 < gpu.free <= gpu.memory
    assert subject.driver.version().split(".")[0].isdigit()
