"""Recorded seccomp filters are run as the kernel runs them, and decide what may be mapped."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.criu import seccomp_filter
from gpuckpt.criu.evidence import Evidence
from gpuckpt.criu.images import save
from gpuckpt.criu.seccomp_filter import ALLOW, ERRNO, KILL_PROCESS, KILL_THREAD, LOG, Call, answer
from gpuckpt.errors import VerificationError

X86_64, I386 = 0xC000003E, 0x40000003
# Instructions of linux/bpf_common.h.
LD_ABS, LDX_IMM, LD_LEN, LD_MEM, ST, STX = 0x20, 0x01, 0x80, 0x60, 0x02, 0x03
JA, JEQ, JGT, JGE, JSET, RET, RET_A, TAX, TXA = 0x05, 0x15, 0x25, 0x35, 0x45, 0x06, 0x16, 0x07, 0x87
NUMBER, ARCH = 0, 4


def argument(index: int, *, high: bool = False) -> int:
    """Where seccomp_data holds half of an argument."""
    return 16 + 8 * index + 4 * high


def program(*steps: tuple[int, ...]) -> bytes:
    """Instructions (code, constant, jump if true, jump if false) as the kernel holds them."""
    return b"".join(
        struct.pack("=HBBI", code, *(rest[1:] if len(rest) > 1 else (0, 0)), rest[0]) for code, *rest in steps
    )


REFUSING = {
    X86_64: {28: (2, 22), 440: (None, 38), 25: (None, 12), 323: (None, 1), 425: (None, 38)},
    X86_64 | 1 << 64: {28: (2, 22), 440: (None, 38), 25: (None, 12), 323: (None, 1), 425: (None, 38)},
    I386: {219: (2, 22), 440: (None, 38), 163: (None, 12), 374: (None, 1), 425: (None, 38)},
}


def refusing(*, forget: tuple[int, int] | None = None, advice: tuple[int, ...] = (4, 24, 102)) -> bytes:
    """A filter that refuses what the profile for mapped memory does, but for ``forget``: architecture, number."""
    steps: list[tuple[int, ...]] = []
    for abi, calls in REFUSING.items():
        arch, x32 = abi & 0xFFFFFFFF, (1 << 30) * (abi >> 64)
        for number, (index, code) in calls.items():
            if forget == (arch, number | x32):
                continue
            body: list[tuple[int, ...]] = []
            if index is None:
                body = [(RET, ERRNO | code)]
            else:
                body = [(LD_ABS, argument(index))]
                body += [step for value in advice for step in ((JEQ, value, 0, 1), (RET, ERRNO | code))]
            steps += [(LD_ABS, ARCH), (JEQ, arch, 0, len(body) + 2), (LD_ABS, NUMBER)]
            steps += [(JEQ, number | x32, 0, len(body)), *body]
    return program(*steps, (RET, ALLOW))


def test_a_filter_by_number_and_argument() -> None:
    code = refusing()
    assert answer([code], Call(X86_64, 28, (0, 4096, 4))) == ERRNO | 22
    assert answer([code], Call(X86_64, 28, (0, 4096, 14))) == ALLOW
    assert answer([code], Call(X86_64, 0)) == ALLOW
    assert answer([], Call(X86_64, 28)) == ALLOW


def test_the_strictest_answer_counts() -> None:
    answers = [program((RET, value)) for value in (ALLOW, LOG, ERRNO | 1, ERRNO | 2)]
    assert answer(answers, Call(X86_64, 0)) == ERRNO | 1
    kill, process = program((RET, KILL_THREAD)), program((RET, KILL_PROCESS))
    assert answer([*answers, kill], Call(X86_64, 0)) == KILL_THREAD
    assert answer([kill, process], Call(X86_64, 0)) == KILL_PROCESS


def test_jumps_and_registers() -> None:
    steps = program(
        (LDX_IMM, 7), (TXA, 0), (STX, 1), (JGT | 8, 0, 0, 1), (RET, 1), (JGE | 8, 0, 0, 1), (JSET, 4, 1, 0), (RET, 2),
        (LD_LEN, 0), (JA, 1), (RET, 3), (RET_A, 0),
    )  # fmt: skip
    assert seccomp_filter.run(steps, bytes(64)) == 64


@pytest.mark.parametrize(
    "damaged",
    [b"", b"1234", program((LD_ABS, 2), (RET_A, 0)), program((LD_ABS, 64), (RET_A, 0)), program((LD_LEN, 0)),
     program((0x34, 0), (RET_A, 0)), program((0xF4, 1), (RET_A, 0))],
)  # fmt: skip
def test_no_program(damaged: bytes) -> None:
    with pytest.raises(VerificationError):
        seccomp_filter.run(damaged, bytes(64))


def dump(
    folder: Path, *threads: dict[str, Any], filters: tuple[tuple[bytes, int | None], ...] = (), flags: int = 0
) -> Evidence:
    """Images of one process with these threads."""
    tree = {"pid": 1, "ppid": 0, "pgid": 1, "sid": 1, "threads": list(range(1, len(threads) + 1))}
    save(folder / "pstree.img", {"magic": "PSTREE", "entries": [tree]})
    for number, thread in enumerate(threads, 1):
        machine = thread.pop("mtype", "X86_64")
        core = {"futex_rla": 0, "futex_rla_len": 0, **thread}
        save(folder / f"core-{number}.img", {"magic": "CORE", "entries": [{"mtype": machine, "thread_core": core}]})
    if filters:
        entries = [
            {"filter": base64.encodebytes(code).decode(), "flags": flags} | ({} if prev is None else {"prev": prev})
            for code, prev in filters
        ]
        save(folder / "seccomp.img", {"magic": "SECCOMP", "entries": [{"seccomp_filters": entries}]})
    return Evidence(folder)


def filtered(index: int = 0) -> dict[str, Any]:
    return {"seccomp_mode": "filter", "seccomp_filter": index}


def test_evidence_for_mapping(tmp_path: Path) -> None:
    evidence = dump(tmp_path, filtered(), {"seccomp_mode": "strict"}, filters=((refusing(), None),))
    assert evidence.processes == (1,)
    assert evidence.against_mapping(1) is None


def test_every_filter_of_the_chain_counts(tmp_path: Path) -> None:
    chain = ((refusing(), None), (program((RET, ALLOW)), 0))
    assert dump(tmp_path, filtered(1), filters=chain).against_mapping(1) is None


@pytest.mark.parametrize(
    ("forget", "named"),
    [((X86_64, 28), "madvise(0x4)"), ((X86_64, 440), "process_madvise"), ((X86_64, 25), "mremap"),
     ((X86_64, 28 | 1 << 30), "madvise(0x4)"), ((I386, 219), "madvise(0x4)"), ((I386, 163), "mremap"),
     ((X86_64, 323), "userfaultfd"), ((X86_64, 425), "io_uring_setup")],
)  # fmt: skip
def test_one_call_let_through_is_enough(tmp_path: Path, forget: tuple[int, int], named: str) -> None:
    reason = dump(tmp_path, filtered(), filters=((refusing(forget=forget), None),)).against_mapping(1)
    assert reason is not None and named in reason


def test_other_advice_drops_pages_too(tmp_path: Path) -> None:
    reason = dump(tmp_path, filtered(), filters=((refusing(advice=(4, 24)), None),)).against_mapping(1)
    assert reason == "its seccomp filter lets madvise(0x66) through"


@pytest.mark.parametrize("odd", [{}, {"seccomp_mode": "disabled"}])
def test_one_thread_without_a_filter(tmp_path: Path, odd: dict[str, Any]) -> None:
    reason = dump(tmp_path, filtered(), odd, filters=((refusing(), None),)).against_mapping(1)
    assert reason == "no seccomp filter keeps it from dropping memory"


def test_filters_that_the_threads_share_are_recorded_with_the_first(tmp_path: Path) -> None:
    chain = ((refusing(), None), (program((RET, ALLOW)), 0))
    assert dump(tmp_path, filtered(1), {}, {}, filters=chain, flags=1).against_mapping(1) is None
    weak = ((refusing(forget=(X86_64, 25)), None),)
    reason = dump(tmp_path, filtered(), {}, filters=weak, flags=1).against_mapping(1)
    assert reason == "its seccomp filter lets mremap through"


def test_what_is_not_understood_is_no_evidence(tmp_path: Path) -> None:
    filters = ((refusing(), None), (b"123", None), (refusing(), 2))
    threads = {"other machine": filtered() | {"mtype": "S390"}, "damaged": filtered(1), "circle": filtered(2),
               "missing": filtered(7)}  # fmt: skip
    for name, thread in threads.items():
        folder = tmp_path / name
        folder.mkdir()
        assert dump(folder, thread, filters=filters).against_mapping(1) is not None, name
