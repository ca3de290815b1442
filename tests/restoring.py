"""A golden that fits this machine, and restores of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.errors import GpuckptError
from gpuckpt.golden.assembly import seccomp_digest
from gpuckpt.golden.prepare import Options
from gpuckpt.golden.restore import Restored, RestoreRequest, restore
from gpuckpt.host import identity as host
from gpuckpt.manifest import BaseFiles, Manifest
from gpuckpt.store import locks, seal
from gpuckpt.timing import PhaseTable
from tests.fakes import World, publish, tools_for

WHOLE_ORDER = [
    "stage: checks",
    "stage: container",
    "mount root",
    "create container",
    "prepare container",
    "inspect container",
    "renew entropy",
    "stage: restore",
    "huge pages on",
    "restore",
    "bind threads",
    "huge pages off",
    "stage: canary",
    "replay canary",
]
HERE = host.machine()
AFTER_CHECKS = [event for event in WHOLE_ORDER[1:] if event != "huge pages off"]


def note(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size}:{status.st_mtime_ns}"


def put(world: World, **changes: Any) -> Manifest:
    """Publish a golden that fits this machine, but for ``changes`` of its manifest."""
    folder = publish(world.layout)
    (folder / "rootfs" / "srv").mkdir(parents=True, exist_ok=True)
    (folder / "rootfs" / "srv" / "written").write_text("by the server")
    publish(world.layout)
    golden = manifests.read(folder)
    fitting = {
        "launch": replace(golden.launch, seccomp_blake3=seccomp_digest(mapped=False), rootfs=str(world.base)),
        "identity": replace(
            golden.identity,
            kernel=HERE.kernel,
            machine=HERE.machine,
            cpu_flags=HERE.cpu_flags,
            base=BaseFiles(digest="1", files={"/lib/libc.so": note(world.base / "lib/libc.so")}),
        ),
        "canary": replace(golden.canary, body_blake3="forty-two") if golden.canary else None,
    }
    golden = replace(golden, **(fitting | changes))
    golden.write(folder)
    seal.write(folder)
    return golden


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine of fakes with the golden “gold” in its store."""
    made = tools_for(tmp_path)
    monkeypatch.setattr("gpuckpt.golden.restore.adapter_of", lambda record: made.adapter)
    put(made)
    return made


def restored(world: World, **options: Any) -> Restored:
    names = [name for name in options if name in Options.__dataclass_fields__]
    part = Options(**{name: options.pop(name) for name in names})
    return restore(RestoreRequest("gold", options=part, **options), world.tools, PhaseTable())


def refused(world: World, kind: type[GpuckptError], code: int, **options: Any) -> GpuckptError:
    """The error of a restore of which nothing may be left, and the golden as it was."""
    with pytest.raises(kind) as caught:
        restored(world, **options)
    assert type(caught.value) is kind and caught.value.exit_code == code
    assert world.left_over() == []
    assert world.layout.names() == ["gold"]
    assert locks.is_free(world.layout.replica_locks, "replica", "gold") and locks.is_free(
        world.layout.golden_locks, "golden", "gold"
    )
    return caught.value


def identity_with(golden: Manifest, **changes: Any) -> Any:
    return replace(golden.identity, **changes)
