"""Prepare replicas: everything of a restore that does not depend on the moment, done before it counts.

podman restores only into a container that exists and has run. Making one takes about as long as a mapped restore
itself, and needs nothing of the moment of the request: so containers can be made ahead, and wait without a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from msgspec import structs

from gpuckpt import manifest as manifests
from gpuckpt.criu import view
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, RestoreError, UsageError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.assembly import assemble, hostname, link_images
from gpuckpt.golden.replica import Replica, load, making
from gpuckpt.golden.serving import container_trouble
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Address, Launch, Manifest, Port
from gpuckpt.store import locks
from gpuckpt.store.digests import digest_bytes
from gpuckpt.store.layout import Tier, check_name


@dataclass(frozen=True)
class Options:
    """What a replica's container depends on besides the golden; see ``gpuckpt restore --help``."""

    ignore_static_ip: bool = False
    ignore_static_mac: bool = False
    ignore_volumes: bool = False
    ignore_rootfs: bool = False
    tcp_established: bool = False
    publish: Port | None = None


@dataclass(frozen=True)
class Source:
    """A golden that is held for reading. ``digest`` is its manifest's: another golden of that name has another.

    ``trouble`` says why it cannot be restored, where a cold start is wanted then.
    """

    manifest: Manifest
    folder: Path
    digest: str
    trouble: GpuckptError | None = None

    def key(self, options: Options) -> str:
        """What a replica was prepared for: this golden, where it lies, and these options."""
        return digest_bytes(f"{self.digest} {self.folder} {options}".encode())


@contextmanager
def opened(tools: Tools, name: str) -> Iterator[Source]:
    """Hold the golden ``name`` for reading. Raises NotFoundError, BusyError, and what reading its manifest raises."""
    tools.layout.golden(name)  # NotFoundError before anything else
    with locks.shared(tools.layout.golden_locks, "golden", name):
        folder = tools.layout.golden(name)
        manifest = manifests.read(folder)
        yield Source(manifest, folder, digest_bytes((folder / "manifest.json").read_bytes()))


def prepare(tools: Tools, source: Source, replica: Replica, options: Options) -> Replica:
    """Make the container of ``replica`` up to the point where only its processes are missing.

    ``replica`` is in the making (:func:`gpuckpt.golden.replica.making`). Raises RestoreError if podman refuses.
    """
    golden, folder = source.manifest, source.folder
    replica = _restore_volumes(tools, source, replica, options)
    address = _address(golden, replica, options)
    with container_trouble(replica, kind=RestoreError, address=address):
        replica, container = assemble(
            tools,
            replica,
            _launch(golden, options),
            memory=folder / "memory",
            golden_layer=None if options.ignore_rootfs else folder / "rootfs",
            address=address,
            tcp_established=options.tcp_established,
        )
        tools.containers.prepare(container)
    bundle = tools.containers.inspect(container).bundle
    images = replica.folder / "images"
    view.make(images, folder / "images", hostname=hostname(replica.name))
    link_images(bundle, images)
    prepared = replace(replica, bundle=str(bundle), key=source.key(options))
    prepared.save()
    return prepared


def prepare_ahead(tools: Tools, name: str, number: int, options: Options) -> list[Replica]:
    """See to it that ``number`` replicas of the golden ``name`` wait prepared; returns them all.

    They are called like the golden, with -2, -3 and so on; names that are in use are passed over. Raises as
    :func:`opened` and :func:`prepare`; those made before the failure stay.
    """
    with opened(tools, name) as source:
        if number > 1 and (options.publish or source.manifest.launch.port):
            raise UsageError(
                f"golden {name} publishes a port, which only one replica can have",
                remedy="prepare one, or restore each with --as NAME --publish PORT",
            )
        found: list[Replica] = []
        for index in count(1):
            if len(found) >= number:
                return found
            called = check_name(name if index == 1 else f"{name}-{index}")
            known = load(tools.layout.replicas / called)
            if known is not None and known.state == "ready" and replicas.alive(tools, known):
                continue
            if (called != name and called in tools.layout.names()) or (known is not None and known.golden != name):
                continue  # another golden's own name, or its replica
            try:
                tools.report.stage(f"prepare {called}")
                found.append(_kept(tools, source, called, options))
            except BusyError:
                continue  # somebody makes one of that name right now
    raise AssertionError("unreachable: names do not end")


