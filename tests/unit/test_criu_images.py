"""CRIU's images: what gpuckpt reads out of them, with CRIU's decoder replaced by what it would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuckpt.criu import images as criu_images

CHOWN, SYS_ADMIN, BPF = 0, 21, 39


def creds(permitted: int = 0, effective: int = 0, inheritable: int = 0) -> dict[str, Any]:
    def words(bits: int) -> list[int]:
        return [bits & 0xFFFFFFFF, bits >> 32]

    given = {"cap_prm": words(permitted), "cap_eff": words(effective), "cap_inh": words(inheritable)}
    return {"entries": [{"thread_core": {"creds": given | {"cap_bnd": words(2**41 - 1)}}}]}


@pytest.mark.parametrize(
    ("cores", "names"),
    [
        ([creds()], ()),
        ([creds(1 << CHOWN, 1 << CHOWN)], ("CAP_CHOWN",)),
        ([creds(), creds(permitted=1 << SYS_ADMIN)], ("CAP_SYS_ADMIN",)),  # another process; not effective yet
        ([creds(inheritable=1 << BPF), creds(1 << CHOWN)], ("CAP_BPF", "CAP_CHOWN")),
        ([creds(permitted=1 << 63)], ("CAP_63",)),  # of a newer kernel: without a name, but not without a word
    ],
)
def test_what_any_process_may_do_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    known = {}
    for number, core in enumerate(cores):
        path = tmp_path / f"core-{number + 1}.img"
        path.touch()
        known[path] = core
    (tmp_path / "pstree.img").touch()
    monkeypatch.setattr(criu_images, "load", known.__getitem__)
    assert criu_images.capabilities(tmp_path) == names
