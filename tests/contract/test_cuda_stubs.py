"""What the real drivers' code hands to NVIDIA's libraries and programs, and makes of what they say; over stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpuckpt.cuda.devices import Devices
from gpuckpt.cuda.driver import Driver, DriverError, Gpu
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.suspend import resume, suspend
from gpuckpt.errors import CheckpointError, DaemonUnreachableError, GpuckptError, PreflightError, RestoreError
from gpuckpt.manifest import Held
from tests import stub_driver
from tests.cuda_fake import H100, MIB
from tests.stub_driver import World

pytestmark = pytest.mark.stubs

# Each byte another, and one with letters in capitals in none of NVIDIA's tools.
FIRST = Gpu("GPU-00112233-4455-6677-8899-aabbccddeeff", H100, 80_000 * MIB, 80_000 * MIB)
SECOND = Gpu("GPU-ffeeddcc-bbaa-9988-7766-554433221100", H100, 80_000 * MIB, 80_000 * MIB)


@pytest.fixture(params=["bindings", "program"])
def driver(request: pytest.FixtureRequest, programs: World) -> Driver:
    """Two processes on two devices."""
    two_processes(programs)
    if request.param == "program":
        return Program(programs.bin / "cuda-checkpoint")
    return programs.remote(programs.folder / "helper.sock")


def two_processes(world: World) -> None:
    world.device(FIRST, mig=False)
    world.device(SECOND, mig=False)
    world.start(11, {FIRST.uuid: 20_000 * MIB})
    world.start(12, {FIRST.uuid: 1_000 * MIB, SECOND.uuid: 30_000 * MIB})


@pytest.fixture
def own(tmp_path: Path, built: Path) -> World:
    """A world whose helper ends with the test."""
    return World(tmp_path / "world", built)


# ---------------------------------------------------------------------- arguments


def test_arguments_arrive_as_they_are_meant(driver: Driver, world: World) -> None:
    driver.lock(11, 1.5)
    driver.checkpoint(11)
    driver.restore(11, {FIRST.uuid: SECOND.uuid, SECOND.uuid: FIRST.uuid})
    driver.unlock(11)
    driver.lock(12, 0.0001)  # 0 would be for ever
    assert world.calls() == [
        "lock 11 1500",
        "checkpoint 11",
        f"restore 11 {FIRST.uuid}={SECOND.uuid} {SECOND.uuid}={FIRST.uuid}",
        "unlock 11",
        "lock 12 1",
    ]
    assert world.held(11) == {SECOND.uuid: 20_000 * MIB}
    assert driver.memory(11) == {SECOND.uuid: 20_000 * MIB}


def test_one_that_is_moved_may_hold_memory_on_several_devices(driver: Driver, world: World) -> None:
    suspend(driver, [12])
    resume(driver, [12], {FIRST.uuid: SECOND.uuid, SECOND.uuid: FIRST.uuid})
    assert driver.memory(12) == {SECOND.uuid: 1_000 * MIB, FIRST.uuid: 30_000 * MIB}


def test_a_map_that_lacks_a_device_is_refused(driver: Driver, world: World) -> None:
    suspend(driver, [11])
    with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_VALUE: .*invalid argument"):
        driver.restore(11, {FIRST.uuid: SECOND.uuid})
    assert world.state(11) == "checkpointed"
    resume(driver, [11])


# ---------------------------------------------------------------------- what they say


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (1, "CUDA_ERROR_INVALID_VALUE"),
        (2, "CUDA_ERROR_OUT_OF_MEMORY"),
        (304, "CUDA_ERROR_OPERATING_SYSTEM"),
        (401, "CUDA_ERROR_ILLEGAL_STATE"),
        (600, "CUDA_ERROR_NOT_READY"),
        (801, "CUDA_ERROR_NOT_SUPPORTED"),
        (999, "CUDA_ERROR_UNKNOWN"),
    ],
)
def test_a_refusal_has_the_driver_s_name_for_it(driver: Driver, world: World, code: int, name: str) -> None:
    world.refuse("lock", 11, code)
    with pytest.raises(DriverError) as caught:
        driver.lock(11, 1)
    assert caught.value.code == name and caught.value.detail


def test_a_code_that_nobody_knows_is_an_error_too(driver: Driver, world: World) -> None:
    world.refuse("lock", 11, 4242)
    with pytest.raises(DriverError, match=r"4242|unrecognized error code"):
        driver.lock(11, 1)
    assert driver.state(11) == "running"


def test_states_of_those_that_have_none(driver: Driver, world: World) -> None:
    assert driver.state(os.getpid()) is None  # no CUDA
    assert driver.state(99_999_999) is None  # no process
    world.start(13, {}, state="failed")
    assert driver.state(13) == "failed"
    world.refuse("state", 11, 999)
    with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
        driver.state(11)


def test_one_that_ran_out_of_memory_once_never_comes_back(driver: Driver, world: World) -> None:
    suspend(driver, [11])
    world.start(14, {FIRST.uuid: 70_000 * MIB})
    with pytest.raises(RestoreError, match="restore failed") as caught:
        resume(driver, [11])
    assert caught.value.cause and "CUDA_ERROR_OUT_OF_MEMORY" in caught.value.cause
    world.start(14, {})
    with pytest.raises(RestoreError) as caught:
        resume(driver, [11])
    assert caught.value.cause and "CUDA_ERROR_OPERATING_SYSTEM" in caught.value.cause


def test_devices_are_described(driver: Driver, world: World) -> None:
    world.clear()
    comma = Gpu("GPU-0-0-0-0-1", "NVIDIA RTX, the second", 8_000 * MIB, 8_000 * MIB)
    cut = Gpu("GPU-0-0-0-0-2", H100, 80_000 * MIB, 79_000 * MIB, mig=True)
    world.device(comma)  # a type without MIG
    world.device(cut, mig=True)
    world.start(11, {cut.uuid: 1_000 * MIB})
    assert driver.gpus() == (comma, cut)
    assert driver.version() == "570.86.15"


def test_a_device_without_memory_of_its_own_has_the_host_s(driver: Driver, world: World) -> None:
    world.clear()
    world.device(FIRST, told=False)
    world.start(11, {FIRST.uuid: 1_000 * MIB})
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    (one,) = driver.gpus()
    assert one.memory == pages and 0 < one.free < pages
    assert driver.memory(11) == {FIRST.uuid: 1_000 * MIB}  # this is told


def test_memory_that_is_not_told_is_not_taken_for_none(driver: Driver, world: World) -> None:
    world.refuse("used")
    with pytest.raises(DriverError, match="does not tell what process 11 holds"):
        driver.memory(11)
    assert driver.memory(99) == {}


def test_no_device_at_all(driver: Driver, world: World) -> None:
    world.clear()
    if isinstance(driver, Program):  # nvidia-smi ends with a status of its own then
        with pytest.raises(DriverError, match="No devices were found"):
            driver.gpus()
    else:
        assert driver.gpus() == ()
    assert driver.memory(11) == {}


# ---------------------------------------------------------------------- machines that cannot


def test_a_program_that_cannot_reach_the_driver_is_not_taken_for_a_process_without_cuda(programs: World) -> None:
    two_processes(programs)
    program = Program(programs.bin / "cuda-checkpoint")
    programs.refuse("init", code=3)
    with pytest.raises(DriverError, match='Error initializing CUDA: "initialization error"'):
        program.state(11)
    programs.refuse("nvml", code=9)
    with pytest.raises(DriverError, match="couldn't communicate with the NVIDIA driver"):
        program.gpus()


@pytest.mark.parametrize(
    ("refused", "code", "said", "why"),
    [
        ("init", 100, "CUDA cannot be initialised", "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected"),
        ("nvml", 9, "NVIDIA's driver does not answer", "Driver Not Loaded"),
    ],
)
def test_a_helper_without_a_driver_says_so(own: World, refused: str, code: int, said: str, why: str) -> None:
    own.refuse(refused, code=code)
    with pytest.raises(PreflightError, match=said) as caught:
        own.remote(own.folder / "helper.sock").version()
    assert caught.value.cause and why in caught.value.cause


def test_nvml_s_refusals_are_the_driver_s(programs: World) -> None:
    two_processes(programs)
    programs.refuse("processes", code=999)
    with pytest.raises(DriverError, match="NVMLError"):
        programs.remote(programs.folder / "helper.sock").memory(11)


def run(world: World, code: str) -> str:
    """What Python prints that sees the stand-ins."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | world.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("import cuda.bindings; cuda.bindings.__version__ = '12.8.0'", "12.9.1 is the oldest that can do it"),
        ("import cuda.bindings; cuda.bindings.__version__ = '12.9.0'", "12.9.1 is the oldest that can do it"),
        # As 13.0.0 has it: whatever was suspended could never be resumed.
        (
            "from cuda.bindings import driver; del driver.cuCheckpointProcessRestore",
            "it lacks cuCheckpointProcessRestore",
        ),
    ],
)
def test_packages_that_are_not_fit_are_refused(own: World, change: str, why: str) -> None:
    code = (
        f"{change}\n"
        "from gpuckpt.cuda.bindings import Bindings\n"
        "from gpuckpt.errors import PreflightError\n"
        "try: Bindings()\n"
        "except PreflightError as error: print(error.cause)"
    )
    assert run(own, code) == why


