"""The real thing: vLLM on the CPU with a small model, frozen, killed, restored, the same tokens and logprobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.integration.conftest import Bench


@pytest.mark.vllm
def test_vllm_comes_back_with_the_same_answer(bench: Bench, tiny_model: Path) -> None:
    name = bench.name()
    # The settings of an environment file, read as it is.
    (bench.folder / ".env").write_text(f"MODEL_ID={tiny_model}   # the model\nCONT_NAME={name}\n")
    created = bench.ok(
        "create", "--env", "VLLM_CPU_KVCACHE_SPACE=1", "--format", "json", "--", "--max-model-len", "512"
    ).json
    assert created["name"] == name
    assert bench.left() == []
    shown = bench.ok("inspect", name, "--format", "json").json
    assert shown["workload"] == shown["workload"] | {"kind": "vllm", "model": str(tiny_model), "served_name": name}
    assert len(shown["canary"]["tokens"]) == len(shown["canary"]["logprobs"]) == 8
    assert len(shown["processes"]) >= 3  # server, engine, worker
    assert not any("io_uring" in line for line in shown["sockets"])

    for _ in range(2):
        restored = bench.ok("restore", name, "--format", "json").json
        assert restored["canary_match"] is True
        assert restored["ttft_s"] < created["cold_ttft_s"] / 4
        # The server still takes other requests, and the same one gives the same tokens.
        body = {"model": name, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "stream": True, "logprobs": 1}
        texts = [
            "".join(
                event["choices"][0]["text"] for _, event in bench.endpoint(name).stream("POST", "/v1/completions", body)
            )
            for _ in range(2)
        ]
        assert texts[0] == texts[1] != ""
        bench.ok("stop", name)

    # Clones begin with one random state, and each draws its own numbers; a seed is a seed everywhere.
    clones = [bench.name("a"), bench.name("b")]
    document = bench.ok("restore", name, "--as", clones[0], "--as", clones[1], "--format", "json").json
    assert [one["canary_match"] for one in document["replicas"]] == [True, True]
    unseeded = [_drawn(bench, clone, name) for clone in clones for _ in range(2)]
    assert len(set(unseeded)) == 4
    seeded = [_drawn(bench, clone, name, seed=7) for clone in clones]
    assert seeded[0] == seeded[1] not in unseeded
    bench.ok("stop", *clones)

    # A canary that was recorded otherwise is noticed, and the replica is not left running.
    _falsify(bench, name)
    failed = bench.run("restore", name)
    assert failed.code == 8
    assert "answers the canary differently" in failed.err
    assert bench.left() == []
    assert "ready" in bench.ok("restore", name, "--no-canary").out
    bench.ok("stop", name)


def _drawn(bench: Bench, replica: str, model: str, **more: Any) -> tuple[str, ...]:
    """Sixteen tokens drawn at temperature 1, as their ids."""
    body = {"model": model, "prompt": "The quick brown fox", "max_tokens": 16, "temperature": 1, "ignore_eos": True,
            "logprobs": 1, "return_tokens_as_token_ids": True}  # fmt: skip
    answer = bench.endpoint(replica).request("POST", "/v1/completions", json.dumps(body | more), timeout=60)
    assert answer.status == 200, answer.body
    tokens: list[str] = json.loads(answer.body)["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 16
    return tuple(tokens)


def _falsify(bench: Bench, name: str) -> None:
    from gpuckpt import manifest as manifests
    from gpuckpt.store import seal

    folder = bench.store / "goldens" / name
    golden = manifests.read(folder)
    assert golden.canary is not None
    logprobs = (golden.canary.logprobs[0] + 1e-6, *golden.canary.logprobs[1:])
    changed = replace(golden.canary, logprobs=logprobs)
    replace(golden, canary=changed).write(folder)
    seal.write(folder)
