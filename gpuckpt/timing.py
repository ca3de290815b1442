"""Phase tables: where the time of an operation went.

A table is a list of consecutive phases on one monotonic clock. It adds up to the wall time by construction: what no
phase claims is the last row, ``unaccounted``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct, field

UNACCOUNTED = "unaccounted"


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: the same clock in every process of the machine."""
    return time.monotonic_ns()


def process_started_ns() -> int:
    """When this process began, on the clock of :func:`now_ns`, to the kernel's 10 ms tick.

    Field 22 of /proc/self/stat counts ticks since boot (proc(5)); CLOCK_BOOTTIME counts the same.
    """
    import os

    with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return now_ns() - max(age_ns, 0)


class Phase(Struct, frozen=True):
    """One row: a name and the seconds spent in it."""

    name: str
    seconds: float


class PhaseTable(Struct):
    """Collects phases of one operation from ``started_ns`` on."""

    started_ns: int = field(default_factory=now_ns)
    ended_ns: int | None = None
    _spans: list[tuple[str, int, int]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` as one phase, also when it raises."""
        begin = now_ns()
        try:
            yield
        finally:
            self._spans.append((name, begin, now_ns()))

    def add(self, name: str, begin_ns: int, end_ns: int) -> None:
        """Record a phase that something else measured on the same clock."""
        self._spans.append((name, begin_ns, max(begin_ns, end_ns)))

    def split(self, name: str, marks: list[tuple[str, int]], *, first: str | None = None) -> None:
        """Replace the phase ``name`` by the stages that ``marks`` (label, time) cut it into.

        The time before the first mark is called ``first``, or keeps the phase's own name; a mark outside the phase is
        pressed to its edge.
        """
        for index, (label, begin, end) in enumerate(self._spans):
            if label == name and marks:
                edges = [
                    (first or name, begin),
                    *((mark, min(max(at, begin), end)) for mark, at in sorted(marks, key=lambda m: m[1])),
                ]
                ends = [at for _, at in edges[1:]] + [end]
                self._spans[index : index + 1] = [(n, b, e) for (n, b), e in zip(edges, ends, strict=True)]
                return

    def branch(self) -> PhaseTable:
        """A table of its own for one of several operations that begin alike and go on side by side."""
        return PhaseTable(self.started_ns, None, list(self._spans))

    def stop(self) -> None:
        """End the operation; what follows is not part of it."""
        if self.ended_ns is None:
            self.ended_ns = now_ns()

    @property
    def wall_seconds(self) -> float:
        return ((self.ended_ns or now_ns()) - self.started_ns) / 1e9

    def rows(self) -> list[Phase]:
        """The phases in order, same names merged, and the ``unaccounted`` rest; their sum is the wall time."""
        wall = self.wall_seconds
        merged: dict[str, float] = {}
        for name, begin, end in sorted(self._spans, key=lambda span: span[1]):
            merged[name] = merged.get(name, 0.0) + (end - begin) / 1e9
        rows = [Phase(name, seconds) for name, seconds in merged.items()]
        return [*rows, Phase(UNACCOUNTED, wall - sum(row.seconds for row in rows))]

    def as_list(self) -> list[dict[str, float | str]]:
        return [{"name": row.name, "seconds": round(row.seconds, 6)} for row in self.rows()]