@pytest.mark.parametrize("lacks", ["CUcheckpointGpuPair", "CUcheckpointRestoreArgs"])
def test_packages_that_cannot_move_say_so_and_still_restore(own: World, lacks: str) -> None:
    two_processes(own)
    code = (
        f"from cuda.bindings import driver; del driver.{lacks}\n"
        "from gpuckpt.cuda.bindings import Bindings\n"
        "from gpuckpt.cuda.driver import DriverError\n"
        "made = Bindings(); made.lock(11, 1); made.checkpoint(11)\n"
        f"try: made.restore(11, {{{FIRST.uuid!r}: {SECOND.uuid!r}}})\n"
        "except DriverError as error: print(error.message)\n"
        "made.restore(11, {}); print(made.state(11))"
    )
    refused, state = run(own, code).splitlines()
    assert "CUDA_ERROR_NOT_SUPPORTED: moving to other devices needs cuda-bindings 13.0.2" in refused
    assert state == "locked"


def test_a_driver_that_has_no_checkpoints_is_told(own: World, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    source = tmp_path / "old.c"
    source.write_text(f'#define cuCheckpointProcessGetState not_yet\n#include "{stub_driver.HERE}/cuda.c"\n')
    library = tmp_path / "old" / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    own.environment["LD_LIBRARY_PATH"] = f"{library.parent}:{own.environment['LD_LIBRARY_PATH']}"
    code = (
        "from gpuckpt.cuda.bindings import Bindings\n"
        "from gpuckpt.cuda.driver import DriverError\n"
        "try: Bindings().state(11)\n"
        "except DriverError as error: print(error.message)"
    )
    assert "cuCheckpointProcessGetState" in run(own, code)


# ---------------------------------------------------------------------- the helper


def devices(world: World, tmp_path: Path, driver: Driver) -> Devices:
    """Those of a server with the processes 11 and 12, which have the devices' files open."""
    for pid in (11, 12):
        folder = tmp_path / "proc" / str(pid) / "fd"
        folder.mkdir(parents=True)
        (folder / "3").symlink_to("/dev/nvidiactl")
    return Devices(
        lambda: driver,
        tmp_path / "room",
        below=lambda first: [10, 11, 12],
        files=tmp_path / "proc",
    )


@pytest.fixture
def two(world: World) -> World:
    two_processes(world)
    return world


def test_a_server_goes_round_and_to_other_devices(two: World, tmp_path: Path) -> None:
    mine = devices(two, tmp_path, two.remote(two.folder / "helper.sock"))
    pids = mine.holders(10)
    assert pids == [11, 12]
    held = mine.held(pids)
    assert held == (Held(FIRST.uuid, H100, 21_000 * MIB), Held(SECOND.uuid, H100, 30_000 * MIB))
    assert [step.name for step in mine.suspend(10, pids)] == ["lock", "checkpoint"]
    assert mine.held(pids) == () and [gpu.free for gpu in mine.gpus()] == [80_000 * MIB] * 2
    with mine.reserve(held) as chosen:
        mine.resume(pids, chosen, [FIRST.uuid, SECOND.uuid])
    assert mine.held(pids) == held
    # The second device is nearly full meanwhile: what was there goes to the first, and the other way round.
    mine.suspend(10, pids)
    two.start(14, {SECOND.uuid: 55_000 * MIB})
    with mine.reserve(held) as chosen:
        mine.resume(pids, chosen, [FIRST.uuid, SECOND.uuid])
    assert {two.state(pid) for pid in pids} == {"running"}
    assert two.held(11) == {SECOND.uuid: 20_000 * MIB}
    assert two.held(12) == {SECOND.uuid: 1_000 * MIB, FIRST.uuid: 30_000 * MIB}


def test_a_refused_checkpoint_leaves_the_server_running(two: World, tmp_path: Path) -> None:
    mine = devices(two, tmp_path, two.remote(two.folder / "helper.sock"))
    two.refuse("checkpoint", 12, 801)
    with pytest.raises(CheckpointError, match="checkpoint failed") as caught:
        mine.suspend(10, [11, 12])
    assert caught.value.cause and "CUDA_ERROR_NOT_SUPPORTED: operation not supported" in caught.value.cause
    assert {two.state(pid) for pid in (11, 12)} == {"running"}
    assert two.held(11) == {FIRST.uuid: 20_000 * MIB}


def test_a_call_that_hangs_keeps_no_other_waiting(two: World) -> None:
    one, other = (two.remote(two.folder / "helper.sock") for _ in range(2))
    one.version()
    kept = two.hang("lock", 11)
    slow = threading.Thread(target=one.lock, args=(11, 1.0))
    slow.start()
    two.wait_for("lock 11")
    for remote in (one, other):
        suspend(remote, [12])
        resume(remote, [12])
        assert remote.state(12) == "running" and remote.gpus() and remote.memory(12)
    assert slow.is_alive() and two.state(11) == "running"
    kept.unlink()
    slow.join(60)
    assert two.state(11) == "locked"


def test_two_clients_at_once(two: World) -> None:
    failed: list[BaseException] = []

    def rounds(pid: int) -> None:
        remote = two.remote(two.folder / "helper.sock")
        try:
            for _ in range(10):
                suspend(remote, [pid])
                resume(remote, [pid])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=rounds, args=(pid,)) for pid in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and {two.state(pid) for pid in (11, 12)} == {"running"}
    assert len(two.calls()) == 80


