"""What stands in for podman, mounts and a server, so that transactions are tested in milliseconds without root.

Everything that happens goes into one :class:`Journal`, in order. A test that wants a step to fail puts an exception
under the step's name into ``journal.trouble``; it is raised once, before the step does anything, or with ``late``
after it was done but before anybody knows: what an interrupt does at its worst.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msgspec import structs

from gpuckpt.config import Create, Paths, Settings, Store
from gpuckpt.containers.podman import LABEL, OWNER, Container, ContainerSpec
from gpuckpt.criu import hot
from gpuckpt.criu.binary import Criu
from gpuckpt.cuda.devices import Devices
from gpuckpt.errors import BusyError, DaemonUnreachableError, GpuckptError, NotFoundError
from gpuckpt.golden.launch import CreateRequest
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import (
    BaseFiles,
    Canary,
    Identity,
    Launch,
    Manifest,
    PhaseRecord,
    Process,
    Request,
    Sizes,
    Ulimit,
    Workload,
)
from gpuckpt.store import digests, seal
from gpuckpt.store.layout import Layout
from gpuckpt.timing import now_ns
from gpuckpt.workload.base import MEMORY_FOLDER, PROCESSORS, Accelerator, LaunchLine, Replay
from gpuckpt.workload.endpoint import Endpoint
from tests.cuda_fake import FakeDriver

DUMP_STAGES = ("pre-dump", "network-lock", "post-dump", "network-unlock")
RESTORE_STAGES = (
    "pre-restore",
    "setup-namespaces",
    "post-setup-namespaces",
    "post-restore",
    "pre-resume",
    "post-resume",
)
IMAGES = {"inventory.img": b"inventory", "pstree.img": b"tree", "core-1.img": b"core", "pages-1.img": bytes(8192)}
NEVER = 10**9  # for FakeAdapter.unhealthy


class Journal:
    """What happened, in order, and what is to go wrong."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.trouble: dict[str, BaseException] = {}
        self.late = False

    @contextmanager
    def step(self, event: str) -> Iterator[None]:
        self.events.append(event)
        error = self.trouble.pop(event, None)
        if error is not None and not self.late:
            raise error
        yield
        if error is not None:
            raise error

    def note(self, event: str) -> None:
        with self.step(event):
            pass


@dataclass
class FakeContainer:
    """A container that never was: its state, and the folder that podman would keep its images in."""

    spec: ContainerSpec
    bundle: Path
    status: str = "created"
    exit_code: int = 0

    @property
    def labels(self) -> dict[str, str]:
        return {LABEL: self.spec.replica, **self.spec.labels}


