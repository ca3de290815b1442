"""The manifest: everything that is known about a golden, as one strict, frozen document.

It lies beside the images as ``manifest.json`` and is written last, before the golden is published. Reading it never
needs CRIU, podman or torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gpuckpt.errors import IncompatibleError, VerificationError

FORMAT: Literal[1] = 1


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Mount(_Record, frozen=True, kw_only=True):
    """A folder or file of the host inside the container."""

    source: str
    destination: str
    read_only: bool = True


class Volume(_Record, frozen=True, kw_only=True):
    """A named podman volume; its content is kept in the golden as ``volumes/NAME``."""

    name: str
    destination: str


class Port(_Record, frozen=True, kw_only=True):
    """A published TCP port: host address and port, and the port inside the container."""

    host_ip: str
    host_port: int
    container_port: int


class Ulimit(_Record, frozen=True, kw_only=True):
    """One resource limit, as podman names it (``nofile``), soft and hard."""

    name: str
    soft: int
    hard: int


class Launch(_Record, frozen=True, kw_only=True):
    """How the container is made: what a cold start runs and what a replica's container looks like."""

    argv: tuple[str, ...]
    env: dict[str, str]
    workdir: str
    user: str
    image: Annotated[str | None, Meta(description="the image's reference, or None when `rootfs` is used")]
    rootfs: Annotated[str | None, Meta(description="a folder of the host, seen through a throw-away overlay")]
    mounts: tuple[Mount, ...]
    volumes: tuple[Volume, ...] = ()
    own: Annotated[
        tuple[str, ...],
        Meta(description="folders of the host that one replica at a time can have: it holds FOLDER/*/lock by flock(2)"),
    ] = ()
    gpus: Annotated[
        tuple[str, ...], Meta(description="GPUs the container is given, as CDI names them: all, an index, a UUID")
    ] = ()
    port: Annotated[
        Port | None, Meta(description="published port; None: no network, the server listens on a Unix socket")
    ]
    ulimits: tuple[Ulimit, ...]
    shm_size: Annotated[int, Meta(description="limit of the container's own /dev/shm in bytes")]
    mapped: Annotated[bool, Meta(description="the seccomp profile for mapped memory was in force")] = False
    seccomp_blake3: Annotated[str, Meta(description="digest of the seccomp profile the processes run under")]
    capabilities: Annotated[tuple[str, ...], Meta(description="effective capabilities of the container's init, sorted")]
    tcp_established: bool = False


class Address(_Record, frozen=True, kw_only=True):
    """The container's address on the bridge, to which its sockets are bound."""

    ip: str
    mac: str


class Request(_Record, frozen=True, kw_only=True):
    """An HTTP request of the canary; ``body`` is JSON text or empty."""

    method: str
    path: str
    body: str = ""


class Canary(_Record, frozen=True, kw_only=True):
    """The recorded deterministic request and what the never-dumped server answered.

    For a language model ``tokens`` and ``logprobs`` (natural logarithms, compared exactly); for any other server the
    status and the blake3 digest of the body.
    """

    request: Request
    status: int
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()
    body_blake3: str = ""


class Workload(_Record, frozen=True, kw_only=True):
    """Which adapter serves the container, and its options."""

    kind: Literal["vllm", "guest", "http"]
    model: str | None = None
    served_name: str | None = None
    health_path: str = "/health"
    canary_request: Request | None = None
    warmup_requests: tuple[Request, ...] = ()


class BaseFiles(_Record, frozen=True, kw_only=True):
    """The root file system under the writable layer: what must be the same for mapped files to be the same.

    ``digest`` is the image's id, or of a folder the blake3 digest of ``files``: every file that the processes have
    open or mapped, with ``size:mtime_ns``.
    """

    digest: str
    files: dict[str, str]


class Identity(_Record, frozen=True, kw_only=True):
    """The machine that a golden was made on; a restore compares it field by field."""

    kernel: str
    machine: str
    cpu_model: str
    cpu_flags: tuple[str, ...]
    criu: str
    runtime: str
    base: BaseFiles
    driver: str | None = None


class Process(_Record, frozen=True, kw_only=True):
    """One process of the tree: ids inside the container, its name, its memory in the images (bytes)."""

    pid: int
    parent: int
    name: str
    threads: int
    pages_bytes: int


class Held(_Record, frozen=True, kw_only=False):
    """A GPU that a server used: its UUID and type, and the bytes of its memory that the server held."""

    uuid: str
    name: str
    bytes: int


class DeviceState(_Record, frozen=True, kw_only=True):
    """State on GPUs that the images carry: what the server held there while it was awake, and which processes hold it
    (ids inside the container)."""

    devices: tuple[Held, ...]
    processes: tuple[int, ...]
    visible: Annotated[
        tuple[str, ...], Meta(description="every GPU of the host, by UUID: the driver saw them all")
    ] = ()
    carried: Annotated[int, Meta(description="bytes of it that the images carry: without what the server gives up")] = 0

    @property
    def bytes(self) -> int:
        """What the server holds on all devices while it is awake."""
        return sum(one.bytes for one in self.devices)


class CopiedMemory(_Record, frozen=True, kw_only=True):
    """Memory of a process that a restore copies, in bytes, and why it cannot be mapped."""

    pid: int
    reason: str
    bytes: int


