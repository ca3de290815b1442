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
    answer = endpoint.request(method, path, "" if body is None else json.dumps(body), timeout=120)
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
        server.wait(60)


def resumed(endpoint: Endpoint) -> dict[str, Any]:
    found = {}
    for name in _SESSIONS:
        shown = ask(endpoint, "GET", f"/v1/sessions/{name}")
        assert shown["state"] == "paused" and shown["pause"]["layers"] == 4
        done = ask(endpoint, "POST", f"/v1/sessions/{name}/resume", {"wait": "end"})
        assert done["state"] == "done" and len(done["tokens"]) == 12 and len(done["logits"]) > 1000
        found[name] = {key: done[key] for key in ("tokens", "logprobs", "logits", "text")}
    return found


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


_MANY = [f"s{number}" for number in range(10)]
# A block of this model is 1 MiB: less room on the device and in host memory than there are sessions.
_SMALL = ("--kv-mib", "4", "--kv-host-mib", "3", "--kv-disk-mib", "64", "--kv-dir", "/var/tmp/gpuckpt-kv")


def written(endpoint: Endpoint, name: str) -> dict[str, Any]:
    """What a session writes on, in a second turn."""
    body = {"prompt": f" {name} and", "max_tokens": 8, "logprobs": 3}
    return {key: value for key, value in ask(endpoint, "POST", f"/v1/sessions/{name}/generate", body).items()
            if key in ("tokens", "logprobs", "text")}  # fmt: skip


def test_sessions_that_are_paged_out_are_a_part_of_the_golden(bench: Bench, lively_model: Path) -> None:
    """Most lie in host memory or in files when the server is frozen; one of them is to outlive it."""
    name = bench.name()
    made = []
    for session in _MANY:
        made.append(("POST", "/v1/sessions", json.dumps({"id": session})))
        made.append(
            ("POST", f"/v1/sessions/{session}/generate", json.dumps({"prompt": f"def {session}(", "max_tokens": 6}))
        )
    durable = ("POST", "/v1/sessions/s3/suspend", json.dumps({"durable": True}))
    options = [word for request in (*made, durable) for word in ("--warmup-request", " ".join(request))]
    bench.ok("create", name, "--workload", "guest", *options, "--", "--model", str(lively_model), *_SMALL)

    with never_dumped(bench.folder, lively_model) as endpoint:
        for method, path, body in made:
            ask(endpoint, method, path, json.loads(body))
        expected = {session: written(endpoint, session) for session in _MANY}

    clones = [bench.name("a"), bench.name("b")]
    bench.ok("restore", name, "--as", clones[0], "--as", clones[1])
    for endpoint in (bench.endpoint(clone) for clone in clones):
        places = {one["id"]: one["memory"] for one in ask(endpoint, "GET", "/v1/sessions")["sessions"]}
        assert len({place["state"] for place in places.values()}) > 1 and places["s3"]["durable"]
        assert ask(endpoint, "GET", "/v1/engine")["memory"]["disk"]["used"] > 0
        # Exported from where it lies, without coming back.
        before = ask(endpoint, "GET", "/v1/engine")["memory"]["in"]["bytes"]
        Client(endpoint).export("s3")
        assert ask(endpoint, "GET", "/v1/engine")["memory"]["in"]["bytes"] == before
        ask(endpoint, "POST", "/v1/sessions/s3/resume", {})
        assert {session: written(endpoint, session) for session in reversed(_MANY)} == expected
        ask(endpoint, "DELETE", "/v1/sessions/s3")  # its files are this clone's own
    bench.ok("stop", *clones)


@pytest.mark.parametrize(("folder", "workdir"), [("/kept/sessions", None), ("sessions", "/kept")])
def test_durable_sessions_outlive_their_replica_on_a_volume(
    bench: Bench, lively_model: Path, folder: str, workdir: str | None
) -> None:
    shared = bench.folder / "shared"
    shared.mkdir()
    name, one, other = bench.name(), bench.name("a"), bench.name("b")
    requests = [
        ("POST", "/v1/sessions", json.dumps({"id": "s0"})),
        ("POST", "/v1/sessions/s0/generate", json.dumps({"prompt": "def s0(", "max_tokens": 6})),
        ("POST", "/v1/sessions/s0/suspend", json.dumps({"durable": True})),
    ]
    options = [word for request in requests for word in ("--warmup-request", " ".join(request))]
    bench.ok(
        "create", name, "--workload", "guest", "--volume", f"{shared}:/kept:rw", *options,
        *(("--workdir", workdir) if workdir else ()), "--", "--model", str(lively_model), "--kv-dir", folder,
    )  # fmt: skip
    bench.ok("restore", name, "--as", one)
    endpoint = bench.endpoint(one)
    ask(endpoint, "POST", "/v1/sessions/s0/resume", {})
    first = written(endpoint, "s0")
    ask(endpoint, "POST", "/v1/sessions/s0/suspend", {"durable": True})
    ask(endpoint, "POST", "/v1/sessions", {"id": "s1"})
    ask(endpoint, "POST", "/v1/sessions/s1/generate", {"prompt": "def s1(", "max_tokens": 6})
    ask(endpoint, "POST", "/v1/sessions/s1/suspend", {"durable": True})

    # One at a time, and who comes second hears it at once.
    refused = bench.run("restore", name, "--as", other)
    assert refused.code == 7 and "belongs to another server that runs" in refused.err
    refused = bench.run("restore", name, "--as", one + "x", "--as", other)
    assert refused.code == 2 and "only one replica" in refused.err

    bench.ok("stop", one)
    bench.ok("restore", name, "--as", other)
    endpoint = bench.endpoint(other)
    found = {session["id"]: session for session in ask(endpoint, "GET", "/v1/sessions")["sessions"]}
    assert set(found) == {"s0", "s1"} and all(one["memory"]["durable"] for one in found.values())
    for session in found:
        ask(endpoint, "POST", f"/v1/sessions/{session}/resume", {})
    with never_dumped(bench.folder, lively_model) as plain:
        for session in found:
            ask(plain, "POST", "/v1/sessions", {"id": session})
            ask(plain, "POST", f"/v1/sessions/{session}/generate", {"prompt": f"def {session}(", "max_tokens": 6})
        assert written(plain, "s0") == first
        assert written(plain, "s0") == written(endpoint, "s0")
        assert written(plain, "s1") == written(endpoint, "s1")
    bench.ok("stop", other)


def test_a_read_only_volume_cannot_keep_sessions(bench: Bench, lively_model: Path) -> None:
    shared = bench.folder / "shared"
    shared.mkdir()
    done = bench.run(
        "create", bench.name(), "--workload", "guest", "--volume", f"{shared}:/kept",
        "--", "--model", str(lively_model), "--kv-dir", "/kept",
    )  # fmt: skip
    assert done.code == 2 and "/kept is mounted read-only" in done.err
