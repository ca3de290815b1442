"""Requests made up from the server's own description of itself: it never fails, and answers as it says it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import booleans
from schemathesis import GenerationMode, checks

from tests.guest_api.conftest import Guest, serving

# What a client must be able to count on. That every made-up request is met or refused is not part of it: most name
# sessions, vectors and layers that are not there.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
EXAMPLES = 12
FUZZED = "fuzzed"


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A server whose sessions have room for few tokens: a made-up request may ask for two billion."""
    log = tmp_path_factory.mktemp("fuzz") / "server.log"
    with serving(model, log, "--max-model-len", "64", "--max-sessions", "400") as started:
        yield started


@pytest.fixture(scope="module")
def described(small: Guest) -> Any:
    """The server's OpenAPI document."""
    return schemathesis.openapi.from_url(f"{small.base}/openapi.json")


def ask(operation: Any, mode: GenerationMode, guest: Guest) -> int:
    """Send made-up requests for one operation; returns how many."""
    # A stream of events ends with its session: nothing to wait for.
    endless = operation.path.endswith("/events")
    sent = 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), present=booleans())
    def requests(case: Any, present: bool) -> None:
        nonlocal sent
        sent += 1
        guest.clear()
        guest.paused(FUZZED, 2, tokens=4)
        # Half of the requests are for a session that is there, stopped.
        if present and not endless and "id" in case.path_parameters:
            case.path_parameters["id"] = FUZZED
        case.call_and_validate(checks=CHECKS, timeout=120)
        assert guest.ok("GET", "/health")["ok"] is True

    requests()
    return sent


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as described", "otherwise"])
def test_made_up_requests(described: Any, small: Guest, mode: GenerationMode, subtests: pytest.Subtests) -> None:
    sent = 0
    for found in described.get_all_operations():
        operation = found.ok()
        with subtests.test(operation.label):
            try:
                sent += ask(operation, mode, small)
            except Unsatisfiable:
                # Without parameters and body there is no request that is not as described.
                assert mode is GenerationMode.NEGATIVE
    assert sent > 20 * EXAMPLES / 2
