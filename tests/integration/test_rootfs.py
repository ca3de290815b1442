"""Overlays of many layers: real mounts, on whatever util-linux and kernel this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuckpt.containers import rootfs
from gpuckpt.errors import NotFoundError, PreflightError
from tests.integration.conftest import Bench


@pytest.fixture
def folder(bench: Bench) -> Iterator[Path]:
    # As long as podman's own layers are: a digest of 64 digits and a word.
    made = bench.folder / ("replica,with:odd\\letters" + "x" * 60)
    made.mkdir()
    yield made
    rootfs.unmount(made)


def layers(bench: Bench, count: int) -> list[Path]:
    """Folders, the uppermost first; each has a file of its own, and all have one file in common."""
    made = []
    for number in range(count):
        layer = bench.folder / "overlay" / f"{number:064x}" / "diff"
        layer.mkdir(parents=True)
        (layer / f"of-{number}").write_text(str(number))
        (layer / "top").write_text(str(number))
        made.append(layer)
    return made


@pytest.mark.parametrize("count", [1, 60, 120])
def test_an_image_of_many_layers(bench: Bench, folder: Path, count: int) -> None:
    base = layers(bench, count)
    golden = bench.folder / "golden"
    golden.mkdir()
    (golden / "frozen").touch()
    before = os.umask(0o077)
    try:
        merged = rootfs.mount(folder, base, golden)
    finally:
        os.umask(before)
    assert merged.stat().st_mode & 0o777 == 0o755, "a server that is not root must be able to enter /"
    assert (merged / "top").read_text() == "0"
    assert {path.name for path in merged.iterdir()} == {"top", "frozen", *(f"of-{number}" for number in range(count))}
    (merged / "written").write_text("x")
    assert (folder / "upper" / "written").read_text() == "x"
    rootfs.unmount(folder)
    assert not merged.is_mount() and not list(merged.iterdir())
    assert rootfs.mount(folder, base[:1]) == merged, "the folder can be used again"
    assert not (merged / "frozen").exists()


def test_too_many_layers_are_refused_by_a_sentence(folder: Path) -> None:
    with pytest.raises(PreflightError, match="501 layers") as caught:
        rootfs.mount(folder, [Path("/")] * 501)
    assert "500" in str(caught.value.cause)


def test_a_layer_that_is_gone_is_named(bench: Bench, folder: Path) -> None:
    with pytest.raises(NotFoundError, match=str(bench.folder / "gone")):
        rootfs.mount(folder, [Path("/"), bench.folder / "gone"])
