"""What all tests share: which of them can run on this machine, and what a skip means.

A test that needs root, podman or a server environment is skipped with the reason where that is missing, so that the
rest is useful on a laptop. With CI=true nothing that is marked is skipped: the machine was set up for it, so what is
missing is a failure.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent
PREFIX = Path(os.environ.get("PREFIX") or os.environ.get("GPUCKPT_PREFIX") or "/opt/gpuckpt")
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
NEVER_SKIPPED_IN_CI = ("browser", "integration", "stubs", "vllm")
INTEGRATION_TIMEOUT = 600  # seconds; a cold start of a server is a minute, a loaded machine doubles it

# A shell without job control has what it runs in the background ignore interrupts, and so would all that is started
# here and has to notice them: what is ignored stays so across an exec, what is handled does not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow at times: how long an example takes says nothing about the code.
settings.register_profile("gpuckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("gpuckpt")


def missing(item: pytest.Item) -> str | None:
    """What the machine lacks for ``item``, with what to do about it; None if nothing."""
    if item.get_closest_marker("integration"):
        if os.geteuid() != 0:
            return "needs root (sudo make test)"
        if shutil.which("podman") is None:
            return "podman is not installed (make setup)"
        if not (PREFIX / "bin" / "criu").exists():
            return f"no CRIU in {PREFIX} (make setup)"
    if item.get_closest_marker("stubs"):
        from gpuckpt.cuda.choice import bindings_installed  # not in the server's environment

        if shutil.which("cc") is None:
            return "no C compiler is installed (make setup-tests)"
        if not bindings_installed():
            return "gpuckpt's GPU packages are not installed (make setup-tests)"
    if item.get_closest_marker("vllm") and not (PREFIX / "server" / "bin" / "python").exists():
        return f"no server environment in {PREFIX} (make setup-server)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by folder, so that a forgotten marker does not let a test escape the rules of this file."""
    for item in items:
        if (TESTS / "integration") in item.path.parents:
            item.add_marker(pytest.mark.integration)
        if item.get_closest_marker("integration") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(INTEGRATION_TIMEOUT))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, of no use but small."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    script = TESTS.parent / "scripts" / "make_model.py"
    subprocess.run([PREFIX / "server" / "bin" / "python", script, "--shape", "tiny", folder], check=True)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What has outlived other modules' tests, thousands of imported modules with them, stays; whoever collects garbage
    need not search it. To find what was not closed, every test of the service collects, which took 0.15 s each."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = missing(item)
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skip of a marked test, whoever decided it, is a failure. Expected failures stay what they are."""
    report = yield
    marked = any(item.get_closest_marker(name) for name in NEVER_SKIPPED_IN_CI)
    if IN_CI and marked and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {_reason(report.longrepr)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module of tests/integration that skips itself as a whole."""
    report = yield
    if IN_CI and report.skipped and (TESTS / "integration") in collector.path.parents:
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    """pytest keeps a skip as (file, line, reason)."""
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
