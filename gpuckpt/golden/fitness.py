"""Whether a golden can be restored here and now: asked before anything is touched for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gpuckpt.errors import BusyError, OutOfSpaceError, UsageError, VerificationError
from gpuckpt.golden import identity
from gpuckpt.golden.prepare import Options, Source
from gpuckpt.golden.tools import Tools
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import Manifest
from gpuckpt.store import locks, seal
from gpuckpt.store.digests import digest_bytes


@contextlib.contextmanager
def own_folders(tools: Tools, golden: Manifest, replicas: int) -> Iterator[None]:
    """Have the folders that only one replica can have. Raises BusyError, and UsageError for several ``replicas``.

    CRIU takes the server's lock again, and would wait for whoever has it.
    """
    if replicas > 1 and golden.launch.own:
        raise UsageError(
            f"only one replica of {golden.name} can run at a time",
            cause=f"it keeps files in {golden.launch.own[0]}",
            remedy="restore one; or create a golden that keeps its files in a folder of the container",
        )
    with contextlib.ExitStack() as stack:
        for own in golden.launch.own:
            stack.enter_context(locks.exclusive(tools.layout.replica_locks, "volume", digest_bytes(own.encode())[:16]))
            if any(locks.held(file) for file in Path(own).glob("*/lock")):
                raise BusyError(
                    f"{own} belongs to another server that runs",
                    cause=f"{golden.name} keeps files there, and only one server at a time can",
                    remedy="stop the other one (gpuckpt ls)",
                )
        yield


def require(tools: Tools, source: Source, options: Options, replicas: int, *, ignore: tuple[str, ...]) -> None:
    """Raise what keeps so many replicas of an opened golden from being restored.

    IncompatibleError: it is another machine, but for the parts of its identity that are to be ignored.
    VerificationError: its bytes are not those that were sealed. OutOfSpaceError, UsageError.
    """
    golden = source.manifest
    if options.tcp_established and not golden.launch.tcp_established:
        raise UsageError(
            f"golden {golden.name} has no open TCP connections to restore",
            cause="it was created without --tcp-established, which closed them",
            remedy="restore without --tcp-established, or create the golden anew with it",
        )
    identity.compare(
        golden.identity,
        golden.launch,
        tools.criu,
        tools.runtime,
        image_digest=tools.containers.image_digest,
        ignore=ignore,
    )
    if golden.gpu is not None:
        tools.devices.check(golden.gpu.devices, golden.launch.gpus)
    if found := seal.broken(source.folder, golden):
        raise VerificationError(
            f"golden {golden.name} is damaged and was not restored",
            cause="; ".join(found[:5]),
            remedy=f"remove it (gpuckpt rm {golden.name}) and create it anew, or import it again",
        )
    needed, available = (golden.sizes.cpu_pages + golden.sizes.shared_memory) * replicas, available_memory()
    if needed > available:
        raise OutOfSpaceError(
            f"restoring {golden.name} needs about {needed >> 20} MiB of memory, {available >> 20} MiB are left",
            remedy="stop replicas (gpuckpt ls) or remove goldens (gpuckpt df)",
        )
