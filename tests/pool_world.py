"""The pool's loop in a small world of its own: hands that only pretend, and a record of what they were asked.

Its time is its own, too: how busy the machine is decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import GpuckptError, NotFoundError
from gpuckpt.manifest import Held as OnGpu
from gpuckpt.pool.book import Event, Held
from gpuckpt.pool.hands import Found, Made, Source
from gpuckpt.pool.owner import Owner
from gpuckpt.pool.state import Golden, Phase, Rules

RULES = Rules(max_replicas=3, concurrency=2, idle_freeze=1000.0, idle_release=1000.0, prepare=0)
HOT, STANDBY, RESTORING, STOPPING = Phase.HOT, Phase.STANDBY, Phase.RESTORING, Phase.STOPPING
NOT_EXPECTED = "failed unexpectedly"  # what is logged of faults that are ours


class FakeHands:
    """Does nothing, after a short while; what it was asked is in ``done``, and what fails is said beforehand.

    ``gate`` holds everything up while it is there and not set, ``gates`` what begins with such a word. ``pids`` of
    replicas-to-be; ``ill`` do not answer, ``doomed_ones`` were killed; ``differences`` are what canaries find.
    ``devices`` are the GPUs, ``on`` what replicas hold on them once they run, ``ordered`` where they were to come;
    ``makes``: what goldens hold that it makes.
    """

    def __init__(self, **models: Found) -> None:
        self.models = models
        self.done: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        self.gate: asyncio.Event | None = None
        self.gates: dict[str, asyncio.Event] = {}
        self.prepared: list[str] = []
        self.distrusted: list[str] = []
        self.pids: dict[str, int] = {}
        self.ill: set[str] = set()
        self.doomed_ones: set[str] = set()
        self.differences: dict[str, tuple[str, ...]] = {}
        self.memories: dict[str, int] = {}
        self.devices: tuple[Gpu, ...] | None = None
        self.on: dict[str, tuple[OnGpu, ...]] = {}
        self.makes: tuple[OnGpu, ...] = ()
        self.ordered: list[tuple[str, tuple[OnGpu, ...]]] = []
        self.looks: list[str] = []
        self.sources: dict[str, Source] | None = None
        self.opened = self.closed = self.interrupted = False

    async def _do(self, what: str, *names: str) -> None:
        await asyncio.sleep(0.005)
        if self.gate:
            await self.gate.wait()
        await self._pass(what)
        self.done.append(" ".join((what, *names)))
        self._fail(what)

    async def _pass(self, what: str) -> None:
        if gate := self.gates.get(what):
            await gate.wait()

    def _fail(self, what: str) -> None:
        if self.fails.get(what):
            raise self.fails[what].pop(0)

    def _found(self, model: str) -> Found:
        if self.sources is not None:
            assert model in self.sources, "nobody has told what it is"
        return self.models[model]

    # ------------------------------------------------------------------ as the loop sees them

    async def look(self, model: str) -> Found:
        self._fail("look")
        return replace(self._found(model), replicas=(), prepared=())

    async def adopt(self, model: str) -> Found:
        await asyncio.sleep(0.001)
        await self._pass("adopt")
        self._fail("adopt")
        return self._found(model)

    async def restore(self, model: str, replica: str, gpus: tuple[OnGpu, ...]) -> Made:
        self.ordered.append((replica, gpus))
        await self._do("restore", replica)
        memory, gpus = self.memories.get(replica, 1), self.on.get(replica, gpus)
        return Made(replica, f"at {replica}", memory=memory, gpus=gpus, pid=self.pids.get(replica))

    async def make(self, model: str, *, replace: bool) -> None:
        await self._do("make anew" if replace else "make", model)
        self.models[model] = Found(model, Golden.TMPFS, golden_bytes=4, gpus=self.makes)

    async def prepare(self, model: str, replica: str) -> None:
        await asyncio.sleep(0.001)
        await self._pass("prepare")
        self._fail("prepare")
        self.prepared.append(replica)

    async def wake(self, model: str, replica: str, gpus: tuple[OnGpu, ...]) -> tuple[OnGpu, ...]:
        self.ordered.append((replica, gpus))
        await self._do("wake", replica)
        return self.on.get(replica, gpus)

    async def freeze(self, model: str, replica: str) -> tuple[OnGpu, ...]:
        await self._do("freeze", replica)
        return self.on.get(replica, ())

    async def stop(self, model: str, replica: str) -> None:
        await self._do("stop", replica)

    async def move(self, model: str, to: Golden) -> None:
        await self._do("move", model, str(to))

    async def healthy(self, model: str, replica: str, timeout: float) -> bool:
        self.looks.append(f"healthy {replica}")
        await asyncio.sleep(0.001)
        await self._pass("healthy")
        self._fail("healthy")
        return replica not in self.ill

    async def distrust(self, model: str) -> None:
        self.distrusted.append(model)

    async def doomed(self, model: str, replica: str) -> bool:
        self.looks.append(f"doomed {replica}")
        await asyncio.sleep(0.001)
        self._fail("doomed")
        return replica in self.doomed_ones

    async def canary(self, model: str, replica: str) -> tuple[str, ...]:
        self.looks.append(f"canary {replica}")
        found = self.differences.get(replica, ())
        await asyncio.sleep(0.001)
        await self._pass(f"canary {replica}")
        await self._pass("canary")
        self._fail("canary")
        return found

    async def memory(self, model: str, replica: str) -> int:
        self.looks.append(f"memory {replica}")
        await asyncio.sleep(0.001)
        self._fail("memory")
        return self.memories.get(replica, 1)

    # ------------------------------------------------------------------ as the service sees them

    async def open(self) -> None:
        await self._pass("open")
        self._fail("open")
        self.opened = True

    def set_sources(self, sources: Mapping[str, Source], leaving: Iterable[str]) -> None:
        before = self.sources or {}
        self.sources = {name: before[name] for name in leaving if name in before} | dict(sources)

    async def gpus(self, replicas: Sequence[str]) -> tuple[tuple[Gpu, ...], dict[str, tuple[OnGpu, ...]]] | None:
        self.looks.append("gpus")
        self._fail("gpus")
        await self._pass("gpus")
        if self.devices is None:
            return None
        return self.devices, {name: self.on[name] for name in replicas if name in self.on}

    def store_size(self) -> int:
        return 1 << 30

    def interrupt(self) -> None:
        self.interrupted = True
        for word in ("make", "make anew"):
            if gate := self.gates.pop(word, None):
                self.fails[word] = [GpuckptError("given up")]
                gate.set()

    def close(self) -> None:
        self.closed = True


class World:
    """An owner, its hands, and what it told."""

    def __init__(self, rules: dict[str, Rules], hands: FakeHands, **options: Any) -> None:
        self.hands = hands
        self.events: list[Event] = []
        settings: dict[str, Any] = {"retry": 0.01, "clock": asyncio.get_running_loop().time}
        self.owner = Owner(hands, tell=self.events.append, **(settings | options))
        self._rules = rules

    async def __aenter__(self) -> World:
        await self.owner.adopt(self._rules)
        self._watch = asyncio.ensure_future(self.owner.watch(0.005))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert not self._watch.done()
        self._watch.cancel()
        for gate in (self.hands.gate, *self.hands.gates.values()):
            if gate:
                gate.set()
        await self.owner.drain(0.1)
        assert not [held.name for model in self.owner.models.values() for held in model.replicas.values()]
        assert not [model.name for model in self.owner.models.values() if model.waiters or model.preparing]

    def phases(self, model: str) -> list[Phase]:
        found = next(one for one in self.owner.view().models if one.name == model)
        return [one.phase for one in found.replicas]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.002)

    async def until_phases(self, *phases: Phase, model: str = "a") -> None:
        """Wait until the replicas of ``model`` are in these."""
        await self.until(lambda: sorted(self.phases(model)) == sorted(phases))

    async def hot(self, model: str = "a") -> Held:
        """A hot replica at work on nothing."""
        lease = await self.owner.acquire(model, 10)
        self.owner.release(lease.replica)
        return lease.replica

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def one(rules: Rules = RULES, golden: Golden = Golden.TMPFS, **options: Any) -> World:
    """A world with the model “a”, whose golden lies there."""
    return World({"a": rules}, FakeHands(a=Found("a", golden, 4, 1)), **options)


class Clockwork(asyncio.SelectorEventLoop):
    """A loop whose time passes only when there is nothing else to do, and then at once: up to what comes next.

    So what takes so many seconds there takes exactly as many, however slow the machine is. Threads would be late.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def look(timeout: float | None) -> Any:
            found = select(None if timeout is None else 0)
            if timeout and not found:
                self._now += timeout
            return found

        selector.select = look

    def time(self) -> float:
        return self._now


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test on a loop whose time is its own; whatever the loop complains of fails it."""
    complaints: list[dict[str, Any]] = []

    async def whole() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await asyncio.wait_for(work, 30)

    with asyncio.Runner(loop_factory=Clockwork) as runner:
        runner.run(whole())
    assert not complaints


def gone(name: str) -> NotFoundError:
    """What hands raise where there is nothing."""
    return NotFoundError(f"there is no {name}")
