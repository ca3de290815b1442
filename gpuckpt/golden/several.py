"""Several replicas of one golden, restored side by side."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed

from msgspec import structs

from gpuckpt.errors import GpuckptError
from gpuckpt.golden.replica import stop
from gpuckpt.golden.restore import Restored, RestoreRequest, from_opened, opened
from gpuckpt.golden.tools import Reporter, Silent, Tools
from gpuckpt.timing import PhaseTable


def restore_all(
    requests: Sequence[RestoreRequest], tools: Tools, phases: PhaseTable
) -> tuple[list[Restored], list[tuple[str, GpuckptError]]]:
    """Restore several replicas of one golden side by side; each is a transaction of its own.

    ``requests`` name the same golden, and each a replica. Returns those that are ready, in the order of the requests,
    and those that failed with their errors. Each has a phase table of its own, from the common start. Raises what
    concerns all of them: NotFoundError, IncompatibleError, VerificationError of the golden. An interrupt lets those
    finish that are under way, but for those that wait for room on a GPU, and removes what this call made.
    """
    first, count = requests[0], len(requests)
    with opened(first, tools, phases, count) as source, ThreadPoolExecutor(count) as pool:
        tools.report.stage(f"restore {count}")
        stop_waiting = threading.Event()
        quiet = structs.replace(tools, report=_NotesOnly(tools.report), devices=tools.devices.stopped_by(stop_waiting))
        # Noted by the threads themselves: an interrupt can come before we, or the pool, know of one that was started.
        beginning, under_way = threading.Lock(), list[threading.Event]()
        made: list[Restored] = []

        def work(one: RestoreRequest) -> Restored:
            over = threading.Event()
            with beginning:
                if stop_waiting.is_set():
                    raise CancelledError
                under_way.append(over)
            try:
                restored = from_opened(one, quiet, phases.branch(), source)
                made.append(restored)
                return restored
            finally:
                over.set()

        running: dict[Future[Restored], RestoreRequest] = {}
        try:
            running |= {pool.submit(work, one): one for one in requests}
            for done, _ in enumerate(as_completed(running), start=1):
                tools.report.stage(f"restore {count}: {done} done")
        except BaseException:
            with beginning:
                stop_waiting.set()
            pool.shutdown(cancel_futures=True)
            for over in under_way:
                over.wait()
            _take_back(tools, made)
            raise
    phases.stop()
    ready = [future.result() for future in running if future.exception() is None]
    failed: list[tuple[str, GpuckptError]] = []
    for future, one in running.items():
        trouble = future.exception()
        if isinstance(trouble, GpuckptError):
            failed.append((str(one.replica), trouble))
        elif trouble is not None:  # a fault of ours: nobody would be told of the others
            _take_back(tools, ready)
            raise trouble
    return ready, failed


def _take_back(tools: Tools, made: Sequence[Restored]) -> None:
    """Stop replicas that were restored; one that will not go does not keep the others."""
    for one in made:
        try:
            stop(tools, one.replica.name)
        except (GpuckptError, OSError) as error:
            tools.report.note(f"could not stop {one.replica.name}: {error}")


class _NotesOnly(Silent):
    """A reporter for one of several operations side by side: their stages would only confuse each other."""

    def __init__(self, report: Reporter) -> None:
        self._report = report

    def note(self, text: str) -> None:
        self._report.note(text)
