"""What the pool's demo and benchmarks serve, and the configuration that says so: all that a user writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness, models
from benchmarks.driver import VLLM_ENVIRONMENT
from benchmarks.workspace import Workspace

BIGRAMS = harness.ROOT / "benchmarks" / "servers" / "bigrams.py"
PROMPT = "def main("
DEADLINE = "15min"  # a cold start on a busy machine of two cores takes minutes


@dataclass(frozen=True)
class Served:
    """One model of the configuration: its name there, how its golden is made, its rules."""

    name: str
    golden: str
    create: tuple[str, ...]
    about: str
    rules: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def table(self, rules: Mapping[str, Any]) -> str:
        """Its table in the configuration; ``rules`` go before its own."""
        words = {"golden": self.golden, "create": list(self.create)} | dict(self.rules) | dict(rules)
        return "\n".join([f"[models.{self.name}]", *(f"{key} = {_toml(value)}" for key, value in words.items())])


def vllm(space: Workspace, name: str, shape: models.Shape, prefix: Path, length: int, **rules: Any) -> Served:
    """vLLM with a model of random weights."""
    folder = prefix / "models" / shape.folder
    options = [word for pair in VLLM_ENVIRONMENT for word in ("--env", pair)]
    words = (*options, "--", "--model", str(folder), "--served-model-name", name, "--max-model-len", str(length))
    return Served(name, f"{space.word}-{name}", words, f"vLLM, {shape.about}", rules, folder)


def bigrams(space: Workspace, name: str = "bigrams", pause: float = 0.0, **rules: Any) -> Served:
    """A small HTTP server that is not vLLM; each of its words takes ``pause`` seconds."""
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": 8})
    request = f"POST /v1/completions {body}"
    folder = str(BIGRAMS.parent)
    words = ("--volume", f"{folder}:{folder}", "--canary", request, "--")
    server = ("/usr/bin/python3", str(BIGRAMS), "{socket}", "--name", name, "--pause", str(pause))
    return Served(name, f"{space.word}-{name}", (*words, *server), "a bigram model of a text, plain HTTP", rules)


def config(
    served: Sequence[Served], rules: Mapping[str, Any] | None = None, front: Mapping[str, Any] | None = None
) -> str:
    """The whole file; ``rules`` go before each model's own, ``front`` is added to its table."""
    keys = {"deadline": DEADLINE} | dict(front or {})
    head = ["[front]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
    return "\n\n".join(["\n".join(head), *(one.table(rules or {}) for one in served)]) + "\n"


def _toml(value: Any) -> str:
    """Words, numbers, switches and lists of words are written in TOML as in JSON."""
    return json.dumps(value, ensure_ascii=False)
