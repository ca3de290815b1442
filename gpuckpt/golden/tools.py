"""What a transaction works with, handed to it as one argument, so that a test can hand it fakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from gpuckpt import proc
from gpuckpt.config import Settings
from gpuckpt.containers import rootfs, service
from gpuckpt.containers.podman import Container, ContainerSpec, Podman
from gpuckpt.criu import kerneldata
from gpuckpt.criu.binary import Criu, find
from gpuckpt.cuda.devices import Devices
from gpuckpt.cuda.driver import Driver
from gpuckpt.host import affinity, entropy, hugepages, tmpfs
from gpuckpt.store.layout import Layout
from gpuckpt.timing import PhaseTable

if TYPE_CHECKING:
    from gpuckpt.criu import hot


class Reporter(Protocol):
    """Told how an operation goes on; the command line draws it."""

    def stage(self, name: str) -> None:
        """A new phase began."""
        ...

    def bytes(self, done: int, total: int) -> None:
        """Of the present phase ``done`` of about ``total`` bytes are through."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know."""
        ...


class Silent:
    """A reporter that says nothing."""

    def stage(self, name: str) -> None:
        pass

    def bytes(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Containers(Protocol):
    """What transactions ask of podman; see :class:`gpuckpt.containers.podman.Podman`."""

    def create(self, spec: ContainerSpec) -> str: ...
    def start(self, container: str) -> None: ...
    def prepare(self, container: str) -> None: ...
    def inspect(self, container: str) -> Container: ...
    def list(self, owner: Path) -> list[dict[str, Any]]: ...
    def checkpoint(self, container: str, *, leave_running: bool, tcp_established: bool) -> dict[str, int]: ...
    def restore(self, container: str, owner: Path, *, tcp_established: bool, limit: float = ...) -> dict[str, int]: ...
    def end_restore(self, container: str, owner: Path) -> None: ...
    def remove(self, container: str, owner: Path) -> None: ...
    def logs(self, container: str, *, most: int | None = None) -> str: ...
    def wait_for_log(self, container: str, timeout: float) -> None: ...
    def image_digest(self, image: str) -> str: ...
    def image_layers(self, image: str) -> tuple[Path, ...]: ...
    def image_config(self, image: str) -> dict[str, Any]: ...
    def volume(self, name: str) -> Path | None: ...
    def create_volume(self, name: str) -> Path: ...
    def remove_volume(self, name: str) -> None: ...


class Overlay(Protocol):
    """Root file systems; see :mod:`gpuckpt.containers.rootfs`."""

    def mount(self, folder: Path, base: Sequence[Path], golden: Path | None = None) -> Path: ...
    def is_mounted(self, folder: Path) -> bool: ...
    def unmount(self, folder: Path) -> None: ...


class Tools(Struct, frozen=True):
    """Everything outside: settings, folders, CRIU, podman, mounts, GPUs, huge pages, randomness, whom to tell."""

    settings: Settings
    layout: Layout
    criu: Criu
    runtime: str
    containers: Containers
    overlay: Overlay
    devices: Devices
    huge_pages: Callable[[Path], AbstractContextManager[bool]]
    memory_of: Callable[[int], int]
    programs_of: Callable[[int], set[str]]
    root_of: Callable[[int], Path]
    written: Callable[[int, str], hot.Pages]
    renew_entropy: Callable[[], None]
    affinity_of: Callable[[int], dict[str, tuple[int, ...]]]
    bind: Callable[[int, Mapping[str, tuple[int, ...]]], list[str]]
    report: Reporter


def memory_below(pid: int) -> int:
    """Bytes that a dump of ``pid`` and its descendants would carry."""
    return proc.memory_of(proc.processes_below(pid))


def programs_below(pid: int) -> set[str]:
    """Paths of the programs and libraries that ``pid`` and its descendants run."""
    return proc.mapped_files(proc.processes_below(pid))


def root_seen_by(pid: int) -> Path:
    """The root file system as a process sees it, mounts and how they are mounted included."""
    return Path(f"/proc/{pid}/root")


def written_below(pid: int, mount_point: str) -> hot.Pages:
    """The pages of memory files, seen at ``mount_point``, that ``pid`` and its descendants have written."""
    from gpuckpt.criu import hot  # not for a restore, which counts milliseconds

    return hot.written(proc.processes_below(pid), mount_point)


@contextmanager
def phase(tools: Tools, phases: PhaseTable, name: str) -> Iterator[None]:
    """One phase of an operation: announced to the user and timed."""
    tools.report.stage(name)
    with phases.phase(name):
        yield


def open_store(settings: Settings) -> bool:
    """Mount the store's tmpfs unless it is there, and make its folders; True if it was mounted now."""
    mounted = tmpfs.ensure(settings.store)
    Layout.of(settings).prepare_store()
    return mounted


def devices(settings: Settings) -> Devices:
    """The GPUs of this machine; nothing is started or asked before somebody needs it."""
    run = settings.paths.run

    def driver() -> Driver:
        from gpuckpt.cuda import choice  # not for a restore without any

        return choice.driver(run, settings.paths.prefix)

    return Devices(driver, run / "cuda" / "room")


def tools(settings: Settings, *, report: Reporter | None = None, criu: Path | None = None) -> Tools:
    """The real ones: prepares the folders and connects to (or starts) the podman service."""
    layout = Layout.of(settings)
    layout.prepare()
    program = find(settings, criu, cache=layout.run)
    if not kerneldata.known() and tmpfs.info(kerneldata.NOTES.parent) is None:
        kerneldata.make(program)
    runtime = service.choose_runtime(settings.podman.runtime, cache=layout.run)
    api = service.connect(layout.run, program.path, runtime=runtime, timeout=settings.podman.timeout)
    return Tools(
        settings=settings,
        layout=layout,
        criu=program,
        runtime=runtime,
        containers=Podman(api),
        overlay=rootfs,
        devices=devices(settings),
        huge_pages=hugepages.transparent_huge_pages_always,
        memory_of=memory_below,
        programs_of=programs_below,
        root_of=root_seen_by,
        written=written_below,
        renew_entropy=entropy.renew,
        affinity_of=affinity.bound,
        bind=affinity.bind,
        report=report or Silent(),
    )
