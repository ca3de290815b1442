"""Weights outside the image: written once, as they lie on the device, given back before the dump, read after a restore.

A dump then carries neither weights nor key-value cache, goldens and replicas of one model share the files (as they
share memory files, by their content), and a wake reads them as fast as the bus takes them. Whether what is read is
what was there is not believed but tried, before the dump, with the canary.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuckpt.errors import (
    CheckpointError,
    DaemonUnreachableError,
    OutOfSpaceError,
    RestoreError,
    VerificationError,
)
from gpuckpt.golden import failures
from gpuckpt.golden.carried import Carried
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools, phase
from gpuckpt.host.tmpfs import available_memory
from gpuckpt.manifest import Canary, Manifest
from gpuckpt.store import seal
from gpuckpt.store.digests import digest_file
from gpuckpt.store.reading import opened
from gpuckpt.store.sharing import Sharing
from gpuckpt.timing import PhaseTable, now_ns
from gpuckpt.workload.base import CONTROL_NAME, MEMORY_FOLDER, Adapter
from gpuckpt.workload.control import Control, ControlAbsent, ControlRefused, Woken

_QUIET = 30.0  # seconds in which the canary's request must have ended
_RANKS = 64  # more processes than any server on one host has


@dataclass(frozen=True)
class Kept:
    """Files with a golden's weights: their names in its folder ``memory``, and their digests by path."""

    names: tuple[str, ...]
    digests: dict[str, str]


@dataclass(frozen=True)
class Given:
    """What a server has given back before it was frozen: its weights, which are in ``files``, or only its caches."""

    files: tuple[Path, ...] = ()
    caches: bool = False

    def __bool__(self) -> bool:
        return bool(self.files) or self.caches


NOTHING = Given()


def control(replica: Replica, *, timeout: float = 1800.0) -> Control:
    """The server's control socket; no order takes longer than ``timeout`` seconds."""
    return Control(replica.sockets / CONTROL_NAME, timeout=timeout)


def release(
    tools: Tools, phases: PhaseTable, replica: Replica, adapter: Adapter, canary: Canary, folder: Path
) -> Given:
    """Have the server write its weights below ``folder``, prove that they can be read again, and leave it asleep.

    Raises CheckpointError if the server cannot, VerificationError if the canary's answer is another one with weights
    that were read, OutOfSpaceError, and what asking the canary raises.
    """
    folder.mkdir(mode=0o700)
    server = control(replica)
    with phase(tools, phases, "weights: save"), _told(tools, replica):
        ranks = server.ranks()
        if not 0 < ranks <= _RANKS:
            raise ControlRefused("it has no weights to keep there", cause=f"ranks: {ranks}")
        _require_room(tools, adapter)
        files = tuple(folder / str(rank) for rank in range(ranks))
        with opened(files, os.O_RDWR | os.O_CREAT | os.O_EXCL) as handles:
            written = server.save(handles)
        if written != (found := [file.stat().st_size for file in files]):
            raise ControlRefused("it says that it has written what it has not", cause=f"{written}, not {found} bytes")
        for file in files:
            file.chmod(0o400)  # as all memory files
    with phase(tools, phases, "weights: rehearse"), opened(files) as handles:
        with _told(tools, replica):
            server.sleep()
            server.wake(handles)
        differences = adapter.replay(replica.endpoint, canary).differences
        adapter.quiesce(replica.endpoint, timeout=_QUIET)
        if differences:
            raise VerificationError(
                "the server answers differently with weights that were read again",
                cause="; ".join(differences),
                remedy="keep them in the image: --weights image",
            )
        with _told(tools, replica):
            server.sleep()
    return Given(files)


_OUTSIDE = "the server cannot keep its weights outside its image", "keep them in the image: --weights image"


