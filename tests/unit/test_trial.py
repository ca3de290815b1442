"""Before it is published a mapped golden is restored once; what its first answer writes is copied from then on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.criu import hot
from gpuckpt.criu.images import PAGE
from gpuckpt.errors import CheckpointError, GpuckptError, VerificationError
from gpuckpt.golden import mapping, trial
from gpuckpt.golden.mapping import Outcome
from gpuckpt.manifest import CopiedMemory, Memory
from tests.fakes import World
from tests.unit.test_create import made, world

__all__ = ["world"]  # the fixture


@pytest.fixture(autouse=True)
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fakes' images can only be looked at: say that they were rewritten."""
    outcome = Outcome(Memory(mode="mapped", mapped=1 << 20, mappings=3), {})
    monkeypatch.setattr(mapping, "map_memory", lambda *_, **__: outcome)
    monkeypatch.setattr(hot, "keep_copied", lambda *_, **__: {1: 8192})


def test_a_mapped_golden_was_restored_before_it_is_published(world: World) -> None:
    golden = made(world).manifest
    events = world.journal.events
    assert events.index("stage: trial") < events.index("restore") < events.index("stage: digests")
    assert golden.memory.mapped == (1 << 20) - 8192
    assert golden.memory.copied == (CopiedMemory(pid=1, reason=trial.REASON, bytes=8192),)
    assert "trial" in [row.name for row in golden.phases]
    assert world.left_over() == []


def test_a_server_that_keeps_running_is_not_restored(world: World) -> None:
    made(world, leave_running=True)
    assert "restore" not in world.journal.events


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(lambda world: world.journal.trouble.update({"restore": GpuckptError("CRIU said no")}), CheckpointError),
     (lambda world: setattr(world.adapter, "answers", ["forty-two", "forty-three"]), VerificationError)],
    ids=["not restored", "another answer"],
)  # fmt: skip
def test_what_cannot_be_restored_is_not_published(
    world: World, trouble: Callable[[World], None], error: type[GpuckptError]
) -> None:
    trouble(world)
    with pytest.raises(error) as caught:
        made(world)
    assert "not published" in caught.value.message and "--mode copy" in str(caught.value.remedy)
    assert world.layout.names() == [] and world.left_over() == []


def test_without_room_the_pages_stay_mapped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> dict[int, int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hot, "keep_copied", full)
    golden = made(world).manifest
    assert golden == manifests.read(world.layout.golden("gold"))
    assert golden.memory.copied == () and any("stay mapped" in note for note in world.report.notes)


def test_pages_of_its_own_are_found(tmp_path: Path) -> None:
    """Ours, of a private mapping of a file: those that were written, not those that were read."""
    import mmap

    path = tmp_path / "memory file"
    path.write_bytes(b"x" * (8 * PAGE))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert mapped[0] == ord("x")
    for page in (2, 3, 6):
        mapped[page * PAGE] = 1
    (ranges,) = hot.written([os.getpid()], str(tmp_path)).values()
    first = ranges[0][0]
    assert [((start - first) // PAGE, (end - start) // PAGE) for start, end in ranges] == [(0, 2), (4, 1)]
    mapped.close()
    assert hot.written([os.getpid(), 1 << 22], str(tmp_path)) == {}
