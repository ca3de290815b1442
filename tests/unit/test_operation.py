"""CRIU's options, and the action script that CRIU calls at its stages: the real one, run by bash."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.criu.operation import STAGES, FailedStep, Operation, action_script, check_hooks
from gpuckpt.errors import PreflightError


@pytest.fixture
def operation(tmp_path: Path) -> Operation:
    return Operation(tmp_path / "criu")


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    return tmp_path / "hooks.d"


def write(operation: Operation, hooks: Path, **changes: Any) -> None:
    given: dict[str, Any] = {
        "golden": "gold",
        "replica": "rep",
        "hooks": hooks,
        "tcp_established": False,
        "ghost_limit": 1 << 20,
        "loopback": False,
        "hook_seconds": 5.0,
    }
    operation.write(**given | changes)


def call(operation: Operation, stage: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What CRIU does: run the configured script with the stage in the environment."""
    script = next(line.split()[1] for line in operation.config.read_text().splitlines() if "action-script" in line)
    given = {"CRTOOLS_SCRIPT_ACTION": stage, "CRTOOLS_IMAGE_DIR": "/images", "CRTOOLS_INIT_PID": "99999999"}
    return subprocess.run(
        [script], env={"PATH": os.environ["PATH"], **given, **environment}, capture_output=True, text=True, check=False
    )


def hook(hooks: Path, stage: str, name: str, script: str, *, mode: int = 0o755) -> Path:
    (hooks / stage).mkdir(parents=True, exist_ok=True)
    path = hooks / stage / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(mode)
    return path


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("established", "option"), [(False, "tcp-close"), (True, "tcp-established")])
def test_options(operation: Operation, hooks: Path, established: bool, option: str) -> None:
    write(operation, hooks, tcp_established=established)
    lines = operation.config.read_text().splitlines()
    assert {option, "ghost-limit 1048576", f"action-script {operation.folder / 'action'}"} <= set(lines)
    assert len({"tcp-close", "tcp-established"} & set(lines)) == 1
    assert (operation.folder / "action").resolve() == action_script()
    assert os.access(action_script(), os.X_OK)


def test_the_folder_is_private(operation: Operation, hooks: Path) -> None:
    write(operation, hooks)
    assert operation.folder.stat().st_mode & 0o077 == 0


def test_a_new_operation_forgets_the_earlier_one(operation: Operation, hooks: Path) -> None:
    hook(hooks, "pre-dump", "a", "echo no; exit 1")
    write(operation, hooks)
    assert call(operation, "pre-dump").returncode != 0
    assert operation.failed_step() and operation.marks()
    write(operation, hooks)
    assert operation.failed_step() is None and operation.marks() == []


@pytest.mark.parametrize("which", ["", "network-lock", "network-lock/a"])
def test_hooks_that_others_may_change_are_refused(operation: Operation, hooks: Path, which: str) -> None:
    hook(hooks, "network-lock", "a", "true")
    (hooks / which).chmod(0o775)
    with pytest.raises(PreflightError, match=r"can be changed by others|others than root may change"):
        write(operation, hooks)
    assert not operation.config.exists()
    (hooks / which).chmod(0o755)
    write(operation, hooks)


def test_hooks_of_another_user_are_refused(hooks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: hooks.stat().st_uid + 1)
    with pytest.raises(PreflightError):
        check_hooks(hooks)


# --- stages ---------------------------------------------------------------------------------------------------


def test_without_a_script_called_there_are_no_marks(operation: Operation) -> None:
    assert operation.marks() == []
    assert operation.failed_step() is None


