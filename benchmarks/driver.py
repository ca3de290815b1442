"""gpuckpt's commands in a workspace, and the servers that the benchmarks make goldens of."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import CommandFailed, Outcome
from benchmarks.journal import Sample
from benchmarks.suite import Unavailable
from benchmarks.workspace import Workspace
from gpuckpt.errors import NotFoundError

FILLER = harness.ROOT / "benchmarks" / "servers" / "filler.py"
SERVED = "bench"  # the model's name, the same in every server, so that one request fits all
# A small KV cache, and every core: vLLM sets one aside by default, which of two would be half.
VLLM_ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_NUM_OF_RESERVED_CPU=0")
VLLM_ARGUMENTS = ("--max-model-len", "2048", "--served-model-name", SERVED)


@dataclass(frozen=True)
class Server:
    """What is frozen: options of `gpuckpt create`, and the server's own words after `--`."""

    options: tuple[str, ...]
    words: tuple[str, ...]
    streams: bool = False
    """Whether it generates tokens (vLLM) or just answers."""

    @classmethod
    def vllm(cls, model: Path) -> Server:
        options = [word for pair in VLLM_ENVIRONMENT for word in ("--env", pair)]
        return cls(tuple(options), ("--model", str(model), *VLLM_ARGUMENTS), streams=True)

    @classmethod
    def filler(cls, megabytes: int, *, processes: int = 1, mappings: int = 1, where: str = "{socket}") -> Server:
        """The synthetic server; its canary touches the same number of pages whatever its size."""
        options = ("--volume", f"{FILLER.parent}:{FILLER.parent}", "--canary", "GET /sample", "--warmup", "1")
        words = ("/usr/bin/python3", str(FILLER), where, "--megabytes", str(megabytes))
        return cls(options, (*words, "--processes", str(processes), "--mappings", str(mappings)))

    @classmethod
    def chosen(cls, options: argparse.Namespace) -> Server:
        """The one that --server and --model name."""
        kind, _, size = str(options.server).partition(":")
        if kind == "filler":
            return cls.filler(int(size or 512))
        if not (options.model / "config.json").is_file():
            raise NotFoundError(
                f"no model at {options.model}",
                remedy=f"make demo, or: PREFIX/server/bin/python scripts/make_model.py {options.model}",
            )
        return cls.vllm(options.model)


@dataclass(frozen=True)
class Gpuckpt:
    """The commands, in one workspace. Names are given without the workspace's word, which :meth:`name` adds."""

    space: Workspace

    def run(self, *words: str) -> Outcome:
        return harness.run([*words], cwd=self.space.folder, env=self.space.env)

    def name(self, word: str) -> str:
        """The name of a golden or replica as the commands know it."""
        return f"{self.space.word}-{word}"

    def create(self, name: str, server: Server, *options: str) -> Outcome:
        words = ("create", self.name(name), *server.options, *options, "--format", "json", "--", *server.words)
        return self.run(*words)

    def restore(self, name: str, *options: str) -> Outcome:
        return self.run("restore", self.name(name), *options, "--format", "json")

    def inspect(self, name: str) -> dict[str, Any]:
        return self.run("inspect", self.name(name), "--format", "json").document

    def stop(self, name: str) -> None:
        """Stop a replica; none of that name is fine too."""
        self._quietly("stop", self.name(name))

    def stop_replica(self, outcome: Outcome) -> None:
        """Stop the replica that a restore made, whatever it is called."""
        self.stop_named(str(outcome.document["replica"]))

    def stop_named(self, replica: str) -> None:
        """The same, by the name that the commands know it by."""
        self._quietly("stop", replica)

    def rm(self, name: str) -> None:
        """Remove a golden and its replicas; none of that name is fine too."""
        self._quietly("rm", "--force", self.name(name))

    def _quietly(self, *words: str) -> None:
        try:
            self.run(*words, "--format", "json")
        except CommandFailed as failure:
            if failure.code != NotFoundError.exit_code:
                raise

    def require_option(self, command: str, option: str) -> None:
        """Raise Unavailable if this gpuckpt's ``command`` does not know ``option``."""
        if option not in _help(self, command):
            raise Unavailable(f"this gpuckpt's {command} has no {option}")


@functools.cache
def _help(gpuckpt: Gpuckpt, command: str) -> str:
    return harness.run([command, "--help"], cwd=gpuckpt.space.folder).stdout


def sample_of(outcome: Outcome) -> Sample:
    """What a benchmark keeps of a restore: times from outside, phases, whether the answer was the recorded one."""
    return {
        "ttft_s": round(outcome.ttft_s, 6),
        "wall_s": round(outcome.wall_s, 6),
        "restore_s": round(restore_seconds(outcome.document["phases"]), 6),
        "canary_match": outcome.document["canary_match"],
        "phases": outcome.phases_to_first_token(),
    }


def restore_seconds(phases: Sequence[dict[str, Any]]) -> float:
    """The restore itself: all phases but those in which the server answers, which is the server's own work."""
    return sum(float(row["seconds"]) for row in phases if row["name"] not in ("first token", "canary", "health"))