class FakeContainers:
    """podman without containers. At CRIU's stages the real action script is called where it has something to do."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self.journal = journal
        self.containers: dict[str, FakeContainer] = {}
        self.volumes: dict[str, Path] = {}
        self.images: dict[str, str] = {}
        self.log = "listening\nready\n"
        self.dies_when_mapped = 0  # exit code of a server that cannot live under the profile for mapped memory
        self.dies_on_start = False
        self.programs: set[str] = set()  # of the container's processes
        self.ignores_options = False  # a runtime that does not know the annotation with CRIU's options
        self.criu_log = ""  # what CRIU says when a dump or restore is told to fail

    def _find(self, container: str) -> FakeContainer:
        try:
            return self.containers[container]
        except KeyError:
            raise NotFoundError(f"no such container {container}") from None

    def foreign(self, name: str, *, replica: str = "gold") -> FakeContainer:
        """A running container of another gpuckpt on this machine."""
        launch = sample_manifest().launch
        spec = ContainerSpec(
            name=name,
            replica=replica,
            golden=replica,
            rootfs=self.folder,
            launch=launch,
            binds=(),
            criu_config=self.folder,
            seccomp=self.folder,
            hostname=replica,
            labels={OWNER: "/var/lib/another"},
        )
        self.containers[name] = FakeContainer(spec, self.folder / "foreign", "running")
        return self.containers[name]

    def create(self, spec: ContainerSpec) -> str:
        with self.journal.step("create container"):
            if spec.name in self.containers:
                raise BusyError(f"a container named {spec.name} exists already")
            bundle = self.folder / spec.name
            bundle.mkdir(parents=True, exist_ok=True)
            self.containers[spec.name] = FakeContainer(spec, bundle)
            # What its processes see of the golden's memory.
            seen = self.folder.parent / "root" / MEMORY_FOLDER.lstrip("/")
            seen.parent.mkdir(parents=True, exist_ok=True)
            source = next(source for source, inside, _ in spec.binds if inside == MEMORY_FOLDER)
            new = seen.with_name(spec.name)
            new.symlink_to(source)
            new.replace(seen)  # in one step: several are made side by side
        return spec.name

    def start(self, container: str) -> None:
        with self.journal.step("start container"):
            found = self._find(container)
            if found.status not in ("created", "exited"):
                raise GpuckptError(f"container {container} is {found.status}")
            found.status = "running"
            upper = found.spec.rootfs.parent / "upper"
            (upper / "srv").mkdir(parents=True, exist_ok=True)
            (upper / "srv" / "written").write_text("by the server")
            if self.dies_on_start:
                found.status, found.exit_code = "exited", 3
            if self.dies_when_mapped and found.spec.launch.mapped:
                found.status, found.exit_code = "exited", self.dies_when_mapped

    def prepare(self, container: str) -> None:
        with self.journal.step("prepare container"):
            self._find(container).status = "exited"

    def inspect(self, container: str) -> Container:
        with self.journal.step("inspect container"):
            found = self._find(container)
        port = found.spec.launch.port
        return Container(
            id=container,
            name=container,
            status=found.status,
            pid=4242 if found.status == "running" else 0,
            exit_code=found.exit_code,
            bundle=found.bundle,
            ip="10.88.0.7" if port else None,
            mac="02:00:00:00:00:07" if port else None,
            labels=found.labels,
        )

    def list(self, owner: Path) -> list[dict[str, Any]]:
        return [
            {"id": name, "name": name, "state": one.status, "labels": one.labels, "pid": 0}
            for name, one in self.containers.items()
            if one.labels.get(OWNER) == str(owner)
        ]

    def checkpoint(self, container: str, *, leave_running: bool, tcp_established: bool) -> dict[str, int]:
        found = self._find(container)
        try:
            with self.journal.step("dump"):
                assert found.status == "running", "only a running container can be dumped"
                images = found.bundle / "checkpoint"
                for name, content in IMAGES.items():
                    (images / name).write_bytes(content)
                self._stages(found, DUMP_STAGES, images)
                found.status = "running" if leave_running else "exited"
        except GpuckptError:
            (found.bundle / "dump.log").write_text(self.criu_log)
            raise
        return {}

    def restore(self, container: str, owner: Path, *, tcp_established: bool, limit: float = 600) -> dict[str, int]:
        found = self._find(container)
        try:
            with self.journal.step("restore"):
                assert found.status == "exited", "podman restores into an exited container"
                images = found.bundle / "checkpoint"
                assert {path.name for path in images.iterdir()} >= set(IMAGES), "the images are not where podman looks"
                self._stages(found, RESTORE_STAGES, images)
                found.status = "running"
                (found.bundle / "restore.log").write_text("restored\n")
        except GpuckptError:
            (found.bundle / "restore.log").write_text(self.criu_log)
            raise
        return {}

    def _stages(self, found: FakeContainer, stages: Sequence[str], images: Path) -> None:
        """What CRIU does at each stage: call the script that its configuration names."""
        if self.ignores_options:
            return
        options = dict(
            line.partition(" ")[::2] for line in found.spec.criu_config.read_text().splitlines() if line.strip()
        )
        folder = found.spec.criu_config.parent
        hooks = next(line[6:] for line in (folder / "context").read_text().splitlines() if line.startswith("HOOKS="))
        for stage in stages:
            if stage != "post-dump" and not Path(hooks, stage).is_dir():
                # All that the script would do is to note the time; a process for each of a thousand takes its own.
                with (folder / "stages").open("a") as notes:
                    notes.write(f"{stage} {time.time():.6f} 4242\n")
                continue
            environment = {
                "PATH": os.environ["PATH"],
                "CRTOOLS_SCRIPT_ACTION": stage,
                "CRTOOLS_IMAGE_DIR": str(images),
                "CRTOOLS_INIT_PID": "4242",
            }
            done = subprocess.run([options["action-script"]], env=environment, capture_output=True, check=False)
            if done.returncode != 0:
                raise GpuckptError("CRIU failed", cause=f"the script of {stage} failed")

    def end_restore(self, container: str, owner: Path) -> None:
        pass

    def remove(self, container: str, owner: Path) -> None:
        with self.journal.step("remove container"):
            found = self.containers.get(container)
            if found is not None and found.labels.get(OWNER) == str(owner):
                del self.containers[container]

    def logs(self, container: str, *, most: int | None = None) -> str:
        self._find(container)
        return self.log

    def wait_for_log(self, container: str, timeout: float) -> None:
        with self.journal.step("wait for log"):
            self._find(container)

    def image_digest(self, image: str) -> str:
        try:
            return self.images[image]
        except KeyError:
            raise NotFoundError(f"no image {image} on this machine") from None

    def image_layers(self, image: str) -> tuple[Path, ...]:
        self.image_digest(image)
        layers = self.folder / "layers" / "upper", self.folder / "layers" / "lower"
        for layer in layers:
            layer.mkdir(parents=True, exist_ok=True)
        return layers

    def image_config(self, image: str) -> dict[str, Any]:
        return {"Env": ["LANG=C.UTF-8"], "Entrypoint": ["/entry"], "WorkingDir": "/srv", "User": "app"}

    def volume(self, name: str) -> Path | None:
        return self.volumes.get(name)

    def create_volume(self, name: str) -> Path:
        with self.journal.step("create volume"):
            folder = self.folder / "volumes" / name
            folder.mkdir(parents=True)
            self.volumes[name] = folder
        return folder

    def remove_volume(self, name: str) -> None:
        with self.journal.step("remove volume"):
            self.volumes.pop(name, None)


class FakeOverlay:
    """Mounts that are only remembered."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.mounted: dict[Path, tuple[tuple[Path, ...], Path | None]] = {}

    def mount(self, folder: Path, base: Sequence[Path], golden: Path | None = None) -> Path:
        with self.journal.step("mount root"):
            assert all(layer.is_dir() for layer in (*base, *([golden] if golden else []))), "layers are folders"
            for name in ("upper", "work", "rootfs"):
                (folder / name).mkdir(exist_ok=True)
            self.mounted[folder] = (tuple(base), golden)
        return folder / "rootfs"

    def is_mounted(self, folder: Path) -> bool:
        return folder in self.mounted

    def unmount(self, folder: Path) -> None:
        with self.journal.step("unmount root"):
            self.mounted.pop(folder, None)


