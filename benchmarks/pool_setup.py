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
        return "\n".join([f"[models.{_toml(self.name)}]", *assignments(words)])


def vllm(space: Workspace, name: str, shape: models.Shape, prefix: Path, length: int, **rules: Any) -> Served:
    """vLLM with a model of random weights."""
    folder = prefix / "models" / shape.folder
    options = [word for pair in VLLM_ENVIRONMENT for word in ("--env", pair)]
    words = (*options, "--", "--model", str(folder), "--served-model-name", name, "--max-model-len", str(length))
    return Served(name, f"{space.word}-{name}", words, f"vLLM, {shape.about}", rules, folder)


def guest(space: Workspace, name: str, shape: models.Shape, prefix: Path, **rules: Any) -> Served:
    """The guest server with a model of random weights."""
    folder = prefix / "models" / shape.folder
    words = ("--workload", "guest", "--", "--model", str(folder), "--served-model-name", name)
    return Served(name, f"{space.word}-{name}", words, f"the guest server, {shape.about}", rules, folder)


def bigrams_words(name: str, *more: str, text: Path | None = None) -> tuple[str, ...]:
    """What makes the golden of a small HTTP server that is not vLLM: a bigram model of ``text``.

    ``more`` are further words of its own.
    """
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": 8})
    folders = [BIGRAMS.parent, *([text.parent] if text else [])]
    options = [word for folder in dict.fromkeys(folders) for word in ("--volume", f"{folder}:{folder}")]
    words = (*options, "--canary", f"POST /v1/completions {body}", "--", "/usr/bin/python3", str(BIGRAMS), "{socket}")
    return (*words, "--name", name, *(("--text", str(text)) if text else ()), *more)


def bigrams(
    space: Workspace, name: str = "bigrams", pause: float = 0.0, text: Path | None = None, **rules: Any
) -> Served:
    """Such a server; each of its words takes ``pause`` seconds."""
    words = bigrams_words(name, "--pause", str(pause), text=text)
    return Served(name, f"{space.word}-{name}", words, "a bigram model of a text, plain HTTP", rules)


def config(
    served: Sequence[Served],
    rules: Mapping[str, Any] | None = None,
    front: Mapping[str, Any] | None = None,
    **tables: Mapping[str, Any],
) -> str:
    """The whole file; ``rules`` go before each model's own, ``front`` is added to its table, ``tables`` are others."""
    heads: dict[str, Mapping[str, Any]] = ({"front": front} if front else {}) | tables
    parts = ["\n".join([f"[{name}]", *assignments(keys)]) for name, keys in heads.items()]
    return "\n\n".join([*parts, *(one.table(rules or {}) for one in served)]) + "\n"


def assignments(keys: Mapping[str, Any]) -> list[str]:
    """Lines of TOML."""
    return [f"{key} = {_toml(value)}" for key, value in keys.items()]


def _toml(value: Any) -> str:
    """Words, numbers, switches and lists of words are written in TOML as in JSON."""
    return json.dumps(value, ensure_ascii=False)
