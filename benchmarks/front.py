"""What does the pool's front add to talking to a replica directly?

    python -m benchmarks.front

A scripted server writes the time into each event that it streams; the front is before it, in a process of its own.
Each sample is a pair of short rounds, directly and through the front, in an order that alternates by chance, over TCP
both ways. Writes front.json: `added` is the difference of a pair's percentiles (of the time to an event from its
stamp, and of the time to the first byte of an answer), its median over the pairs; and the processor time that the
front took for an event and for a request, which the noise of a busy machine changes least. Clients with short requests
ask as fast as they can: of 64 of them, a request waits for the others'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import suite
from benchmarks.harness import ROOT
from benchmarks.journal import Document, Sample, summary
from benchmarks.statistics import median, percentile
from benchmarks.suite import Run

BUDGET = 600.0
INTERVAL = 0.02  # seconds between the events of a stream: 50 tokens a second
SECONDS = 1.5  # of streaming in one round
RAMP = 0.5  # seconds in which the streams of a round begin: a first byte is not to wait for 63 other requests
REQUESTS = 300
PERCENTS = (50, 99)
_STAMP = re.compile(rb'data: \{"stamp":(\d+),[^\n]*\n')
_QUANTITIES = ("added_event_p50_ms", "added_event_p99_ms", "added_first_p50_ms", "added_first_p99_ms",
               "added_request_p50_ms", "added_request_p99_ms", "cpu_per_event_us", "cpu_per_request_us",
               "direct_event_p50_ms", "direct_event_p99_ms", "front_event_p50_ms", "front_event_p99_ms")  # fmt: skip


# ---------------------------------------------------------------------- the load


@dataclass
class Heard:
    """What clients measured, in nanoseconds: from an event's stamp to its arrival, from a request to its first byte."""

    events: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)


class Client(asyncio.Protocol):
    """One connection, one request after the other."""

    def __init__(self, heard: Heard, request: bytes, end: bytes, times: int) -> None:
        self._heard, self._request, self._end, self._left = heard, request, end, times
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._sent = 0
        self._waits = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def ask(self) -> None:
        self._left -= 1
        self._rest, self._waits, self._sent = b"", True, time.monotonic_ns()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if self._waits:
            self._waits = False
            if not data.startswith(b"HTTP/1.1 200 "):
                self.done.set_exception(ConnectionError(f"no answer: {data[:500]!r}"))
                self._transport.close()
                return
            self._heard.first.append(now - self._sent)
        self._rest += data
        last = 0
        for found in _STAMP.finditer(self._rest):
            self._heard.events.append(now - int(found[1]))
            last = found.end()
        self._rest = self._rest[last:]
        if self._rest.endswith(self._end):
            if self._left:
                self.ask()
            else:
                self.done.set_result(None)
                self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the answer broke off: {error}"))


async def load(port: int, clients: int, times: int, asked: Document, end: bytes) -> Heard:
    """So many clients at once, each asking so many times."""
    heard = Heard()
    body = json.dumps({"model": "m"} | asked).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n"
    request += b"content-length: %d\r\n\r\n%b" % (len(body), body)
    loop = asyncio.get_running_loop()
    made: list[Client] = []
    for _ in range(clients):
        _, client = await loop.create_connection(lambda: Client(heard, request, end, times), "127.0.0.1", port)
        made.append(client)
    for client in made:
        client.ask()
        if asked["events"]:
            await asyncio.sleep(RAMP / clients)
    async with asyncio.timeout(60):
        await asyncio.gather(*(client.done for client in made))
    return heard


def run_load(work: Coroutine[Any, Any, Heard]) -> Heard:
    import uvloop

    return uvloop.run(work)


# ---------------------------------------------------------------------- the other processes


