"""Preflight checks of CRIU."""

from __future__ import annotations

import importlib.util
import platform
import re
from pathlib import Path

from gpuckpt import proc
from gpuckpt.checks import Check
from gpuckpt.config import Settings
from gpuckpt.criu import binary
from gpuckpt.errors import GpuckptError

_OLDEST = (3, 17)  # the first that rebuilds seccomp filters, rseq and the cgroups of today's runtimes together
# Kernel 6.16 laid out the vDSO's data pages anew; CRIU before 4.2 stops at it ("Unexpected rt vDSO area bounds").
_NEW_VDSO_KERNEL, _NEW_VDSO_CRIU = (6, 16), (4, 2)


def all_checks(settings: Settings) -> list[Check]:
    """Every check of this package; ``criu check`` takes about 0.1 s."""
    version, found = program(settings)
    return [version, self_check(found), pycriu()]


def program(
    settings: Settings, *, release: str | None = None, cache: Path | None = None
) -> tuple[Check, binary.Criu | None]:
    """Is there a CRIU that fits the kernel ``release``? Runs only ``criu --version`` (``cache``: if that is news)."""
    why = "CRIU freezes and restores the processes"
    try:
        criu = binary.find(settings, cache=cache)
    except GpuckptError as error:
        found = error.message + (f": {error.cause}" if error.cause else "")
        return Check("criu.program", "CRIU", "fail", found, why, error.remedy), None
    found = f"{criu.version} ({criu.path})"
    running = _numbers(release or platform.release())
    version = _numbers(criu.version)
    if version < _OLDEST:
        why = f"versions before {_OLDEST[0]}.{_OLDEST[1]} cannot restore what today's runtimes start"
        return Check("criu.program", "CRIU", "fail", found, why, "make setup"), criu
    if running >= _NEW_VDSO_KERNEL and version < _NEW_VDSO_CRIU:
        why = "kernels from 6.16 on have a vDSO that CRIU before 4.2 cannot parse: every dump fails"
        return Check("criu.program", "CRIU", "fail", found, why, "make setup"), criu
    return Check("criu.program", "CRIU", "ok", found, why), criu


def self_check(criu: binary.Criu | None) -> Check:
    """Does ``criu check`` pass?"""
    title, why = "criu check", "CRIU's own probe of what this kernel offers"
    if criu is None:
        return Check("criu.check", title, "skip", "there is no CRIU to run", why)
    try:
        result = proc.run([criu.path, "check"], timeout=30, check=False)
    except (GpuckptError, OSError) as error:
        return Check("criu.check", title, "fail", str(error), why, f"{criu.path} check")
    if result.code == 0:
        return Check("criu.check", title, "ok", "passes", why)
    # Its own verdict is the last line; what came before says which feature is missing.
    complaints = [line for line in proc.tail(result.stderr or result.stdout) if re.search(r"Error|Warn", line)]
    found = "; ".join(complaints[-3:]) or f"status {result.code}"
    return Check("criu.check", title, "fail", found, why, f"{criu.path} check --all")


def pycriu() -> Check:
    """Can this Python read CRIU's images? Found, not imported: importing takes longer than a restore may spend."""
    why = "goldens are made by rewriting CRIU's images; needed by create, not by restore"
    spec = importlib.util.find_spec("pycriu")
    if spec is None:
        return Check("criu.pycriu", "pycriu", "fail", "no Python package pycriu", why, "make setup")
    return Check("criu.pycriu", "pycriu", "ok", f"in {(spec.submodule_search_locations or ['?'])[0]}", why)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
