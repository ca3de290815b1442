"""The profile in real containers: what the runtime compiled and installed is fetched back and executed here.

Calling every system call to see what it answers would be unsafe (exit, fork, pause, …) and would test the kernel as
well as the filter. Instead the filter's own program is read from a process in the container
(PTRACE_SECCOMP_GET_FILTER) and interpreted for every system call number.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import random
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpuckpt import proc
from seccomp import derive

pytestmark = pytest.mark.integration

IO_URING_NUMBERS = {425: "io_uring_setup", 426: "io_uring_enter", 427: "io_uring_register"}  # on every architecture
HIGHEST_NUMBER = 470


@dataclass(frozen=True)
class Machine:
    """The ABIs of a machine as (AUDIT_ARCH_*, bits of the number), its native one first, and two call numbers."""

    abis: tuple[tuple[int, int], ...]
    getpid: int
    acct: int

    @property
    def native(self) -> int:
        return self.abis[0][0]


MACHINE = {
    "x86_64": Machine(((0xC000_003E, 0), (0xC000_003E, 0x4000_0000), (0x4000_0003, 0)), getpid=39, acct=163),
    "aarch64": Machine(((0xC000_00B7, 0), (0x4000_0028, 0)), getpid=172, acct=89),
}[platform.machine()]
RET_ALLOW, RET_ERRNO = 0x7FFF_0000, 0x0005_0000

# --- classic BPF ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """``struct sock_filter`` of linux/filter.h."""

    code: int
    jt: int
    jf: int
    k: int


Program = tuple[Instruction, ...]


def execute(program: Program, data: bytes) -> tuple[int, bool]:
    """Run ``program`` over ``data`` (struct seccomp_data); its result, and whether it looked at the arguments.

    Only what the kernel admits in seccomp filters and libseccomp emits is known; anything else is an error here.
    """
    a = x = position = 0
    memory = [0] * 16
    looked = False
    while True:
        step = program[position]
        position += 1
        kind = step.code & 0x07
        operand = x if step.code & 0x08 else step.k
        if step.code == 0x20:  # LD W ABS: a word of struct seccomp_data {nr, arch, ip[2], args[12]}
            a = int(struct.unpack_from("<I", data, step.k)[0])
            looked = looked or step.k >= 16
        elif step.code in (0x00, 0x01):  # LD, LDX IMM
            a, x = (step.k, x) if step.code == 0x00 else (a, step.k)
        elif step.code in (0x60, 0x61):  # LD, LDX MEM
            a, x = (memory[step.k], x) if step.code == 0x60 else (a, memory[step.k])
        elif step.code in (0x02, 0x03):  # ST, STX
            memory[step.k] = a if step.code == 0x02 else x
        elif step.code in (0x07, 0x87):  # TAX, TXA
            a, x = (a, a) if step.code == 0x07 else (x, x)
        elif kind == 0x04 and step.code & 0xF0 in (0x40, 0x50):  # OR, AND
            a = a | operand if step.code & 0xF0 == 0x40 else a & operand
        elif step.code == 0x05:  # JA
            position += step.k
        elif kind == 0x05 and step.code & 0xF0 in (0x10, 0x20, 0x30, 0x40):  # JEQ, JGT, JGE, JSET
            holds = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}
            position += step.jt if holds[step.code & 0xF0] else step.jf
        elif kind == 0x06:  # RET K, RET A
            return (a if step.code & 0x18 == 0x10 else step.k), looked
        else:
            raise NotImplementedError(f"BPF instruction {step} at {position - 1}")


def answer(programs: Sequence[Program], arch: int, number: int, arguments: Sequence[int]) -> tuple[int, bool]:
    """What the kernel does with the call under all ``programs``: the strictest action wins (seccomp(2))."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    results = [execute(program, data) for program in programs]

    def strictness(value: int) -> int:  # the action, compared as a signed number; the lowest is the strictest
        action = value & 0xFFFF_0000
        return action - (1 << 32) if action & 0x8000_0000 else action

    return min((value for value, _ in results), key=strictness), any(looked for _, looked in results)


