"""Replicas: their folder, their record, and the one place that removes everything that belongs to one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpuckpt.containers.podman import ALIVE, OWNER, container_name
from gpuckpt.criu.operation import Operation
from gpuckpt.errors import BusyError, GpuckptError, InterruptedByUser, NotFoundError, OutOfSpaceError, UsageError
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Port
from gpuckpt.paths import LONGEST_SOCKET
from gpuckpt.store import locks
from gpuckpt.store.layout import check_name
from gpuckpt.workload.base import SOCKET_NAME
from gpuckpt.workload.endpoint import Endpoint

SETTLED = ("ready", "prepared")  # states that outlive the transaction that made them


@dataclass(frozen=True)
class Standby:
    """What a standby has given up, by which it is woken: its processes with device state (ids in the container), the
    devices as (UUID, type, bytes), all that the host had then, and whether it has given memory back that it is to take
    again; ``tier`` is that of the golden's files with its weights, if these are outside."""

    processes: tuple[int, ...] = ()
    devices: tuple[tuple[str, str, int], ...] = ()
    visible: tuple[str, ...] = ()
    given: bool = False
    tier: str = ""


@dataclass(frozen=True)
class Replica:
    """A container of ours and what belongs to it on the host.

    ``state`` is ``making`` until the transaction that makes it ends well, then ``ready``, and ``removing`` from the
    moment it is taken apart; ``prepared`` is one whose container waits for its restore. ``volumes`` names those that
    the transaction created. ``tier`` says what it was started from, ``memory`` how its memory came back. ``bundle`` is
    podman's folder of the container that was prepared, ``key`` says for what (see :mod:`gpuckpt.golden.prepare`).
    ``keeper`` is who looks after it, if that is not the user: the warm pool knows its own by it. ``standby`` is there
    while it is frozen, and on the way there and back.
    """

    name: str
    golden: str
    folder: Path
    state: str = "making"
    host: str | None = None
    port: int | None = None
    volumes: tuple[str, ...] = ()
    tier: str = "hot"
    memory: str = "copy"
    bundle: str = ""
    key: str = ""
    keeper: str = ""
    standby: Standby | None = None

    @property
    def container(self) -> str:
        return container_name(self.name)

    def needs(self, tiers: Collection[str]) -> bool:
        """Whether it uses files of its golden in one of these tiers: to run, or to be woken."""
        return self.tier in tiers or (self.standby is not None and self.standby.tier in tiers)

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
        try:
            temporary.write_text(json.dumps(record))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutOfSpaceError(
                f"the record of replica {self.name} cannot be written",
                cause=f"{self.folder}: {os.strerror(error.errno)}",
                remedy="make room on that disk (state.path)",
            ) from error
        temporary.replace(self.folder / "replica.json")


def load(folder: Path) -> Replica | None:
    """The replica recorded in ``folder``; None if its making had not come so far."""
    try:
        record = json.loads((folder / "replica.json").read_text())
        standby = _standby(record["standby"]) if record.get("standby") else None
        own = {"name": folder.name, "folder": folder, "volumes": tuple(record["volumes"]), "standby": standby}
        return Replica(**(record | own))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _standby(record: dict[str, Any]) -> Standby:
    devices = tuple((str(uuid), str(name), int(count)) for uuid, name, count in record["devices"])
    visible = tuple(map(str, record["visible"]))
    processes = tuple(map(int, record["processes"]))
    return Standby(processes, devices, visible, bool(record["given"]), str(record.get("tier", "")))