def prepare_as(tools: Tools, name: str, replica: str, options: Options, *, keeper: str = "") -> Replica:
    """Prepare a replica of the golden ``name`` that is called ``replica``; returns it, also if it was there already.

    ``keeper`` is who looks after it.
    Raises as :func:`opened` and :func:`prepare`, and BusyError if a replica of that name runs.
    """
    with opened(tools, name) as source:
        return _kept(tools, source, replica, options, keeper)


def _kept(tools: Tools, source: Source, name: str, options: Options, keeper: str = "") -> Replica:
    key = source.key(options)
    with making(tools, name, source.manifest.name, key=key, keeper=keeper) as replica:
        made = replica if replica.key == key else prepare(tools, source, replica, options)
        # The volumes that it brought stay: another replica may use them before it is ever restored.
        kept = replace(made, state="prepared", tier=tools.layout.tier_of(source.folder), volumes=())
        kept.save()
        return kept


def prepared(tools: Tools, name: str) -> list[Replica]:
    """The replicas of the golden ``name`` that wait prepared, by name."""
    return [one for one in replicas.all_of(tools.layout.replicas) if one.golden == name and one.state == "prepared"]


def discard_prepared(tools: Tools, name: str, *, tier: Tier | None = None) -> None:
    """Remove the prepared replicas of the golden ``name``, which was replaced, or is restored from ``tier`` now."""
    for one in prepared(tools, name):
        if one.tier == tier:
            continue
        try:
            replicas.stop(tools, one.name, only_prepared=True)
        except (NotFoundError, BusyError):
            continue  # somebody else removes or restores it; the restore will find that it does not fit


def _launch(golden: Manifest, options: Options) -> Launch:
    if options.publish is None:
        return golden.launch
    if golden.launch.port is None:
        raise UsageError(
            f"golden {golden.name} publishes no port",
            cause="its server listens on a Unix socket",
            remedy="leave --publish out; or create the golden with --publish",
        )
    # Inside the container the server listens where it did.
    port = Port(
        host_ip=options.publish.host_ip,
        host_port=options.publish.host_port,
        container_port=golden.launch.port.container_port,
    )
    return structs.replace(golden.launch, port=port)


def _address(golden: Manifest, replica: Replica, options: Options) -> Address | None:
    """The golden's address on the bridge, without the parts that are to be ignored.

    Only the replica that bears the golden's name takes it: two containers cannot have one address.
    """
    if golden.address is None:
        return None
    own = replica.name == golden.name
    return Address(
        ip=golden.address.ip if own and not options.ignore_static_ip else "",
        mac=golden.address.mac if own and not options.ignore_static_mac else "",
    )


def _restore_volumes(tools: Tools, source: Source, replica: Replica, options: Options) -> Replica:
    """Fill named volumes that are not here (another machine, a removed volume); those that exist are left alone."""
    for volume in source.manifest.launch.volumes:
        # Clones are made side by side: the first brings the volume, the others find it filled.
        with locks.waiting(tools.layout.replica_locks, "volume", volume.name):
            if tools.containers.volume(volume.name) is not None:
                continue
            # Recorded first, so that a failed or killed restore takes the volume it brought away again.
            replica = replace(replica, volumes=(*replica.volumes, volume.name))
            replica.save()
            target = tools.containers.create_volume(volume.name)
            kept = source.folder / "volumes" / volume.name
            if not options.ignore_volumes and kept.is_dir():
                from gpuckpt.store.copying import copy_tree  # threads, which other restores do not need

                copy_tree(kept, target)
    return replica
