"""Any profile is what it was but for io_uring, and the filter of one computes as the kernel does."""

from __future__ import annotations

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.criu import seccomp_filter
from gpuckpt.criu.seccomp_filter import Call
from seccomp import derive
from tests.unit.test_seccomp import Profile, Rule, assert_io_uring_answers_enosys
from tests.unit.test_seccomp_filter import LD_ABS, LD_MEM, RET_A, ST, TAX, X86_64, argument, program

_CALLS = ("accept4", "bpf", "clone", "futex", "openat", "personality", "read", "socket", *derive.IO_URING)
_ARGUMENTS = st.fixed_dictionaries(
    {
        "index": st.integers(0, 5),
        "value": st.integers(0, 2**32),
        "op": st.sampled_from(["SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"]),
    }
)
_CONDITIONS = st.dictionaries(
    st.sampled_from(["caps", "arches", "minKernel"]), st.lists(st.sampled_from(["CAP_SYS_ADMIN", "amd64"]), max_size=2)
)
_RULES = st.fixed_dictionaries(
    {
        "names": st.lists(st.sampled_from(_CALLS), min_size=1, max_size=6),
        "action": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG"]),
    },
    optional={
        "args": st.none() | st.lists(_ARGUMENTS, max_size=2),
        "comment": st.sampled_from(["", "why"]),
        "includes": _CONDITIONS,
        "excludes": _CONDITIONS,
        "errnoRet": st.integers(1, 133),
    },
)
_PROFILES = st.fixed_dictionaries(
    {
        "defaultAction": st.sampled_from(["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_LOG"]),
        "syscalls": st.lists(_RULES, max_size=12),
    },
    optional={"defaultErrnoRet": st.integers(1, 133), "archMap": st.just([{"architecture": "SCMP_ARCH_X86_64"}])},
)


def rules_of(call: str, of: Profile) -> list[Rule]:
    """Everything that decides ``call``, in order."""
    return [
        {key: value for key, value in entry.items() if key != "names"}
        for entry in of["syscalls"]
        for name in entry["names"]
        if name == call
    ]


@given(_PROFILES)
def test_nothing_else_changes(original: Profile) -> None:
    before = copy.deepcopy(original)
    derived = derive.derive(original)
    assert original == before, "the profile that was given is left alone"
    assert_io_uring_answers_enosys(derived)
    assert {key: value for key, value in derived.items() if key != "syscalls"} == {
        key: value for key, value in original.items() if key != "syscalls"
    }
    for call in set(_CALLS) - set(derive.IO_URING):
        assert rules_of(call, derived) == rules_of(call, original)
    assert set(derive.differing_syscalls(original, derived)) <= set(derive.IO_URING)
    assert derive.derive(derived) == derived
    assert json.loads(derive.render(derived)) == derived


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_arithmetic_wraps_at_32_bits(left: int, right: int, word: int) -> None:
    expected = {
        0x04: left + right,
        0x14: left - right,
        0x24: left * right,
        0x44: left | right,
        0x54: left & right,
        0xA4: left ^ right,
        0x84: -left,
    }
    if right:
        expected[0x34] = left // right
    for code, value in expected.items():
        steps = program((0x00, left), (code, right), (RET_A, 0))
        assert seccomp_filter.run(steps, bytes(64)) == value & 0xFFFFFFFF
    halves = program(
        (LD_ABS, argument(2, high=True)), (ST, 3), (LD_ABS, argument(2)), (TAX, 0), (LD_MEM, 3), (RET_A, 0)
    )
    assert seccomp_filter.run(halves, Call(X86_64, 0, (0, 0, word)).pack()) == word >> 32
