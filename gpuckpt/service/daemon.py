"""The daemon's life: sockets, signals, readiness, watchdog, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, GpuckptError, PreflightError
from gpuckpt.golden.sweep import sweep
from gpuckpt.golden.tools import tools
from gpuckpt.paths import refuse_untrusted
from gpuckpt.pool import config as configuration
from gpuckpt.service import activation, journal
from gpuckpt.service.admin import Admin
from gpuckpt.service.notify import Notifier
from gpuckpt.service.server import Guard, HttpServer, listen
from gpuckpt.service.service import Changes, Service
from gpuckpt.service.site import Site
from gpuckpt.store import locks
from gpuckpt.store.layout import Layout

_log = logging.getLogger("gpuckpt.pool")
_SPARE_FILES = 2000  # descriptors beside clients' connections: those to replicas, files, pidfds
_STATUS_SECONDS = 2.0
_PROGRESS_SECONDS = 10.0  # between two words to systemd that the start goes on


def run(settings: Settings, file: Path, *, admin: Path, level: int = logging.INFO) -> None:
    """Run the pool that ``file`` describes until SIGTERM or SIGINT; ``admin`` is the admin API's socket.

    Raises BusyError if one runs already, and what reading the configuration and opening the store raise.
    """
    import uvloop

    journal.set_up(level)
    uvloop.run(_Daemon(settings, file, admin).run())


class _Daemon:
    def __init__(self, settings: Settings, file: Path, admin: Path) -> None:
        self._settings = settings
        self._file = file
        self._admin = admin
        self._notifier = Notifier.from_environment()
        self._layout = Layout.of(settings)
        self._stop = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()
        self._guard = Guard()

    async def run(self) -> None:
        config = configuration.load(self._file)
        with _alone(self._layout), contextlib.ExitStack() as sockets:
            credential = activation.credential()
            service = self._service = Service(self._settings, config, keys=credential)
            front_sockets = self._front_sockets(config.front.listen)
            for one in front_sockets:
                sockets.callback(one.close)
            self._follow(config)
            refuse_untrusted(self._admin.parent, what="the admin socket's folder")
            self._admin.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            admin = Admin(service, reload=self._reload, stop=self._stop.set).app()
            admin_server = HttpServer(admin, [self._admin_socket()], guard=Guard())
            front_server = HttpServer(Site(service), front_sockets, guard=self._guard)
            service.connections = lambda: front_server.connections
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            loop.add_signal_handler(signal.SIGHUP, self._reload_soon)
            ping = loop.create_task(self._ping())
            try:
                # Clients may connect from now on; their requests wait until it is ready.
                await front_server.start()
                await admin_server.start()
                if await self._unless_stopped(self._open()):
                    self._notifier.ready(self._status())
                    _log.info("ready: %d models at %s", len(config.models), ", ".join(service.listening))
                    status = loop.create_task(self._tell_status())
                    await self._stop.wait()
                    status.cancel()
            finally:
                self._notifier.stopping("finishing what is at work")
                front_server.stop_listening()
                patience = service.config.front.drain
                async with self._reloading:  # what one is looking at would be left behind
                    if service.state == "ready":
                        await service.close(patience)
                await front_server.close(1)
                await admin_server.close(1)
                ping.cancel()
                with contextlib.suppress(FileNotFoundError):
                    self._admin.unlink()

    # ------------------------------------------------------------------ the start

    async def _open(self) -> None:
        await asyncio.to_thread(self._sweep)
        await self._service.open()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do it, and keep systemd from losing patience; whether it was done before somebody asked us to stop."""
        loop = asyncio.get_running_loop()
        doing, stopping = loop.create_task(work), loop.create_task(self._stop.wait())
        try:
            while not (doing.done() or stopping.done()):
                self._notifier.extend(_PROGRESS_SECONDS * 3)
                await asyncio.wait((doing, stopping), timeout=_PROGRESS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                doing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await doing
                return False
            doing.result()
            return True
        finally:
            stopping.cancel()

    def _front_sockets(self, addresses: tuple[str, ...]) -> list[socket.socket]:
        handed = [one.socket for one in activation.listeners()]
        self._service.listening = [_name_of(one) for one in handed] or list(addresses)
        if handed:
            return handed
        made: list[socket.socket] = []
        for address in addresses:
            try:
                made.append(listen(address))
            except (OSError, UnicodeError) as error:
                for one in made:
                    one.close()
                raise _cannot_listen(address, error, f"change front.listen in {self._file}") from error
        return made

    def _admin_socket(self) -> socket.socket:
        try:
            return _private_socket(self._admin)
        except OSError as error:
            raise _cannot_listen(f"unix:{self._admin}", error, "name another socket with --socket") from error

    def _sweep(self) -> None:
        for sentence in sweep(self._settings, lambda: tools(self._settings)):
            _log.info("%s", sentence)

    def _follow(self, config: configuration.Pool) -> None:
        """Limits of connections, as far as the kernel lets us have so many files."""
        wanted = config.front.connections + _SPARE_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._guard.connections = min(config.front.connections, max(100, soft - _SPARE_FILES))
        self._guard.head_seconds = config.front.header_timeout
        if self._guard.connections < config.front.connections:
            _log.warning(
                "only %d connections at once: raise LimitNOFILE= (ulimit -n) to %d", self._guard.connections, wanted
            )

    # ------------------------------------------------------------------ while it runs

    async def _ping(self) -> None:
        every = self._notifier.ping_every
        while every is not None:
            self._notifier.ping()
            await asyncio.sleep(every)

    async def _tell_status(self) -> None:
        told = ""
        while True:
            if (now := self._status()) != told:
                told = now
                self._notifier.status(now)
            await asyncio.sleep(_STATUS_SECONDS)

    def _status(self) -> str:
        models = self._service.owner.models.values()
        phases = [str(one.phase) for model in models for one in model.replicas.values()]
        counts = ", ".join(f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(sorted(phases))) or "no replicas"
        working = sum(one.requests for model in models for one in model.replicas.values())
        waiting = sum(len(model.waiters) for model in models)
        return f"{len(models)} models, {counts}; {working} requests at work, {waiting} waiting"

    def _reload_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload_by_signal())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload_by_signal(self) -> None:
        if self._service.state != "ready":  # to say now that it is would be wrong
            _log.error("the configuration was not reloaded: the service is %s", self._service.state)
            return
        try:
            self._notifier.reloading()
            await self._reload()
            self._notifier.ready(self._status())
        except GpuckptError as error:
            _log.error("the configuration was not reloaded: %s", " — ".join(filter(None, (error.message, error.cause))))
            self._notifier.ready(f"the configuration was not reloaded: {error.message}")
        except Exception:
            _log.exception("the configuration was not reloaded")
            self._notifier.ready("the configuration was not reloaded")

    async def _reload(self) -> Changes:
        async with self._reloading:
            if self._service.state != "ready":
                raise BusyError(f"the service is {self._service.state}")
            config = await asyncio.to_thread(configuration.load, self._file)
            changes = await self._service.reload(config)
            self._follow(config)
            for note in changes.notes:
                _log.warning("%s", note)
            return changes


@contextlib.contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    # Two would take each other's replicas for what an earlier one has left.
    layout.prepare()
    try:
        with locks.exclusive(layout.replica_locks, "pool", "pool"):
            yield
    except BusyError as error:
        raise BusyError(
            "a pool runs already",
            cause=error.cause,
            remedy="gpuckpt pool drain ends it; systemctl stop gpuckpt-pool, where systemd runs it",
        ) from error


def _cannot_listen(address: str, error: OSError | UnicodeError, otherwise: str) -> PreflightError:
    cause = getattr(error, "strerror", None) or str(error)
    remedy = f"end what listens there, or {otherwise}"
    return PreflightError(f"the pool cannot listen at {address}", cause=cause, remedy=remedy)


def _private_socket(path: Path) -> socket.socket:
    # Made closed: between making it and closing it somebody could connect.
    before = os.umask(0o177)
    try:
        return listen(f"unix:{path}")
    finally:
        os.umask(before)


def _name_of(listening: socket.socket) -> str:
    name: Any = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if listening.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
