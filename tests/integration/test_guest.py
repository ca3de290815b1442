"""Reseeding under a real torch, and in a real vLLM on the CPU: no container, the identity is a file of the test's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.workload import Vllm
from gpuckpt.workload.endpoint import Endpoint
from tests.integration.conftest import HERE, PREFIX

PYTHON = PREFIX / "server" / "bin" / "python"
HOOKS = HERE.parents[1] / "hooks"
SEEDS = {"A": "a" * 64, "B": "b" * 64}

pytestmark = pytest.mark.vllm


def become(path: Path, replica: str) -> None:
    new = path.with_name("new")
    new.write_text(json.dumps({"replica": replica, "golden": "g", "seed": SEEDS[replica]}))
    new.rename(path)


def test_streams_of_torch_numpy_and_python(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    code = f"""
import json, os, random, sys
import numpy.random, torch
from gpuckpt_guest import lifecycle
before = torch.get_rng_state()
assert not lifecycle.check() and torch.equal(before, torch.get_rng_state())
for seed in {list(SEEDS.values())} * 2:
    with open("new", "w") as file:
        json.dump(dict(replica="r", golden="g", seed=seed), file)
    os.rename("new", {str(path)!r})
    assert lifecycle.check()
    state = torch.get_rng_state()
    assert not lifecycle.check() and torch.equal(state, torch.get_rng_state())
    print([random.random(), numpy.random.random(), torch.rand(1).item()])
"""
    done = subprocess.run(
        [PYTHON, "-c", code],
        env={"PYTHONPATH": str(HOOKS), "GPUCKPT_IDENTITY": str(path), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, other, again, other_again = map(json.loads, done.stdout.splitlines())
    assert first == again and other == other_again
    assert all(one != two for one, two in zip(first, other, strict=True))


@contextmanager
def served(folder: Path, model: Path, *arguments: str, env: dict[str, str]) -> Iterator[tuple[Endpoint, Path]]:
    """vLLM as gpuckpt starts it, but with its socket, and the identity, in ``folder``; and its log."""
    adapter = Vllm.from_arguments(["--model", str(model), *arguments], model=None, name="tiny")
    line = adapter.launch(arguments, port=None, python=PYTHON)
    endpoint, log = Endpoint(socket=folder / "server.sock"), folder / "log"
    argv = [*line.argv]
    argv[argv.index("--uds") + 1] = str(endpoint.socket)
    with log.open("w") as output:
        server = subprocess.Popen(
            argv,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(folder),
                **line.env,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **env,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 500
        while not adapter.healthy(endpoint):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield endpoint, log
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def ask(endpoint: Endpoint, **more: Any) -> list[str]:
    body = {
        "model": "tiny",
        "prompt": "The quick brown fox",
        "max_tokens": 24,
        "temperature": 1,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }
    answer = endpoint.request("POST", "/v1/completions", json.dumps(body | more))
    assert answer.status == 200, answer.body
    tokens: list[str] = json.loads(answer.body)["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 24
    return tokens


WITNESS = """
import os
from gpuckpt_guest import lifecycle

def register():
    lifecycle.on_restore(testify)

def testify(identity):
    with open(os.environ["WITNESS"], "a") as file:
        file.write(f"{os.getpid()} {identity.replica}\\n")
"""


def a_plugin_of_the_users(folder: Path) -> dict[str, str]:
    """Another plugin, which writes down in which process it is told of a restore; the environment for it."""
    (folder / "witness.dist-info").mkdir(parents=True)
    (folder / "witness.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 1\n")
    (folder / "witness.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nwitness = witness:register\n"
    )
    (folder / "witness.py").write_text(WITNESS)
    return {"PYTHONPATH": f"{HOOKS}:{folder}", "VLLM_PLUGINS": "witness,gpuckpt", "WITNESS": str(folder / "log")}


@pytest.mark.timeout(900)
def test_a_server_draws_as_the_replica_that_it_is(tmp_path: Path, tiny_model: Path) -> None:
    identity = tmp_path / "identity"
    env = {"GPUCKPT_IDENTITY": str(identity)} | a_plugin_of_the_users(tmp_path / "plugin")
    with served(tmp_path, tiny_model, "--max-model-len", "512", env=env) as (endpoint, log):
        # What a golden has answered already; twice, so that all answers below come from a warm prefix cache.
        golden = [ask(endpoint) for _ in range(2)]
        seeded = ask(endpoint, seed=7)
        greedy = ask(endpoint, temperature=0)
        first, second = [], []
        for replica in ("A", "B", "A"):
            become(identity, replica)
            first.append(ask(endpoint))
            second.append(ask(endpoint))
            assert ask(endpoint, seed=7) == seeded
            assert ask(endpoint, temperature=0) == greedy
        text = log.read_text()
    assert first[0] == first[2] and second[0] == second[2], "the same seed is the same state"
    answers = [tuple(tokens) for tokens in (*golden, *first[:2], *second[:2])]
    assert len(set(answers)) == 6, "no two of different states, or one after the other, are alike"
    assert "this vLLM has no" not in text and "is no identity" not in text
    noticed: dict[str, str] = {}
    for pid, replica in map(str.split, Path(env["WITNESS"]).read_text().splitlines()):
        noticed[pid] = noticed.get(pid, "") + replica
    assert len(noticed) >= 2 and set(noticed.values()) == {"ABA"}, "server and engine, each once per replica"