def test_a_runtime_that_did_not_call_the_script(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    write(operation, hooks)
    with pytest.raises(PreflightError) as caught:
        operation.require_marks()
    assert caught.value.exit_code == 4 and caught.value.cause == "the action script was not called"
    call(operation, "orphan-pts-master")
    with pytest.raises(PreflightError):
        operation.require_marks()
    call(operation, "post-dump")
    operation.require_marks()
    operation.require_marks(tmp_path)
    with pytest.raises(PreflightError) as caught:
        operation.require_marks(tmp_path, tmp_path / "absent")
    assert caught.value.cause == f"{tmp_path / 'absent'} was not made"


def test_stages_are_noted_in_order_on_the_monotonic_clock(operation: Operation, hooks: Path) -> None:
    write(operation, hooks)
    begin = time.monotonic_ns()
    for stage in STAGES:
        done = call(operation, stage)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    end = time.monotonic_ns()
    # Two clocks are read one after the other; who is kept waiting in between finds later times.
    marks = min((operation.marks() for _ in range(50)), key=lambda marks: marks[0][1])
    assert [label for label, _ in marks] == list(STAGES.values())
    times = [at for _, at in marks]
    assert times == sorted(times)
    slack = 5_000_000
    assert begin - slack <= times[0] and times[-1] <= end + slack


def test_a_stage_that_is_not_known_is_no_mark(operation: Operation, hooks: Path) -> None:
    write(operation, hooks)
    assert call(operation, "orphan-pts-master").returncode == 0
    assert operation.marks() == []


def test_another_language_does_not_change_the_notes(operation: Operation, hooks: Path) -> None:
    write(operation, hooks)
    call(operation, "pre-dump", LC_ALL="de_DE.UTF-8", LC_NUMERIC="de_DE.UTF-8")
    assert len(operation.marks()) == 1


# --- hooks ----------------------------------------------------------------------------------------------------


def test_hooks_run_in_order_and_know_where_they_are(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name in ("20-second", "10-first"):
        hook(
            hooks,
            "post-restore",
            name,
            f'echo "{name} $GPUCKPT_STAGE $GPUCKPT_GOLDEN $GPUCKPT_REPLICA $GPUCKPT_PID $GPUCKPT_IMAGES" >>{log}',
        )
    hook(hooks, "post-restore", "30-not-executable", f"echo never >>{log}", mode=0o644)
    (hooks / "post-restore" / "40-folder").mkdir()
    hook(hooks, "pre-dump", "other", f"echo never >>{log}")
    write(operation, hooks)
    assert call(operation, "post-restore").returncode == 0
    tail = "post-restore gold rep 99999999 /images"
    assert log.read_text().splitlines() == [f"10-first {tail}", f"20-second {tail}"]


def test_a_failing_hook_stops_the_operation(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    first = hook(hooks, "pre-dump", "a", "echo out; echo err >&2; exit 7")
    hook(hooks, "pre-dump", "b", f"touch {tmp_path}/ran")
    write(operation, hooks)
    assert call(operation, "pre-dump").returncode != 0
    assert operation.failed_step() == FailedStep(f"{first} ended with status 7", ("out", "err"), users=True)
    assert not (tmp_path / "ran").exists()


def test_a_hook_that_cannot_be_executed_fails(operation: Operation, hooks: Path) -> None:
    path = hook(hooks, "pre-dump", "a", "true")
    path.write_text("#!/nonexistent\n")
    write(operation, hooks)
    assert call(operation, "pre-dump").returncode != 0
    assert operation.failed_step() is not None


def test_the_output_of_a_hook_is_cut(operation: Operation, hooks: Path) -> None:
    hook(hooks, "pre-dump", "a", "seq 100; exit 1")
    write(operation, hooks)
    call(operation, "pre-dump")
    failed = operation.failed_step()
    assert failed is not None and failed.output == tuple(map(str, range(86, 101)))


def test_a_hook_does_not_wait_for_input(operation: Operation, hooks: Path) -> None:
    hook(hooks, "pre-dump", "a", "! read -r line")
    write(operation, hooks)
    assert call(operation, "pre-dump").returncode == 0


# --- copies ---------------------------------------------------------------------------------------------------


def test_files_are_copied_at_the_end_of_the_dump_only(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    layer = tmp_path / "an upper = layer"
    (layer / "deep").mkdir(parents=True)
    (layer / "deep" / "file").write_text("content")
    (layer / "deep" / "file").chmod(0o640)
    (layer / "link").symlink_to("/etc/passwd")
    with (layer / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 24)
    volume = tmp_path / "volume"
    volume.mkdir()
    (tmp_path / "golden" / "volumes").mkdir(parents=True)
    target = tmp_path / "golden" / "rootfs"
    write(operation, hooks, copies=[(layer, target), (volume, tmp_path / "golden" / "volumes" / "data")])
    for stage in ("pre-dump", "network-lock", "network-unlock"):
        assert call(operation, stage).returncode == 0
        assert not target.exists()
    assert call(operation, "post-dump").returncode == 0
    assert (target / "deep" / "file").read_text() == "content"
    assert (target / "deep" / "file").stat().st_mode & 0o777 == 0o640
    assert (target / "link").readlink() == Path("/etc/passwd")
    assert (target / "sparse").stat().st_size == 1 << 24 and (target / "sparse").stat().st_blocks < 1 << 10
    assert (tmp_path / "golden" / "volumes" / "data").is_dir()


def test_a_copy_that_fails_stops_the_dump(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    write(operation, hooks, copies=[(tmp_path / "absent", tmp_path / "target")])
    assert call(operation, "post-dump").returncode != 0
    failed = operation.failed_step()
    assert failed is not None and failed.name == "copying the written files" and not failed.users
    assert "absent" in " ".join(failed.output)


def test_the_user_s_hooks_see_the_copies(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    hook(hooks, "post-dump", "a", f"test -d {tmp_path}/target")
    write(operation, hooks, copies=[(tmp_path / "layer", tmp_path / "target")])
    assert call(operation, "post-dump").returncode == 0


# --- loopback -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loopback", "stage"), [(True, "setup-namespaces"), (True, "pre-resume"), (False, "setup-namespaces")]
)
def test_the_loopback_of_an_empty_network_is_switched_on(
    operation: Operation, hooks: Path, tmp_path: Path, loopback: bool, stage: str
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nsenter").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/called\n')
    (programs / "nsenter").chmod(0o755)
    write(operation, hooks, loopback=loopback)
    assert call(operation, stage, PATH=f"{programs}:{os.environ['PATH']}").returncode == 0
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert operation.failed_step() is None
    expected = "--target 99999999 --net ip link set lo up\n" if loopback and stage == "setup-namespaces" else ""
    assert called == expected


def test_a_loopback_that_stays_down_stops_the_restore(operation: Operation, hooks: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nsenter").write_text("#!/bin/sh\necho not permitted >&2\nexit 1\n")
    (programs / "nsenter").chmod(0o755)
    write(operation, hooks, loopback=True)
    assert call(operation, "setup-namespaces", PATH=f"{programs}:{os.environ['PATH']}").returncode != 0
    assert operation.failed_step() == FailedStep("setting the loopback interface up", ("not permitted",), users=False)
