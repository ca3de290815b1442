"""The ways in which stock podman and CRIU bring a server back, as methods of a comparison."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.asking import Answered
from benchmarks.driver import Server
from benchmarks.journal import Journal, Sample
from benchmarks.ours import Goldens, no_such_program, timed
from benchmarks.peers import Peer, build_image
from benchmarks.suite import Unavailable
from benchmarks.workspace import Workspace, criu_program
from gpuckpt import proc
from gpuckpt.errors import GpuckptError
from gpuckpt.host import hugepages
from gpuckpt.timing import now_ns


@dataclass
class Bench:
    """What the methods share: the image, the golden whose launch line and canary they use, and one dumped container.

    The container is started once (a cold start that counts as one), asked, exported twice while it goes on, and then
    dumped into the tmpfs, from where the images are copied to the disk.
    """

    space: Workspace
    goldens: Goldens
    server: Server
    golden_name: str
    journal: Journal
    image: str = ""
    dumped: Peer | None = None
    archives: dict[str, Path] = field(default_factory=dict)

    @property
    def golden(self) -> dict[str, Any]:
        return self.goldens.need(self.golden_name, self.server, "mapped")

    def peer(self, word: str) -> Peer:
        self.image = self.image or build_image(self.space)
        return Peer(self.space, self.image, self.golden, word)

    @property
    def ram(self) -> Path:
        return self.space.ram / "images"

    @property
    def disk(self) -> Path:
        return self.space.disk / "images"

    def need(self) -> Peer:
        """The dumped container; made when it is asked for first."""
        if self.dumped is None:
            peer = self.peer("server")
            self.space.mount_ram()
            try:
                self._dump(peer)
            except BaseException:
                peer.remove()
                raise
            self.dumped = peer
        return self.dumped

    def _dump(self, peer: Peer) -> None:
        peer.start()
        answered = peer.first_token()
        if self.server.streams:
            self.journal.add("cold", cold_sample(peer, answered))
        for _ in range(3):
            peer.first_token()
        for compression in ("none", "zstd"):
            file = self.space.disk / f"{compression}.tar"
            try:
                seconds = peer.checkpoint("--leave-running", "--compress", compression, "--export", file)
            except GpuckptError as error:
                self.journal.fact(f"podman_export_{compression}_error", "; ".join([error.message, *error.log[-3:]]))
            else:
                self.archives[compression] = file
                self.journal.fact(f"podman_export_{compression}", {"seconds": seconds, "bytes": file.stat().st_size})
        peer.link_checkpoint(self.ram)
        seconds = peer.checkpoint("--keep")
        shutil.copytree(self.ram, self.disk, symlinks=True)
        size = sum(path.stat().st_size for path in self.ram.glob("*.img"))
        self.journal.fact("podman_checkpoint", {"seconds": seconds, "bytes": size})


def cold_sample(peer: Peer, answered: Answered) -> Sample:
    ttft, command = (answered.first_token_ns - peer.started_ns) / 1e9, (peer.running_ns - peer.started_ns) / 1e9
    return {
        "ttft_s": round(ttft, 6),
        "canary_match": answered.difference is None,
        "phases": [
            {"name": "podman run", "seconds": round(command, 6)},
            {"name": "server start", "seconds": round(ttft - command, 6)},
        ],
    }


@dataclass
class Cold:
    """`podman run` of the server to its first token, the files it reads in the page cache."""

    bench: Bench
    n: int | None = 3
    name: str = "cold"

    def prepare(self) -> None:
        self.bench.peer("cold")

    def measure(self) -> Sample:
        peer = self.bench.peer("cold")
        try:
            peer.start()
            answered = peer.first_token()
            return cold_sample(peer, answered)
        finally:
            peer.remove()

    def close(self) -> None:
        pass


@dataclass
class Podman:
    """`podman container restore --keep` from images in a tmpfs or on the disk; ``huge``: as gpuckpt's copies do."""

    name: str
    bench: Bench
    where: str
    huge: bool = False
    evicted: bool = False
    lazy: bool = False
    n: int | None = None

    def prepare(self) -> None:
        self.bench.need()

    def measure(self) -> Sample:
        peer = self.bench.need()
        images = self.bench.ram if self.where == "tmpfs" else self.bench.disk
        if self.evicted:
            evict(images)
        peer.link_checkpoint(images)
        with contextlib.ExitStack() as stack:
            if self.huge and not stack.enter_context(hugepages.transparent_huge_pages_always(self.bench.space.run)):
                raise Unavailable("transparent huge pages cannot be switched on here")
            if self.lazy:
                stack.enter_context(lazy_pages(peer, images))
            try:
                spawned, back = peer.restore("--keep", "--file-locks", peer.name)
                if not self.lazy:
                    stack.close()  # only the restore itself is done with huge pages
                return timed(spawned, back, peer.endpoint, peer.canary, "podman container restore")
            finally:
                peer.kill()

    def close(self) -> None:
        pass


