"""The one door to other programs: what they see, when they are ended, what is said when they fail."""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpuckpt import proc
from gpuckpt.errors import DeadlineError, NotFoundError


def test_output_and_status() -> None:
    done = proc.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_failure_can_be_pasted_into_a_shell_and_shows_the_end_of_the_output() -> None:
    argv = ["sh", "-c", "seq 30 >&2; exit 3", "with space"]
    with pytest.raises(proc.CommandError, match="status 3") as caught:
        proc.run(argv)
    line = str(caught.value.cause).removeprefix("the command was: ")
    assert shlex.split(line) == argv
    assert caught.value.log == tuple(map(str, range(16, 31)))


def test_without_an_error_output_the_other_is_shown() -> None:
    with pytest.raises(proc.CommandError) as caught:
        proc.run(["sh", "-c", "echo why; false"])
    assert caught.value.log == ("why",)


def test_a_missing_program() -> None:
    with pytest.raises(NotFoundError, match="no such program"):
        proc.run(["gpuckpt-does-not-exist"])


def test_a_program_that_takes_too_long_is_killed() -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match=r"0\.1 s") as caught:
        proc.run([sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(60)"], timeout=0.1)
    assert time.monotonic() - begin < 50  # not 60
    assert caught.value.exit_code == 13


def test_secrets_of_the_caller_do_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PATH", "/home/user/bin")
    monkeypatch.setenv("LANG", "C.UTF-8")
    seen = dict(line.partition("=")[::2] for line in proc.run(["/usr/bin/env"], env={"EXTRA": "1"}).stdout.splitlines())
    assert "HF_TOKEN" not in seen
    assert seen["LANG"] == "C.UTF-8" and seen["EXTRA"] == "1"
    assert "/home/user/bin" not in seen["PATH"] and "/usr/bin" in seen["PATH"]


def test_a_path_before_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "criu").write_text("#!/bin/sh\necho ours\n")
    (tmp_path / "criu").chmod(0o755)
    assert proc.run(["sh", "-c", "criu"], path=[tmp_path]).stdout == "ours\n"
    assert proc.environment(path=["/a", Path("/b")])["PATH"].startswith("/a:/b:/usr/local/sbin")


def test_standard_input_is_closed() -> None:
    assert proc.run(["cat"]).stdout == ""


def test_bytes_that_are_no_text_are_no_trouble() -> None:
    assert proc.run(["printf", r"a\377b"]).stdout == "a�b"


def test_the_working_folder(tmp_path: Path) -> None:
    assert proc.run(["pwd"], cwd=tmp_path).stdout.strip() == str(tmp_path)


def test_a_daemon_has_its_own_session_and_a_log(tmp_path: Path) -> None:
    code = "import os; print(os.getsid(0) == os.getpid(), os.getcwd(), os.environ.get('A'), flush=True)"
    child = proc.spawn([sys.executable, "-c", code], log=tmp_path / "log", env={"A": "1"})
    assert child.wait(timeout=60) == 0
    assert (tmp_path / "log").read_text() == "True / 1\n"
    with pytest.raises(NotFoundError):
        proc.spawn(["gpuckpt-does-not-exist"], log=tmp_path / "log")


def test_tail_skips_empty_lines() -> None:
    assert proc.tail("a\n\n  \nb\nc\n", 2) == ("b", "c")
    assert proc.tail("") == ()


def test_tail_is_safe_to_print() -> None:
    assert proc.tail("\x1b[31mred\x1b[0m\tand\x07\x9b \x1b]0;title\x07plain\x00\n\x1b[2J\n") == ("red\tand plain",)
    assert proc.tail("x" * 10_000) == ("x" * 500 + "…",)


def test_the_end_of_a_process_is_waited_for_as_long_as_told() -> None:
    with subprocess.Popen(["cat", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdin.write(b"?\n")
        child.stdin.flush()
        child.stdout.readline()  # in the middle of exec(2) it has no command line
        began = time.monotonic()
        proc.wait_for_end(child.pid, "-", 0.05)
        assert time.monotonic() - began >= 0.05 and child.poll() is None
        closing = threading.Timer(0.05, child.stdin.close)
        closing.start()
        proc.wait_for_end(child.pid, "-", 60)
        assert child.poll() == 0
        closing.join()


def test_another_process_with_the_number_is_not_waited_for() -> None:
    proc.wait_for_end(os.getpid(), "no argument of ours", 60)


def test_a_process_that_has_ended_is_not_waited_for() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    proc.wait_for_end(child.pid, "true", 60)  # a zombie has no command line
    child.wait()
    proc.wait_for_end(child.pid, "true", 60)


# ---------------------------------------------------------------------- children that may be told to stop


def test_a_child_s_outputs_and_status() -> None:
    done = proc.Child(["sh", "-c", "echo out; echo err >&2; exit 3"]).wait(30)
    assert (done.code, done.stdout, done.stderr) == (3, "out\n", "err\n") and done.argv[0] == "sh"


def test_a_child_is_a_session_of_its_own_with_an_environment_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os; print(os.getsid(0) == os.getpid(), os.environ.get('HF_TOKEN'), os.environ['MORE'])"
    assert proc.Child([sys.executable, "-c", code], env={"MORE": "1"}).wait(30).stdout == "True None 1\n"


def test_programs_of_a_bundle_that_we_run_from_go_before_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc, "_BUNDLE", tmp_path)
    assert str(tmp_path) not in proc.environment()["PATH"]
    (tmp_path / "bundle.json").touch()
    assert proc.environment(path=["/first"])["PATH"].split(":")[:2] == ["/first", f"{tmp_path}/bin"]


def test_a_child_that_does_not_exist_says_so() -> None:
    done = proc.Child(["gpuckpt-does-not-exist"]).wait(30)
    assert done.code == 127 and "gpuckpt-does-not-exist" in done.stderr


def test_without_what_starts_children_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proc, "_PATH", "/nowhere")
    with pytest.raises(NotFoundError, match="setpriv"):
        proc.Child(["true"])


def test_a_child_that_is_interrupted_may_undo_what_it_has_begun() -> None:
    code = "import time\ntry:\n print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n print('undone')"
    child = proc.Child([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not child._out.seek(0, os.SEEK_END) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.interrupt()
    assert child.wait(30).stdout == "begun\nundone\n"
    child.interrupt()  # there is nobody any more


def test_a_child_that_takes_too_long_is_killed() -> None:
    child = proc.Child(["sh", "-c", "echo so far >&2; exec sleep 60"])
    with pytest.raises(DeadlineError, match=r"sh did not end within 0\.3 s"):
        child.wait(0.3)
    assert child._process.returncode == -9


def test_a_child_dies_with_whoever_has_started_it() -> None:
    code = (
        "import os, sys; from gpuckpt import proc; "
        "child = proc.Child(['sh', '-c', 'echo $$ >&2; exec sleep 60']); print(child._process.pid, flush=True); "
        "sys.stdin.read(); os._exit(1)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ
    ) as parent:
        assert parent.stdin and parent.stdout
        child = int(parent.stdout.readline())
        handle = os.pidfd_open(child)
        deadline = time.monotonic() + 30
        # Only when the program is what setpriv has become is it bound to its parent.
        program = Path(f"/proc/{child}/cmdline")
        while not program.read_bytes().startswith((b"sh\0", b"sleep\0")) and time.monotonic() < deadline:
            time.sleep(0.01)
        parent.stdin.close()
        assert select.select([handle], [], [], 30)[0]
        os.close(handle)


def test_who_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not proc.is_killed(process.pid)
        process.send_signal(signal.SIGSTOP)
        assert not proc.is_killed(process.pid)
        process.kill()
        process.wait()
        assert proc.is_killed(process.pid)
    # One in a frozen group is still there; the signal waits.
    status = tmp_path / "status"
    monkeypatch.setattr(proc, "Path", lambda path: status)
    for text, killed in (
        ("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", True),
        ("SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", True),
        ("SigPnd:\t0000000000004000\nShdPnd:\t0000000000010000\nSigBlk:\t0000000000000100\n", False),
    ):
        status.write_text(text)
        assert proc.is_killed(1) is killed