@dataclass
class Setup:
    """The scripted server and the front before it."""

    direct: int
    front: int
    pid: int

    def cpu_ns(self) -> int:
        """Processor time of the front until now; it has one thread."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Setup]:
    """Both, for the time of the body."""
    path = folder / "replica.sock"
    with contextlib.ExitStack() as stack:
        direct, _ = _started(stack, "benchmarks.servers.stamps", path)
        front, process = _started(stack, "benchmarks.servers.relay", path)
        yield Setup(direct, front, process.pid)


def _started(stack: contextlib.ExitStack, module: str, path: Path) -> tuple[int, subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(path)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )

    def end() -> None:
        process.terminate()
        process.communicate(timeout=20)

    stack.callback(end)
    assert process.stdout is not None
    return int(process.stdout.readline()), process


# ---------------------------------------------------------------------- what is compared


@dataclass
class Pairs:
    """Rounds of one kind, directly and through the front."""

    name: str
    setup: Setup
    round: Callable[[int], Heard]
    seed: int
    n: int | None = None
    taken: int = 0

    def prepare(self) -> None:
        for port in (self.setup.direct, self.setup.front):
            self.round(port)

    def measure(self) -> Sample:
        self.taken += 1
        ways = [("direct", self.setup.direct), ("front", self.setup.front)]
        random.Random(f"{self.seed} {self.name} {self.taken}").shuffle(ways)
        sample: Sample = {}
        for who, port in ways:
            before = self.setup.cpu_ns()
            heard = self.round(port)
            if who == "front":
                kind, count = ("event", len(heard.events)) if heard.events else ("request", len(heard.first))
                sample[f"cpu_per_{kind}_us"] = round((self.setup.cpu_ns() - before) / count / 1e3, 3)
            for what, times in (("event", heard.events), ("first" if heard.events else "request", heard.first)):
                for percent in PERCENTS if times else ():
                    sample[f"{who}_{what}_p{percent}_ms"] = round(percentile(times, percent) / 1e6, 4)
        for key in [key for key in sample if key.startswith("front_")]:
            rest = key.removeprefix("front_")
            sample[f"added_{rest}"] = round(sample[key] - sample[f"direct_{rest}"], 4)
        return sample

    def close(self) -> None:
        pass


def streams(count: int, *, step: bool) -> Callable[[int], Heard]:
    """So many streams at once; in step, all get an event at the same moment."""
    asked = {"stream": True, "events": round(SECONDS / INTERVAL), "interval": INTERVAL, "step": step}
    return lambda port: run_load(load(port, count, 1, asked, b"0\r\n\r\n"))


def requests(count: int) -> Callable[[int], Heard]:
    """Short requests, by so many clients at once."""
    return lambda port: run_load(load(port, count, REQUESTS // count, {"events": 0}, b"}"))


def body(run: Run) -> None:
    with contextlib.ExitStack() as stack:
        setup = stack.enter_context(processes(run.space.folder))
        kinds = {
            "1 stream": streams(1, step=False),
            "64 streams": streams(64, step=False),
            "64 streams in step": streams(64, step=True),
            "1 client": requests(1),
            "64 clients": requests(64),
        }
        methods: list[suite.Method] = [Pairs(name, setup, round_, run.options.seed) for name, round_ in kinds.items()]
        run.rounds(run.prepare(methods, stack))


def summarise(document: Document) -> Document:
    """The median of every quantity over the pairs, with its interval."""
    found: Document = {}
    for name, samples in document["runs"].items():
        quantities = {key: summary(samples, key) for key in _QUANTITIES}
        found[name] = {key: value for key, value in quantities.items() if value is not None}
        found[name]["pairs"] = len(samples)
    return {"front": found}


def shown(document: Document) -> Iterator[str]:
    """A table of the medians."""
    for name, samples in document["runs"].items():
        medians = {key: median([sample[key] for sample in samples]) for key in samples[0] if key in _QUANTITIES}
        yield f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in medians.items())


def parser() -> argparse.ArgumentParser:
    return suite.parser("front", __doc__, n=20, budget=BUDGET)


def main(argv: Sequence[str] | None = None) -> int:
    def whole(run: Run) -> None:
        try:
            body(run)
        finally:
            for line in shown(run.journal.document):
                run.say(line)

    return suite.main("front", parser(), whole, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
