"""Put a replica's container together: root file system, mounts, options; the same for a cold start and a restore."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

from gpuckpt.containers import rootfs as layers
from gpuckpt.containers.podman import OWNER, ContainerSpec
from gpuckpt.cuda import nodes
from gpuckpt.errors import BusyError
from gpuckpt.golden.replica import Replica, publish_address
from gpuckpt.golden.tools import Tools
from gpuckpt.host.seccomp import profile_path
from gpuckpt.manifest import Address, Launch, Port
from gpuckpt.store.digests import digest_bytes, digest_file
from gpuckpt.workload.base import MEMORY_FOLDER, SOCKET_FOLDER
from gpuckpt.workload.guest import present


def assemble(
    tools: Tools,
    replica: Replica,
    launch: Launch,
    *,
    memory: Path,
    golden_layer: Path | None = None,
    address: Address | None = None,
    tcp_established: bool,
    copies: tuple[tuple[Path, Path], ...] = (),
) -> tuple[Replica, str]:
    """Mount the root file system, write CRIU's options and create the container; returns the replica and its id.

    ``memory`` holds the golden's memory files (empty for a golden that is copied, and while one is made),
    ``golden_layer`` is the golden's frozen writable layer, ``address`` the one to take on the bridge, ``copies`` what
    a dump is to copy while the processes are frozen.
    """
    base = tools.containers.image_layers(launch.image) if launch.image else (Path(launch.rootfs or "/"),)
    if golden_layer and layers.nested(golden_layer, base):
        from gpuckpt.store.copying import copy_tree  # threads, which other restores do not need

        # A golden on the disk that holds / cannot be a layer beside it. What its server wrote (megabytes, mostly)
        # then becomes the begin of the replica's own layer.
        copy_tree(golden_layer, replica.folder / "upper")
        golden_layer = None
    if launch.port:
        _refuse_taken(launch.port)
    rootfs = tools.overlay.mount(replica.folder, base, golden_layer)
    if launch.port:
        host, port = publish_address(launch.port)
        replica = replace(replica, host=host, port=port)
        replica.save()
    write_operation(tools, replica, launch, tcp_established=tcp_established, copies=copies)
    binds = [(mount.source, mount.destination, mount.read_only) for mount in map(present, launch.mounts)]
    binds.append((str(replica.sockets), SOCKET_FOLDER, False))
    binds.append((str(memory), MEMORY_FOLDER, True))
    spec = ContainerSpec(
        name=replica.container,
        replica=replica.name,
        golden=replica.golden,
        rootfs=rootfs,
        launch=launch,
        binds=tuple(binds),
        criu_config=replica.operation.config,
        seccomp=profile_path(mapped=launch.mapped),
        hostname=hostname(replica.name),
        ip=address.ip if address else None,
        mac=address.mac if address else None,
        devices=nodes.devices(launch.gpus, image=launch.image is not None) if launch.gpus else (),
        labels={OWNER: str(tools.layout.state)},
    )
    return replica, tools.containers.create(spec)


def _refuse_taken(port: Port) -> None:
    """Before podman tries: taking down a container that found its port in use, it cuts off who has the port."""
    family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((port.host_ip, port.host_port))
        except OSError as error:
            raise BusyError(
                f"port {port.host_port} cannot be published",
                cause=f"{port.host_ip or 'this machine'}: {error.strerror}",
                remedy="publish another one, --publish 127.0.0.1:PORT, or free it (gpuckpt ls)",
            ) from error


def write_operation(
    tools: Tools,
    replica: Replica,
    launch: Launch,
    *,
    tcp_established: bool,
    copies: tuple[tuple[Path, Path], ...] = (),
    hooks: Path | None = None,
) -> None:
    """Write CRIU's options for ``replica`` as the settings are now; PreflightError if a hook cannot be trusted.

    ``hooks``: another folder than the configured one.
    """
    replica.operation.write(
        golden=replica.golden,
        replica=replica.name,
        hooks=hooks or tools.settings.paths.hooks,
        tcp_established=tcp_established,
        ghost_limit=tools.settings.criu.ghost_limit,
        loopback=launch.port is None,
        hook_seconds=tools.settings.criu.hook_timeout,
        copies=copies,
    )


def hostname(replica: str) -> str:
    """A host name (letters, digits, hyphens) for the container of a replica; CRIU restores it with the processes."""
    cleaned = "".join(letter if letter.isalnum() else "-" for letter in replica.lower()).strip("-")
    if cleaned == replica:
        return replica
    # Two names may become one by cleaning, two host names must not be one.
    return f"{cleaned or 'replica'}-{digest_bytes(replica.encode())[:6]}"


def seccomp_digest(*, mapped: bool) -> str:
    """Digest of the profile that containers run under; see :func:`gpuckpt.host.seccomp.profile_path`."""
    return digest_file(profile_path(mapped=mapped))


def link_images(bundle: Path, images: Path) -> None:
    """Make podman's checkpoint folder of a container a link to ``images``: podman follows it, and nothing is copied."""
    link = bundle / "checkpoint"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(images)
