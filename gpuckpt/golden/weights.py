"""Weights outside the image: written once, as they lie on the device, given back before the dump, read after a restore.

A dump then carries neither weights nor key-value cache, goldens and replicas of one model share the files (as they
share memory files, by their content), and a wake reads them as fast as the bus takes them. Whether what is read is
what was there is not believed but tried, before the dump, with the canary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.errors import CheckpointError, GpuckptError, OutOfSpaceError, RestoreError, VerificationError
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.manifest import Canary, Manifest
from gpuckpt.store.digests import digest_file
from gpuckpt.store.sharing import Sharing
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload.base import CONTROL_NAME, Adapter
from gpuckpt.workload.control import Control, ControlRefused

_RANKS = 64  # more processes than any server on one host has


@dataclass(frozen=True)
class Kept:
    """Files with a golden's weights: their names in its folder ``memory``, and their digests by path."""

    names: tuple[str, ...]
    digests: dict[str, str]


def control(replica: Replica) -> Control:
    return Control(replica.sockets / CONTROL_NAME)


def release(
    tools: Tools, phases: PhaseTable, replica: Replica, adapter: Adapter, canary: Canary, folder: Path
) -> list[Path]:
    """Have the server write its weights below ``folder``, prove that they can be read again, and leave it asleep.

    Returns the files, one a rank. Raises CheckpointError if the server cannot, VerificationError if the canary's answer
    is another one with weights that were read, OutOfSpaceError.
    """
    folder.mkdir(mode=0o700)
    server = control(replica)
    try:
        with phase(tools, phases, "weights: save"):
            ranks = server.ranks()
            if not 0 < ranks <= _RANKS:
                raise ControlRefused("the server has no weights to keep outside its image", cause=f"ranks: {ranks}")
            files = [folder / str(rank) for rank in range(ranks)]
            with _opened(files, os.O_RDWR | os.O_CREAT | os.O_EXCL) as handles:
                server.save(handles)
            for file in files:
                file.chmod(0o400)  # as all memory files
        with phase(tools, phases, "weights: rehearse"), _opened(files) as handles:
            server.sleep()
            server.wake(handles)
            differences = adapter.replay(replica.endpoint, canary).differences
            adapter.quiesce(replica.endpoint, timeout=30)
            if differences:
                raise VerificationError(
                    "the server answers differently with weights that were read again",
                    cause="; ".join(differences),
                    remedy="keep them in the image: --weights image",
                )
            server.sleep()
    except ControlRefused as error:
        if "No space left" in f"{error.message} {error.cause}":
            raise OutOfSpaceError(
                "there is no room in the store for the model's weights",
                cause=error.cause,
                remedy="remove goldens (gpuckpt df, gpuckpt rm), or enlarge store.size",
            ) from error
        raise CheckpointError(
            f"the server cannot keep its weights outside its image: {error.message}",
            cause=error.cause,
            remedy="keep them in the image: --weights image",
        ) from error
    return files


def keep(tools: Tools, staging: Path, files: Sequence[Path]) -> Kept:
    """Put the files into the golden that is being made, as links where another golden has the same weights."""
    sharing = Sharing(tools.layout.goldens)
    names, digests = [], {}
    try:
        for file in files:
            digest = digest_file(file)
            name = f"{digest[:40]}.extent"
            target = staging / "memory" / name
            if target.exists() or sharing.link(name, file.stat().st_size, target):
                file.unlink()
            else:
                file.rename(target)
            names.append(name)
            digests[f"memory/{name}"] = digest
    finally:
        sharing.settle()
    if files:
        files[0].parent.rmdir()
    return Kept(tuple(names), digests)


def wake(tools: Tools, phases: PhaseTable, replica: Replica, files: Sequence[Path]) -> None:
    """Have the replica's server read its weights and answer again. Raises RestoreError, DaemonUnreachableError."""
    begin = now_ns()
    tools.report.stage("weights")
    with _opened(files) as handles:
        try:
            woken = control(replica).wake(handles)
        except ControlRefused as error:
            raise RestoreError(
                f"the server of {replica.name} could not read its weights: {error.message}",
                cause=error.cause,
                remedy="gpuckpt verify tells whether the files are whole; create the golden anew, or --weights image",
            ) from error
    _split(phases, begin, now_ns(), woken.phases)


def sleep(tools: Tools, phases: PhaseTable, replica: Replica) -> None:
    """Have a running replica's server give its weights back. Raises CheckpointError, DaemonUnreachableError."""
    with phase(tools, phases, "weights: release"):
        try:
            control(replica).sleep()
        except ControlRefused as error:
            raise CheckpointError(
                f"the server of {replica.name} does not give its weights back: {error.message}", cause=error.cause
            ) from error


def files_of(golden: Manifest, folder: Path) -> list[Path]:
    """A golden's files with weights, one a rank."""
    return [folder / "memory" / name for name in golden.weights]


def _split(phases: PhaseTable, begin: int, end: int, parts: dict[str, float]) -> None:
    """The server's own steps as rows; they follow one another, and what is left of the time is asking for them."""
    at = begin
    for name, took in parts.items():
        until = min(end, at + round(took * 1e9))
        phases.add(f"weights: {name}", at, until)
        at = until
    phases.add("weights: ask", at, end)


@contextlib.contextmanager
def _opened(files: Sequence[Path], flags: int = os.O_RDONLY) -> Iterator[list[int]]:
    handles: list[int] = []
    try:
        for file in files:
            handles.append(os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        yield handles
    except FileNotFoundError as error:
        raise GpuckptError(f"the weights {error.filename} are missing", remedy="create the golden anew") from error
    finally:
        for handle in handles:
            os.close(handle)
