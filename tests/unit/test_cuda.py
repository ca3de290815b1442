"""Suspending and resuming device state, on a driver without a GPU: every failure at every step."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
from msgspec import structs

from gpuckpt.cuda.devices import Devices, pairing
from gpuckpt.cuda.driver import DriverError
from gpuckpt.cuda.helper import Helper
from gpuckpt.cuda.holders import holders
from gpuckpt.cuda.remote import Remote
from gpuckpt.cuda.room import Room, place
from gpuckpt.cuda.suspend import Limits, _Calls, _late, resume, suspend
from gpuckpt.errors import (
    CheckpointError,
    DaemonUnreachableError,
    GpuFullError,
    IncompatibleError,
    InterruptedByUser,
    PreflightError,
    RestoreError,
)
from gpuckpt.manifest import Held
from tests.cuda_fake import H100, MIB, FakeDriver, gpu
from tests.interrupts import interrupts
from tests.opened import left_open, opened

PIDS = (11, 12, 13)


@pytest.fixture
def driver() -> FakeDriver:
    """Three processes of one server on two devices."""
    made = FakeDriver({one.uuid: one for one in (gpu(0), gpu(1))})
    first, second = made.devices
    made.start(11, 20_000, first)
    made.start(12, 1_000, first)
    made.start(13, 30_000, second)
    return made


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What hangs until this is set comes late: it is set when a step is over and who has not answered is waited for."""
    over = threading.Event()

    def waiting(made: Sequence[_Calls], limits: Limits) -> dict[int, str]:
        over.set()
        return _late(made, limits)

    monkeypatch.setattr("gpuckpt.cuda.suspend._late", waiting)
    return over


def quick(monkeypatch: pytest.MonkeyPatch, step: str, pid: int) -> Limits:
    """Limits of which this step's is short for this process, and for no other one, however slow the machine is."""
    wait = _Calls.wait

    def waited(self: _Calls, limit: float) -> list[int]:
        for one, over in self._over.items():
            assert one == pid or over.wait(60)
        return wait(self, limit)

    monkeypatch.setattr(_Calls, "wait", waited)
    monkeypatch.setattr("gpuckpt.cuda.suspend._SPARE", 0.1)
    return structs.replace(Limits(), **{step: 0.1})


def join(name: str) -> None:
    """Wait for the threads that are called so."""
    for thread in threading.enumerate():
        if name in thread.name:
            thread.join(60)


def states(driver: FakeDriver, but: int | None = None) -> set[str | None]:
    return {driver.state(pid) for pid in PIDS if pid != but}


