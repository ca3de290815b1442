"""The service: pool, front, health and history put together, as one configuration says."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from gpuckpt import __version__
from gpuckpt.config import Settings
from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import BusyError, UsageError
from gpuckpt.host import tmpfs
from gpuckpt.pool.book import Event, Held, RefusedError
from gpuckpt.pool.config import MEMORY_SHARE, Model, Pool
from gpuckpt.pool.hands import Source, Workplace
from gpuckpt.pool.health import Health
from gpuckpt.pool.owner import Lease, Owner
from gpuckpt.pool.space import left_by_others, limited
from gpuckpt.pool.state import Budget, Golden, Phase
from gpuckpt.pool.steady import again_and_again
from gpuckpt.pool.workshop import Workshop
from gpuckpt.service.front import Front, Limits
from gpuckpt.service.history import History
from gpuckpt.service.keys import Keys
from gpuckpt.service.metrics import Metrics
from gpuckpt.service.routing import Route, Routes
from gpuckpt.service.upstream import Upstream
from gpuckpt.service.view import GoldenView, GpuView, ModelView, PoolView, ReplicaView, UseView

_TICK = 1.0
_GPU_LOOK = 1.0  # seconds between two looks at the GPUs
_GPU_LOOK_LONGEST = 60.0  # the same where the driver does not answer: each try may start a helper


@dataclass(frozen=True)
class Changes:
    """What a reload has changed: names of models, and sentences on what takes effect only at a restart."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


_log = logging.getLogger("gpuckpt.pool")
_BAD = frozenset(("failed", "lost", "quarantined"))


