#!/usr/bin/env python3
"""Derive gpuckpt's seccomp profile from the distribution's default.

One thing changes: io_uring_setup, io_uring_enter and io_uring_register answer ENOSYS, whoever asks and with whatever
arguments. CRIU cannot dump an io_uring descriptor, so a server that opened one could never become a golden. Event
loops that use io_uring (libuv below uvloop, for one) probe for it and fall back to epoll, but some take only ENOSYS
("this kernel has none") as the reason to; EPERM they report as an error. Default profiles differ between versions in
what they do: allow the three, answer EPERM, or answer ENOSYS. The derived profile says it itself.

A second profile, gpuckpt-mapped.json, is for goldens whose memory is mapped from files at a restore. There
madvise(MADV_DONTNEED) would bring the golden's bytes back where the program may count on zeros. Under this profile
the advice fails with EINVAL from the server's first instruction on, as it does on kernels and mappings that cannot
drop pages; allocators that look at the answer clear the memory themselves, and nobody is ever given stale bytes.
mremap(2) fails with ENOMEM: what it adds to a mapping would be the next bytes of the golden's file, or end the process
behind the file's end (SIGBUS); realloc copies instead.

    seccomp/derive.py                     write gpuckpt.json beside this script
    seccomp/derive.py --mapped            write gpuckpt-mapped.json
    seccomp/derive.py [--mapped] --check  compare with a fresh derivation; say which system calls differ

Exit status: 0 written or the same, 1 differs (--check), 2 the request or the distribution's profile is wrong.
Only the standard library is used: the script also serves machines where gpuckpt is not installed yet.
"""

from __future__ import annotations

import argparse
import copy
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IO_URING = ("io_uring_enter", "io_uring_register", "io_uring_setup")
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")  # containers-common installs it there
DERIVED_PROFILE = Path(__file__).resolve().parent / "gpuckpt.json"
MAPPED_PROFILE = DERIVED_PROFILE.with_name("gpuckpt-mapped.json")

_RULE: dict[str, Any] = {
    "names": list(IO_URING),
    "action": "SCMP_ACT_ERRNO",
    "args": [],
    "comment": "gpuckpt: CRIU cannot dump an io_uring descriptor; ENOSYS makes every program fall back to epoll",
    "includes": {},
    "excludes": {},
    "errnoRet": errno.ENOSYS,
    "errno": "ENOSYS",
}

# Advice (linux/mman.h) after which private anonymous memory reads as zeros, and a private file mapping as the file:
# DONTNEED, DONTNEED_LOCKED, and GUARD_INSTALL, which drops the pages it guards.
_DROPPING = (4, 24, 102)
# Every other advice that the kernel knows for a process' own memory; what comes after them is refused like an unknown.
_KEEPING = (*range(4), *range(8, 24), 25, 103)


class ProfileError(ValueError):
    """The profile to derive from is not what podman would take as a seccomp profile."""


def derive(profile: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``profile`` in which io_uring answers ENOSYS and everything else is as it was.

    The three are taken out of every rule that names them, conditional ones too: a rule is chosen by capability and
    architecture when the container starts, and libseccomp refuses or merges contradicting rules for one call.
    """
    _require_profile(profile)
    kept = [rule for rule in (_without(rule, IO_URING) for rule in profile["syscalls"]) if rule is not None]
    return copy.deepcopy({**profile, "syscalls": [*kept, _RULE]})


def derive_mapped(profile: dict[str, Any]) -> dict[str, Any]:
    """:func:`derive`, and madvise(2) refuses with EINVAL what would drop pages of private memory.

    process_madvise(2), which can give a process the same advice through its own pidfd, answers ENOSYS, mremap(2)
    ENOMEM.
    """
    derived = derive(profile)
    dropping = ("madvise", "process_madvise", "mremap")
    kept = [rule for rule in (_without(rule, dropping) for rule in derived["syscalls"]) if rule is not None]
    comment = "gpuckpt: on memory that is mapped from a golden, dropped pages would not read as zeros"
    rules = [_advice("SCMP_ACT_ALLOW", advice) for advice in _KEEPING]
    rules += [
        _advice("SCMP_ACT_ERRNO", advice) | {"errnoRet": errno.EINVAL, "errno": "EINVAL", "comment": comment}
        for advice in _DROPPING
    ]
    other = {**_RULE, "names": ["process_madvise"], "comment": comment}
    growing = {**_RULE, "names": ["mremap"], "errnoRet": errno.ENOMEM, "errno": "ENOMEM"}
    growing["comment"] = "gpuckpt: what is added to memory that is mapped from a golden would not read as zeros"
    return {**derived, "syscalls": [*kept, *rules, other, growing]}


def _advice(action: str, advice: int) -> dict[str, Any]:
    """A rule for madvise(2) with exactly this advice, its third argument; libseccomp takes any matching rule."""
    arguments = [{"index": 2, "value": advice, "op": "SCMP_CMP_EQ"}]
    return {"names": ["madvise"], "action": action, "args": arguments, "includes": {}, "excludes": {}}


def render(profile: dict[str, Any]) -> str:
    """``profile`` as text in the distribution's layout (tabs, its order), so that a diff shows only what changed."""
    return json.dumps(profile, indent="\t", ensure_ascii=False) + "\n"


def differing_syscalls(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The system calls that the two profiles treat differently, sorted."""
    ours, theirs = _treatment(one), _treatment(other)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The members beside the rules (default action, architectures, …) in which the two profiles differ, sorted."""
    names = (one.keys() | other.keys()) - {"syscalls"}
    return sorted(name for name in names if one.get(name) != other.get(name))


def _names(rule: dict[str, Any]) -> list[str]:
    """The calls a rule is about; profiles of Docker's older format have a single ``name``."""
    return list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))


