"""The real hands: what the loop orders, done by the golden package's transactions in threads.

A restore runs in this process, which has everything imported already; making a golden takes a minute and much memory,
and is left to a process of its own, `gpuckpt create`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import gpuckpt
from gpuckpt import manifest as manifests
from gpuckpt import proc
from gpuckpt.config import Settings
from gpuckpt.config_load import as_environment
from gpuckpt.containers import freezer
from gpuckpt.containers.podman import Container, container_name
from gpuckpt.cuda.driver import Gpu
from gpuckpt.errors import (
    BusyError,
    CheckpointError,
    GpuckptError,
    NotFoundError,
    NothingToDo,
    OutOfSpaceError,
    RestoreError,
)
from gpuckpt.golden import prepare, standby, tiers
from gpuckpt.golden import replica as replicas
from gpuckpt.golden.prepare import Options
from gpuckpt.golden.replica import Replica
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.tools import Tools, open_store, tools
from gpuckpt.manifest import Held, Manifest
from gpuckpt.pool.hands import Found, Made, Source
from gpuckpt.pool.state import Golden, Phase
from gpuckpt.store import seal
from gpuckpt.store.layout import Tier
from gpuckpt.timing import PhaseTable
from gpuckpt.workload import adapter
from gpuckpt.workload.endpoint import Endpoint

_Result = TypeVar("_Result")
_log = logging.getLogger("gpuckpt.pool")
_WORKERS = 32  # restores, stops and checks at once
_MOVERS = 2  # goldens moved at once, one each way
_NICE = 10  # of theirs: nobody waits for a golden to be moved, and requests are answered on the same cores
_DUMP_SECONDS = 600  # the most that warming up and dumping may take
_KEEPER = "pool"
_GPU_PATIENCE = 30.0  # seconds that a wake or restore waits for room on the GPUs: others are leaving it


class _Failure(msgspec.Struct, frozen=True):
    """The parts of a failed command's `error` that are passed on."""

    message: str
    cause: str | None = None
    remedy: str | None = None
    log: tuple[str, ...] = ()
    lacking: int = 0


class _Failed(msgspec.Struct, frozen=True):
    error: _Failure


_FAILED = msgspec.json.Decoder(_Failed)  # not made by the threads that use it: see gpuckpt.manifest


