"""The project's seccomp profile: where it is, and what it answers to a system call."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuckpt.checks import Check, Verdict
from gpuckpt.errors import NotFoundError

# CRIU cannot dump an io_uring descriptor. A program that is told ENOSYS believes the kernel is older than io_uring
# and takes epoll; EPERM, the runtimes' usual answer, makes some of them give up instead.
IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")

_PACKAGE = Path(__file__).resolve().parents[1]
_NAME = "gpuckpt.json"
_MAPPED = "gpuckpt-mapped.json"  # for goldens whose memory is mapped: see seccomp/derive.py


def candidates(package: Path = _PACKAGE, *, name: str = _NAME) -> tuple[Path, ...]:
    """Where a profile may be: beside the package in a checkout, inside it when installed from a wheel."""
    return package.parent / "seccomp" / name, package / "data" / "seccomp" / name


def profile_path(package: Path = _PACKAGE, *, mapped: bool = False) -> Path:
    """The seccomp profile that containers run under; ``mapped``: the one that refuses to drop pages.

    Raises NotFoundError if this installation has none.
    """
    name = _MAPPED if mapped else _NAME
    for path in candidates(package, name=name):
        if path.is_file():
            return path
    raise NotFoundError(
        "this installation holds no seccomp profile",
        cause="looked for " + " and ".join(str(path) for path in candidates(package, name=name)),
        remedy=_mend(package, name),
    )


def answer(profile: dict[str, Any], syscall: str) -> str:
    """What ``profile`` answers to ``syscall``: the name of an errno, ``allowed``, or the action in lower case.

    An allowing rule counts however many conditions it has: it lets some call through.
    """
    rules = [rule for rule in profile.get("syscalls") or () if syscall in (rule.get("names") or [rule.get("name")])]
    if any(rule.get("action") in ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE") for rule in rules):
        return "allowed"
    # libseccomp takes the most restrictive of several matching rules; two different refusals do not occur here.
    for rule in rules or [{"action": profile.get("defaultAction"), "errnoRet": profile.get("defaultErrnoRet")}]:
        action = str(rule.get("action"))
        if action == "SCMP_ACT_ERRNO":
            number = rule.get("errnoRet")
            return errno.errorcode.get(errno.EPERM if number is None else int(number), str(number))
        if action == "SCMP_ACT_ALLOW":
            return "allowed"
        return action.removeprefix("SCMP_ACT_").lower()
    raise AssertionError("unreachable: there is always a default rule")


def check(package: Path = _PACKAGE, *, actions: Path = Path("/proc/sys/kernel/seccomp/actions_avail")) -> Check:
    """Are there both profiles, can the kernel apply them, and does io_uring answer ENOSYS in them?"""

    def verdict(value: Verdict, found: str, why: str, mend: str | None = None) -> Check:
        return Check("host.seccomp", "seccomp profile", value, found, why, mend)

    why = "without it a server may open io_uring descriptors, which CRIU cannot dump"
    for name in (_NAME, _MAPPED):
        try:
            path = profile_path(package, mapped=name == _MAPPED)
            profile = json.loads(path.read_text())
            answers: Sequence[str] = [answer(profile, syscall) for syscall in IO_URING]
        except NotFoundError:
            return verdict("fail", f"not found at {candidates(package, name=name)[0]}", why, _mend(package, name))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            return verdict("fail", f"{name} is unreadable: {error}", why, _mend(package, name))
        wrong = [f"{call}: {got}" for call, got in zip(IO_URING, answers, strict=True) if got != "ENOSYS"]
        if wrong:
            return verdict("fail", f"{path} does not answer ENOSYS ({', '.join(wrong)})", why, _mend(package, name))
    try:
        supported = "errno" in actions.read_text().split()
    except OSError:
        supported = False
    if not supported:
        return verdict("fail", "this kernel has no seccomp filters", f"{why}; the kernel needs CONFIG_SECCOMP_FILTER")
    return verdict("ok", f"{path.parent}: io_uring answers ENOSYS", why)


def _mend(package: Path, name: str) -> str:
    checkout = package.parent
    if (checkout / ".git").exists():
        return f"git -C {checkout} checkout -- seccomp/{name}"
    return "pip install --force-reinstall gpuckpt"
