"""The real hands: what the loop orders, done by the golden package's transactions in threads.

A restore runs in this process, which has everything imported already; making a golden takes a minute and much memory,
and is left to a process of its own, `gpuckpt create`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from gpuckpt import manifest as manifests
from gpuckpt import proc
from gpuckpt.config import Settings
from gpuckpt.containers import freezer
from gpuckpt.containers.podman import Container, container_name
from gpuckpt.errors import CheckpointError, GpuckptError, NotFoundError, NothingToDo, RestoreError
from gpuckpt.golden import replica as replicas
from gpuckpt.golden import tiers
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.tools import Tools, open_store, tools
from gpuckpt.pool.hands import Found, Made
from gpuckpt.pool.state import Golden, Phase
from gpuckpt.timing import PhaseTable
from gpuckpt.workload import adapter

_Result = TypeVar("_Result")
_WORKERS = 32  # restores, stops and checks at once
_DUMP_SECONDS = 600  # the most that warming up and dumping may take


@dataclass(frozen=True)
class Source:
    """Where a model comes from: its golden, and what follows ``gpuckpt create NAME`` if there is none."""

    golden: str
    create: tuple[str, ...] = ()


class Workshop:
    """See :class:`gpuckpt.pool.hands.Hands`. ``environment`` is what tells a child process the same settings."""

    def __init__(
        self, settings: Settings, sources: Mapping[str, Source], *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._settings = settings
        self._sources = dict(sources)
        self._environment = dict(environment or {})
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="gpuckpt-pool")
        self._known: dict[str, Container] = {}  # id and first process of running replicas

    async def open(self) -> None:
        """Mount the store, find CRIU, connect to podman. Raises what these raise."""
        await self._in_thread(open_store, self._settings)
        self._tools: Tools = await self._in_thread(tools, self._settings)

    def close(self) -> None:
        """End the threads; what they are doing is waited for."""
        self._pool.shutdown(cancel_futures=True)

    async def _in_thread(self, work: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    # ------------------------------------------------------------------ looking

    async def look(self, model: str) -> Found:
        return await self._in_thread(self._look, self._sources[model].golden)

    def _look(self, golden: str) -> Found:
        layout = self._tools.layout
        here = layout.tiers(golden)
        size, memory = 0, 0
        if here:
            manifest = manifests.read(next(iter(here.values())))
            size = manifest.sizes.total
            # Of a mapped one only what it writes is its own; nobody knows how much before one has run.
            memory = manifest.sizes.cpu_pages + manifest.sizes.shared_memory
        place = Golden.TMPFS if "tmpfs" in here else Golden.DISK if here else Golden.NONE
        return Found(golden, place, size, memory, 0, tuple(self._left(golden)))

    def _left(self, golden: str) -> list[tuple[Made, Phase]]:
        """Replicas of an earlier service that can be used; the others are removed."""
        usable = []
        for one in replicas.all_of(self._tools.layout.replicas):
            if one.golden != golden or not _is_ours(one):
                continue
            with contextlib.suppress(GpuckptError):
                container = self._container(one.name)
                still = freezer.frozen(container.pid, container.id)
                if one.state == "ready" and container.alive and (still or self._answers(one)):
                    usable.append((self._made(one), Phase.STANDBY if still else Phase.HOT))
                    continue
            with contextlib.suppress(GpuckptError):
                replicas.stop(self._tools, one.name)
        return usable

    def _answers(self, replica: Replica) -> bool:
        manifest = manifests.read(self._tools.layout.golden(replica.golden))
        return adapter(manifest.workload).healthy(replica.endpoint)

    def _container(self, name: str) -> Container:
        if (known := self._known.get(name)) is None:
            known = self._known[name] = self._tools.containers.inspect(container_name(name))
        return known

    def _made(self, replica: Replica, phases: PhaseTable | None = None) -> Made:
        container = self._container(replica.name)
        spent = {row.name: row.seconds for row in phases.rows()} if phases else {}
        return Made(replica.name, replica.endpoint, _private(container.pid), 0, spent)

    # ------------------------------------------------------------------ replicas

    async def restore(self, model: str, replica: str) -> Made:
        return await self._in_thread(self._restore, self._sources[model].golden, replica)

    def _restore(self, golden: str, name: str) -> Made:
        self._known.pop(name, None)
        phases = PhaseTable()
        # Its first real request is its proof; a canary of sixteen tokens would keep that waiting.
        restored = restore(RestoreRequest(golden, replica=name, canary=False), self._tools, phases)
        return self._made(restored.replica, phases)

    async def start(self, model: str, replica: str) -> Made:
        source = self._sources[model]
        if not source.create:
            raise NotFoundError(
                f"there is no golden {source.golden}, and nothing says how to make it",
                remedy=f'gpuckpt create {source.golden} …, or create = ["--", …] in [models."{model}"]',
            )
        return await self._in_thread(self._start, source, replica)

    def _start(self, source: Source, name: str) -> Made:
        # Then restored like any other: it takes a second more, and one kind of replica is enough.
        words = [sys.executable, "-m", "gpuckpt", "create", source.golden, "--replace", *source.create]
        longest = self._settings.create.start_timeout + _DUMP_SECONDS
        result = proc.run(words, timeout=longest, env=self._environment, check=False)
        if result.code != 0:
            said = proc.tail(result.stderr, 3)
            raise CheckpointError(f"golden {source.golden} could not be made", cause=" ".join(said), log=said)
        return self._restore(source.golden, name)

    async def wake(self, model: str, replica: str) -> None:
        await self._in_thread(self._thaw, replica)

    def _thaw(self, name: str) -> None:
        container = self._container(name)
        freezer.thaw(container.pid, container.id)

    async def freeze(self, model: str, replica: str) -> None:
        await self._in_thread(self._freeze, replica)

    def _freeze(self, name: str) -> None:
        container = self._container(name)
        freezer.freeze(container.pid, container.id)

    async def stop(self, model: str, replica: str) -> None:
        await self._in_thread(self._stop, replica)

    def _stop(self, name: str) -> None:
        self._known.pop(name, None)
        with contextlib.suppress(NotFoundError, NothingToDo):
            replicas.stop(self._tools, name)

    # ------------------------------------------------------------------ goldens

    async def move(self, model: str, to: Golden) -> None:
        golden = self._sources[model].golden
        try:
            if to is Golden.TMPFS:
                # It stays on disk: replicas may run from there, and to let it go again then costs nothing.
                await self._in_thread(lambda: tiers.move(self._tools, golden, "tmpfs", keep=True))
            else:
                await self._in_thread(lambda: tiers.move(self._tools, golden, "disk", keep=False))
        except NothingToDo:
            pass
        except OSError as error:
            raise RestoreError(f"golden {golden} could not be moved to {to}", cause=str(error)) from error


def _is_ours(replica: Replica) -> bool:
    """Whether the pool has made it; what was restored by hand is left alone."""
    prefix, dot, number = replica.name.rpartition(".")
    return bool(dot) and number.isdigit() and replica.golden.startswith(prefix)


def _private(pid: int) -> int:
    """Bytes that this container's processes hold beside the golden's pages that they share with others."""
    return proc.own_memory_of(proc.processes_below(pid))
