"""Limits of containers stay at or below those of the machine."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gpuckpt.host import limits

INFINITE = resource.RLIM_INFINITY


def machine(nofile: int, nproc: int, memlock: int) -> limits.Getter:
    hard = {
        resource.RLIMIT_NOFILE: nofile,
        resource.RLIMIT_NPROC: nproc,
        resource.RLIMIT_MEMLOCK: memlock,
    }
    return lambda kind: (min(1024, hard[kind]) if hard[kind] != INFINITE else 1024, hard[kind])


@pytest.mark.parametrize(
    ("hard", "expected"),
    [
        ((20000, 96365, 8 << 20), {"nofile": 20000, "nproc": 65536}),
        ((1 << 20, 4096, INFINITE), {"nofile": 65536, "nproc": 4096, "memlock": 2**64 - 1}),
        # RLIM_INFINITY is -1: a plain min() would ask podman for a limit of -1.
        ((INFINITE, INFINITE, INFINITE), {"nofile": 65536, "nproc": 65536, "memlock": 2**64 - 1}),
    ],
)
def test_limits_are_capped_and_never_above_the_hard_ones(
    tmp_path: Path, hard: tuple[int, int, int], expected: dict[str, int]
) -> None:
    given = limits.container_ulimits(machine(*hard), pid_max=tmp_path / "absent")
    assert {limit["Name"]: limit["Hard"] for limit in given} == expected
    assert all(limit["Soft"] == limit["Hard"] for limit in given)


def test_processes_stay_below_the_limit_that_podman_gives_itself(tmp_path: Path) -> None:
    (tmp_path / "pid_max").write_text("32768\n")
    given = limits.container_ulimits(machine(65536, 96365, 0), pid_max=tmp_path / "pid_max")
    assert {limit["Name"]: limit["Hard"] for limit in given} == {"nofile": 65536, "nproc": 32768}


def test_the_real_machine_allows_what_is_asked_for() -> None:
    for limit in limits.container_ulimits():
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{str(limit['Name']).upper()}"))[1]
        assert hard == INFINITE or int(limit["Hard"]) <= hard


def test_low_limits_fail_and_say_which() -> None:
    check = limits.check(machine(256, INFINITE, 65536))
    assert check.verdict == "fail"
    assert "nofile 256 < 1024" in check.why
    assert check.mend is not None and check.mend.startswith("prlimit")
    assert (
        limits.check(machine(INFINITE, INFINITE, INFINITE)).found
        == "nofile unlimited, nproc unlimited, memlock unlimited"
    )
