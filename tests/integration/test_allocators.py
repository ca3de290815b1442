"""Memory that a program may expect to read as zeros, in mapped goldens: zeros, or a refusal, never old bytes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import Bench
from tests.integration.programs import STORED, compiled, freeze, get, library, memory, restored

# What the kernel is not let to do: it would bring a golden's bytes back, or those that follow them in its file.
REFUSED = {
    "dontneed": "EINVAL",
    "dontneed-locked": "EINVAL",
    "guard": "EINVAL",
    "process-dontneed": "ENOSYS",
    "grow": "ENOMEM",
    "shrink-and-grow": "ENOMEM",
    "move-away": "ENOMEM",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("memory"))


def _outcomes(text: str) -> dict[str, set[str]]:
    """For each operation what came of it on its regions; a breach of the rule is an answer of another status."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        what, _, outcome = line.partition(": ")
        found.setdefault(what.split()[0], set()).add(outcome)
    return found


def test_no_operation_brings_old_bytes_back(bench: Bench, program: str) -> None:
    # It does the same before the dump, under the same profile: there memory is still anonymous.
    name = freeze(bench, program, "{socket}", warmup=("/churn", "/operate"))
    shown = memory(bench, name)
    assert shown["mapped"] > 100 << 20
    assert sum(shown["copied"].values()) < STORED
    for replica in restored(bench, name, times=2):
        assert int(get(bench, replica, "/writable")) > 0
        for _ in range(2):
            found = _outcomes(get(bench, replica, "/operate"))
            assert {key: found[key] for key in REFUSED} == {key: {f"refused {why}"} for key, why in REFUSED.items()}
            assert found["heap"] == {"done"}  # the heap did shrink by golden memory, and grew again
        get(bench, replica, "/churn")
        get(bench, replica, "/scribble")


def test_the_operations_give_zeros_without_the_profile(program: str) -> None:
    """What the program looks for is what Linux promises of anonymous memory."""
    done = subprocess.run([program, "--once"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = _outcomes(done.stdout)
    assert found["dontneed"] == {"zeros"}
    assert not [key for key in REFUSED.keys() - {"guard", "process-dontneed"} if "refused" in str(found[key])]


def test_the_hazard_is_real(program: str, tmp_path: Path) -> None:
    """Private mappings of a file, as a restore makes them, without the profile: each way to old bytes is seen."""
    done = subprocess.run([program, "--once", str(tmp_path / "memory")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    broken = {key for key, outcomes in _outcomes(done.stdout).items() if any("WRONG" in one for one in outcomes)}
    assert {"dontneed", "fork", "grow", "move-away", "shrink-and-grow"} <= broken
    assert not broken & {"standing", "heap", "free", "wipe-on-fork", "unmap", "map-over", "protect"}


@pytest.mark.parametrize(
    ("allocator", "stem", "settings"),
    [
        ("glibc", None, {}),
        ("jemalloc", "libjemalloc", {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0"}),
        # This one takes the kernel's word for it that dropped memory is zeros, and does not try at its start.
        ("jemalloc", "libjemalloc", {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0,trust_madvise:true"}),
        (
            "mimalloc",
            "libmimalloc",
            {
                "MIMALLOC_PAGE_RESET": "1",
                "MIMALLOC_RESET_DELAY": "0",
                "MIMALLOC_DECOMMIT_DELAY": "0",
                "MIMALLOC_PURGE_DELAY": "0",
            },
        ),
        ("tcmalloc", "libtcmalloc_minimal", {"TCMALLOC_AGGRESSIVE_DECOMMIT": "1", "TCMALLOC_RELEASE_RATE": "1000"}),
    ],
    ids=["glibc", "jemalloc", "jemalloc-trusting", "mimalloc", "tcmalloc"],
)
def test_an_allocator_that_drops_memory_at_once(
    bench: Bench, program: str, allocator: str, stem: str | None, settings: dict[str, str]
) -> None:
    preloaded = {"LD_PRELOAD": library(stem)} if stem else {}
    name = freeze(bench, program, "{socket}", warmup=("/churn",), env=preloaded | settings)
    shown = memory(bench, name)
    assert shown["mapped"] > 100 << 20
    assert sum(shown["copied"].values()) < STORED
    for replica in restored(bench, name):
        assert _advice(bench, replica)[0] == allocator
        for _ in range(2):
            _, drops, refusals = _advice(bench, replica)
            zeroed, checked = get(bench, replica, "/churn").split()[1::2]
            assert int(zeroed) > 100 << 20 and int(checked) > 100 << 20
            # It did ask for golden memory to be dropped, and was told that it was not. (glibc asks unseen.)
            assert not stem or (_advice(bench, replica)[1] > drops and _advice(bench, replica)[2] > refusals)


def _advice(bench: Bench, replica: str) -> tuple[str, int, int]:
    """The allocator at work, how often it asked the kernel to drop memory, and how often that was refused."""
    name, _, drops, _, refusals = get(bench, replica, "/allocator").split()
    return name, int(drops), int(refusals)
