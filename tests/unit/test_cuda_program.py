"""What is made of the words of cuda-checkpoint and nvidia-smi, and which way to the driver is chosen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt.config import Settings
from gpuckpt.cuda import checks, choice
from gpuckpt.cuda.devices import Devices
from gpuckpt.cuda.driver import DriverError, Gpu, host_memory
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.remote import Remote

MIB = 1 << 20
UUID = "GPU-eea0d83f-ebcd-ac27-6b3e-bec2a19724e6"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are looked for."""
    monkeypatch.setattr("gpuckpt.proc._PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def says(folder: Path, name: str, text: str, code: int = 0, to: int = 1) -> Path:
    """A program that says this, and ends so."""
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat >&{to} <<'END'\n{text}\nEND\nexit {code}\n")
    file.chmod(0o755)
    return file


# ---------------------------------------------------------------------- cuda-checkpoint


@pytest.mark.parametrize("word", ["running", "locked", "checkpointed", "failed"])
def test_states(folder: Path, word: str) -> None:
    assert Program(says(folder, "cuda-checkpoint", word)).state(11) == word


@pytest.mark.parametrize("to", [1, 2])
@pytest.mark.parametrize("words", ["initialization error", "invalid argument"])
def test_a_process_without_cuda(folder: Path, words: str, to: int) -> None:
    said = f'Error getting process state for process ID 11: "{words}"'
    assert Program(says(folder, "cuda-checkpoint", said, 3, to)).state(11) is None


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        # The machine cannot; to take it for a process without CUDA would freeze a server with its device state lost.
        ('Error initializing CUDA: "initialization error"', 3, "CUDA_ERROR_NOT_INITIALIZED"),
        ('Error initializing CUDA: "OS call failed or operation not supported on this OS"', 48, "CUDA_ERROR_OPERATING"),
        ('Error getting process state for process ID 11: "operation not supported"', 33, "CUDA_ERROR_NOT_SUPPORTED"),
        ("cuda-checkpoint: libcuda.so.1: cannot open shared object file: No such file or directory", 127, "STATUS_127"),
        ("Invalid option: --get-state", 1, "STATUS_1"),  # that of 550
    ],
)
def test_whatever_else_is_wrong_is_an_error(folder: Path, said: str, status: int, code: str) -> None:
    with pytest.raises(DriverError) as caught:
        Program(says(folder, "cuda-checkpoint", said, status)).state(11)
    assert caught.value.code.startswith(code) and caught.value.detail == said


def test_a_word_that_is_no_state(folder: Path) -> None:
    with pytest.raises(DriverError, match="UNKNOWN_STATE: paused"):
        Program(says(folder, "cuda-checkpoint", "paused")).state(11)


def test_a_program_that_is_not_there(folder: Path) -> None:
    program = Program(folder / "cuda-checkpoint")
    with pytest.raises(DriverError, match="NO_PROGRAM"):
        program.state(11)
    with pytest.raises(DriverError, match=r"NVIDIA_SMI: .*no such program"):
        program.gpus()


# ---------------------------------------------------------------------- nvidia-smi


@pytest.mark.parametrize(
    ("row", "gpu"),
    [
        (f"{UUID}, 81559, 81007, Disabled, NVIDIA H100", Gpu(UUID, "NVIDIA H100", 81559 * MIB, 81007 * MIB)),
        (f"{UUID}, 40960, 512, Enabled, NVIDIA A100", Gpu(UUID, "NVIDIA A100", 40960 * MIB, 512 * MIB, True)),
        (f"{UUID}, 8192, 8000, [N/A], NVIDIA X, Y", Gpu(UUID, "NVIDIA X, Y", 8192 * MIB, 8000 * MIB)),
        (f"{UUID}, 8192, 8000, [Not Supported], Tesla", Gpu(UUID, "Tesla", 8192 * MIB, 8000 * MIB)),
    ],
)
def test_devices(folder: Path, row: str, gpu: Gpu) -> None:
    says(folder, "nvidia-smi", row)
    assert Program(folder / "none").gpus() == (gpu,)


