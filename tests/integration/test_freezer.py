"""The kernel's freezer, on a real container."""

from __future__ import annotations

import pytest

from gpuckpt.containers import freezer
from gpuckpt.containers.podman import Container
from gpuckpt.errors import NotFoundError, PreflightError
from tests.integration.conftest import Bench


def container(bench: Bench, replica: str) -> Container:
    from gpuckpt.config_load import load
    from gpuckpt.golden.tools import tools

    environ = {name: value for name, value in bench.env.items() if name.startswith("GPUCKPT_")}
    settings = load(None, environ=environ, env_file=None, flags={}).settings
    return tools(settings).containers.inspect(f"gpuckpt-{replica}")


def test_what_is_frozen_stands_still_and_goes_on_where_it_was(bench: Bench) -> None:
    name = bench.name()
    bench.create(name)
    bench.ok("restore", name)
    held = container(bench, name)
    before = bench.get(name, "/digest")
    assert not freezer.frozen(held.pid, held.id)
    freezer.freeze(held.pid, held.id)
    assert freezer.frozen(held.pid, held.id)
    # The kernel still takes the connection; nobody answers.
    with pytest.raises(Exception, match=r"timed out|silent|answer"):
        bench.endpoint(name).request("GET", "/digest", timeout=0.5)
    freezer.thaw(held.pid, held.id)
    assert bench.get(name, "/digest") == before
    # One that is frozen can be stopped, and nobody waits for processes that cannot die.
    freezer.freeze(held.pid, held.id)
    bench.ok("stop", name)  # within the minutes that any command has: else it would be for ever
    assert bench.left() == []
    with pytest.raises(NotFoundError):
        freezer.freeze(held.pid, held.id)


def test_a_group_that_others_are_in_is_never_frozen() -> None:
    with pytest.raises(PreflightError):
        freezer.freeze(1, "0123456789abcdef")