class FakeAdapter:
    """A server that answers as it is told to: healthy after ``unhealthy`` looks, ``answers`` to the canary."""

    def __init__(self, journal: Journal, record: Workload | None = None) -> None:
        self.journal = journal
        self._record = record or Workload(kind="http", health_path="/health")
        self.unhealthy = 0
        self.answers: list[str] = ["forty-two"]  # one after the other, the last one for ever
        self.silent = 0  # so many canaries meet a socket on which nobody answers yet

    @property
    def record(self) -> Workload:
        return self._record

    def _answer(self) -> str:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        return LaunchLine(tuple(arguments), {"SERVER": "fake"})

    def healthy(self, endpoint: Endpoint, *, timeout: float = 2) -> bool:
        with self.journal.step("health"):
            self.unhealthy -= 1
        return self.unhealthy < 0

    def first_token(self, endpoint: Endpoint) -> int:
        with self.journal.step("first token"):
            return now_ns()

    def warm_up(self, endpoint: Endpoint, count: int, prompts: Sequence[str]) -> None:
        self.journal.note("warm up")

    def record_canary(self, endpoint: Endpoint) -> Canary:
        with self.journal.step("record canary"):
            return Canary(request=Request(method="GET", path="/"), status=200, body_blake3=self._answer())

    def replay(self, endpoint: Endpoint, canary: Canary) -> Replay:
        with self.journal.step("replay canary"):
            if self.silent > 0:
                self.silent -= 1
                raise DaemonUnreachableError("the server does not answer", cause="connection refused")
            got = self._answer()
        different = () if got == canary.body_blake3 else (f"the body is {got}, {canary.body_blake3} was recorded",)
        return Replay(now_ns(), different)

    def quiesce(self, endpoint: Endpoint, *, timeout: float) -> None:
        self.journal.note("quiesce")