@contextlib.contextmanager
def _told(tools: Tools, replica: Replica, what: str = _OUTSIDE[0], remedy: str = _OUTSIDE[1]) -> Iterator[None]:
    """What a server refuses, or fails at, as an error of the creation."""
    try:
        yield
    except ControlAbsent as error:
        raise CheckpointError(
            f"{what}: it has no control socket",
            cause=error.cause,
            remedy=f"{remedy}; docs/gpu.md tells what a server has to do",
        ) from error
    except DaemonUnreachableError as error:
        failure = failures.server_failure(tools, replica, f"{what}: it failed", kind=CheckpointError, ending=True)
        failure.cause = "; ".join(text for text in (error.message, error.cause, failure.cause) if text)
        failure.remedy = remedy
        raise failure from error
    except ControlRefused as error:
        if "No space left" in f"{error.message} {error.cause}":
            raise _full(error.cause) from error
        raise CheckpointError(f"{what}: {error.message}", cause=error.cause, remedy=remedy) from error


def require_able(tools: Tools, replica: Replica) -> None:
    """Raise CheckpointError if the server takes no orders about its weights: known before it is warmed up."""
    with _told(tools, replica):
        control(replica).ranks()


def _require_room(tools: Tools, adapter: Adapter) -> None:
    """Refuse before a tmpfs takes the last memory of the machine. A model's weights are about as large as its files."""
    model = Path(adapter.record.model or "")
    needed = sum(file.stat().st_size for file in model.glob("*.safetensors")) if model.is_absolute() else 0
    free = min(shutil.disk_usage(tools.layout.store).free, available_memory())
    if needed > free:
        raise _full(f"they are about {needed >> 20} MiB, and {free >> 20} MiB are left", needed - free)


def _full(cause: str | None, lacking: int = 0) -> OutOfSpaceError:
    return OutOfSpaceError(
        "there is no room in the store for the model's weights",
        cause=cause,
        remedy="remove goldens (gpuckpt df, gpuckpt rm), or enlarge store.size",
        lacking=lacking,
    )


def release_caches(
    tools: Tools, phases: PhaseTable, replica: Replica, adapter: Adapter, canary: Canary | None
) -> Given:
    """Have a server whose weights stay in its image give its caches back, and leave it asleep.

    One that says that it cannot is told of: its image carries them. Raises CheckpointError if it gives them back and
    cannot take them again, VerificationError if it answers the canary differently then, and what asking that raises.
    """
    server = control(replica)
    trouble = "the server cannot give its caches back and take them again", "report it with the server's version"
    with phase(tools, phases, "caches: release"):
        with _told(tools, replica, *trouble):
            try:
                server.sleep(caches=True)
            except (ControlRefused, ControlAbsent) as error:  # it is as it was
                why = f"{error.message}: {error.cause}" if error.cause else error.message
                tools.report.note(f"the server's caches are in its image: {why}")
                return NOTHING
        with _told(tools, replica, *trouble):
            server.wake((), caches=True)
        differences = adapter.replay(replica.endpoint, canary).differences if canary is not None else ()
        adapter.quiesce(replica.endpoint, timeout=_QUIET)
        if differences:
            raise VerificationError(
                "the server answers differently when it has given its caches back and taken them again",
                cause="; ".join(differences),
                remedy=trouble[1],
            )
        with _told(tools, replica, *trouble):
            server.sleep(caches=True)
    return Given(caches=True)


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


def wake(
    tools: Tools,
    phases: PhaseTable,
    replica: Replica,
    given: Given,
    ahead: Carried | None = None,
    first: int | None = None,
    *,
    timeout: float = 1800.0,
) -> None:
    """Have the replica's server take again what it has given back, and answer; from ``ahead``, if that is given.

    ``first``: its first process, for files of a published golden. They are opened as it sees them, on a mount that is
    read-only: whoever has a file open may open it once more, and root in a container writes where the mode forbids it.

    Raises RestoreError, DaemonUnreachableError.
    """
    tools.report.stage("weights")
    server = control(replica, timeout=timeout)
    with opened(_seen(tools, given.files, first)) as handles:
        _compare(given.files, handles)
        try:
            memory = _waited_for(tools, phases, ahead)
            begin = now_ns()
            woken = _from_device(tools, server, handles, ahead, memory) if ahead and memory is not None else None
            if woken is None:
                begin, woken = now_ns(), server.wake(handles, caches=given.caches)
        except ControlRefused as error:
            raise RestoreError(
                f"the server of {replica.name} could not read its weights: {error.message}",
                cause=error.cause,
                remedy="gpuckpt verify tells whether the files are whole; create the golden anew, or --weights image",
            ) from error
        except DaemonUnreachableError as error:
            message = f"the server of {replica.name} failed when it was to take its memory again"
            failure = failures.server_failure(tools, replica, message, kind=RestoreError, ending=True)
            failure.cause = "; ".join(text for text in (error.message, error.cause, failure.cause) if text)
            raise failure from error
    if woken.told:
        tools.report.note(f"the weights that were carried ahead could not be used: {woken.told}")
    _split(phases, "caches" if given.caches else "weights", begin, now_ns(), woken.phases)