def free(driver: FakeDriver) -> list[int]:
    return [one.free // MIB for one in driver.gpus()]


# ---------------------------------------------------------------------- the order


def test_all_are_locked_before_any_is_checkpointed_and_restored_before_any_is_unlocked(driver: FakeDriver) -> None:
    before = free(driver)
    steps = suspend(driver, PIDS)
    assert states(driver) == {"checkpointed"} and free(driver) == [80_000, 80_000]
    steps += resume(driver, PIDS)
    assert states(driver) == {"running"} and free(driver) == before
    assert [name for name, _ in driver.calls] == [
        step for step in ("lock", "checkpoint", "restore", "unlock") for _ in PIDS
    ]
    assert [step.name for step in steps] == ["lock", "checkpoint", "restore", "unlock"]
    assert all(step.begin_ns <= step.end_ns for step in steps)


def test_each_step_is_made_side_by_side(driver: FakeDriver) -> None:
    meeting = threading.Barrier(len(PIDS))

    def meet(step: str, pid: int) -> None:
        if step != "state":
            meeting.wait(60)  # all are at the same step, or nobody gets on

    driver.before = meet
    suspend(driver, PIDS)
    resume(driver, PIDS)
    assert states(driver) == {"running"}


def test_a_server_without_cuda_has_nothing_to_move() -> None:
    driver = FakeDriver()
    assert [step.name for step in suspend(driver, ())] == ["lock", "checkpoint"] and not driver.calls


# ---------------------------------------------------------------------- every failure at every step


@pytest.mark.parametrize(("step", "pid"), list(product(("lock", "checkpoint"), PIDS)))
@pytest.mark.parametrize("how", ["refused", "hangs"])
def test_a_suspend_that_fails_leaves_the_server_running(
    driver: FakeDriver, late: threading.Event, monkeypatch: pytest.MonkeyPatch, step: str, pid: int, how: str
) -> None:
    before, limits = free(driver), Limits()
    if how == "refused":
        driver.refuse[step, pid] = DriverError("CUDA_ERROR_NOT_SUPPORTED", "peers")
    else:
        driver.hang[step, pid], limits = late, quick(monkeypatch, step, pid)
    with pytest.raises(CheckpointError, match=f"{step} failed") as caught:
        suspend(driver, PIDS, limits)
    assert caught.value.cause and f"process {pid}:" in caught.value.cause
    if how == "refused":
        assert "CUDA_ERROR_NOT_SUPPORTED: peers" in caught.value.cause
        assert caught.value.remedy and caught.value.remedy.startswith("the server runs on")
        assert states(driver) == {"running"} and free(driver) == before
        driver.refuse.clear()
        suspend(driver, PIDS)  # and it can be tried again
    else:
        assert "did not answer within" in caught.value.cause
        # It came late, was waited for, and undone.
        assert caught.value.remedy and caught.value.remedy.startswith("the server runs on")
        assert states(driver) == {"running"} and free(driver) == before


@pytest.mark.parametrize(("step", "pid"), list(product(("lock", "checkpoint"), PIDS)))
def test_a_call_that_stays_out_is_told_of(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, step: str, pid: int
) -> None:
    over = driver.hang[step, pid] = threading.Event()
    limits = structs.replace(quick(monkeypatch, step, pid), late=0.05)
    try:
        with pytest.raises(CheckpointError) as caught:
            suspend(driver, PIDS, limits)
        remedy = caught.value.remedy or ""
        assert "could not be undone" in remedy and f"process {pid}: the driver is still at it" in remedy
        assert states(driver, but=pid) == {"running"}
    finally:
        over.set()


@pytest.mark.parametrize(("step", "pid"), list(product(("lock", "checkpoint"), PIDS)))
def test_an_interrupt_in_the_midst_leaves_the_server_running(
    driver: FakeDriver, late: threading.Event, step: str, pid: int
) -> None:
    before = free(driver)
    driver.hang[step, pid] = late

    with interrupts() as interrupt:
        driver.before = lambda now, one: interrupt() if (now, one) == (step, pid) else None
        with pytest.raises(InterruptedByUser):
            suspend(driver, PIDS)
    join("gpuckpt-cuda")  # nothing that was begun comes behind
    assert states(driver) == {"running"} and free(driver) == before


@pytest.mark.parametrize(("step", "calls"), [("lock", 0), ("checkpoint", 3)])
def test_an_interrupt_before_all_calls_are_begun_leaves_the_server_running(
    driver: FakeDriver, late: threading.Event, monkeypatch: pytest.MonkeyPatch, step: str, calls: int
) -> None:
    before, start = free(driver), threading.Thread.start
    driver.hang[step, 11] = late

    def begin(thread: threading.Thread) -> None:
        if thread.name == "gpuckpt-cuda-12" and len(driver.calls) == calls and not late.is_set():
            threading.Event().wait(60)  # the interrupt comes here
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)
    with interrupts() as interrupt:
        driver.before = lambda now, one: interrupt() if (now, one) == (step, 11) else None
        with pytest.raises(InterruptedByUser):
            suspend(driver, PIDS)
    join("gpuckpt-cuda")  # nothing that was begun comes behind
    assert states(driver) == {"running"} and free(driver) == before


