"""What a recorded seccomp filter answers to a system call: classic BPF, interpreted.

The programs are arrays of ``struct sock_filter`` (linux/filter.h: code, jump if true, jump if false, constant) that
run on ``struct seccomp_data`` (seccomp(2): number, architecture, instruction pointer, six arguments). The instructions
are those that the kernel's seccomp_check_filter() lets in.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gpuckpt.errors import VerificationError

# Actions in the kernel's order: of several filters' answers the first in this order counts (seccomp(2)).
KILL_PROCESS, KILL_THREAD, TRAP, ERRNO = 0x80000000, 0, 0x00030000, 0x00050000
USER_NOTIF, TRACE, LOG, ALLOW = 0x7FC00000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000
_ACTION = 0xFFFF0000
_WORD = 0xFFFFFFFF
_DATA_BYTES = 64
_SCRATCH_WORDS = 16
# Classes, sizes, modes and operations of linux/bpf_common.h.
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_IMM, _ABS, _MEM, _LEN = 0x00, 0x20, 0x60, 0x80
_X = 0x08
_TXA = 0x80


@dataclass(frozen=True)
class Call:
    """A system call as a filter sees it; ``arch`` is one of linux/audit.h's AUDIT_ARCH_*."""

    arch: int
    number: int
    arguments: tuple[int, ...] = ()

    def pack(self) -> bytes:
        padded = (*self.arguments, *[0] * (6 - len(self.arguments)))
        return struct.pack("=iIQ6Q", self.number, self.arch, 0, *padded)


def answer(filters: Sequence[bytes], call: Call) -> int:
    """The value (action and data) that a chain of filters gives for a call; ALLOW if there is none.

    Raises VerificationError if a program is none that the kernel would have taken.
    """
    data = call.pack()
    found = ALLOW
    for program in filters:
        value = run(program, data)
        if _rank(value) < _rank(found):
            found = value
    return found


def _rank(value: int) -> int:
    action = value & _ACTION
    return action - (1 << 32) if action >> 31 else action


def run(program: bytes, data: bytes) -> int:
    """The value that one program returns for ``data``, a packed struct seccomp_data."""
    if not program or len(program) % 8:
        raise VerificationError("a recorded seccomp filter is no BPF program", cause=f"it has {len(program)} bytes")
    code = list(struct.iter_unpack("=HBBI", program))
    words = struct.unpack("=16I", data)
    scratch = [0] * _SCRATCH_WORDS
    accumulator = index = at = 0
    try:
        # Jumps go forward only, so that a program ends; each step moves on by at least one.
        while True:
            operation, if_true, if_false, constant = code[at]
            at += 1
            kind = operation & 7
            operand = index if operation & _X else constant
            if kind in (_LD, _LDX):
                value = _load(operation & 0xE0, constant, words, scratch)
                accumulator, index = (value, index) if kind == _LD else (accumulator, value)
            elif kind == _ST:
                scratch[constant] = accumulator
            elif kind == _STX:
                scratch[constant] = index
            elif kind == _ALU:
                accumulator = _calculate(operation & 0xF0, accumulator, operand)
            elif kind == _JMP:
                at += (
                    constant
                    if operation & 0xF0 == 0
                    else if_true
                    if _holds(operation, accumulator, operand)
                    else if_false
                )
            elif kind == _RET:
                return accumulator if operation & 0x18 == 0x10 else constant
            elif operation & 0xF8 == _TXA:
                accumulator = index
            else:
                index = accumulator
    except (IndexError, ZeroDivisionError, KeyError, ValueError) as error:
        raise VerificationError("a recorded seccomp filter is no valid BPF program", cause=str(error)) from error


def _load(mode: int, constant: int, words: Sequence[int], scratch: Sequence[int]) -> int:
    if mode == _ABS:
        if constant % 4:
            raise ValueError(f"a load from {constant}")
        return words[constant // 4]
    return {_IMM: constant, _LEN: _DATA_BYTES}[mode] if mode != _MEM else scratch[constant]


def _calculate(operation: int, left: int, right: int) -> int:
    if operation in (0x60, 0x70) and right >= 32:
        return 0
    results = {
        0x00: lambda: left + right,
        0x10: lambda: left - right,
        0x20: lambda: left * right,
        0x30: lambda: left // right,
        0x40: lambda: left | right,
        0x50: lambda: left & right,
        0x60: lambda: left << right,
        0x70: lambda: left >> right,
        0x80: lambda: -left,
        0xA0: lambda: left ^ right,
    }
    return results[operation]() & _WORD


def _holds(operation: int, left: int, right: int) -> bool:
    results = {0x10: left == right, 0x20: left > right, 0x30: left >= right, 0x40: bool(left & right)}
    return results[operation & 0xF0]