class FakeReporter:
    """Stages go to the journal too: between any two of them an interrupt may come."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.notes: list[str] = []

    def stage(self, name: str) -> None:
        self.journal.note(f"stage: {name}")

    def bytes(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class World:
    """A machine of fakes in one folder: the tools, and what they did."""

    folder: Path
    settings: Settings
    layout: Layout
    journal: Journal
    containers: FakeContainers
    overlay: FakeOverlay
    adapter: FakeAdapter
    report: FakeReporter
    tools: Tools
    driver: FakeDriver
    huge_pages: bool = field(default=False)

    @property
    def base(self) -> Path:
        """The folder that containers have as root file system."""
        return self.folder / "base"

    def request(self, name: str = "gold", **changes: Any) -> CreateRequest:
        """A request that works."""
        request = CreateRequest(name=name, adapter=self.adapter, arguments=("serve", "--fast"), rootfs=self.base)
        return replace(request, **changes)

    def on_gpu(self, **mib: int) -> None:
        """Have the container's processes hold device memory: ``p4242=1024``. Steps of the driver go to the journal."""
        self.driver.before = lambda step, pid: self.journal.note(f"{step} {pid}") if step != "state" else None
        for name, count in mib.items():
            pid = int(name[1:])
            self.driver.start(pid, count)
            files = self.folder / "proc" / str(pid) / "fd"
            files.mkdir(parents=True)
            (files / "3").symlink_to("/dev/nvidiactl")

    def hook(self, stage: str, script: str) -> Path:
        """Install a user's hook."""
        folder = self.settings.paths.hooks / stage
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        path = folder / "10-hook"
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    def left_over(self) -> list[str]:
        """Everything that a transaction without a result should not have left."""
        found = [f"container {one['name']}" for one in self.containers.list(self.layout.state)]
        found += [f"mount {folder}" for folder in self.overlay.mounted]
        found += [f"volume {name}" for name in self.containers.volumes]
        for parent in (self.layout.replicas, self.layout.staging):
            found += [f"folder {path}" for path in sorted(parent.iterdir())]
        return [*found, "huge pages"] if self.huge_pages else found


def settings_for(folder: Path) -> Settings:
    """Settings whose every path lies below ``folder``."""
    return Settings(
        paths=Paths(prefix=folder / "prefix", state=folder / "state", run=folder / "run", hooks=folder / "hooks.d"),
        store=Store(path=folder / "store"),
        create=Create(),
    )


def tools_for(folder: Path) -> World:
    """A machine of fakes whose every file lies below ``folder``."""
    settings = settings_for(folder)
    layout = Layout.of(settings)
    layout.prepare()
    layout.prepare_store()
    base = folder / "base"
    (base / "lib").mkdir(parents=True)
    (base / "lib" / "libc.so").write_bytes(b"libc")
    (base / "app").write_bytes(b"program")
    journal = Journal()
    containers = FakeContainers(folder / "podman", journal)
    overlay = FakeOverlay(journal)
    report = FakeReporter(journal)
    driver = FakeDriver()

    def memory_of(pid: int) -> int:
        assert pid == 4242, "the memory of the container's init is asked for"
        with journal.step("measure memory"):
            return 4096

    def programs_of(pid: int) -> set[str]:
        assert pid == 4242, "the programs of the container's init are asked for"
        return set(containers.programs)

    @contextmanager
    def huge_pages(run: Path) -> Iterator[bool]:
        journal.note("huge pages on")
        world.huge_pages = True
        try:
            yield True
        finally:
            journal.events.append("huge pages off")
            world.huge_pages = False

    def renew_entropy() -> None:
        with journal.step("renew entropy"):
            pass

    def written(pid: int, mount_point: str) -> hot.Pages:
        assert (pid, mount_point) == (4242, MEMORY_FOLDER)
        return {1: ((0x1000, 0x3000),)}

    def affinity_of(pid: int) -> dict[str, tuple[int, ...]]:
        assert pid == 4242, "the threads below the container's init are asked for"
        return {"0": (7, 9)}

    def bind(pid: int, affinity: Mapping[str, tuple[int, ...]]) -> list[str]:
        assert pid == 4242, "the threads below the container's init are bound"
        with journal.step("bind threads"):
            return []

    tools = Tools(
        settings=settings,
        layout=layout,
        criu=Criu(Path("/nonexistent/criu"), "4.2.1"),
        runtime="runc",
        containers=containers,
        overlay=overlay,
        devices=Devices(
            lambda: driver,
            folder / "run" / "room",
            below=lambda pid: sorted({4242, *driver.processes}),
            files=folder / "proc",
        ),
        huge_pages=huge_pages,
        memory_of=memory_of,
        programs_of=programs_of,
        root_of=lambda pid: folder / "root",
        renew_entropy=renew_entropy,
        written=written,
        affinity_of=affinity_of,
        bind=bind,
        report=report,
    )
    world = World(folder, settings, layout, journal, containers, overlay, FakeAdapter(journal), report, tools, driver)
    return world