class Memory(_Record, frozen=True, kw_only=True):
    """How memory comes back: ``mapped`` from memory files, or ``copy``.

    ``reason`` says why memory that was to be mapped is copied. Of a mapped golden: bytes that are mapped, bytes of
    these that other processes or goldens share, bytes of zeros that are stored no more, the number of mappings, and
    what is copied all the same.
    """

    mode: Literal["mapped", "copy"]
    reason: str = ""
    mapped: int = 0
    shared: int = 0
    zeros: int = 0
    mappings: int = 0
    copied: tuple[CopiedMemory, ...] = ()


class Sizes(_Record, frozen=True, kw_only=True):
    """Bytes of the golden by kind; ``cpu_pages`` are copied by a restore, ``mapped_pages`` are not.

    ``weights`` are files beside the images, ``gpu`` files of CRIU plugins.
    """

    cpu_pages: int
    mapped_pages: int = 0
    weights: int = 0
    gpu: int
    shared_memory: int
    rootfs: int
    metadata: int

    @property
    def total(self) -> int:
        pages = self.cpu_pages + self.mapped_pages + self.shared_memory
        return pages + self.weights + self.gpu + self.rootfs + self.metadata


class FileRecord(_Record, frozen=True, kw_only=True):
    """Size in bytes and blake3 digest (hex) of one file of the golden."""

    size: int
    blake3: str


class PhaseRecord(_Record, frozen=True, kw_only=True):
    """One row of the phase table of the creation."""

    name: str
    seconds: float


class Manifest(_Record, frozen=True, kw_only=True):
    """A golden, described."""

    format: Literal[1] = FORMAT
    name: str
    created: Annotated[str, Meta(description="UTC, ISO 8601")]
    gpuckpt: Annotated[str, Meta(description="the version that made it")]
    workload: Workload
    launch: Launch
    address: Address | None
    identity: Identity
    canary: Canary | None
    sizes: Sizes
    memory: Memory = Memory(mode="copy")
    gpu: DeviceState | None = None
    weights: Annotated[
        tuple[str, ...], Meta(description="files in `memory` with the weights, one for each process that holds some")
    ] = ()
    caches: Annotated[bool, Meta(description="the server gave its caches back, and keeps its weights in the image")] = (
        False
    )
    processes: tuple[Process, ...]
    affinity: Annotated[
        dict[str, tuple[int, ...]], Meta(description="ids of threads by the only processors that they may run on")
    ] = {}
    sockets: Annotated[tuple[str, ...], Meta(description="listening and connected sockets, one line each")]
    files: Annotated[
        dict[str, FileRecord], Meta(description="every file of the golden but the manifest, by relative path")
    ]
    links: Annotated[dict[str, str], Meta(description="symbolic links in the written layers and their targets")] = {}
    attributes_blake3: Annotated[str, Meta(description="digest of the written layers' owners, modes and marks")]
    phases: tuple[PhaseRecord, ...]
    cold_ttft_s: Annotated[
        float, Meta(description="seconds from the command to the first streamed token of the cold start")
    ]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``, readable by root alone (it may hold secrets of the environment)."""
        path = folder / "manifest.json"
        path.touch(mode=0o600)
        path.write_bytes(dump(self))


def read(folder: Path) -> Manifest:
    """Read the manifest of the golden in ``folder``.

    Raises VerificationError if it is missing or damaged, IncompatibleError if a newer gpuckpt wrote it.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise VerificationError(
            f"golden {folder.name} has no readable manifest",
            cause=str(error),
            remedy=f"remove it (gpuckpt rm {folder.name}) and create it anew",
        ) from error
    return parse(text, folder.name)


def parse(text: bytes, name: str) -> Manifest:
    """The manifest in ``text``; ``name`` is for the messages. Raises as :func:`read`."""
    try:
        return _MANIFEST.decode(text)
    except msgspec.ValidationError as error:
        # What a newer gpuckpt writes differs in more than its number; that is still what is to be said of it.
        found = _format_of(text)
        if found != FORMAT:
            raise IncompatibleError(
                f"golden {name} has manifest format {found}, this gpuckpt knows {FORMAT}",
                remedy="use the gpuckpt that made it, or create it anew",
            ) from error
        raise _damaged(name, str(error)) from error
    except msgspec.DecodeError as error:
        raise _damaged(name, f"invalid JSON: {error}") from error


def dump(manifest: Manifest) -> bytes:
    """``manifest`` as the text of its file."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


class _Head(msgspec.Struct):
    format: Any = FORMAT


# msgspec looks at a type when it first decodes one, and two threads that do so at once end the process (0.22).
_MANIFEST = msgspec.json.Decoder(Manifest)
_HEAD = msgspec.json.Decoder(_Head)


def _format_of(text: bytes) -> Any:
    try:
        return _HEAD.decode(text).format
    except msgspec.DecodeError:
        return FORMAT  # not even an object: damaged, whatever its format


def _damaged(name: str, error: str) -> VerificationError:
    what, _, place = error.partition(" - at `$.")
    return VerificationError(
        f"the manifest of golden {name} is damaged",
        cause=f"{place.removesuffix('`')}: {what}" if place else what,
        remedy=f"remove it (gpuckpt rm {name}) and create it anew",
    )