def all_of(parent: Path) -> list[Replica]:
    """Every replica recorded below ``parent``, by name."""
    try:
        folders = sorted(entry for entry in parent.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    return [found for folder in folders if (found := load(folder))]


def by_name(parent: Path, name: str) -> Replica:
    """The replica ``name`` recorded below ``parent``; NotFoundError if there is none."""
    found = load(parent / check_name(name))
    if found is None:
        known = ", ".join(entry.name for entry in all_of(parent)) or "none"
        raise NotFoundError(f"no replica named {name}", cause=f"there are {known}", remedy="gpuckpt ls")
    return found


def status(tools: Tools, replica: Replica) -> str:
    """podman's word for the state of the replica's container, or ``gone`` (also if the name is somebody else's now)."""
    try:
        found = tools.containers.inspect(replica.container)
    except NotFoundError:
        return "gone"
    return found.status if found.labels.get(OWNER) == str(tools.layout.state) else "gone"


def alive(tools: Tools, replica: Replica) -> bool:
    """Whether the replica's container runs or is frozen."""
    return status(tools, replica) in ALIVE


def discard(tools: Tools, replica: Replica) -> None:
    """Remove everything that belongs to a replica: container, mounts, volumes it brought, folder.

    The caller holds the replica's lock. Goes on after a failing step, so that one stuck part does not keep the rest;
    the first error is raised at the end, and the record stays for the next sweep.
    """
    errors: list[GpuckptError | OSError | InterruptedByUser] = []

    def attempt(step: Callable[..., object], *arguments: object) -> None:
        try:
            step(*arguments)
        except (GpuckptError, OSError) as error:
            errors.append(error)
        except InterruptedByUser as error:  # comes once; what it cut short is done again
            errors.append(error)
            attempt(step, *arguments)

    def mark() -> None:
        # Killed from here on, it is swept: only what is ready is left alone. A full disk is to be emptied, not to be
        # left as it is.
        with contextlib.suppress(OutOfSpaceError):
            replace(replica, state="removing").save()

    if replica.folder.exists():
        attempt(mark)
    attempt(replica.operation.end_hooks)
    if replica.state not in SETTLED:
        attempt(tools.containers.end_restore, replica.container, tools.layout.state)
    attempt(tools.containers.remove, replica.container, tools.layout.state)
    attempt(tools.overlay.unmount, replica.folder)
    for volume in replica.volumes:
        attempt(tools.containers.remove_volume, volume)
    if replica.folder.exists() and all(isinstance(error, InterruptedByUser) for error in errors):
        attempt(shutil.rmtree, replica.folder)
    if errors:
        raise errors[0]


def stop(tools: Tools, name: str, *, only_dead: bool = False, only_prepared: bool = False) -> bool:
    """Stop the replica ``name`` and remove it; True if it was removed.

    ``only_dead``: one whose container is alive is left alone; ``only_prepared``: any other than a prepared one is.
    Raises NotFoundError, or BusyError while another command is working on it.
    """
    by_name(tools.layout.replicas, name)
    with locks.exclusive(tools.layout.replica_locks, "replica", name):
        replica = by_name(tools.layout.replicas, name)
        if (only_dead and alive(tools, replica)) or (only_prepared and replica.state != "prepared"):
            return False
        discard(tools, replica)
        return True


@contextlib.contextmanager
def making(tools: Tools, name: str, golden: str, *, key: str = "", keeper: str = "") -> Iterator[Replica]:
    """Make a replica as a transaction: whatever ends the body by an exception leaves nothing of it behind.

    The body must call :func:`commit` on the replica for it to stay. One that was prepared for ``key`` is taken as it
    is. Raises BusyError if it is being made by another process or is already there and alive; what a dead one left, or
    one prepared for something else, is removed first.
    """
    with locks.exclusive(tools.layout.replica_locks, "replica", check_name(name)):
        folder = tools.layout.replicas / name
        _check_socket(Replica(name, golden, folder).sockets / SOCKET_NAME)
        if folder.exists():
            earlier = load(folder) or Replica(name, golden, folder)
            if earlier.state == "ready" and earlier.standby is not None and alive(tools, earlier):
                raise BusyError(
                    f"replica {name} is there already, as a standby",
                    cause=f"it was made from golden {earlier.golden}",
                    remedy=f"gpuckpt wake {name}, or restore another: --as NAME",
                )
            if earlier.state == "ready" and alive(tools, earlier):
                raise BusyError(
                    f"replica {name} is already {status(tools, earlier)}",
                    cause=f"it was made from golden {earlier.golden} and listens on {earlier.endpoint}",
                    remedy=f"use it, stop it first (gpuckpt stop {name}), or restore another: --as NAME",
                )
            # podman keeps the bundle as long as it knows the container: `podman container prune` takes both.
            whole = earlier.state == "prepared" and tools.overlay.is_mounted(folder) and Path(earlier.bundle).is_dir()
            taken = whole and bool(key) and earlier.key == key
            if not taken:
                discard(tools, earlier)
        else:
            taken = False
        if taken:
            replica = replace(earlier, state="making", keeper=keeper)
        else:
            folder.mkdir(mode=0o700)
            replica = Replica(name, golden, folder, keeper=keeper)
        try:
            replica.save()
            if not taken:
                _make_sockets(replica)
            yield replica
        except BaseException:
            try:
                discard(tools, load(folder) or replica)
            except (GpuckptError, OSError) as error:
                tools.report.note(f"could not remove all of replica {name} ({error}); the next command tries again")
            raise
        else:
            kept = load(folder)
            if kept is not None and kept.state not in SETTLED:
                discard(tools, kept)


def empty_again(tools: Tools, replica: Replica) -> Replica:
    """Take a replica in the making back to its begin, for another try: no container, mount or file of its server."""
    current = load(replica.folder) or replica
    current.operation.end_hooks()
    tools.containers.remove(current.container, tools.layout.state)
    tools.overlay.unmount(current.folder)
    for name in ("upper", "work", "socket", "images"):
        shutil.rmtree(current.folder / name, ignore_errors=True)
    _make_sockets(current)
    return current


def _make_sockets(replica: Replica) -> None:
    replica.sockets.mkdir()
    replica.sockets.chmod(0o777)  # the server's user makes its socket there; the parent is root's alone


def _check_socket(path: Path) -> None:
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise UsageError(
            f"the socket's path would be too long: {path}",
            cause=f"a Unix socket's path has at most {LONGEST_SOCKET} bytes",
            remedy="choose a shorter name, or a shorter paths.state",
        )


def commit(replica: Replica, *, memory: str = "copy", tier: str = "hot") -> Replica:
    """Mark the replica as ready: from now on it outlives the transaction, and so do the volumes it brought."""
    ready = replace(replica, state="ready", volumes=(), tier=tier, memory=memory)
    ready.save()
    return ready


def publish_address(port: Port) -> tuple[str, int]:
    """Where this machine reaches a published port."""
    return ("127.0.0.1" if port.host_ip in ("", "0.0.0.0") else port.host_ip), port.host_port