def test_a_helper_that_is_killed_in_the_midst_of_a_call(own: World) -> None:
    two_processes(own)
    remote = own.remote(own.folder / "helper.sock")
    remote.version()
    first = own.helper_pid()
    kept = own.hang("checkpoint", 12)
    failed: list[GpuckptError] = []

    def ask() -> None:
        try:
            remote.checkpoint(12)
        except GpuckptError as error:
            failed.append(error)

    remote.lock(12, 1)
    asking = threading.Thread(target=ask)
    asking.start()
    own.wait_for("checkpoint 12")
    os.kill(first, signal.SIGKILL)
    asking.join(60)
    assert isinstance(failed[0], DaemonUnreachableError)
    kept.unlink()
    # Another one goes on from where the driver is.
    try:
        assert remote.state(12) == "locked"
        assert own.helper_pid() != first
        remote.unlock(12)
        assert remote.state(12) == "running"
    finally:
        os.kill(own.helper_pid(), signal.SIGTERM)


def test_a_helper_that_is_killed_in_the_midst_of_a_suspend(own: World, tmp_path: Path) -> None:
    two_processes(own)
    mine = devices(own, tmp_path, own.remote(own.folder / "helper.sock"))
    mine.driver.version()
    first = own.helper_pid()
    kept = own.hang("checkpoint", 12)

    def kill() -> None:
        own.wait_for("checkpoint 12")
        own.wait_for("checkpoint 11")
        while own.state(11) != "checkpointed":
            time.sleep(0.002)
        os.kill(first, signal.SIGKILL)  # before the call may go on: it could still be answered
        kept.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(CheckpointError, match="checkpoint failed") as caught:
        mine.suspend(10, [11, 12])
    killer.join()
    try:
        assert caught.value.cause and "the GPU helper ended while it was asked “checkpoint”" in caught.value.cause
        assert caught.value.remedy and caught.value.remedy.startswith("the server runs on")
        assert {own.state(pid) for pid in (11, 12)} == {"running"}  # another helper has put it back
    finally:
        os.kill(own.helper_pid(), signal.SIGTERM)
