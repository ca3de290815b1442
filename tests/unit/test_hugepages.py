"""The machine's huge page mode is borrowed and always comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpuckpt.host import hugepages


class Sysfs:
    """A file that answers like sysfs: one word is written, all words are read with the chosen one in brackets.

    A real file cannot rewrite itself, so the test does it between steps.
    """

    def __init__(self, folder: Path, mode: str = "madvise") -> None:
        self.file = folder / "enabled"
        self.set(mode)

    def set(self, mode: str) -> None:
        self.file.write_text(" ".join(f"[{word}]" if word == mode else word for word in ("always", "madvise", "never")))

    @property
    def mode(self) -> str | None:
        return hugepages.current(self.file)


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def left(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "thp").iterdir()}


HOLDER = """
import sys, time
from pathlib import Path
from gpuckpt.host.hugepages import transparent_huge_pages_always
with transparent_huge_pages_always(Path(sys.argv[1]), file=Path(sys.argv[2])) as on:
    print(on, flush=True)
    sys.stdin.read()
"""


def holder(run_dir: Path, sysfs: Sysfs) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), str(sysfs.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    return child


def end(child: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        child.send_signal(signal.SIGKILL)
    child.communicate()


def test_current_reads_the_bracketed_word(tmp_path: Path, sysfs: Sysfs) -> None:
    assert sysfs.mode == "madvise"
    assert hugepages.current(tmp_path / "absent") is None


def test_the_mode_comes_back_also_after_an_error(run_dir: Path, sysfs: Sysfs) -> None:
    def restore() -> None:
        with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file) as on:
            assert on and sysfs.mode == "always"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        restore()
    assert sysfs.mode == "madvise"
    assert left(run_dir) == {"lock"}


def test_always_already_is_left_alone(run_dir: Path, sysfs: Sysfs) -> None:
    sysfs.set("always")
    with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file) as on:
        assert on
    assert sysfs.mode == "always"


def test_a_kernel_without_huge_pages_is_no_error(run_dir: Path, tmp_path: Path) -> None:
    with hugepages.transparent_huge_pages_always(run_dir, file=tmp_path / "absent") as on:
        assert not on
    assert not run_dir.exists()


def test_an_administrator_who_changed_it_meanwhile_is_right(run_dir: Path, sysfs: Sysfs) -> None:
    with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file):
        sysfs.set("never")
    assert sysfs.mode == "never"


def test_the_last_of_several_processes_puts_it_back(run_dir: Path, sysfs: Sysfs) -> None:
    first, second = holder(run_dir, sysfs), holder(run_dir, sysfs)
    end(first)
    assert sysfs.mode == "always"
    assert not hugepages.sweep(run_dir, file=sysfs.file)
    end(second)
    assert sysfs.mode == "madvise"


def test_threads_of_one_process_count_separately(run_dir: Path, sysfs: Sysfs) -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file):
        thread.start()
        assert inside.wait(60)
    assert sysfs.mode == "always"
    leave.set()
    thread.join()
    assert sysfs.mode == "madvise"


def test_sweep_repairs_what_a_kill_left_and_only_then(run_dir: Path, sysfs: Sysfs) -> None:
    assert not hugepages.sweep(run_dir, file=sysfs.file)
    end(holder(run_dir, sysfs), kill=True)
    assert sysfs.mode == "always"
    check = hugepages.check(run_dir, file=sysfs.file)
    assert check.verdict == "warn" and check.mend == f"echo madvise > {sysfs.file}"
    assert check.apply is not None
    check.apply()
    assert sysfs.mode == "madvise"
    assert not hugepages.sweep(run_dir, file=sysfs.file)
    assert left(run_dir) == {"lock"}


def test_the_next_holder_inherits_the_original_of_a_killed_one(run_dir: Path, sysfs: Sysfs) -> None:
    end(holder(run_dir, sysfs), kill=True)
    with hugepages.transparent_huge_pages_always(run_dir, file=sysfs.file):
        assert sysfs.mode == "always"
    assert sysfs.mode == "madvise"


def test_a_record_of_another_boot_is_worthless(run_dir: Path, sysfs: Sysfs) -> None:
    (run_dir / "thp").mkdir(parents=True)
    (run_dir / "thp" / "original.json").write_text(json.dumps({"original": "never", "boot": "another"}))
    sysfs.set("always")
    assert not hugepages.left_over(run_dir)
    assert not hugepages.sweep(run_dir, file=sysfs.file)
    assert sysfs.mode == "always"
    assert left(run_dir) == {"lock"}


def test_deny_of_shared_memory_is_a_warning(run_dir: Path, sysfs: Sysfs, tmp_path: Path) -> None:
    shmem = tmp_path / "shmem"
    shmem.write_text("always within_size advise never [deny] force")
    check = hugepages.check(run_dir, file=sysfs.file, shmem=shmem)
    assert check.verdict == "warn" and "deny" in check.why
