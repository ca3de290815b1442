"""When a dump is not mapped: a golden that is copied and says why, or an error, and never half of either."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.criu.images import UndecodableError
from gpuckpt.criu.rewrite import Copied, Rewritten
from gpuckpt.errors import GpuckptError, IncompatibleError, OutOfSpaceError, VerificationError
from gpuckpt.golden import mapping
from tests.fakes import World, tools_for

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


class Evidence:
    """Process 1 may be mapped, process 2 may not."""

    processes: tuple[int, ...] = (1, 2)

    def __init__(self, images: Path) -> None:
        pass

    def against_mapping(self, pid: int) -> str | None:
        return "lets madvise through" if pid == 2 else None


class Harmless(Evidence):
    processes = (1,)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(mapping, "Evidence", Harmless)
    return tools_for(tmp_path)


@pytest.fixture
def staging(world: World) -> Path:
    folder = world.layout.staging / "gold"
    for name in ("images", "memory"):
        (folder / name).mkdir(parents=True)
    return folder


def failing(error: BaseException) -> Callable[..., Rewritten]:
    def rewrite(images: Path, memory: Path, **_: Any) -> Rewritten:
        (memory / "1.small").write_bytes(b"half of it")
        raise error

    return rewrite


@pytest.mark.parametrize(
    ("error", "words"),
    [(NO_SPACE, "no room"), (OutOfSpaceError("little memory"), "little memory"), (IncompatibleError("newer"), "newer"),
     (UndecodableError("not decodable"), "not decodable")],
)  # fmt: skip
def test_what_cannot_be_mapped_is_copied_and_says_why(
    world: World, staging: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    monkeypatch.setattr(mapping, "rewrite", failing(error))
    found = mapping.map_memory(world.tools, staging, forced=False)
    assert (found.memory.mode, found.digests) == ("copy", {})
    assert words in found.memory.reason
    assert any(words in note for note in world.report.notes)
    assert list((staging / "memory").iterdir()) == []


@pytest.mark.parametrize("forced", [False, True])
def test_images_that_contradict_each_other_are_no_golden(
    world: World, staging: Path, monkeypatch: pytest.MonkeyPatch, forced: bool
) -> None:
    monkeypatch.setattr(mapping, "rewrite", failing(VerificationError("pages-1.img is shorter than it should be")))
    with pytest.raises(VerificationError, match="shorter"):
        mapping.map_memory(world.tools, staging, forced=forced)


@pytest.mark.parametrize("error", [IncompatibleError("newer"), UndecodableError("not decodable")])
def test_forced_mapping_of_what_cannot_be(
    world: World, staging: Path, monkeypatch: pytest.MonkeyPatch, error: GpuckptError
) -> None:
    monkeypatch.setattr(mapping, "rewrite", failing(error))
    with pytest.raises(type(error)):
        mapping.map_memory(world.tools, staging, forced=True)
    assert list((staging / "memory").iterdir()) == []


def test_forced_mapping_names_the_processes(world: World, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "Evidence", Evidence)
    monkeypatch.setattr(mapping, "rewrite", failing(AssertionError("nothing may be written")))
    with pytest.raises(IncompatibleError) as caught:
        mapping.map_memory(world.tools, staging, forced=True)
    assert caught.value.cause == "process 2: lets madvise through"


def test_forced_without_room_is_a_copied_golden_and_its_lack(
    world: World, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "rewrite", failing(NO_SPACE))
    found = mapping.map_memory(world.tools, staging, forced=True)
    assert found.memory.mode == "copy"
    assert isinstance(found.lacking, OutOfSpaceError)


def test_a_process_that_is_copied_is_listed(world: World, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Rewritten(
        mapped=8192, copied=[Copied(2, 0x1000, 3, "why"), Copied(2, 0x9000, 1, "why"), Copied(1, 0, 1, "x")]
    )
    monkeypatch.setattr(mapping, "rewrite", lambda *_, **__: done)
    memory = mapping.map_memory(world.tools, staging, forced=False).memory
    assert memory.mode == "mapped"
    assert [(one.pid, one.reason, one.bytes) for one in memory.copied] == [(2, "why", 4 * 4096), (1, "x", 4096)]


def test_all_processes_copied(world: World, staging: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "rewrite", lambda *_, **__: Rewritten(copied=[Copied(2, 0, 3, "no filter")]))
    memory = mapping.map_memory(world.tools, staging, forced=False).memory
    assert (memory.mode, memory.reason) == ("copy", "no filter")
    assert manifests.CopiedMemory(pid=2, reason="no filter", bytes=3 * 4096) in memory.copied


def test_the_machine_keeps_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "available_memory", lambda: mapping._RESERVE + (44 << 20))
    mapping._room(40 << 20)
    with pytest.raises(OutOfSpaceError):
        mapping._room(50 << 20)