def sample_manifest(name: str = "gold", **changes: Any) -> Manifest:
    """A manifest in which every part is filled."""
    manifest = Manifest(
        name=name,
        created="2025-01-02T03:04:05+00:00",
        gpuckpt="0.1.0",
        workload=Workload(kind="http"),
        launch=Launch(
            argv=("serve",),
            env={"HOME": "/root"},
            workdir="/",
            user="",
            image=None,
            rootfs="/",
            mounts=(),
            port=None,
            ulimits=(Ulimit(name="nofile", soft=1024, hard=1024),),
            shm_size=1 << 20,
            seccomp_blake3="0" * 64,
            capabilities=("CAP_CHOWN",),
        ),
        attributes_blake3=digests.digest_bytes(b""),  # no written layer
        address=None,
        identity=Identity(
            kernel="6.1",
            machine="x86_64",
            cpu_model="a processor",
            cpu_flags=("avx", "sse"),
            criu="4.2.1",
            runtime="runc",
            base=BaseFiles(digest="1" * 64, files={"/lib/libc.so": "4:1"}),
        ),
        canary=Canary(request=Request(method="GET", path="/"), status=200, body_blake3="2" * 64),
        sizes=Sizes(cpu_pages=8192, gpu=0, shared_memory=0, rootfs=13, metadata=20),
        processes=(Process(pid=1, parent=0, name="serve", threads=1, pages_bytes=8192),),
        sockets=("unix /run/gpuckpt/server.sock listening",),
        files={},
        phases=(PhaseRecord(name="dump", seconds=0.5),),
        cold_ttft_s=1.5,
    )
    return structs.replace(manifest, **changes)


def publish(layout: Layout, name: str = "gold", contents: dict[str, bytes] | None = None) -> Path:
    """Put a sealed golden into the store; ``contents`` is what it holds besides whatever lies in its folder already."""
    folder = layout.goldens / name
    (folder / "images").mkdir(parents=True, exist_ok=True, mode=0o700)
    files = {f"images/{image}": data for image, data in IMAGES.items()} if contents is None else contents
    for relative, data in files.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if relative.startswith("memory/"):
            path.chmod(0o400)
    for path in ((folder / "images"), *(folder / "images").rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    found = digests.record(folder)
    sample_manifest(name, files=found.files, links=found.links, attributes_blake3=found.attributes).write(folder)
    seal.write(folder)
    tick(path)  # a test that changes it is to be noticed
    return folder


def tick(path: Path) -> None:
    """Wait until what is written now has a later time than what happened to ``path``: times of files are those of the
    kernel's last tick, and some kernels have only a hundred in a second."""
    coarse = 5  # CLOCK_REALTIME_COARSE
    while time.clock_gettime_ns(coarse) <= path.stat().st_ctime_ns:
        time.sleep(0.001)


@dataclass(frozen=True)
class Asked:
    """A request as it came over the socket."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def response(status: int, body: bytes | str | dict[str, Any] | list[Any] = b"", *, length: int | None = None) -> bytes:
    """A whole HTTP response; with ``length`` it claims another length than it has."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Status\r\nContent-Length: {len(data) if length is None else length}\r\n\r\n"
    return head.encode() + data


class UnixServer:
    """A tiny server on a Unix socket. ``answer`` gives the raw bytes for a request, or None to stay silent."""

    def __init__(self, path: Path, answer: Callable[[Asked], bytes | None]) -> None:
        self.path = path
        self.answer = answer
        self.asked: list[Asked] = []
        self._stop = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> UnixServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            method, path, _ = stream.readline().decode().split(" ")
            headers: dict[str, str] = {}
            while line := stream.readline().strip():
                key, _, value = line.decode().partition(":")
                headers[key.lower()] = value.strip()
            asked = Asked(method, path, headers, stream.read(int(headers.get("content-length", 0))))
            self.asked.append(asked)
            data = self.answer(asked)
            if data is None:
                self._stop.wait(60)
            else:
                with suppress(OSError):  # who has waited long enough has gone
                    connection.sendall(data)