def test_a_device_that_shares_the_host_s_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(folder, "nvidia-smi", f"{UUID}, [N/A], [N/A], [N/A], NVIDIA GB10")
    monkeypatch.setattr("gpuckpt.cuda.program.host_memory", lambda: (128, 64))
    assert Program(folder / "none").gpus() == (Gpu(UUID, "NVIDIA GB10", 128, 64),)


def test_memory_of_the_host(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text(
        "MemTotal:       127600748 kB\nMemFree:  1 kB\nMemAvailable:   118566368 kB\nHugePages_Total:   0\n"
    )
    assert host_memory(file) == (127600748 << 10, 118566368 << 10)


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        ("No devices were found", 6, "No devices were found"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, "couldn't communicate"),
        (
            f"{UUID}, 81559, 81007, Disabled, NVIDIA H100\nUnable to determine the device handle for GPU0: GPU is lost",
            0,
            "GPU is lost",
        ),
        (f"{UUID}, [Unknown Error], [Unknown Error], [N/A], NVIDIA H100", 0, "Unknown Error"),
        ("", 15, "status 15"),
    ],
)
def test_a_device_or_driver_that_fails_is_told(folder: Path, said: str, status: int, why: str) -> None:
    says(folder, "nvidia-smi", said, status)
    with pytest.raises(DriverError, match="NVIDIA_SMI") as caught:
        Program(folder / "none").gpus()
    assert why in caught.value.detail


def test_what_a_process_holds(folder: Path) -> None:
    rows = (f"{UUID}, 11, 1000", f"{UUID}, 110, 5000", "GPU-2, 11, 24", f"{UUID}, 11, 1", f"{UUID}, [N/A], [N/A]")
    says(folder, "nvidia-smi", "\n".join(rows))
    program = Program(folder / "none")
    assert program.memory(11) == {UUID: 1001 * MIB, "GPU-2": 24 * MIB}
    assert program.memory(12) == {}
    says(folder, "nvidia-smi", f"{UUID}, 11, [N/A]")
    with pytest.raises(DriverError, match=r"process 11 holds: \[N/A\]"):
        program.memory(11)
    assert program.memory(12) == {}


# ---------------------------------------------------------------------- which way


@pytest.mark.parametrize(
    ("packages", "version", "program", "kind"),
    [
        (True, None, True, Remote),
        (True, "570.86.15", True, Remote),
        (True, "unknown", True, Remote),
        (True, "565.57.01", True, Program),  # the packages find no checkpoints in it
        (True, "565.57.01", False, Remote),
        (False, "570.86.15", True, Program),
        (False, "570.86.15", False, Remote),
    ],
)
def test_the_way_to_the_driver(
    folder: Path, monkeypatch: pytest.MonkeyPatch, packages: bool, version: str | None, program: bool, kind: type
) -> None:
    monkeypatch.setattr(choice, "bindings_installed", lambda: packages)
    monkeypatch.setattr(checks, "driver_version", lambda: version)
    if program:
        (folder / "bin").mkdir()
        says(folder / "bin", "cuda-checkpoint", "")
    assert type(choice.driver(folder / "run", folder)) is kind
    assert not (folder / "run").exists()  # nothing is started before it is asked


def test_nothing_is_started_on_a_machine_without_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(remote: Remote) -> None:
        raise AssertionError("the helper was started")

    monkeypatch.setattr(Remote, "_start", started)
    monkeypatch.setattr(choice, "bindings_installed", lambda: True)
    found = checks.all_checks(Settings(), driver_file=folder / "absent", cdi_folders=())
    assert {check.verdict for check in found} == {"skip"}
    made = Devices(lambda: choice.driver(folder, folder), folder / "room", below=lambda first: [os.getpid()])
    assert made.holders(1) == [] and made.held(()) == () and made.inside(1)
    made.check((), ("all",))
    with made.reserve(()) as chosen:
        assert chosen == {}