# --- ptrace ---------------------------------------------------------------------------------------------------

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_SECCOMP_GET_FILTER = 17, 0x4206, 0x4207, 0x420C
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request: int, pid: int, address: int = 0, data: ctypes.Array[ctypes.c_char] | None = None) -> int:
    result = int(_LIBC.ptrace(request, pid, address, data))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request:#x} on {pid}: {os.strerror(number)}")
    return result


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stopped under ptrace (seized: it sees no signal of it), running again afterwards."""
    ptrace(PTRACE_SEIZE, pid)
    try:
        ptrace(PTRACE_INTERRUPT, pid)
        os.waitpid(pid, 0x4000_0000)  # __WALL
        yield
    finally:
        ptrace(PTRACE_DETACH, pid)


def installed_filters(pid: int) -> list[Program]:
    """The seccomp programs of ``pid``. The kernel gives them to CAP_SYS_ADMIN that is under no filter itself."""
    programs: list[Program] = []
    with stopped(pid):
        while True:
            try:
                count = ptrace(PTRACE_SECCOMP_GET_FILTER, pid, len(programs))
            except OSError as error:
                if error.errno == errno.ENOENT:  # no filter of that index
                    return programs
                raise
            buffer = ctypes.create_string_buffer(count * 8)
            ptrace(PTRACE_SECCOMP_GET_FILTER, pid, len(programs), buffer)
            programs.append(tuple(Instruction(*fields) for fields in struct.iter_unpack("<HBBI", buffer.raw)))


# --- containers -----------------------------------------------------------------------------------------------

# Runs in the container: the real answers of the kernel to the three calls with arguments that are invalid anyway.
_INSIDE = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
answers = []
for number in (425, 426, 427):
    result = libc.syscall(number, -1, 0, 0, 0, 0, 0)
    answers.append(ctypes.get_errno() if result < 0 else 0)
print("answers", *answers, flush=True)
time.sleep(300)
"""

Run = Callable[[Path | None], tuple[list[Program], list[int]]]


@pytest.fixture
def in_container(tmp_path: Path) -> Iterator[Run]:
    """A function: start a container under a profile, return its filters and what the io_uring calls answered."""
    configuration = tmp_path / "containers.conf"
    configuration.write_text(
        '[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n'
        '[network]\nnetwork_backend="netavark"\n'
    )
    env = {"CONTAINERS_CONF": str(configuration)}
    names: list[str] = []

    def run(profile: Path | None) -> tuple[list[Program], list[int]]:
        name = f"gpuckpt-test-{uuid.uuid4().hex[:12]}"
        names.append(name)
        security = [] if profile is None else ["--security-opt", f"seccomp={profile}"]
        limits = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=8192:8192"]
        proc.run(
            ["podman", "run", "--detach", "--name", name, "--runtime", "runc", "--network", "none", *limits]
            + [*security, "--log-driver", "k8s-file", "--rootfs", "/:O", "/usr/bin/python3", "-c", _INSIDE],
            env=env,
        )
        answers: list[int] | None = None
        deadline = time.monotonic() + 180
        while answers is None and time.monotonic() < deadline:
            words = proc.run(["podman", "logs", name], env=env).stdout.split()
            if words[:1] == ["answers"] and len(words) == 4:
                answers = [int(word) for word in words[1:]]
            else:
                time.sleep(0.05)
        assert answers is not None, "the container printed nothing"
        pid = int(proc.run(["podman", "inspect", "--format", "{{.State.Pid}}", name], env=env).stdout)
        return installed_filters(pid), answers

    yield run
    for name in names:
        proc.run(["podman", "rm", "--force", "--time", "0", name], env=env, check=False)


def sample_arguments(profile: dict[str, Any]) -> list[tuple[int, ...]]:
    """Arguments worth trying: nothing, everything, at and around each value that a rule compares with, and random."""
    samples: list[tuple[int, ...]] = [(0,) * 6, (2**64 - 1,) * 6, (1,) * 6]
    for rule in profile["syscalls"]:
        conditions = rule.get("args") or []
        for offset in (-1, 0, 1, 1 << 32):
            arguments = [0] * 6
            for condition in conditions:
                arguments[condition["index"]] = (condition["value"] + offset) % 2**64
            samples.append(tuple(arguments))
    generator = random.Random(0)
    samples += [tuple(generator.getrandbits(64) for _ in range(6)) for _ in range(8)]
    return sorted(set(samples))