@contextlib.contextmanager
def lazy_pages(peer: Peer, images: Path) -> Iterator[None]:
    """CRIU's daemon that brings pages when they are touched, and the option that has the restore leave them out."""
    peer.write_config("lazy-pages")
    log = peer.folder / "lazy-pages.log"
    # The restoring CRIU looks for the daemon's socket in its working folder, which podman sets to the bundle.
    daemon = proc.spawn(
        [criu_program(), "lazy-pages", "--images-dir", images, "--work-dir", peer.bundle, "-v2", "--log-file", log],
        log=peer.folder / "lazy-pages.out",
    )
    try:
        deadline = time.monotonic() + 10
        while not (peer.bundle / "lazy-pages.socket").exists():
            if daemon.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
                raise Unavailable(f"criu lazy-pages does not run here: {'; '.join(lines) or daemon.returncode}")
            time.sleep(0.01)
        yield
    finally:
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        (peer.bundle / "lazy-pages.socket").unlink(missing_ok=True)
        peer.write_config()


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, as if the machine had been used for other things since."""
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


@dataclass
class Import:
    """`podman container restore --import` of an archive: unpacked, a new container made, restored."""

    name: str
    bench: Bench
    compression: str
    n: int | None = None

    def prepare(self) -> None:
        self.bench.need()
        if self.compression not in self.bench.archives:
            reason = self.bench.journal.document["facts"].get(f"podman_export_{self.compression}_error")
            raise Unavailable(f"podman could not export the container: {reason}")

    def measure(self) -> Sample:
        peer = self.bench.need()
        imported = f"{peer.name}-imported"
        try:
            archive = self.bench.archives[self.compression]
            spawned, back = peer.restore("--file-locks", "--import", archive, "--name", imported)
            return timed(spawned, back, peer.endpoint, peer.canary, "podman container restore --import")
        finally:
            peer.podman("rm", "-f", "-t", "0", imported, check=False)

    def close(self) -> None:
        pass


@dataclass
class Dmtcp:
    """DMTCP, which works by a library in every process: `dmtcp_restart` to the first token."""

    bench: Bench
    n: int | None = None
    name: str = "dmtcp"

    def prepare(self) -> None:
        if not shutil.which("dmtcp_launch"):
            raise no_such_program("DMTCP", "dmtcp")
        self.folder = self.bench.space.folder / "dmtcp"
        (self.folder / "socket").mkdir(parents=True, exist_ok=True)
        launch = self.bench.golden["launch"]
        inside = str(self.bench.peer("dmtcp").endpoint.socket)
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        argv = [inside if word.endswith("/server.sock") else word for word in launch["argv"]]
        started = self._start(["dmtcp_launch", "--ckptdir", str(self.folder), *argv], launch["env"])
        try:
            self.bench.peer("dmtcp").first_token(timeout=300)
            proc.run(["dmtcp_command", "--port", "7779", "--bcheckpoint"], timeout=300)
        except GpuckptError as error:
            raise Unavailable(f"DMTCP does not hold this server: {error.message} {error.cause or ''}") from error
        finally:
            self._end(started)

    def _start(self, argv: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        return proc.spawn(argv, log=self.folder / "log", env=env | {"DMTCP_COORD_PORT": "7779"})

    def _end(self, started: subprocess.Popen[bytes]) -> None:
        proc.run(["dmtcp_command", "--port", "7779", "--quit"], check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(30)
        started.kill()
        started.wait()

    def measure(self) -> Sample:
        spawned = now_ns()
        started = self._start([str(self.folder / "dmtcp_restart_script.sh")], {})
        try:
            peer = self.bench.peer("dmtcp")
            return timed(spawned, now_ns(), peer.endpoint, peer.canary, "dmtcp_restart")
        finally:
            self._end(started)

    def close(self) -> None:
        pass