def _seen(tools: Tools, files: Sequence[Path], first: int | None) -> list[Path]:
    if first is None:
        return list(files)
    folder = tools.root_of(first) / MEMORY_FOLDER.lstrip("/")
    return [folder / file.name for file in files]


def _compare(files: Sequence[Path], handles: Sequence[int]) -> None:
    """What a container shows must be the golden's."""
    for file, handle in zip(files, handles, strict=True):
        own, found = file.stat(), os.fstat(handle)
        if (own.st_dev, own.st_ino) != (found.st_dev, found.st_ino):
            raise RestoreError(
                "the container shows other weights than the golden's",
                cause=f"{file.name} is another file there",
                remedy="stop the replica: its server has meddled with its mounts",
            )


def _waited_for(tools: Tools, phases: PhaseTable, ahead: Carried | None) -> int | None:
    if ahead is None:
        return None
    with phase(tools, phases, "weights: wait"):
        return ahead.handle()


def _from_device(tools: Tools, server: Control, handles: Sequence[int], ahead: Carried, memory: int) -> Woken | None:
    """Have the server copy what was carried ahead; None if it has no room for both at once after all."""
    try:
        return server.wake(handles, [memory])
    except ControlRefused as error:
        tools.report.note(f"the weights that were carried ahead could not be used: {error.message}: {error.cause}")
        ahead.close()  # its memory is free from now on
        return None


def sleep(tools: Tools, phases: PhaseTable, replica: Replica, given: Given) -> None:
    """Have a running replica's server give back what it gave before. Raises CheckpointError, DaemonUnreachableError."""
    with phase(tools, phases, "caches: release" if given.caches else "weights: release"):
        try:
            control(replica).sleep(caches=given.caches)
        except ControlRefused as error:
            raise CheckpointError(
                f"the server of {replica.name} does not give its memory back: {error.message}", cause=error.cause
            ) from error


def require_intact(golden: Manifest, given: Given) -> None:
    """Raise VerificationError if the golden's files with weights are not as they were sealed."""
    names = [f"memory/{file.name}" for file in given.files]
    if names and (found := seal.changed(given.files[0].parents[1], golden, names)):
        raise VerificationError(
            f"the weights of golden {golden.name} are damaged",
            cause="; ".join(found),
            remedy=f"gpuckpt verify {golden.name}; stop its replicas, and create it anew",
        )


def given_by(golden: Manifest, folder: Path) -> Given:
    """What the golden's server had given back when it was frozen."""
    return Given(tuple(folder / "memory" / name for name in golden.weights), golden.caches)


def shown(tools: Tools, golden: Manifest, first: int) -> Given | None:
    """What the server of the process ``first`` can give back and have again: its container shows the weights' files.

    A golden may lie in two tiers; a container shows those of the one from which it was restored. None if it shows none
    of the golden's: its server was started cold, or the golden has left that tier.
    """
    for folder in tools.layout.tiers(golden.name).values():
        given = given_by(golden, folder)
        if all(map(_is_same, given.files, _seen(tools, given.files, first))):
            return given
    return None


def _is_same(one: Path, other: Path) -> bool:
    try:
        mine, found = one.lstat(), other.lstat()
    except OSError:
        return False
    return (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)


def _split(phases: PhaseTable, what: str, begin: int, end: int, parts: dict[str, float]) -> None:
    """The server's own steps as rows; they follow one another, and what is left of the time is asking for them."""
    at = begin
    for name, took in parts.items():
        until = min(end, at + round(took * 1e9))
        phases.add(f"{what}: {name}", at, until)
        at = until
    phases.add(f"{what}: ask", at, end)
