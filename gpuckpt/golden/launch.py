"""What a golden is to be made of, and the container that its server is started in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpuckpt.cuda import nodes
from gpuckpt.cuda.checks import specifications
from gpuckpt.errors import UsageError
from gpuckpt.golden.assembly import seccomp_digest
from gpuckpt.golden.tools import Tools
from gpuckpt.host.limits import container_ulimits
from gpuckpt.manifest import Launch, Mount, Port, Ulimit, Volume
from gpuckpt.workload.base import Accelerator, Adapter, LaunchLine


@dataclass(frozen=True)
class CreateRequest:
    """What to make a golden of, and how; see ``gpuckpt create --help`` for each field's meaning."""

    name: str
    adapter: Adapter
    arguments: tuple[str, ...]
    image: str | None = None
    rootfs: Path = Path("/")
    publish: Port | None = None
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    volumes: tuple[Volume, ...] = ()
    workdir: str | None = None
    shm_size: int = 1 << 30
    warmup: int = 3
    prompts: tuple[str, ...] = ()
    start_timeout: float = 600
    canary: bool = True
    leave_running: bool = False
    tcp_established: bool = False
    replace: bool = False
    mode: Literal["auto", "mapped", "copy"] = "auto"
    gpus: tuple[str, ...] = ()
    graphs: bool = False
    weights: Literal["auto", "image", "outside"] = "auto"

    @property
    def accelerator(self) -> Accelerator:
        """What the server runs on. Weights are outside by themselves where a GPU has them and a canary proves it."""
        able = bool(self.gpus) and self.canary and self.adapter.record.kind != "http"
        outside = self.weights == "outside" or (self.weights == "auto" and able)
        return Accelerator(gpu=bool(self.gpus), graphs=self.graphs, outside=outside)


def launch_of(request: CreateRequest, tools: Tools, on: Accelerator) -> Launch:
    """The container's launch. Raises NotFoundError for an image that is not there, and UsageError."""
    mapped = (
        request.mode != "copy"
    )  # decided before the dump: what a process was told about memory cannot be taken back
    port = request.publish.container_port if request.publish else None
    python = None
    config: dict[str, object] = {}
    if request.image:
        tools.containers.image_digest(request.image)  # NotFoundError before anything is made
        config = tools.containers.image_config(request.image)
    else:
        candidate = tools.settings.paths.prefix / "server" / "bin" / "python"
        python = candidate if candidate.exists() else None
    line = request.adapter.launch(request.arguments, port=port, python=python, on=on)
    workdir = request.workdir or str(config.get("WorkingDir") or "/")
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    env |= dict(str(pair).partition("=")[::2] for pair in _words(config.get("Env")))
    argv = line.argv
    if request.adapter.record.kind == "http" and request.image:
        # A generic image's entrypoint belongs to its command; a server that we start ourselves replaces it.
        argv = (*map(str, _words(config.get("Entrypoint"))), *argv)
    return Launch(
        argv=argv,
        env=line.environment(env, request.env),
        workdir=workdir,
        user=str(config.get("User") or ""),
        image=request.image,
        rootfs=None if request.image else str(request.rootfs),
        mounts=(*line.mounts, *_driver(request), *request.mounts),
        volumes=request.volumes,
        own=_own(request, line, workdir, tools),
        gpus=request.gpus,
        port=request.publish,
        ulimits=tuple(
            Ulimit(name=str(limit["Name"]), soft=int(limit["Soft"]), hard=int(limit["Hard"]))
            for limit in container_ulimits()
        ),
        shm_size=request.shm_size,
        mapped=mapped,
        seccomp_blake3=seccomp_digest(mapped=mapped),
        capabilities=(),
        tcp_established=request.tcp_established,
    )


def _driver(request: CreateRequest) -> Iterator[Mount]:
    """What of NVIDIA's driver the root file system would not show; a CDI specification brings it by itself."""
    if request.gpus and not request.image and not specifications():
        for path in nodes.libraries():
            yield Mount(source=path, destination=path)


def _own(request: CreateRequest, line: LaunchLine, workdir: str, tools: Tools) -> tuple[str, ...]:
    """Where the server's own folders lie on the host, of those that a volume holds."""
    shared: list[tuple[str, Path | None, bool]] = [
        (mount.destination, Path(mount.source), mount.read_only) for mount in request.mounts
    ]
    shared += [(volume.destination, tools.containers.volume(volume.name), False) for volume in request.volumes]
    found = []
    for own in line.own:
        inside = Path(os.path.normpath(Path(workdir) / own))
        for destination, source, read_only in shared:
            if inside.is_relative_to(destination):
                if read_only:
                    raise UsageError(
                        f"the server cannot keep its files in {own}",
                        cause=f"{destination} is mounted read-only",
                        remedy=f"--volume {source}:{destination}:rw, or a folder of the container",
                    )
                if source is None:
                    raise UsageError(
                        f"the server cannot keep its files in {own}",
                        cause=f"the volume on {destination} is made by this command",
                        remedy="make it first (podman volume create), or name a folder of the host: --volume",
                    )
                found.append(str(source / inside.relative_to(destination)))
    return tuple(found)


def refuse_own_folders(launch: Launch, tools: Tools) -> None:
    """A container that sees gpuckpt's own mounts is frozen with them, and they are others when it is restored."""
    layout = tools.layout
    for mount in launch.mounts:
        source = Path(mount.source)
        for own in (layout.state, layout.run, layout.store):
            if own.is_relative_to(source) or source.is_relative_to(own):
                raise UsageError(
                    f"{source} cannot be given to the server",
                    cause=f"gpuckpt's own folder {own} is part of it" if own != source else "it is gpuckpt's own",
                    remedy="give it only the folders that it needs: --volume",
                )


def _words(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []
