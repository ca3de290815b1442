"""What the orders to vLLM count on, asked of the engine that is installed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gpuckpt.workload.vllm import _ENVIRONMENT
from tests.conftest import PREFIX

HERE = Path(__file__).resolve().parent
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1"}


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_requests_wait_for_caches_that_come_back_empty(tiny_model: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1] / "hooks")])
    done = subprocess.run(
        [PREFIX / "server" / "bin" / "python", HERE / "vllm_engine.py", tiny_model, tmp_path / "found"],
        env={**os.environ, **_ENVIRONMENT, **SMALL, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "found").read_text())
    answer = found["first"]["tokens"]
    assert len(answer) == 100 and found["again"]["tokens"] == answer
    assert found["first"]["cached"] == 0 < found["again"]["cached"]
    # What ran has ended, whole; what came meanwhile was neither refused nor answered.
    assert found["slept"] == {"released": 7} and found["asleep"] == {"asleep": True}
    assert found["running"]["tokens"] == found["other"]["tokens"]
    assert found["waited"] is True
    assert found["woken"] == {"bytes": 0, "phases": {"map": 0.0, "stream": 0.0, "kv": 0.5}}
    assert found["awake"] == {"asleep": False}
    assert found["waiting"] == {"tokens": answer, "cached": 0}  # of what was cached, nothing is left
    assert found["after"]["tokens"] == answer and found["after"]["cached"] > 0
