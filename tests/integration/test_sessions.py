"""Sessions that have stopped between two layers, frozen with their server, and resumed in two clones: bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.sessions import Client
from gpuckpt.workload import Guest
from gpuckpt.workload.endpoint import Endpoint
from tests.integration.conftest import PREFIX, Bench

PYTHON = PREFIX / "server" / "bin" / "python"
pytestmark = pytest.mark.vllm  # needs the server environment

_GENERATE = {"prompt": "def main(arguments):", "max_tokens": 12, "logprobs": 3, "logits": True}
# One has stopped while it read its prompt, one at a token that it wrote, one draws its tokens at random.
_SESSIONS: dict[str, dict[str, Any]] = {
    "prompt": {"breakpoints": [{"layer": 2, "phase": "prefill", "once": True}]},
    "token": {"breakpoints": [{"layer": 3, "step": 4, "once": True}]},
    "drawn": {"breakpoints": [{"layer": 1, "step": 2, "once": True}], "temperature": 1.0, "seed": 5},
}


def requests() -> list[tuple[str, str, str]]:
    made = []
    for name, more in _SESSIONS.items():
        made.append(("POST", "/v1/sessions", json.dumps({"id": name})))
        made.append(("POST", f"/v1/sessions/{name}/generate", json.dumps(_GENERATE | more)))
    return made


def ask(endpoint: Endpoint, method: str, path: str, body: Any = None) -> Any:
    answer = endpoint.request(method, path, "" if body is None else json.dumps(body), timeout=60)
    assert 200 <= answer.status < 300, answer.body
    return json.loads(answer.body)


@contextmanager
def never_dumped(folder: Path, model: Path) -> Iterator[Endpoint]:
    line = Guest.from_arguments(["--model", str(model)], model=None, name="tiny").launch((), port=None, python=PYTHON)
    argv = [*line.argv]
    endpoint = Endpoint(socket=folder / "plain.sock")
    argv[argv.index("--uds") + 1] = str(endpoint.socket)
    hooks = Path(__file__).parents[2] / "hooks"
    environment = {"PATH": os.environ["PATH"], **line.env, "PYTHONPATH": str(hooks)}
    server = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    try:
        adapter = Guest.from_arguments(["--model", str(model)], model=None, name="tiny")
        while not adapter.healthy(endpoint):
            assert server.poll() is None
            time.sleep(0.2)
        yield endpoint
    finally:
        server.terminate()
        server.wait(30)


def resumed(endpoint: Endpoint) -> dict[str, Any]:
    found = {}
    for name in _SESSIONS:
        shown = ask(endpoint, "GET", f"/v1/sessions/{name}")
        assert shown["state"] == "paused" and shown["pause"]["layers"] == 4
        done = ask(endpoint, "POST", f"/v1/sessions/{name}/resume", {"wait": "end"})
        assert done["state"] == "done" and len(done["tokens"]) == 12 and len(done["logits"]) > 1000
        found[name] = {key: done[key] for key in ("tokens", "logprobs", "logits", "text")}
    return found


@pytest.mark.timeout(300)
def test_stopped_sessions_go_on_in_two_clones(bench: Bench, lively_model: Path) -> None:
    name = bench.name()
    options = [word for request in requests() for word in ("--warmup-request", " ".join(request))]
    created = bench.ok(
        "create", name, "--workload", "guest", *options, "--format", "json", "--", "--model", str(lively_model)
    ).json
    assert created["name"] == name
    shown = bench.ok("inspect", name, "--format", "json").json
    assert shown["workload"]["kind"] == "guest" and len(shown["canary"]["tokens"]) == 8

    with never_dumped(bench.folder, lively_model) as endpoint:
        for method, path, body in requests():
            ask(endpoint, method, path, json.loads(body))
        expected = resumed(endpoint)

    clones = [bench.name("a"), bench.name("b")]
    document = bench.ok("restore", name, "--as", clones[0], "--as", clones[1], "--format", "json").json
    assert [one["canary_match"] for one in document["replicas"]] == [True, True]
    one, other = (bench.endpoint(clone) for clone in clones)

    # A stopped session moves from one clone to the other, and goes on there as it would have here.
    moved = Client(other).import_(Client(one).export("token"), "moved")
    assert moved.id == "moved" and moved.state == "paused"
    assert resumed(one) == expected
    assert resumed(other) == expected
    done = ask(other, "POST", "/v1/sessions/moved/resume", {})
    assert {key: done[key] for key in expected["token"]} == expected["token"]

    # And both still talk: the second turn reads only what is new.
    for endpoint in (one, other):
        turn = ask(endpoint, "POST", "/v1/sessions/token/generate", {"prompt": " return", "max_tokens": 4})
        assert turn["prompt_tokens"] < 6 and len(turn["tokens"]) == 4
    bench.ok("stop", *clones)