def test_a_restore_that_comes_late_is_taken_off_again(
    driver: FakeDriver, late: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspend(driver, PIDS)
    driver.hang["restore", 12] = late
    with pytest.raises(RestoreError) as caught:
        resume(driver, PIDS, limits=quick(monkeypatch, "restore", 12))
    assert "none of it is on a device" in (caught.value.remedy or "")
    assert states(driver) == {"checkpointed"} and free(driver) == [80_000, 80_000]


@pytest.mark.parametrize("pid", PIDS)
def test_a_restore_that_fails_takes_the_others_off_again(driver: FakeDriver, pid: int) -> None:
    suspend(driver, PIDS)
    driver.refuse["restore", pid] = DriverError("CUDA_ERROR_UNKNOWN", "")
    with pytest.raises(RestoreError, match="restore failed") as caught:
        resume(driver, PIDS)
    assert caught.value.remedy and "none of it is on a device" in caught.value.remedy
    assert states(driver) == {"checkpointed"} and free(driver) == [80_000, 80_000]
    driver.refuse.clear()
    resume(driver, PIDS)
    assert states(driver) == {"running"}


@pytest.mark.parametrize("pid", PIDS)
def test_an_unlock_that_fails_is_told(driver: FakeDriver, pid: int) -> None:
    suspend(driver, PIDS)
    driver.refuse["unlock", pid] = DriverError("CUDA_ERROR_UNKNOWN", "")
    with pytest.raises(RestoreError, match="unlock failed"):
        resume(driver, PIDS)


@pytest.mark.parametrize("pid", PIDS)
def test_what_cannot_be_undone_is_said(driver: FakeDriver, pid: int) -> None:
    driver.refuse["checkpoint", 12] = DriverError("CUDA_ERROR_UNKNOWN", "")
    driver.refuse["unlock", pid] = DriverError("CUDA_ERROR_UNKNOWN", "stuck")
    with pytest.raises(CheckpointError) as caught:
        suspend(driver, PIDS)
    assert (
        caught.value.remedy
        and "could not be undone" in caught.value.remedy
        and "stop the server" in caught.value.remedy
    )
    assert f"process {pid}" in caught.value.remedy


@pytest.mark.parametrize("state", ["locked", "checkpointed", "failed", None])
def test_a_process_that_another_program_works_on_is_left_alone(driver: FakeDriver, state: str | None) -> None:
    if state is None:
        del driver.processes[12]
    else:
        driver.processes[12].state = state  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="not what it should be") as caught:
        suspend(driver, PIDS)
    assert caught.value.cause and f"process 12 is {state or 'without CUDA'}, not running" in caught.value.cause
    assert not driver.calls


def test_a_fault_of_ours_is_not_taken_for_the_driver_s(driver: FakeDriver) -> None:
    def broken(step: str, pid: int) -> None:
        if step == "lock":
            raise ZeroDivisionError

    driver.before = broken
    with pytest.raises(ZeroDivisionError):
        suspend(driver, PIDS)


# ---------------------------------------------------------------------- room


def held(*wanted: tuple[int, int], name: str = H100) -> list[Held]:
    return [Held(gpu(number).uuid, name, mib * MIB) for number, mib in wanted]


def test_it_comes_back_where_it_was_if_there_is_room() -> None:
    gpus = (gpu(0, free=30_000), gpu(1, free=80_000))
    assert place(held((0, 20_000)), gpus, {}) == {gpu(0).uuid: gpu(0).uuid}
    assert place(held((0, 40_000)), gpus, {}) == {gpu(0).uuid: gpu(1).uuid}  # another of the same type
    assert place(held((0, 20_000)), gpus, {gpu(0).uuid: 15_000 * MIB}) == {gpu(0).uuid: gpu(1).uuid}
    assert place(held((7, 20_000)), gpus, {}) == {gpu(7).uuid: gpu(1).uuid}  # from another host
    assert place([], gpus, {}) == {}


def test_two_devices_come_back_to_two() -> None:
    gpus = (gpu(0, free=30_000), gpu(1, free=80_000))
    assert place(held((0, 20_000), (1, 60_000)), gpus, {}) == {gpu(0).uuid: gpu(0).uuid, gpu(1).uuid: gpu(1).uuid}
    assert place(held((0, 60_000), (1, 20_000)), gpus, {}) == {gpu(0).uuid: gpu(1).uuid, gpu(1).uuid: gpu(0).uuid}
    assert place(held((0, 60_000), (1, 60_000)), gpus, {}) is None
    with pytest.raises(IncompatibleError, match="no GPU for it"):
        place(held((0, 20_000), (1, 20_000), (2, 20_000)), gpus, {})


