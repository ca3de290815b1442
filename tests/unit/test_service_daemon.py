"""The daemon around the service: alone, its sockets, signals, limits, readiness, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.config import Paths, Settings, Store
from gpuckpt.errors import BusyError, GpuckptError, NotFoundError, PreflightError, UsageError
from gpuckpt.pool import config as configuration
from gpuckpt.pool.config import Front, Pool
from gpuckpt.service import daemon as module
from gpuckpt.service.client import Client
from gpuckpt.service.daemon import _Daemon
from gpuckpt.service.service import Service
from gpuckpt.store.layout import Layout
from tests.pool_service import hands_for
from tests.pool_world import FakeHands
from tests.service_world import run, until

TEXT = '[front]\nlisten = ["{listen}"]\n\n[models.a]\n'


class Notified:
    """What systemd would be told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ping_every: float | None = 0.01

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name == "extend":  # said while the start goes on, whenever that is
            return lambda seconds: None
        return lambda *words: self.said.append(" ".join((name, *words)))


class Site:
    """A folder for a daemon of a test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "pool.toml"
        self.admin = folder / "run" / "pool.sock"
        self.front = folder / "front.sock"
        self.settings = Settings(
            paths=Paths(state=folder / "state", run=folder / "run"), store=Store(path=folder / "store")
        )
        self.write(TEXT)

    def write(self, text: str) -> None:
        self.file.write_text(text.format(listen=f"unix:{self.front}"))

    def daemon(self) -> _Daemon:
        made = _Daemon(self.settings, self.file, self.admin)
        made._notifier = Notified()  # type: ignore[assignment]
        return made


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "sweep", lambda settings, tools: ["swept"])
    for name in ("LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "state").mkdir(mode=0o700)
    # Short names: a Unix socket's path has room for 107 bytes.
    return Site(Path(os.path.relpath(tmp_path)).absolute())


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> FakeHands:
    made = hands_for(Pool(models={"a": configuration.Model(), "b": configuration.Model()}))

    def service(settings: Settings, config: Pool, **more: Any) -> Service:
        return Service(settings, config, hands=made, **more)

    monkeypatch.setattr(module, "Service", service)
    return made


@contextlib.asynccontextmanager
async def daemon(site: Site) -> AsyncIterator[tuple[_Daemon, Notified]]:
    """A daemon that is ready; at the end it is told to go by a signal, and has gone."""
    made = site.daemon()
    notified: Any = made._notifier
    running = asyncio.ensure_future(made.run())
    try:
        await until(lambda: running.done() or any(word.startswith("ready") for word in notified.said))
        yield made, notified
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(running, 50)
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert not site.admin.exists()


async def ask(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def test_its_life(site: Site, hands: FakeHands) -> None:
    async def work() -> None:
        async with daemon(site) as (made, notified):
            assert notified.said[0] == "ping"
            ready = next(word for word in notified.said if word.startswith("ready"))
            assert ready == "ready 1 models, no replicas; 0 requests at work, 0 waiting"
            assert stat.S_IMODE(site.admin.stat().st_mode) == 0o600
            client = Client(site.admin)
            view = await ask(client.state)
            assert view.state == "ready" and view.listen == [f"unix:{site.front}"]
            await ask(lambda: client.wake("a"))
            await until(lambda: any("1 hot" in word for word in notified.said))
        assert notified.said[-1] != "ready" and "stopping finishing what is at work" in notified.said
        assert hands.closed and "stop a.1" in hands.done and made._service.state == "closed"

    run(work())


def test_a_drain_by_the_admin_api_is_its_end(site: Site, hands: FakeHands) -> None:
    async def work() -> None:
        made = site.daemon()
        running = asyncio.ensure_future(made.run())
        await until(lambda: running.done() or (site.admin.exists() and made._service.state == "ready"))
        await ask(Client(site.admin).drain)
        await asyncio.wait_for(running, 50)
        assert hands.closed

    run(work())


def test_only_one_runs(site: Site, hands: FakeHands) -> None:
    async def work() -> None:
        async with daemon(site):
            with pytest.raises(BusyError, match="a pool runs already") as refused:
                await site.daemon().run()
            assert str(os.getpid()) in (refused.value.cause or "")
            assert (await ask(Client(site.admin).state)).state == "ready"  # the other one's socket is still there
        async with daemon(site):
            pass

    run(work())


def test_what_cannot_be_read_does_not_begin(site: Site) -> None:
    site.file.unlink()
    with pytest.raises(NotFoundError):
        run(site.daemon().run())
    site.write(TEXT + "nonsense = 1\n")
    with pytest.raises(UsageError, match="nonsense"):
        run(site.daemon().run())


def test_an_address_that_is_taken_is_named_with_what_to_do(site: Site, hands: FakeHands) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        site.file.write_text(f'[front]\nlisten = ["unix:{site.front}", "127.0.0.1:{port}"]\n')
        with pytest.raises(PreflightError, match=f"cannot listen at 127.0.0.1:{port}") as refused:
            run(site.daemon().run())
    assert refused.value.cause == "Address already in use" and "front.listen in" in (refused.value.remedy or "")


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "no-such-host.invalid"])
def test_a_host_that_there_is_not_is_named(site: Site, hands: FakeHands, host: str) -> None:
    site.file.write_text(f'[front]\nlisten = ["{host}:1234"]\n')
    with pytest.raises(PreflightError, match="cannot listen at") as refused:
        run(site.daemon().run())
    assert refused.value.cause


def test_an_admin_socket_that_cannot_be_is_named(site: Site, hands: FakeHands) -> None:
    site.admin.parent.mkdir(mode=0o700)
    site.admin.write_text("somebody's")
    with pytest.raises(PreflightError, match=r"cannot listen at unix:.*pool\.sock") as refused:
        run(site.daemon().run())
    assert "--socket" in (refused.value.remedy or "") and site.admin.read_text() == "somebody's"
    assert not hands.opened


def test_what_goes_wrong_at_the_start_ends_it(site: Site, hands: FakeHands) -> None:
    hands.fails["open"] = [GpuckptError("no podman")]
    with pytest.raises(GpuckptError, match="no podman"):
        run(site.daemon().run())
    assert not site.admin.exists()


# ---------------------------------------------------------------------- signals


def test_a_signal_reloads_and_a_wrong_configuration_is_only_logged(
    site: Site, hands: FakeHands, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with daemon(site) as (made, notified):

            async def hangup(*said: str) -> None:
                notified.said = [word for word in notified.said if word == "stopping"]
                os.kill(os.getpid(), signal.SIGHUP)
                await until(lambda: any(word.startswith("ready") for word in notified.said))
                words = [word for word in notified.said if not word.startswith(("ping", "status"))]
                assert len(words) == 2 and words[0] == "reloading" and words[1].startswith(said)

            site.write(TEXT + "[models.b]\n")
            await hangup("ready 2 models")
            site.write(TEXT + "nonsense = 1\n")
            await hangup("ready the configuration was not reloaded: unknown setting")
            hands.fails["adopt"] = [OSError("a fault of ours")]
            site.write(TEXT + "[models.b]\n[models.c]\n")
            hands.models["c"] = hands.models["a"]
            await hangup("ready the configuration was not reloaded")
            await hangup("ready 3 models")
            await until(lambda: not made._reloads)
            assert made._service.state == "ready"

    with caplog.at_level(logging.INFO):
        run(work())
    assert "OSError: a fault of ours" in caplog.text and "nonsense" in caplog.text and "swept" in caplog.text


def test_signals_during_a_reload_wait_for_it_and_the_last_one_counts(site: Site, hands: FakeHands) -> None:
    async def work() -> None:
        async with daemon(site) as (made, _):
            hands.gates["adopt"] = asyncio.Event()
            site.write(TEXT + "[models.b]\n")
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
                await asyncio.sleep(0.01)
            await until(lambda: made._reloads)
            site.write(TEXT)
            asked = asyncio.ensure_future(ask(Client(site.admin).reload))
            await asyncio.sleep(0.02)
            hands.gates["adopt"].set()
            await asked
            await until(lambda: not made._reloads and list(made._service.owner.models) == ["a"])
            assert list(made._service.config.models) == ["a"]

    run(work())


def test_the_end_waits_for_a_reload_and_leaves_nothing_of_it(site: Site, hands: FakeHands) -> None:
    async def work() -> None:
        made = site.daemon()
        running = asyncio.ensure_future(made.run())
        await until(lambda: running.done() or (site.admin.exists() and made._service.state == "ready"))
        hands.gates["adopt"] = asyncio.Event()
        site.write(TEXT + "[models.b]\nmin_standby = 1\n")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: made._reloading.locked() and made._reloads)
        os.kill(os.getpid(), signal.SIGHUP)  # this one comes too late
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.03)
        assert not running.done()
        hands.gates["adopt"].set()
        await asyncio.wait_for(running, 50)
        assert made._service.state == "closed"
        await until(lambda: not made._reloads)

    run(work())


def test_a_signal_before_it_is_ready_does_not_make_it_so(
    site: Site, hands: FakeHands, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        hands.gates["open"] = asyncio.Event()
        made = site.daemon()
        notified: Any = made._notifier
        running = asyncio.ensure_future(made.run())
        await until(lambda: running.done() or site.admin.exists())
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: "the service is starting" in caplog.text)
        assert (await ask(Client(site.admin).state)).state == "starting"
        with pytest.raises(BusyError):
            await ask(Client(site.admin).reload)
        assert not [word for word in notified.said if word.startswith(("ready", "reloading"))]
        hands.gates["open"].set()
        await until(lambda: any(word.startswith("ready") for word in notified.said))
        made._stop.set()
        await asyncio.wait_for(running, 50)

    run(work())


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "wanted", "raised", "connections"),
    [
        ((1024, 524288), 20000, 22000, 20000),
        ((1024, resource.RLIM_INFINITY), 20000, 22000, 20000),
        ((1024, 4096), 20000, 4096, 2096),
        ((1024, 1024), 20000, 1024, 100),
        ((65536, 65536), 20000, None, 20000),
    ],
)
def test_so_many_connections_as_the_kernel_lets_us_have_files(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limits: tuple[int, int],
    wanted: int,
    raised: int | None,
    connections: int,
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: told.append(pair))
    made = site.daemon()
    made._follow(Pool(front=Front(connections=wanted, header_timeout=7.0)))
    assert told == ([] if raised is None else [(raised, limits[1])])
    assert made._guard.connections == connections and made._guard.head_seconds == 7.0
    assert ("raise LimitNOFILE= (ulimit -n) to 22000" in caplog.text) is (connections < wanted)


def test_sockets_are_called_by_their_addresses() -> None:
    for family, address, name in (
        (socket.AF_INET, "127.0.0.1", "127.0.0.1:"),
        (socket.AF_INET6, "::1", "[::1]:"),
    ):
        with socket.socket(family) as made, contextlib.suppress(OSError):
            made.bind((address, 0))
            assert module._name_of(made).startswith(name)


def test_locks_are_where_all_pools_of_a_state_look(site: Site) -> None:
    layout = Layout.of(site.settings)
    with module._alone(layout), pytest.raises(BusyError), module._alone(layout):
        pass
    with module._alone(layout):
        pass