class Service:
    """Everything but sockets and signals. ``keys``: a file of API keys that systemd has handed over.

    ``hands``: what does the work, by default a :class:`Workshop`.
    """

    def __init__(
        self,
        settings: Settings,
        config: Pool,
        *,
        keys: Path | None = None,
        hands: Workplace | None = None,
    ) -> None:
        self.config = config
        self._credential = keys
        self.started = time.time()
        self.state = "starting"
        self._opened = asyncio.Event()
        self.listening: list[str] = []
        self.connections: Callable[[], int] = lambda: 0
        self.history = History()
        self._workshop: Workplace = hands or Workshop(settings, _sources(config))
        self.owner = Owner(self._workshop, tell=self._tell)
        self.metrics = Metrics(self.owner.view, self._connected)
        self.health = Health(self.owner, self._workshop, config.health, self.metrics.canary)
        self._upstream = Upstream()
        self._routes = Routes({}, self._served)
        self._to_prewarm: set[str] = set()
        self._gpus: tuple[Gpu, ...] | None = None  # with what replicas may hold of each, as ``free``
        self._glance: tuple[float, bytes, bytes] | None = None  # when somebody looked last, what is new, and all
        self.front = Front(
            self, self._upstream, self._route, keys=self._read_keys(config), limits=Limits(), done=self.metrics.request
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._apply(config)

    def _connected(self) -> int:
        return self.connections()

    def _apply(self, config: Pool) -> None:
        """What can change while requests are under way."""
        self.config = config
        names = {alias: name for name, model in config.models.items() for alias in (name, *model.aliases)}
        self._routes = Routes(names, self._served)
        front = config.front
        limits = self.front.limits
        limits.body, limits.bodies, limits.deadline = front.body_limit, front.bodies, front.deadline
        limits.keep_alive, limits.request = front.keep_alive, front.header_timeout
        self.owner.queue, self.owner.operations.retry = front.queue, config.health.retry
        self.health.rules = config.health

    def _read_keys(self, config: Pool) -> Keys:
        file = config.front.keys or self._credential
        return Keys.read(file) if file else Keys()

    # ------------------------------------------------------------------ its life

    async def open(self) -> None:
        """Find the tools, mount the store, take over what an earlier service has left. Raises what these raise.

        Requests that come before wait for it.
        """
        await self._workshop.open()
        self.owner.budget = self._budget()
        await self.owner.adopt({name: model.rules() for name, model in self.config.models.items()})
        await self._look_at_gpus()
        self._prewarm(self.config.models)
        loop = asyncio.get_running_loop()
        watches = (self.owner.watch, self.health.run, self._tick, self._watch_gpus)
        self._tasks = [loop.create_task(work()) for work in watches]
        self.state = "ready"
        self._opened.set()

    def _budget(self) -> Budget:
        given = self.config.budget
        memory = given.memory if given.memory is not None else int(tmpfs.memory_total() * MEMORY_SHARE)
        store = given.store if given.store is not None else self._workshop.store_size()
        gpus = None if self._gpus is None else limited(self._gpus, given.gpu)
        return Budget(memory, gpus, store)

    async def _watch_gpus(self) -> None:
        pause = _GPU_LOOK
        while True:
            await asyncio.sleep(pause)
            try:
                answered = await self._look_at_gpus()
            except Exception:
                _log.exception("a look at the GPUs failed unexpectedly")
                answered = False
            pause = _GPU_LOOK if answered else min(2 * pause, _GPU_LOOK_LONGEST)

    async def _look_at_gpus(self) -> bool:
        """Note what replicas hold on the GPUs, and leave what others hold there out of the budget.

        Whether the driver has answered; a host may have GPUs without a model that uses them: it is not asked then.
        """
        if self.config.budget.gpu is None and not any(model.gpus for model in self.owner.models.values()):
            return True
        before, hot = self.owner.on_gpus(), self.owner.hot_on_gpus()
        looked = await self._workshop.gpus([one.name for one in hot])
        if looked is None:
            return False
        seen, held = looked
        for one in self.owner.hot_on_gpus():
            if one in hot:
                one.gpus = held.get(one.name) or one.gpus
        after = self.owner.on_gpus()
        known = {gpu.uuid: gpu.free for gpu in self._gpus or ()}
        # The answer may be of any moment between the two.
        self._gpus = left_by_others(seen, before[0] & after[0], before[1] | after[1], known)
        self.owner.budget = self._budget()
        return True

    def _prewarm(self, models: Mapping[str, Model]) -> None:
        self._to_prewarm |= {name for name, model in models.items() if model.prewarm}

    async def _tick(self) -> None:
        await again_and_again(self._keep_warm, _TICK)

    def _keep_warm(self) -> None:
        now = time.localtime()
        minute = now.tm_hour * 60 + now.tm_min
        scheduled = {
            name
            for name, model in self.config.models.items()
            if any(window.holds(now.tm_wday, minute) for window in model.schedule)
        }
        # One that has come is kept no longer than any other.
        self._to_prewarm -= {
            name
            for name in self._to_prewarm
            if (model := self.owner.models.get(name)) is None or model.has(Phase.HOT, Phase.STANDBY)
        }
        self.owner.set_warm(scheduled | self._to_prewarm)

    async def reload(self, config: Pool) -> Changes:
        """Go by another configuration from now on; requests under way are not disturbed.

        Raises UsageError, NotFoundError or BusyError if it cannot be used (now), and what looking at new models'
        goldens raises: then nothing has changed. For one caller at a time.
        """
        keys = self._read_keys(config)
        before = self.config
        notes = []
        if config.front.listen != before.front.listen:
            notes.append("front.listen takes effect at the next start")
        for name in set(before.models) & set(config.models):
            if _golden(name, before.models[name]) != _golden(name, config.models[name]):
                raise UsageError(
                    f"model {name} cannot get another golden while it is served",
                    remedy="give it another name, or restart the service",
                )
        going = [name for name, one in self.owner.models.items() if one.leaving]
        if back := [name for name in config.models if name in going]:
            raise BusyError(f"still going, as asked: {', '.join(back)}", remedy="try again in a moment")
        removed = [name for name in before.models if name not in config.models]
        held = {self.owner.models[name].prefix for name in (*going, *removed)}
        if taken := [name for name, model in config.models.items() if _golden(name, model) in held]:
            raise BusyError(
                f"the golden of {', '.join(taken)} is that of a model that goes",
                remedy="for another name add an alias; else reload without either first",
            )
        added = [name for name in config.models if name not in before.models]
        changed = [
            name for name in config.models if name in before.models and config.models[name] != before.models[name]
        ]
        # What is new is looked at first: that may fail, and requests for it are to find it there.
        self._workshop.set_sources(_sources(config), [*going, *removed])
        try:
            await self.owner.adopt({name: config.models[name].rules() for name in added})
        except BaseException:
            self._workshop.set_sources(_sources(before), going)
            raise
        self._apply(config)
        self.front.keys = keys
        self.owner.budget = self._budget()
        for name in removed:
            self.owner.remove(name)
        self.owner.set_rules({name: config.models[name].rules() for name in changed})
        for name in added:
            self.health.forget(name)  # one that was called so before may have had another golden
        self._prewarm({name: config.models[name] for name in added})
        changes = Changes(added, removed, changed, notes)
        said = [
            f"{word} {', '.join(names)}"
            for word, names in (("added", added), ("removed", removed), ("changed", changed))
            if names
        ]
        self._tell(Event(time.time(), "reloaded", "", reason="; ".join(said) or "nothing has changed"))
        return changes

    async def close(self, patience: float) -> None:
        """Finish what is at work, ``patience`` seconds at most, stop the replicas, end."""
        self.state = "draining"
        self._tell(Event(time.time(), "draining", ""))
        self._workshop.interrupt()
        await self.owner.drain(patience)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._upstream.close()
        self._workshop.close()
        self.history.close()
        self.state = "closed"

    def _tell(self, event: Event) -> None:
        self.metrics.event(event)
        if event.kind in ("stopped", "lost"):
            self._upstream.forget(event.replica)
        if event.kind in ("made", "quarantined"):
            self.health.forget(event.model)
        self.history.add(event)
        level = logging.WARNING if event.kind in _BAD else logging.INFO
        _log.log(level, "%s", _told(event), extra={"fields": _fields(event)})

    # ------------------------------------------------------------------ what the front asks

    def tier_of(self, name: str) -> str:
        """The tier that a request for the model would find now."""
        return held.tier() if (held := self.owner.models.get(name)) else "cold"

    async def acquire(self, name: str, deadline: float) -> Lease:
        """See :meth:`gpuckpt.pool.owner.Owner.acquire`."""
        if not self._opened.is_set():
            began = self.owner.clock()
            try:
                async with asyncio.timeout(deadline):
                    await self._opened.wait()
            except TimeoutError:
                raise RefusedError(f"the service was not ready within {deadline:g} s", retry_after=5) from None
            deadline -= self.owner.clock() - began
        return await self.owner.acquire(name, max(0.0, deadline))

    def release(self, held: Held) -> None:
        """See :meth:`gpuckpt.pool.owner.Owner.release`."""
        self.owner.release(held)

    async def suspect(self, held: Held) -> None:
        """See :meth:`gpuckpt.pool.health.Health.suspect`."""
        await self.health.suspect(held)

    def _route(self, path: str, query: bytes, raw_path: bytes, headers: Mapping[bytes, bytes], body: bytes) -> Route:
        return self._routes.route(path, query, raw_path, headers, body)

    def _served(self, model: str) -> str | None:
        return held.served if (held := self.owner.models.get(model)) else None

    # ------------------------------------------------------------------ what is told

    def view(self, events: int = 100) -> PoolView:
        """Everything at this moment, with the last ``events`` of what happened."""
        offset = time.time() - self.owner.clock()
        models = [self._model(name, offset) for name in self.config.models if name in self.owner.models]
        total = tmpfs.memory_total()
        budget = self.owner.budget
        held = [one for model in self.owner.models.values() for one in model.replicas.values()]
        _, on_gpus = self.owner.on_gpus()
        most = self.config.budget.gpu
        gpus = [
            GpuView(
                uuid=gpu.uuid,
                name=gpu.name,
                used=on_gpus[gpu.uuid],
                limit=gpu.free if most is None else min(most, gpu.free),
            )
            for gpu in budget.gpus or ()
        ]
        return PoolView(
            version=__version__,
            pid=os.getpid(),
            state=self.state,
            started=self.started,
            now=time.time(),
            listen=self.listening,
            memory=UseView(used=sum(one.on_host for one in held), limit=budget.memory),
            gpu=UseView(used=on_gpus.total(), limit=None if budget.gpus is None else sum(one.limit for one in gpus)),
            store=UseView(
                used=sum(
                    m.golden_bytes for m in self.owner.models.values() if m.golden in (Golden.TMPFS, Golden.MOVING)
                ),
                limit=budget.store,
            ),
            host_memory=UseView(used=total - tmpfs.available_memory(), limit=total),
            models=models,
            ttft=self.metrics.ttft(),
            events=self.history.last(events),
            gpus=gpus,
        )

    async def views(self, refresh: float, quiet: float) -> AsyncIterator[bytes]:
        """The view as JSON: every ``refresh`` seconds while something changes, else every ``quiet``."""
        told, last = 0.0, b""
        while self.state != "closed":
            now = self.owner.clock()
            # However many look, it is made once.
            if self._glance is None or now - self._glance[0] >= refresh / 2:
                view = self.view()
                # Times pass and the machine's memory moves: that alone is no news.
                news = msgspec.json.encode(
                    (view.state, view.models, view.events[-1:], view.memory, view.store, view.gpus)
                )
                self._glance = (now, news, msgspec.json.encode(view))
            _, news, whole = self._glance
            if news != last or now - told >= quiet:
                told, last = now, news
                yield whole
            await asyncio.sleep(refresh)

    def _model(self, name: str, offset: float) -> ModelView:
        model, configured = self.owner.models[name], self.config.models[name]
        rules = model.rules
        return ModelView(
            name=name,
            aliases=list(configured.aliases),
            tier=model.tier(),
            golden=GoldenView(name=_golden(name, configured), tier=str(model.golden), bytes=model.golden_bytes),
            replicas=[
                ReplicaView(
                    name=one.name,
                    phase=str(one.phase),
                    since=one.since + offset,
                    requests=one.requests,
                    memory=one.on_host,
                    gpu=sum(one.on_gpus.values()),
                    pid=one.pid,
                    gpus=one.on_gpus,
                )
                for one in sorted(model.replicas.values(), key=lambda one: (len(one.name), one.name))
            ],
            waiting=len(model.waiters),
            requests=sum(one.requests for one in model.replicas.values()),
            answered=self.metrics.answered.get(name, 0),
            failed=self.metrics.failed.get(name, 0),
            asked=model.asked + offset if model.requested else None,
            trouble=model.trouble,
            retry_at=model.retry_at + offset if model.retry_at > self.owner.clock() else None,
            warm=model.warm,
            drained=model.drained,
            scale=model.scale,
            expected_memory=model.expected,
            rules=asdict(rules) | {"pin": str(rules.pin)},
        )

    def find(self, name: str) -> str:
        """The model that is called so, or has the alias; raises RoutingError."""
        return self._routes.find(name)


def _golden(name: str, model: Model) -> str:
    return model.golden or name


def _sources(config: Pool) -> dict[str, Source]:
    return {name: Source(_golden(name, model), model.create) for name, model in config.models.items()}


def _told(event: Event) -> str:
    what = " ".join(word for word in (event.model, event.replica) if word)
    text = f"{event.kind} {what}".strip()
    if event.reason:
        text += f" ({event.reason})"
    if event.seconds is not None:
        text += f" in {event.seconds:.2f} s"
    return text


def _fields(event: Event) -> dict[str, str]:
    fields = {
        "GPUCKPT_EVENT": event.kind,
        "GPUCKPT_MODEL": event.model,
        "GPUCKPT_REPLICA": event.replica,
        "GPUCKPT_TIER": event.tier,
        "GPUCKPT_REASON": event.reason,
        "GPUCKPT_SECONDS": f"{event.seconds:.3f}" if event.seconds is not None else "",
    }
    return {name: value for name, value in fields.items() if value}