@pytest.mark.parametrize(
    "gpus",
    [(), (gpu(0, name="NVIDIA A100"),), (gpu(0, memory=16_000, free=16_000),), (gpu(0, mig=True),)],
    ids=["none", "another type", "too small", "MIG"],
)
def test_what_can_never_fit_is_refused(gpus: tuple[object, ...]) -> None:
    with pytest.raises(IncompatibleError, match="no GPU for it: it ran on a NVIDIA H100"):
        place(held((0, 20_000)), gpus, {})  # type: ignore[arg-type]


def test_reservations_of_others_count_until_they_end(tmp_path: Path) -> None:
    driver = FakeDriver()
    one, other = Room(tmp_path, driver), Room(tmp_path, driver)
    with one.reserve(held((0, 50_000))) as where:
        assert where == {gpu(0).uuid: gpu(0).uuid}
        with (
            pytest.raises(GpuFullError, match="50000 MiB of GPU memory are needed"),
            other.reserve(held((0, 50_000))),
        ):
            pass
        with other.reserve(held((0, 20_000))):
            pass
    with other.reserve(held((0, 50_000))):
        pass
    assert not list(tmp_path.glob("*.json"))


def test_who_waits_for_room_gets_it_or_hears_of_it(tmp_path: Path) -> None:
    driver = FakeDriver({gpu(0).uuid: gpu(0, free=1_000)})
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            driver.devices[gpu(0).uuid] = gpu(0)
        time.sleep(0.001)

    with Room(tmp_path, driver, sleep=sleep).reserve(held((0, 50_000)), timeout=10) as where:
        assert where and looks == 3
    driver.devices[gpu(0).uuid] = gpu(0, free=1_000)
    with (
        pytest.raises(GpuFullError, match=r"were not free within 0\.05 s"),
        Room(tmp_path, driver).reserve(held((0, 50_000)), timeout=0.05),
    ):
        pass


def test_a_reservation_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    driver = FakeDriver()
    for number, text in enumerate(("", "{", '{"pid": 1}', "[]")):
        (tmp_path / f"{number}-0.json").write_text(text)
    with Room(tmp_path, driver).reserve(held((0, 50_000))) as where:
        assert where and len(list(tmp_path.glob("*.json"))) == 1
    assert not list(tmp_path.glob("*.json"))


def test_what_the_driver_is_told_of_devices() -> None:
    one, two, three = "A", "B", "C"
    assert pairing({one: one}, [one, two], [one, two]) == {}
    assert pairing({one: two}, [one, two], [one, two]) == {one: two, two: one}
    assert pairing({one: two, two: one}, [one, two, three], [one, two, three]) == {one: two, two: one, three: three}
    # Another host, with as many, more, and fewer of them: never one that is not there, and none twice.
    assert pairing({one: "X"}, [one], ["X", "Y"]) == {one: "X"}
    assert pairing({one: "Y"}, [one, two], ["X", "Y"]) == {one: "Y", two: "X"}
    assert pairing({one: "X"}, [one, two, three], ["X"]) == {one: "X"}


