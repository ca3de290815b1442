"""Pages in a real browser (the distribution's Chromium, driven by Playwright), the guest's against a real server."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests import pool_views
from tests.browser.dashboard import Open, serving
from tests.fake_dashboard import FakePool

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Path(os.environ.get("GPUCKPT_PREFIX", "/opt/gpuckpt"))
START_S = 120  # importing torch on a loaded machine, a model of a few megabytes
NAMES = ("chromium", "chromium-browser", "google-chrome")

expect.set_options(timeout=60_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a browser and the server environment."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.timeout(400))  # several of the waits for what does not come


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A guest with a model of four layers; its address."""
    python = PREFIX / "server" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no server environment in {PREFIX} (make setup-server)")
    folder = tmp_path_factory.mktemp("guest")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "hooks"), "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    script = ROOT / "scripts" / "make_model.py"
    subprocess.run([python, script, "--shape", "tiny", folder / "tiny"], check=True, env=env, timeout=START_S)
    # Bound as long as it runs, so that nobody else is given it; who listens there says SO_REUSEADDR, as asyncio does.
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    argv: list[str | Path] = [python, "-m", "gpuckpt_guest", "serve", "--model", folder / "tiny", "--port", str(port)]
    # In 32-bit floats what shares a batch does not change greedy tokens here.
    argv += ["--dtype", "float32", "--threads", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(60)
        held.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed (make setup-tests)")
    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, and a container's /dev/shm is small.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        started = playwright.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()


@pytest.fixture
def page(server: str, browser: Browser) -> Iterator[Page]:
    """The page, connected; no script of it may fail, and nothing may be asked of another address."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    failures: list[str] = []
    opened.on("pageerror", lambda error: failures.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url.startswith((server, "blob:")) else failures.append(request.url)
    )
    opened.goto(server)
    expect(opened.locator("#link .dot.live")).to_be_visible()
    yield opened
    context.close()
    assert failures == []


@pytest.fixture
def pool() -> Iterator[FakePool]:
    """A lively one."""
    with serving(pool_views.lively(time.time())) as made:
        yield made


@pytest.fixture
def look(browser: Browser) -> Iterator[Open]:
    """Opens the dashboard of a pool: no script may fail, nothing may be refused by the page's own policy, nothing asked
    of another address. ``troubled``: the test lets answers fail, and the browser may write that to its console."""
    contexts, failures = [], []

    def opened(pool: FakePool, *, width: int = 1280, troubled: bool = False, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda said: failures.append(said.text) if fails(said.type, said.text) else None)
        page.on("request", lambda asked: None if asked.url.startswith(pool.address) else failures.append(asked.url))

        def fails(kind: str, text: str) -> bool:
            return kind in ("error", "warning") and not (troubled and text.startswith("Failed to load resource"))

        page.goto(f"{pool.address}/dashboard")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert failures == []
