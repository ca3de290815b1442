"""Start a server in its container and wait until it answers; say with its own last words why it does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpuckpt.containers.api import PodmanError
from gpuckpt.errors import DaemonUnreachableError, DeadlineError, GpuckptError
from gpuckpt.golden import failures
from gpuckpt.golden.replica import Replica, alive
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Address
from gpuckpt.workload.base import Adapter

_POLL = 0.05  # seconds between health checks of a starting server


@contextmanager
def container_trouble(replica: Replica, *, kind: type[GpuckptError], address: Address | None = None) -> Iterator[None]:
    """Turn what podman refuses while a container is made or started into an error of ``kind`` with its reason."""
    try:
        yield
    except PodmanError as error:
        remedy = "correct the command after `--`, its mounts, or the published port, and try again"
        if address is not None:
            remedy = "free the port, or restore with --publish PORT"
            if address.ip:
                remedy += f"; free the address {address.ip}, or restore with --ignore-static-ip --ignore-static-mac"
        raise kind(f"the container of {replica.name} could not be started", cause=error.cause, remedy=remedy) from error


def wait_healthy(adapter: Adapter, tools: Tools, replica: Replica, *, timeout: float, kind: type[GpuckptError]) -> None:
    """Wait until the server answers its health check; an error of ``kind`` with its last words if it dies.

    Raises DeadlineError, with the server's last words, after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    next_look = 0.0
    while not adapter.healthy(replica.endpoint):
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 0.5
            if not alive(tools, replica):
                raise failures.server_failure(tools, replica, f"the server of {replica.name} ended", kind=kind)
        if now > deadline:
            failure = failures.server_failure(
                tools, replica, f"the server of {replica.name} was not healthy within {timeout:g} s", kind=DeadlineError
            )
            failure.cause, failure.remedy = _last_answer(adapter, replica)
            raise failure
        time.sleep(_POLL)


def _last_answer(adapter: Adapter, replica: Replica) -> tuple[str, str]:
    """What the health check gets of a server that is not healthy, and what to do about it."""
    path = adapter.record.health_path
    try:
        status = replica.endpoint.request("GET", path, timeout=2).status
    except DaemonUnreachableError as error:
        return (
            f"nothing answers on {replica.endpoint} ({error.cause})",
            "have the server listen where it is told ({socket}, or {port} with --publish), or raise --start-timeout",
        )
    return f"GET {path} answers {status}", "name the path that answers 2xx by --health-path, or raise --start-timeout"