def test_a_reservation_of_a_killed_command_does_not_count(tmp_path: Path) -> None:
    driver = FakeDriver()
    script = (
        f"import os, sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from pathlib import Path\n"
        "from gpuckpt.cuda.room import Room\n"
        "from tests.cuda_fake import FakeDriver\n"
        "from tests.unit.test_cuda import held\n"
        f"kept = Room(Path({str(tmp_path)!r}), FakeDriver()).reserve(held((0, 50_000)))\n"
        "kept.__enter__()\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert list(tmp_path.glob("*.json"))
    with Room(tmp_path, driver).reserve(held((0, 50_000))):
        assert len(list(tmp_path.glob("*.json"))) == 1


def test_it_comes_to_the_devices_that_are_preferred_if_they_have_room(tmp_path: Path, driver: FakeDriver) -> None:
    devices = Devices(lambda: driver, tmp_path)
    mine, other = gpu(0).uuid, gpu(1).uuid
    driver.devices = {mine: gpu(0), other: gpu(1)}
    for visible, preferred, chosen in (
        (("all",), (), mine),
        (("all",), (other,), other),
        (("all",), ("GPU-gone",), mine),
        (("0",), (), mine),
        (("0",), (mine,), mine),
        (("0",), (other,), mine),  # which it was never given
    ):
        with devices.reserve(held((0, 50_000)), visible, preferred=preferred) as where:
            assert where == {mine: chosen}
    # Somebody is there: it is waited for a moment, and then another has room, too.
    driver.devices[other] = gpu(1, free=100)
    slept: list[float] = []
    room = Room(tmp_path, driver, sleep=lambda seconds: slept.append(seconds) or time.sleep(seconds))  # type: ignore[func-returns-value]
    with room.reserve(held((0, 50_000)), timeout=60, preferred=(other,)) as where:
        assert where == {mine: mine} and 0.5 < sum(slept) < 5
    with devices.reserve(held((0, 50_000)), preferred=(other,)) as where:
        assert where == {mine: mine}
    driver.devices[mine] = gpu(0, free=100)
    with pytest.raises(GpuFullError), devices.reserve(held((0, 50_000)), preferred=(other,)):
        pytest.fail("there is no room")


# ---------------------------------------------------------------------- who holds device memory


def test_only_processes_with_the_devices_open_are_asked_about(tmp_path: Path) -> None:
    driver = FakeDriver()
    driver.start(11, 100)
    asked: list[int] = []
    driver.before = lambda step, pid: asked.append(pid)
    for pid, target in ((11, "/dev/nvidiactl"), (12, "/dev/nvidia-uvm"), (13, "/dev/null")):
        folder = tmp_path / str(pid) / "fd"
        folder.mkdir(parents=True)
        (folder / "3").symlink_to(target)
    assert holders(driver, [13, 12, 11, 99], proc=tmp_path) == [11]
    assert asked == [12, 11]


# ---------------------------------------------------------------------- the helper


def listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(str(path)) == 0


@pytest.fixture
def served(tmp_path: Path, driver: FakeDriver) -> Iterator[Path]:
    path = tmp_path / "gpu.sock"
    thread = threading.Thread(target=Helper(driver, path, idle=30).serve)
    thread.start()
    while not listening(path):  # its file is there a moment before it listens
        time.sleep(0.005)
    yield path
    path.unlink(missing_ok=True)
    thread.join(60)
    assert not thread.is_alive()


def test_the_helper_says_what_the_driver_says(served: Path, driver: FakeDriver) -> None:
    remote = Remote(served)
    assert remote.gpus() == driver.gpus() and remote.version() == "570.86.15"
    assert remote.state(11) == "running" and remote.state(99) is None
    assert remote.memory(11) == driver.memory(11)
    suspend(remote, PIDS)
    assert states(driver) == {"checkpointed"}
    resume(remote, PIDS, {})
    assert states(driver) == {"running"}
    with pytest.raises(DriverError) as caught:
        remote.unlock(11)
    assert caught.value.code == "CUDA_ERROR_ILLEGAL_STATE" and "running" in caught.value.message
    assert served.stat().st_mode & 0o777 == 0o600


def test_the_choreography_is_the_same_through_the_helper(served: Path, driver: FakeDriver) -> None:
    driver.refuse["checkpoint", 12] = DriverError("CUDA_ERROR_NOT_SUPPORTED", "")
    with pytest.raises(CheckpointError, match="checkpoint failed"):
        suspend(Remote(served), PIDS)
    assert states(driver) == {"running"}


def test_one_call_that_hangs_keeps_nobody_else(served: Path, driver: FakeDriver) -> None:
    begun, over = threading.Event(), threading.Event()
    driver.hang["lock", 11] = over
    driver.before = lambda step, pid: begun.set() if (step, pid) == ("lock", 11) else None
    slow = threading.Thread(target=Remote(served).lock, args=(11, 1.0))
    slow.start()
    try:
        assert begun.wait(60)
        Remote(served).lock(12, 1.0)
        assert driver.calls == [("lock", 12)] and slow.is_alive()
    finally:
        over.set()
        slow.join()


def test_who_hangs_up_leaves_no_files_open(served: Path) -> None:
    import array

    def attended() -> None:
        Remote(served).version()  # they are accepted in turn: all who connected before it have a thread now
        join("(_answer)")

    attended()
    before = opened()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, open("/dev/null") as file:
            client.connect(str(served))
            client.sendall(b'{"call": "version", "arguments": []}\n')
            rights = array.array("i", [file.fileno()])
            client.sendmsg([b'{"ha'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    attended()
    assert not left_open(before)


def test_nonsense_is_answered(served: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(served))
        with connection.makefile("rwb") as stream:
            for line in (
                b"nonsense",
                b"{}",
                b'{"call": "__init__", "arguments": []}',
                b'{"call": "state", "arguments": [1, 2]}',
            ):
                stream.write(line + b"\n")
                stream.flush()
                assert b'"error"' in stream.readline()


_SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from gpuckpt.cuda.helper import Helper
from tests.cuda_fake import FakeDriver
class Dies(FakeDriver):
    def checkpoint(self, pid):
        import os; os._exit(3)
driver = Dies()
driver.start(11, 100)
driver.processes[12] = driver.processes[11]
Helper(driver, Path(sys.argv[1]), idle=60.0).serve()
"""


def command(tmp_path: Path) -> tuple[str, ...]:
    script = tmp_path / "helper.py"
    script.write_text(_SCRIPT.format(path=[str(Path(__file__).parents[2])]))
    return (sys.executable, str(script))


def test_the_helper_is_started_once_and_again_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "run" / "gpu.sock"
    remotes = [Remote(path, argv=command(tmp_path)) for _ in range(6)]
    found: list[str] = []
    threads = [threading.Thread(target=lambda one=one: found.append(one.version())) for one in remotes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["570.86.15"] * 6
    inode = path.stat().st_ino
    assert remotes[0].state(11) == "running" and path.stat().st_ino == inode
    remotes[0].lock(11, 1.0)
    with pytest.raises(DaemonUnreachableError, match="ended while it was asked “checkpoint”"):
        remotes[0].checkpoint(11)
    assert remotes[0].state(11) == "running"  # another one
    path.unlink()  # it ends


def test_a_crash_in_the_midst_of_a_suspend_is_told(tmp_path: Path) -> None:
    path = tmp_path / "gpu.sock"
    remote = Remote(path, argv=command(tmp_path))
    with pytest.raises(CheckpointError, match="checkpoint failed") as caught:
        suspend(remote, [11])
    assert caught.value.cause and "ended while it was asked" in caught.value.cause
    path.unlink(missing_ok=True)


def test_the_helper_ends_when_nobody_asks(tmp_path: Path, driver: FakeDriver) -> None:
    path = tmp_path / "gpu.sock"
    helper = Helper(driver, path, idle=60)
    thread = threading.Thread(target=helper.serve, daemon=True)
    thread.start()
    while not listening(path):
        time.sleep(0.005)
    assert Remote(path).version()
    helper._idle = 0.05  # of which it would hardly have lived to be asked
    thread.join(60)
    assert not thread.is_alive() and not path.exists()


def test_who_is_at_the_door_when_it_ends_is_answered(tmp_path: Path, driver: FakeDriver) -> None:
    path = tmp_path / "gpu.sock"
    with socket.socket(socket.AF_UNIX) as client:

        class Ending(Helper):
            def _wanted(self, mine: int) -> bool:
                client.connect(str(path))
                client.sendall(b'{"call": "version", "arguments": []}\n')
                client.shutdown(socket.SHUT_WR)
                return False

        Ending(driver, path).serve()
        assert b"570.86.15" in client.recv(1 << 12)
    assert not path.exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('print(\'{"error": ["CUDA cannot be initialised", "why", "do"]}\')', "CUDA cannot be initialised"),
        ("raise SystemExit('no such thing')", "could not be started"),
        ("", "could not be started"),
    ],
)
def test_a_helper_that_cannot_start_says_why(tmp_path: Path, script: str, said: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(script)
    with pytest.raises(PreflightError, match=said):
        Remote(tmp_path / "gpu.sock", argv=(sys.executable, str(file))).version()