def assert_only_io_uring_differs(
    before: Sequence[Program], after: Sequence[Program], samples: Sequence[tuple[int, ...]]
) -> int:
    """Compare the filters for every call; returns how many of the calls depend on their arguments."""
    depending = 0
    for arch, bit in MACHINE.abis:
        for number in range(HIGHEST_NUMBER + 1):
            _, looked_before = answer(before, arch, number | bit, (0,) * 6)
            _, looked_after = answer(after, arch, number | bit, (0,) * 6)
            looked = looked_before or looked_after
            depending += looked
            # A program that does not look at the arguments gives one answer for all of them.
            for arguments in samples if looked else [(0,) * 6]:
                old, _ = answer(before, arch, number | bit, arguments)
                new, _ = answer(after, arch, number | bit, arguments)
                if number in IO_URING_NUMBERS:
                    assert new == RET_ERRNO | errno.ENOSYS, f"{IO_URING_NUMBERS[number]} on {arch:#x} answers {new:#x}"
                else:
                    assert new == old, f"call {number} on {arch:#x} with {arguments}: {old:#x} became {new:#x}"
    return depending


def _allowing_io_uring(profile: dict[str, Any]) -> dict[str, Any]:
    return {**profile, "syscalls": [*profile["syscalls"], {"names": [*derive.IO_URING], "action": "SCMP_ACT_ALLOW"}]}


def _answering_eperm(profile: dict[str, Any]) -> dict[str, Any]:
    return {**profile, "defaultErrnoRet": errno.EPERM, "defaultErrno": "EPERM"}


@pytest.mark.parametrize(
    ("change", "original_answers"),
    [
        pytest.param(None, None, id="the distribution's default"),
        pytest.param(_allowing_io_uring, RET_ALLOW, id="a default that allows io_uring"),
        pytest.param(_answering_eperm, RET_ERRNO | errno.EPERM, id="a default that answers EPERM"),
    ],
)
def test_only_io_uring_differs(
    change: Callable[[dict[str, Any]], dict[str, Any]] | None,
    original_answers: int | None,
    in_container: Run,
    tmp_path: Path,
) -> None:
    original = json.loads(derive.DEFAULT_PROFILE.read_text(encoding="utf-8"))
    source: Path | None = None  # without --security-opt: what podman takes by itself
    if change is not None:
        original = change(original)
        source = tmp_path / "source.json"
        source.write_text(json.dumps(original))
    derived = tmp_path / "derived.json"
    derived.write_text(derive.render(derive.derive(original)))

    before, answers_before = in_container(source)
    after, answers_after = in_container(derived)

    assert before, "the container runs under a filter"
    assert answers_after == [errno.ENOSYS] * 3
    if original_answers is not None:
        zeros = (0,) * 6
        assert {answer(before, MACHINE.native, number, zeros)[0] for number in IO_URING_NUMBERS} == {original_answers}
        assert errno.ENOSYS not in answers_before
    assert answer(after, MACHINE.native, MACHINE.getpid, (0,) * 6)[0] == RET_ALLOW
    assert answer(after, MACHINE.native, MACHINE.acct, (0,) * 6)[0] == RET_ERRNO | errno.EPERM
    depending = assert_only_io_uring_differs(before, after, sample_arguments(original))
    assert depending > 0, "no call depends on its arguments: then the samples prove nothing"


def test_the_committed_profile(in_container: Run) -> None:
    filters, answers = in_container(derive.DERIVED_PROFILE)
    assert answers == [errno.ENOSYS] * 3
    for number in IO_URING_NUMBERS:
        assert answer(filters, MACHINE.native, number, (0,) * 6)[0] == RET_ERRNO | errno.ENOSYS
