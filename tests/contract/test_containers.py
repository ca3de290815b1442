"""One suite for the fake containers of the unit tests and for podman: what holds for one must hold for the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpuckpt.config import Paths, Settings, Store
from gpuckpt.containers.podman import LABEL, OWNER
from gpuckpt.errors import BusyError, NotFoundError
from gpuckpt.golden.assembly import assemble, link_images, seccomp_digest
from gpuckpt.golden.replica import Replica, discard
from gpuckpt.golden.tools import Tools, tools
from gpuckpt.manifest import Launch, Ulimit
from tests.fakes import tools_for

# The podman service is started to outlive the command, which Python takes for a forgotten child.
pytestmark = [
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@dataclass(frozen=True)
class Side:
    """The tools of one side, and a word that begins the names of its replicas."""

    tools: Tools
    word: str

    def replica(self, suffix: str) -> Replica:
        name = f"{self.word}-{suffix}"
        made = Replica(name, name, self.tools.layout.replicas / name)
        made.folder.mkdir(parents=True)
        made.save()
        made.sockets.mkdir()
        return made

    def assemble(self, suffix: str) -> tuple[Replica, str]:
        launch = Launch(
            argv=("/bin/sleep", "60"),
            env={"PATH": "/usr/bin:/bin"},
            workdir="/",
            user="",
            image=None,
            rootfs="/",
            mounts=(),
            port=None,
            ulimits=(Ulimit(name="nofile", soft=1024, hard=1024), Ulimit(name="nproc", soft=1024, hard=1024)),
            shm_size=1 << 20,
            seccomp_blake3=seccomp_digest(mapped=False),
            capabilities=(),
        )
        replica = self.replica(suffix)
        memory = replica.folder / "memory"
        memory.mkdir()
        return assemble(self.tools, replica, launch, memory=memory, tcp_established=False)


@pytest.fixture(params=["fake", pytest.param("real", marks=[pytest.mark.integration, pytest.mark.timeout(120)])])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Side]:
    if request.param == "fake":
        yield Side(tools_for(tmp_path).tools, "contract")
        return
    folder = Path(f"/var/tmp/gpuckpt-test-{uuid.uuid4().hex[:8]}")
    folder.mkdir(mode=0o700)
    prefix = Path(os.environ.get("GPUCKPT_PREFIX", "/opt/gpuckpt"))
    settings = Settings(
        paths=Paths(prefix=prefix, state=folder / "state", run=folder / "run", hooks=folder / "hooks.d"),
        store=Store(path=folder / "store"),
    )
    made = Side(tools(settings), f"t{uuid.uuid4().hex[:6]}")
    layout = made.tools.layout
    try:
        yield made
    finally:
        for entry in made.tools.containers.list(layout.state):
            name = entry["labels"][LABEL]
            discard(made.tools, Replica(name, name, layout.replicas / name))
        for pid in folder.glob("run/podman-*/service.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(pid.read_text()), signal.SIGTERM)
        for mounted in folder.glob("state/replicas/*/rootfs"):
            subprocess.run(["umount", "-l", mounted], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def test_from_created_to_removed(side: Side) -> None:
    containers, owner = side.tools.containers, side.tools.layout.state
    replica, container = side.assemble("a")
    assert containers.inspect(container).status == "created"
    assert containers.inspect(replica.container).labels[OWNER] == str(owner)
    assert [entry["labels"][LABEL] for entry in containers.list(owner)] == [replica.name]
    assert containers.list(Path("/somebody/else")) == []
    containers.start(container)
    running = containers.inspect(container)
    assert (running.status, running.alive) == ("running", True)
    assert running.pid > 0
    assert running.bundle.is_dir()
    containers.remove(replica.container, Path("/somebody/else"))
    assert containers.inspect(container).status == "running", "only its owner removes a container"
    containers.remove(replica.container, owner)
    with pytest.raises(NotFoundError):
        containers.inspect(container)
    containers.remove(replica.container, owner)  # once more is no error


def test_a_name_is_taken_once(side: Side) -> None:
    replica, _ = side.assemble("a")
    side.tools.overlay.unmount(replica.folder)
    shutil.rmtree(replica.folder)
    with pytest.raises(BusyError):
        side.assemble("a")


def test_dump_and_restore_into_another(side: Side) -> None:
    containers = side.tools.containers
    original, container = side.assemble("a")
    containers.start(container)
    images = original.folder / "images"
    images.mkdir()
    link_images(containers.inspect(container).bundle, images)
    containers.checkpoint(container, leave_running=False, tcp_established=False)
    assert containers.inspect(container).status == "exited"
    assert (images / "pstree.img").stat().st_size > 0
    original.operation.require_marks()
    assert original.operation.failed_step() is None

    other, clone = side.assemble("b")
    containers.prepare(clone)
    assert containers.inspect(clone).status == "exited"
    link_images(containers.inspect(clone).bundle, images)
    containers.restore(clone, side.tools.layout.state, tcp_established=False)
    assert containers.inspect(clone).status == "running"
    other.operation.require_marks()
    assert (images / "pstree.img").exists(), "a golden's images are kept"
    for one in (other, original):
        discard(side.tools, one)
        assert not one.folder.exists()


def test_volumes(side: Side) -> None:
    containers, name = side.tools.containers, f"gpuckpt-{side.word}-volume"
    assert containers.volume(name) is None
    folder = containers.create_volume(name)
    try:
        assert folder.is_dir()
        assert containers.volume(name) == folder
    finally:
        containers.remove_volume(name)
    assert containers.volume(name) is None
    containers.remove_volume(name)