def _without(rule: dict[str, Any], calls: Sequence[str]) -> dict[str, Any] | None:
    """``rule`` without the named calls; None if it was about nothing else."""
    names = _names(rule)
    rest = [name for name in names if name not in calls]
    if len(rest) == len(names):
        return rule
    return {**rule, "names": rest} if rest else None


def _treatment(profile: dict[str, Any]) -> dict[str, list[str]]:
    """For each call the rules that name it, in order, as comparable text without the comment."""
    treatment: dict[str, list[str]] = {}
    for rule in profile["syscalls"]:
        essence = {key: value for key, value in rule.items() if key not in ("name", "names", "comment") and value}
        for name in _names(rule):
            treatment.setdefault(name, []).append(json.dumps(essence, sort_keys=True))
    return treatment


def _require_profile(profile: object) -> None:
    if not isinstance(profile, dict) or "defaultAction" not in profile:
        raise ProfileError("it is not a JSON object with a “defaultAction”")
    rules = profile.get("syscalls")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ProfileError("“syscalls” is not a list of rules")


def _read(path: Path) -> dict[str, Any]:
    profile: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _require_profile(profile)
    return profile


def _check(fresh: dict[str, Any], output: Path) -> int:
    """Compare ``output`` with ``fresh``; print the differences and return the exit status."""
    if output.read_text(encoding="utf-8") == render(fresh):
        return 0
    committed = _read(output)
    syscalls, settings = differing_syscalls(committed, fresh), differing_settings(committed, fresh)
    print(f"{output} differs from a fresh derivation:", file=sys.stderr)
    if settings:
        print(f"  settings: {', '.join(settings)}", file=sys.stderr)
    if syscalls:
        print(f"  system calls: {', '.join(syscalls)}", file=sys.stderr)
    if not settings and not syscalls:
        print("  only in layout, order of rules, or comments", file=sys.stderr)
    print("to take over the distribution's profile as it is now: seccomp/derive.py", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Derive gpuckpt's seccomp profile from the distribution's default.")
    parser.add_argument("--check", action="store_true", help="compare instead of write")
    parser.add_argument("--source", type=Path, default=DEFAULT_PROFILE, help="the profile to derive from (%(default)s)")
    parser.add_argument("--mapped", action="store_true", help="the profile for goldens whose memory is mapped")
    parser.add_argument("--output", type=Path, help="the derived profile (beside this script)")
    arguments = parser.parse_args(argv)
    output = arguments.output or (MAPPED_PROFILE if arguments.mapped else DERIVED_PROFILE)
    reading = arguments.source
    try:
        fresh = (derive_mapped if arguments.mapped else derive)(_read(arguments.source))
        if arguments.check:
            reading = output
            return _check(fresh, output)
    except (OSError, ValueError) as error:
        print(f"seccomp/derive.py: cannot use {reading}: {error}", file=sys.stderr)
        return 2
    output.write_text(render(fresh), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
