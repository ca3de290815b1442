"""Turn what went wrong in a container or in CRIU into one error that shows the reason."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from gpuckpt.criu.logs import diagnose
from gpuckpt.errors import CheckpointError, GpuckptError, NotFoundError, OutOfSpaceError, RestoreError
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools
from gpuckpt.proc import tail

_KEPT = 40  # log files of failed operations; older ones go
_LARGEST = 4 << 20  # bytes kept of one log: its end, where the reason stands
_ERROR = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S.*)$")  # as Python's tracebacks end
_ENDING_SECONDS = 2.0  # the most that it may take from a broken connection to the end of the container


def keep_log(tools: Tools, label: str, text: str | Path) -> Path | None:
    """Keep a log under STATE/logs, because the container's own folder is about to go; returns where, if it exists."""
    target = tools.layout.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{label}.log"
    if isinstance(text, Path):
        if not text.is_file() or (length := text.stat().st_size) == 0:
            return None
        with text.open("rb") as source:
            source.seek(max(0, length - _LARGEST))
            data = source.read(_LARGEST)
    else:
        data = text.encode("utf-8", "replace")[-_LARGEST:]
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as kept:
        kept.write(data)
    logs = sorted(tools.layout.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for old in logs[:-_KEPT]:
        old.unlink(missing_ok=True)
    return target


def server_failure(
    tools: Tools, replica: Replica, message: str, *, kind: type[GpuckptError], ending: bool = False
) -> GpuckptError:
    """An error of ``kind`` that shows the last lines of the server's own log.

    ``ending``: its connection broke, so its end is near or here, and its last lines may not have reached the log yet.
    """
    try:
        if ending:
            tools.containers.wait_for_log(replica.container, _ENDING_SECONDS)
        text = tools.containers.logs(replica.container, most=_LARGEST)
    except GpuckptError:
        text = ""
    path = keep_log(tools, f"{replica.name}-server", text) if text else None
    state, remedy = "", "the server's last lines say why; correct its arguments and try again"
    shown = tail(text, 20)
    first = _first_error(text)
    if not shown:
        remedy = "the server printed nothing; run it by hand with the same arguments to see why"
    try:
        container = tools.containers.inspect(replica.container)
        if not container.alive:
            state = f"the container ended with exit code {container.exit_code}"
            if container.exit_code == 0:
                remedy = "the server must stay in the foreground: a container ends with its first process"
    except NotFoundError:
        state = "the container is gone"
    except GpuckptError as error:
        state = error.message
    if first and not any(first in line for line in shown):
        state = "; ".join(filter(None, [state, f"its first error: {first}"]))
    return kind(
        message,
        cause=state or None,
        remedy=remedy,
        log=shown,
        log_path=str(path) if path else None,
    )


def _first_error(text: str) -> str | None:
    """The first exception that a server printed: of several processes it is the cause, the last ones tell the end."""
    for line in tail(text, 2000):
        if found := _ERROR.search(line):
            return found[1]
    return None


def dump_failure(tools: Tools, replica: Replica, bundle: Path, error: GpuckptError) -> GpuckptError:
    """Why a checkpoint failed, from CRIU's log and the hooks."""
    return _criu_failure(tools, replica, bundle / "dump.log", "checkpoint", error, CheckpointError)


def restore_failure(tools: Tools, replica: Replica, bundle: Path, error: GpuckptError) -> GpuckptError:
    """Why a restore failed, from CRIU's log and the hooks."""
    return _criu_failure(tools, replica, bundle / "restore.log", "restore", error, RestoreError)


def _criu_failure(
    tools: Tools, replica: Replica, log: Path, what: str, error: GpuckptError, kind: type[GpuckptError]
) -> GpuckptError:
    kept = keep_log(tools, f"{replica.name}-{what}", log)
    path = str(kept) if kept else None
    if failed := step_failure(replica, what, kind, path):
        return failed
    found = diagnose(log)
    if found.no_space:
        return OutOfSpaceError(
            f"the {what} of {replica.name} ran out of space",
            cause=found.cause,
            remedy=found.remedy,
            log=found.lines,
            log_path=path,
        )
    return kind(
        f"CRIU could not {what} {replica.name}",
        cause=found.cause or error.cause or error.message,
        remedy=found.remedy or "the log's first error tells the reason; gpuckpt doctor checks the machine",
        log=found.lines,
        log_path=path,
    )


def step_failure(
    replica: Replica, what: str, kind: type[GpuckptError], log_path: str | None = None
) -> GpuckptError | None:
    """The error of a step of the action script, or None. CRIU does not look at every stage's status: ask always."""
    failed = replica.operation.failed_step()
    if failed is None:
        return None
    if failed.users:
        return kind(
            f"the {what} of {replica.name} was stopped by a hook: {failed.name}",
            remedy="mend or remove that executable; its output is below",
            log=failed.output,
            log_path=log_path,
        )
    full = any("No space left" in line for line in failed.output)
    return (OutOfSpaceError if full else kind)(
        f"the {what} of {replica.name} failed at {failed.name}",
        cause="the store is full" if full else None,
        remedy="gpuckpt df; enlarge store.size" if full else "the output below says why",
        log=failed.output,
        log_path=log_path,
    )
