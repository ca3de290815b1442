"""Replicas: their folder, their record, and the one place that removes everything that belongs to one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpuckpt.containers.podman import container_name
from gpuckpt.criu.operation import Operation
from gpuckpt.errors import BusyError, GpuckptError, InterruptedByUser, NotFoundError
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Port
from gpuckpt.store import locks
from gpuckpt.store.layout import check_name
from gpuckpt.workload.base import SOCKET_NAME
from gpuckpt.workload.endpoint import Endpoint


@dataclass(frozen=True)
class Replica:
    """A container of ours and what belongs to it on the host.

    ``state`` is ``making`` until the transaction that makes it ends well, then ``ready``. ``volumes`` names those
    that the transaction created.
    """

    name: str
    golden: str
    folder: Path
    state: str = "making"
    host: str | None = None
    port: int | None = None
    volumes: tuple[str, ...] = ()
    tier: str = "hot"

    @property
    def container(self) -> str:
        return container_name(self.name)

    @property
    def operation(self) -> Operation:
        return Operation(self.folder / "criu")

    @property
    def sockets(self) -> Path:
        """The folder that the container sees as /run/gpuckpt."""
        return self.folder / "socket"

    @property
    def endpoint(self) -> Endpoint:
        if self.port is not None:
            return Endpoint(host=self.host or "127.0.0.1", port=self.port)
        return Endpoint(socket=self.sockets / SOCKET_NAME)

    def save(self) -> None:
        """Write the record; one rename, so that a reader never sees half of it."""
        record = asdict(self) | {"folder": str(self.folder)}
        temporary = self.folder / "replica.json.new"
        temporary.write_text(json.dumps(record))
        temporary.replace(self.folder / "replica.json")


def load(folder: Path) -> Replica | None:
    """The replica recorded in ``folder``; None if its making had not come so far."""
    try:
        record = json.loads((folder / "replica.json").read_text())
        return Replica(**(record | {"folder": folder, "volumes": tuple(record["volumes"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def all_of(parent: Path) -> list[Replica]:
    """Every replica recorded below ``parent``, by name."""
    try:
        folders = sorted(entry for entry in parent.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    return [found for folder in folders if (found := load(folder))]


def by_name(tools: Tools, name: str) -> Replica:
    """The replica ``name``; NotFoundError if there is none."""
    found = load(tools.layout.replicas / check_name(name))
    if found is None:
        known = ", ".join(entry.name for entry in all_of(tools.layout.replicas)) or "none"
        raise NotFoundError(f"no replica named {name}", cause=f"there are: {known}", remedy="gpuckpt ls")
    return found


def status(tools: Tools, replica: Replica) -> str:
    """podman's word for the state of the replica's container, or ``gone``."""
    try:
        return tools.containers.inspect(replica.container).status
    except NotFoundError:
        return "gone"


def discard(tools: Tools, replica: Replica) -> None:
    """Remove everything that belongs to a replica: container, mounts, volumes it brought, folder.

    Goes on after a failing step, so that one stuck part does not keep the rest; the first error is raised at the end.
    """
    errors: list[GpuckptError | OSError | InterruptedByUser] = []

    def attempt(step: object, *arguments: object) -> None:
        try:
            step(*arguments)  # type: ignore[operator]
        except (GpuckptError, OSError) as error:
            errors.append(error)
        except InterruptedByUser as error:  # comes once; what it cut short is done again
            errors.append(error)
            attempt(step, *arguments)

    attempt(tools.containers.remove, replica.container)
    attempt(tools.overlay.unmount, replica.folder)
    for volume in replica.volumes:
        attempt(tools.containers.remove_volume, volume)
    if replica.folder.exists() and not (replica.folder / "rootfs").is_mount():
        # Never delete through a mount that would not go.
        attempt(shutil.rmtree, replica.folder)
    if errors:
        raise errors[0]


def stop(tools: Tools, replica: Replica) -> None:
    """Stop a replica and remove it; BusyError while another command is making it."""
    with locks.exclusive(tools.layout.locks, "replica", replica.name):
        discard(tools, replica)


@contextlib.contextmanager
def making(tools: Tools, name: str, golden: str) -> Iterator[Replica]:
    """Make a replica as a transaction: whatever ends the body by an exception leaves nothing of it behind.

    The body must call :func:`commit` on the replica for it to stay. Raises BusyError if it is being made by another
    process or is already there and alive; what a dead one left is removed first.
    """
    with locks.exclusive(tools.layout.locks, "replica", check_name(name)):
        folder = tools.layout.replicas / name
        if folder.exists():
            earlier = load(folder) or Replica(name, golden, folder)
            state = status(tools, earlier)
            if earlier.state == "ready" and state in ("running", "paused"):
                raise BusyError(
                    f"replica {name} is already {state}",
                    cause=f"it was made from golden {earlier.golden} and listens on {earlier.endpoint}",
                    remedy=f"use it, or stop it first: gpuckpt stop {name}",
                )
            discard(tools, earlier)
        folder.mkdir(mode=0o700)
        replica = Replica(name, golden, folder)
        try:
            replica.save()
            replica.sockets.mkdir(mode=0o755)
            yield replica
        except BaseException:
            with contextlib.suppress(GpuckptError, OSError):
                discard(tools, load(folder) or replica)
            raise
        else:
            kept = load(folder)
            if kept is not None and kept.state != "ready":
                discard(tools, kept)


def commit(replica: Replica, *, tier: str = "hot") -> Replica:
    """Mark the replica as ready: from now on it outlives the transaction."""
    ready = replace(replica, state="ready", tier=tier)
    ready.save()
    return ready


def publish_address(port: Port) -> tuple[str, int]:
    """Where this machine reaches a published port."""
    return ("127.0.0.1" if port.host_ip in ("", "0.0.0.0") else port.host_ip), port.host_port
