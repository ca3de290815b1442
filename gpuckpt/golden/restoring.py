"""podman's restore of one container, at work beside us."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gpuckpt.errors import GpuckptError, RestoreError
from gpuckpt.golden import failures
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.tools import Tools


class Restoring(threading.Thread):
    """podman's restore, which ends some time after the processes run: podman and the runtime have books to keep."""

    def __init__(self, tools: Tools, replica: Replica, *, tcp_established: bool, limit: float) -> None:
        super().__init__(daemon=True)
        self._restore = partial(
            tools.containers.restore,
            replica.container,
            tools.layout.state,
            tcp_established=tcp_established,
            limit=limit,
        )
        self._operation = replica.operation
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._restore()
        except BaseException as error:
            self.error = error

    def until_resumed(self, prepare: Callable[[int], None]) -> int | None:
        """Start it, and wait until the processes run, or it is over; returns the first one, raises what it raised.

        ``prepare`` is called with the first process when all are there and CRIU is about to let them run.
        """
        self.start()
        first: int | None = None
        while self.is_alive() and (first := self._operation.restored()) is None:
            self.join(0.001)
        if first is not None or (first := self._operation.restored()) is not None:
            prepare(first)
        while self.is_alive() and not self._operation.resumed():
            self.join(0.001)
        if self.error is not None:
            raise self.error
        return first


@contextlib.contextmanager
def restoring(
    tools: Tools, replica: Replica, bundle: Path, *, tcp_established: bool, limit: float
) -> Iterator[Restoring]:
    """A restore that ends with the body, which may use the server as soon as its processes run.

    An interrupt is not kept waiting: removing the container ends podman's restore of it.
    """
    restoring = Restoring(tools, replica, tcp_established=tcp_established, limit=limit)
    trouble: BaseException | None = None
    try:
        yield restoring
    except (GpuckptError, OSError) as error:
        trouble = error
    if restoring.ident is not None:
        restoring.join()
    # Why there is no server is a better reason than that it does not answer.
    if isinstance(restoring.error, GpuckptError):
        raise failures.restore_failure(tools, replica, bundle, restoring.error) from restoring.error
    if restoring.error is not None:
        raise restoring.error
    replica.operation.require_marks()
    if failed := failures.step_failure(replica, "restore", RestoreError):
        raise failed
    if trouble is not None:
        raise trouble