class Workshop:
    """See :class:`gpuckpt.pool.hands.Workplace`."""

    def __init__(self, settings: Settings, sources: Mapping[str, Source]) -> None:
        self._settings = settings
        self._sources = dict(sources)
        # The same settings for a child, wherever ours came from, and the same gpuckpt, however we have found it.
        self._environment = as_environment(settings) | {"PYTHONPATH": str(Path(gpuckpt.__file__).parents[1])}
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="gpuckpt-pool")
        self._movers = ThreadPoolExecutor(_MOVERS, thread_name_prefix="gpuckpt-move", initializer=_yield_to_others)
        self._known: dict[str, Container] = {}  # id and first process of running replicas
        self._endpoints: dict[str, Endpoint] = {}
        # Of the goldens that replicas are restored from; another file is another golden.
        self._records: dict[str, tuple[tuple[int, int], Manifest]] = {}
        self._creating: set[proc.Child] = set()
        self._interrupted = False
        self._gpu_trouble = ""
        self._births = threading.Lock()  # between a child's start and its entry in the list it cannot be interrupted

    def set_sources(self, sources: Mapping[str, Source], leaving: Iterable[str]) -> None:
        self._sources = {name: self._sources[name] for name in leaving} | dict(sources)

    def store_size(self) -> int:
        state = os.statvfs(self._tools.layout.store)
        return state.f_blocks * state.f_frsize

    async def gpus(self, replicas: Sequence[str]) -> tuple[tuple[Gpu, ...], dict[str, tuple[Held, ...]]] | None:
        try:
            found = await self._in_thread(self._on_devices, replicas)
        except (GpuckptError, OSError) as error:
            if str(error) != self._gpu_trouble:  # it is asked again and again
                self._gpu_trouble = str(error)
                _log.warning("the GPUs cannot be asked for their memory: %s", error)
            return None
        if self._gpu_trouble:
            self._gpu_trouble = ""
            _log.info("the GPUs can be asked again")
        return found

    def _on_devices(self, replicas: Sequence[str]) -> tuple[tuple[Gpu, ...], dict[str, tuple[Held, ...]]]:
        gpus = tuple(gpu for gpu in self._tools.devices.gpus() if not gpu.mig)
        held: dict[str, tuple[Held, ...]] = {}
        for name in replicas:
            with contextlib.suppress(GpuckptError, OSError):  # it may end meanwhile
                held[name] = self._on_gpus(self._container(name).pid)
        return gpus, held

    async def open(self) -> None:
        # The store is mounted, CRIU found, podman connected to.
        await self._in_thread(open_store, self._settings)
        self._tools: Tools = await self._in_thread(tools, self._settings)
        await self._in_thread(self._remove_strangers)

    def close(self) -> None:
        for threads in (self._pool, self._movers):
            threads.shutdown(cancel_futures=True)

    async def _in_thread(self, work: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    # ------------------------------------------------------------------ looking

    async def look(self, model: str) -> Found:
        return await self._in_thread(self._look, self._sources[model].golden)

    async def adopt(self, model: str) -> Found:
        golden = self._sources[model].golden
        replicas, prepared = await self._in_thread(self._left, golden)
        found = await self._in_thread(self._look, golden)
        return replace(found, replicas=tuple(replicas), prepared=tuple(prepared))

    def _remove_strangers(self) -> None:
        """Replicas of an earlier service's models that are not ours: nobody would ever stop them."""
        known = {source.golden for source in self._sources.values()}
        for one in replicas.all_of(self._tools.layout.replicas):
            if one.keeper == _KEEPER and one.golden not in known:
                with contextlib.suppress(GpuckptError, OSError):
                    self._stop(one.name)

    def _look(self, golden: str) -> Found:
        here = self._tools.layout.tiers(golden)
        if not here:
            return Found(golden, Golden.NONE)
        manifest = self._record(golden)
        # Of a mapped one only what it writes is its own; nobody knows how much before one has run.
        memory = manifest.sizes.cpu_pages + manifest.sizes.shared_memory
        place = Golden.TMPFS if "tmpfs" in here else Golden.DISK
        gpus = manifest.gpu.devices if manifest.gpu else ()
        fixed = "all" not in manifest.launch.gpus
        served = manifest.workload.served_name
        carried = manifest.gpu.carried if manifest.gpu else 0
        return Found(golden, place, manifest.sizes.total, memory, served, gpus=gpus, fixed=fixed, carried=carried)

    def _left(self, golden: str) -> tuple[list[tuple[Made, Phase]], list[str]]:
        """Replicas of an earlier service that can be used, and prepared ones; the others are removed."""
        usable, prepared = [], []
        for one in replicas.all_of(self._tools.layout.replicas):
            if one.golden != golden or one.keeper != _KEEPER:
                continue
            # It may end while it is looked at: its files in /proc and of its control group go with it.
            with contextlib.suppress(GpuckptError, OSError):
                if one.state == "prepared":
                    prepared.append(one.name)
                    continue
                container = self._container(one.name)
                still = freezer.frozen(container.pid, container.id)
                # One that was being frozen or woken may hold half of its memory, and answer its health check.
                whole = still or (one.standby is None and self._answers(one))
                if one.state == "ready" and container.alive and whole:
                    usable.append((self._made(one, self._held(one)), Phase.STANDBY if still else Phase.HOT))
                    continue
            with contextlib.suppress(GpuckptError, OSError):
                self._stop(one.name)
        return usable, prepared

    def _answers(self, replica: Replica) -> bool:
        return adapter(self._record(replica.golden).workload).healthy(replica.endpoint)

    def _record(self, golden: str) -> Manifest:
        folder = self._tools.layout.golden(golden)
        state = (folder / "manifest.json").stat()
        now = (state.st_ino, state.st_mtime_ns)
        if (known := self._records.get(golden)) is None or known[0] != now:
            known = self._records[golden] = (now, manifests.read(folder))
        return known[1]

    def _container(self, name: str) -> Container:
        if (known := self._known.get(name)) is None:
            known = self._known[name] = self._tools.containers.inspect(container_name(name))
        return known

    def _endpoint(self, name: str) -> Endpoint:
        if (known := self._endpoints.get(name)) is None:
            raise NotFoundError(f"replica {name} is gone")  # removed while somebody looked at it
        return known

    def _made(self, replica: Replica, gpus: tuple[Held, ...], phases: PhaseTable | None = None) -> Made:
        container = self._container(replica.name)
        if not container.pid:  # below process 0 is everything that the machine runs
            raise RestoreError(f"replica {replica.name} has ended", cause=f"its container is {container.status}")
        self._endpoints[replica.name] = replica.endpoint
        spent = {row.name: row.seconds for row in phases.rows()} if phases else {}
        record = self._known_record(replica.golden)
        carried = record.gpu.carried if record and record.gpu else 0
        return Made(replica.name, replica.endpoint, _private(container.pid), gpus, carried, container.pid, spent)

    # ------------------------------------------------------------------ replicas

    async def restore(self, model: str, replica: str, gpus: tuple[Held, ...]) -> Made:
        return await self._in_thread(self._restore, self._sources[model].golden, replica, _uuids(gpus))

    def _restore(self, golden: str, name: str, gpus: tuple[str, ...]) -> Made:
        self._known.pop(name, None)
        phases = PhaseTable()
        # Its first real request is its proof; a canary of sixteen tokens would keep that waiting.
        restored = restore(
            RestoreRequest(golden, replica=name, canary=False, keeper=_KEEPER, gpu_wait=_GPU_PATIENCE, gpus=gpus),
            self._tools,
            phases,
        )
        try:
            return self._made(restored.replica, restored.gpus, phases)
        except BaseException:
            with contextlib.suppress(GpuckptError, OSError):
                self._stop(name)
            raise

    async def prepare(self, model: str, replica: str) -> None:
        await self._in_thread(self._prepare, self._sources[model].golden, replica)

    def _prepare(self, golden: str, name: str) -> None:
        prepare.prepare_as(self._tools, golden, name, Options(), keeper=_KEEPER)

    async def make(self, model: str, *, replace: bool) -> None:
        source = self._sources[model]
        if not replace and self._tools.layout.tiers(source.golden):
            return  # somebody has made it meanwhile
        if not source.create:
            raise NotFoundError(
                f"there is no golden {source.golden}, and nothing says how to make it",
                remedy=f'gpuckpt create {source.golden} …, or create = ["--", …] in [models."{model}"]',
            )
        await self._in_thread(self._make, source)

    def _make(self, source: Source) -> None:
        words = [sys.executable, "-m", "gpuckpt", "create", source.golden, "--replace", "--format=json", *source.create]
        longest = self._settings.create.start_timeout + _DUMP_SECONDS
        with self._births:
            if self._interrupted:
                raise CheckpointError(f"golden {source.golden} is not made", cause="the service goes down")
            child = proc.Child(words, env=self._environment)
            self._creating.add(child)
        try:
            result = child.wait(longest)
        finally:
            self._creating.discard(child)
        if result.code == BusyError.exit_code:
            raise BusyError(f"golden {source.golden} is being made by another command")
        if result.code != 0:
            raise _not_made(source.golden, result)

    def interrupt(self) -> None:
        with self._births:
            self._interrupted = True
            for child in list(self._creating):
                child.interrupt()

    async def wake(self, model: str, replica: str, gpus: tuple[Held, ...]) -> tuple[Held, ...]:
        return await self._in_thread(self._wake, self._sources[model].golden, replica, _uuids(gpus))

    def _wake(self, golden: str, name: str, gpus: tuple[str, ...]) -> tuple[Held, ...]:
        record, container, phases = self._known_record(golden), self._container(name), PhaseTable()
        try:
            woken = standby.wake(
                self._tools, name, record, phases, timeout=_GPU_PATIENCE, gpus=gpus, container=container
            )
        except NothingToDo:  # somebody did it by hand
            return ()
        return woken.gpus

    async def freeze(self, model: str, replica: str) -> tuple[Held, ...]:
        return await self._in_thread(self._freeze, self._sources[model].golden, replica)

    def _freeze(self, golden: str, name: str) -> tuple[Held, ...]:
        record, container = self._known_record(golden), self._container(name)
        try:
            return standby.suspend(self._tools, name, record, PhaseTable(), container=container).gpus
        except NothingToDo:
            return ()

    def _known_record(self, golden: str) -> Manifest | None:
        """The golden's manifest; the last one known while it is being replaced."""
        try:
            return self._record(golden)
        except NotFoundError:
            return self._records[golden][1] if golden in self._records else None

    async def stop(self, model: str, replica: str) -> None:
        await self._in_thread(self._stop, replica)

    def _stop(self, name: str) -> None:
        self._known.pop(name, None)
        self._endpoints.pop(name, None)
        with contextlib.suppress(NotFoundError, NothingToDo):
            replicas.stop(self._tools, name)

    # ------------------------------------------------------------------ health

    async def healthy(self, model: str, replica: str, timeout: float) -> bool:
        return await self._in_thread(self._healthy, self._sources[model].golden, replica, timeout)

    def _healthy(self, golden: str, name: str, timeout: float) -> bool:
        return adapter(self._record(golden).workload).healthy(self._endpoint(name), timeout=timeout)

    async def doomed(self, model: str, replica: str) -> bool:
        return await self._in_thread(self._doomed, replica)

    def _doomed(self, name: str) -> bool:
        container = self._container(name)
        return any(map(proc.is_killed, proc.processes_below(container.pid) or [container.pid]))

    async def canary(self, model: str, replica: str) -> tuple[str, ...]:
        return await self._in_thread(self._canary, self._sources[model].golden, replica)

    def _canary(self, golden: str, name: str) -> tuple[str, ...]:
        record = self._record(golden)
        serving = adapter(record.workload)
        if record.canary is None:
            serving.first_token(self._endpoint(name))
            return ()
        return serving.replay(self._endpoint(name), record.canary).differences

    async def memory(self, model: str, replica: str) -> int:
        return await self._in_thread(lambda: _private(self._container(replica).pid))

    def _held(self, replica: Replica) -> tuple[Held, ...]:
        """What one that an earlier service has left holds on GPUs, or held before it was frozen."""
        if replica.standby is not None:
            return tuple(Held(uuid, name, count) for uuid, name, count in replica.standby.devices)
        record = self._known_record(replica.golden)
        if record is None or record.gpu is None:
            return ()
        with contextlib.suppress(GpuckptError):  # it answers all the same
            return self._on_gpus(self._container(replica.name).pid) or record.gpu.devices
        return record.gpu.devices

    def _on_gpus(self, pid: int) -> tuple[Held, ...]:
        """What the driver says that it holds; nothing if it does not know the processes. Raises what asking raises."""
        return self._tools.devices.held(self._tools.devices.holders(pid))

    # ------------------------------------------------------------------ goldens

    async def distrust(self, model: str) -> None:
        await self._in_thread(self._distrust, self._sources[model].golden)

    def _distrust(self, golden: str) -> None:
        for folder in self._tools.layout.tiers(golden).values():
            seal.distrust(folder)

    async def move(self, model: str, to: Golden) -> None:
        golden = self._sources[model].golden
        await asyncio.get_running_loop().run_in_executor(self._movers, self._move, golden, to)

    def _move(self, golden: str, to: Golden) -> None:
        # What goes to the tmpfs stays on disk: replicas may run from there, and to let it go again then costs nothing.
        tier: Tier = "tmpfs" if to is Golden.TMPFS else "disk"
        try:
            tiers.move(self._tools, golden, tier, keep=tier == "tmpfs")
        except NothingToDo:
            pass
        except OSError as error:
            raise RestoreError(f"golden {golden} could not be moved to {to}", cause=str(error)) from error
        # Where a copy lay there already, nothing was moved, and nobody has told those that wait.
        prepare.discard_prepared(self._tools, golden, tier=tier)


def _yield_to_others() -> None:
    # Of a thread, and of those that it starts: Linux keeps it for each of its own.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _uuids(gpus: tuple[Held, ...]) -> tuple[str, ...]:
    return tuple(one.uuid for one in gpus)


def _private(pid: int) -> int:
    """Bytes that this container's processes hold beside the golden's pages that they share with others."""
    return proc.own_memory_of(proc.processes_below(pid))


def _not_made(golden: str, result: proc.Result) -> GpuckptError:
    """Why `gpuckpt create --format=json` failed; all it printed is its error, unless it was killed."""
    said = proc.tail(result.stderr)
    message = f"golden {golden} could not be made"
    remedy = f"try it by hand: gpuckpt create {golden} …"
    if result.code < 0:
        cause = f"it was ended by {signal.Signals(-result.code).name}"
        more = "; the kernel does that when memory runs out (journalctl -k)" if result.code == -signal.SIGKILL else ""
        return CheckpointError(message, cause=cause + more, remedy=remedy, log=said)
    try:
        error = _FAILED.decode(result.stdout).error
    except msgspec.DecodeError:
        return CheckpointError(message, cause=said[-1] if said else "it gave no reason", remedy=remedy, log=said)
    remedy = error.remedy or remedy
    if result.code == OutOfSpaceError.exit_code:
        return OutOfSpaceError(message, cause=error.message, remedy=remedy, log=error.log, lacking=error.lacking)
    # Where a server has ended, its last line says most.
    why = ": ".join(filter(None, (error.message, error.cause, *error.log[-1:])))
    return CheckpointError(message, cause=why, remedy=remedy, log=error.log or said)
