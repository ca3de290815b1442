"""Many replicas at once: from one to eight, by order and by a burst; and replicas of two models side by side."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from benchmarks import pool_states
from benchmarks.asking import until_answered
from benchmarks.density import settled
from benchmarks.driver import Gpuckpt
from benchmarks.journal import Sample
from benchmarks.pool_client import Reply, ask, threads
from benchmarks.pool_memory import noted, of_replicas
from benchmarks.pool_run import MODEL, Pool, first_token
from benchmarks.pool_setup import PROMPT
from gpuckpt.errors import DeadlineError, GpuckptError
from gpuckpt.host.tmpfs import memory_total
from gpuckpt.service.view import EventView
from gpuckpt.timing import now_ns

_N = 5
_LONG = 400  # tokens: nobody's answer ends before the last one's begins
_MOST = 120.0
_PAUSE = 0.01


def to_one(pool: Pool, clones: int) -> None:
    """One hot replica, which has answered before; containers prepared for all others."""
    process = pool.process
    process.client.scale(MODEL, None)
    pool_states.release(process, MODEL)
    pool_states.make_hot(process, MODEL)
    pool.ask()
    pool_states.until_hot(process, MODEL)
    pool_states.until_prepared(pool.run.space, pool.golden(), clones - 1)


def failures(events: list[EventView]) -> None:
    """Raise GpuckptError if one of them tells of a start that failed."""
    if bad := next((event for event in events if event.kind in ("failed", "lost", "quarantined")), None):
        raise GpuckptError(f"{bad.replica or bad.model} {bad.kind}", cause=bad.reason)


@dataclass
class ScaleOut:
    """``gpuckpt pool scale MODEL 8``: from the order until each of the eight has answered a request of its own.

    Each is asked directly, in the moment in which the service tells that it is there.
    """

    pool: Pool
    clones: int
    name: str = "scale_out"
    n: int | None = _N

    def prepare(self) -> None:
        pass

    def measure(self) -> Sample:
        pool, process = self.pool, self.pool.process
        to_one(pool, self.clones)
        known = process.client.events()[-1].seq
        answered: dict[str, Future[int]] = {}
        came: list[EventView] = []
        (first,) = process.model(MODEL).replicas
        with threads(self.clones) as workers:
            began = now_ns()
            process.client.scale(MODEL, self.clones)
            answered[first.name] = workers.submit(self._answered, first.name)
            while len(came) < self.clones - 1:
                if now_ns() - began > _MOST * 1e9:
                    raise DeadlineError(f"{len(came) + 1} of {self.clones} replicas were there after {_MOST:g} s")
                news = process.client.events(after=known, model=MODEL)
                failures(news)
                for event in pool_states.brought_up(news):
                    came.append(event)
                    answered[event.replica] = workers.submit(self._answered, event.replica)
                known = news[-1].seq if news else known
                time.sleep(_PAUSE)
            times = sorted((future.result() - began) / 1e9 for future in answered.values())
        slowest = max(came, key=lambda event: event.seconds or 0.0)
        return {
            "replicas": len(times),
            "all_s": round(times[-1], 6),
            "answered_s": [round(value, 6) for value in times],
            "restore_s": [round(event.seconds or 0.0, 6) for event in came],
            # Of the replica that took the longest; its siblings' are of the same moments.
            "phases": [{"name": name, "seconds": round(value, 6)} for name, value in slowest.phases.items()],
        }

    def _answered(self, replica: str) -> int:
        found = next(
            one for one in pool_states.replicas(self.pool.run.space.state, self.pool.golden()) if one.name == replica
        )
        first_token(found.endpoint, MODEL)
        return now_ns()

    def close(self) -> None:
        with contextlib.suppress(GpuckptError):
            self.pool.process.client.scale(MODEL, None)


@dataclass
class Burst:
    """Eight long streams at once for a model with one hot replica that takes one: until each has its first token.

    The first ones decode while the others are restored, on the same cores: this is what clients see.
    """

    pool: Pool
    clones: int
    name: str = "burst"
    n: int | None = _N

    def prepare(self) -> None:
        pass

    def measure(self) -> Sample:
        pool, process = self.pool, self.pool.process
        to_one(pool, self.clones)
        known = process.client.events()[-1].seq
        together = threading.Barrier(self.clones)

        def begun(reply: Reply) -> bool:
            together.wait(_MOST)  # until then each keeps its replica
            return False

        def stream(_: int) -> Reply:
            more: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
            return ask(process.port, MODEL, PROMPT, _LONG, first=begun, more=more)

        try:
            with threads(self.clones) as workers:
                began = now_ns()
                replies = list(workers.map(stream, range(self.clones)))
        except threading.BrokenBarrierError:
            raise DeadlineError(f"not all of {self.clones} streams had begun after {_MOST:g} s") from None
        news = process.client.events(after=known, model=MODEL)
        failures(news)
        times = sorted((reply.first_ns - began) / 1e9 for reply in replies)
        slowest = max(pool_states.brought_up(news), key=lambda event: event.seconds or 0.0)
        return {
            "replicas": len({reply.replica for reply in replies}),
            "all_s": round(times[-1], 6),
            "answered_s": [round(value, 6) for value in times],
            "phases": [{"name": name, "seconds": round(value, 6)} for name, value in slowest.phases.items()],
        }

    def close(self) -> None:
        pass


@dataclass
class Many:
    """Replicas of two models, six of each, all live at once: what they hold, and whether each answers as recorded."""

    pool: Pool
    models: tuple[str, ...]
    each: int = 6
    name: str = "many"
    n: int | None = 1

    def prepare(self) -> None:
        gpuckpt = Gpuckpt(self.pool.run.space)
        self.canaries = {name: gpuckpt.inspect(name)["canary"] for name in self.models}

    def measure(self) -> Sample:
        pool, process = self.pool, self.pool.process
        for name in self.models:
            process.client.scale(name, None)
            pool_states.release(process, name)
        for name in self.models:
            pool_states.until_prepared(pool.run.space, pool.golden(name), self.each)
        before = settled()
        began = time.monotonic()
        for name in self.models:
            process.client.scale(name, self.each)
        for name in self.models:
            pool_states.until_hot(process, name, self.each)
        hot = time.monotonic() - began
        first, differences = self._asked()
        noted(process)
        after = settled()
        held = {name: of_replicas(process.model(name)) for name in self.models}
        everything = [one for each in held.values() for one in each]
        return {
            "replicas": len(everything),
            "all_hot_s": round(hot, 6),
            "all_answered": len(differences) == len(everything) == self.each * len(self.models),
            "canaries_equal": not any(differences),
            "differences": [difference for difference in differences if difference],
            "asked_again": [difference for difference in first if difference],
            "available_before": before,
            "available_after": after,
            "available_drop_bytes": before - after,
            "memory_total_bytes": memory_total(),
            "goldens_bytes": {name: process.model(name).golden.bytes for name in self.models},
        } | {f"{key}": sum(one[key] for one in everything) for key in ("own_bytes", "pss_bytes", "private_bytes")} | {
            "by_model": {
                name: {
                    key: round(sum(one[key] for one in each) / len(each))
                    for key in ("own_bytes", "pss_bytes", "private_bytes", "rss_bytes")
                }
                | {"replicas": len(each)}
                for name, each in held.items()
            }
        }  # fmt: skip

    def _asked(self) -> tuple[list[str | None], list[str | None]]:
        """The first difference of each replica's answer from the recorded one; all are asked at the same time.

        They are asked past the service, which may be asking its own canary: sums over two requests are made in another
        order. So who differs is asked once more, by itself. Returns what the first answers said, and the last ones.
        """
        work = [
            (endpoint, self.canaries[name])
            for name in self.models
            for endpoint in pool_states.endpoints(self.pool.run.space, self.pool.golden(name))
        ]
        with threads(len(work)) as workers:
            answers = list(workers.map(lambda one: until_answered(*one, timeout=_MOST), work))
        first = [answer.difference for answer in answers]
        last = [
            until_answered(*one, timeout=_MOST).difference if why else None
            for one, why in zip(work, first, strict=True)
        ]
        return first, last

    def close(self) -> None:
        for name in self.models:
            with contextlib.suppress(GpuckptError):
                self.pool.process.client.scale(name, None)
