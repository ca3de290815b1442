"""All preconditions of this machine together, and the gate in front of create and restore."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from gpuckpt.checks import Check
from gpuckpt.config import Settings
from gpuckpt.containers import checks as containers
from gpuckpt.containers import service
from gpuckpt.criu import checks as criu
from gpuckpt.criu.binary import find
from gpuckpt.errors import GpuckptError, PreflightError
from gpuckpt.host import checks as host
from gpuckpt.host import limits, seccomp, tmpfs

Group = Callable[[], list[Check]]


def diagnose(settings: Settings) -> list[Check]:
    """Every check, host first; a check that breaks is reported as one that failed. Changes nothing.

    Takes about as long as ``podman info``: the groups that execute programs run side by side.
    """
    from concurrent.futures import ThreadPoolExecutor  # not for require, which counts milliseconds

    from gpuckpt.cuda import checks as cuda

    machine = host.Machine()
    groups: list[tuple[str, Group]] = [("host", lambda: host.all_checks(settings, machine))]
    if machine.uid == 0:
        groups.append(("criu", lambda: criu.all_checks(settings)))
        groups.append(("containers", lambda: containers.all_checks(settings)))
        groups.append(("service", lambda: _service(settings)))
    else:
        # As a user podman is rootless and CRIU refuses: what they would say is not true of root.
        groups.append(("criu", lambda: [criu.program(settings)[0], criu.pycriu()]))
        groups.append(("containers", lambda: [*containers.fast_checks(settings), containers.network(settings)]))
    groups.append(("cuda", lambda: cuda.all_checks(settings)))
    with ThreadPoolExecutor(len(groups)) as pool:
        results = list(pool.map(lambda group: _guarded(*group), groups))
    return [check for checks in results for check in checks]


def require(settings: Settings, purpose: Literal["create", "restore"]) -> None:
    """Raise PreflightError (exit 4) naming every failed check that ``purpose`` depends on; return if there is none.

    Only what is fast is looked at (milliseconds; nothing but ``criu --version`` is executed, and that only if CRIU is
    not the one that was asked before), and nothing is changed, so that a command can begin with it.
    """
    machine = host.Machine()
    root = host.root(machine)
    if root.verdict == "fail":
        # Everything else would fail or lie for the same reason.
        raise PreflightError(
            f"gpuckpt {purpose} must run as root", cause=f"{root.found}; {root.why}", remedy=f"sudo gpuckpt {purpose} …"
        )
    failed = [check for check in _relevant(settings, purpose, machine) if check.verdict == "fail"]
    if not failed:
        return
    mends = list(dict.fromkeys(check.mend for check in failed if check.mend))
    count = "a precondition is" if len(failed) == 1 else f"{len(failed)} preconditions are"
    raise PreflightError(
        f"this machine cannot {purpose} a golden yet: {count} not met",
        cause="; ".join(check.title for check in failed),
        remedy="; ".join(mends) if mends else "gpuckpt doctor",
        log=tuple(f"{check.title}: {check.found}: {check.why}" for check in failed),
    )


def _relevant(settings: Settings, purpose: str, machine: host.Machine) -> Iterable[Check]:
    yield host.capabilities(machine)
    yield host.features(machine)
    yield host.overlay(machine)
    yield host.cgroups(machine)
    yield seccomp.check()
    yield tmpfs.check(settings.store)
    yield criu.program(settings, cache=settings.paths.run)[0]
    yield from containers.fast_checks(settings)
    if purpose == "create":
        yield host.kernel(machine)
        yield limits.check()
        yield criu.pycriu()


def _service(settings: Settings) -> list[Check]:
    try:
        program = find(settings).path
    except GpuckptError:
        return []  # CRIU's own row says it
    return [service.check(settings.paths.run, program, settings.podman.runtime)]


def _guarded(name: str, group: Group) -> list[Check]:
    # The doctor must be able to speak about a machine that is stranger than its checks expect.
    try:
        return group()
    except Exception as error:
        found = f"the checks themselves failed: {type(error).__name__}: {error}"
        return [Check(f"{name}.error", f"checks of {name}", "fail", found, "it met what it does not know; report it")]
