"""The ways in which gpuckpt brings a server back, as methods of a comparison."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.asking import until_answered
from benchmarks.driver import Gpuckpt, Server, restore_seconds, sample_of
from benchmarks.journal import Journal, Sample
from benchmarks.suite import Unavailable
from benchmarks.workspace import podman_command
from gpuckpt import proc
from gpuckpt.config_load import load
from gpuckpt.containers.podman import container_name
from gpuckpt.golden.replica import stop
from gpuckpt.golden.restore import RestoreRequest, restore
from gpuckpt.golden.tools import tools
from gpuckpt.timing import UNACCOUNTED, PhaseTable, now_ns
from gpuckpt.workload.endpoint import Endpoint


@dataclass
class Goldens:
    """Goldens that several methods share: made when the first asks for them, removed with the workspace."""

    gpuckpt: Gpuckpt
    journal: Journal
    compared: Server
    """The server of the comparison: its creations are `cold_create`, those of another are a series of their own."""
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    def need(self, name: str, server: Server, mode: str) -> dict[str, Any]:
        """What `gpuckpt inspect` says of the golden ``name``; it is created first if it is not there."""
        if name not in self.made:
            outcome = self.gpuckpt.create(name, server, "--mode", mode)
            phases = outcome.document["phases"]
            self.journal.add(
                "cold_create" if server == self.compared else f"create_{name}",
                {"ttft_s": round(outcome.ttft_s, 6), "mode": mode, "phases": outcome.phases_to_first_token()},
            )
            self.journal.fact(
                f"create_{name}",
                {"wall_s": outcome.wall_s, "image_bytes": outcome.document["image_bytes"], "phases": phases},
            )
            self.made[name] = self.gpuckpt.inspect(name)
        return self.made[name]


@dataclass
class Restore:
    """`gpuckpt restore` of a golden in one mode, with options; the replica is stopped off the clock."""

    name: str
    goldens: Goldens
    server: Server
    golden: str
    mode: str
    options: tuple[str, ...] = ()
    n: int | None = None

    def prepare(self) -> None:
        self.goldens.need(self.golden, self.server, self.mode)

    def measure(self) -> Sample:
        gpuckpt = self.goldens.gpuckpt
        outcome = gpuckpt.restore(self.golden, *self.options)  # one that fails leaves nothing
        gpuckpt.stop_replica(outcome)
        return sample_of(outcome)

    def close(self) -> None:
        pass


@dataclass
class Prepared(Restore):
    """The same, into a container that was prepared off the clock, as stock podman's is that it restores into."""

    def prepare(self) -> None:
        self.goldens.gpuckpt.require_option("restore", "--prepare")
        super().prepare()

    def measure(self) -> Sample:
        self.goldens.gpuckpt.restore(self.golden, "--prepare", "1")
        return super().measure()


@dataclass
class Resident(Prepared):
    """The same, by a call in our own process instead of a command: what a resident service takes."""

    def prepare(self) -> None:
        super().prepare()
        self.settings = load(
            None, environ=os.environ | self.goldens.gpuckpt.space.env, env_file=Path(os.devnull), flags={}
        ).settings
        self.measure()  # what a process does only once

    def measure(self) -> Sample:
        gpuckpt = self.goldens.gpuckpt
        gpuckpt.restore(self.golden, "--prepare", "1")
        phases = PhaseTable()
        with phases.phase("podman service"):
            work = tools(self.settings)
        restored = restore(RestoreRequest(gpuckpt.name(self.golden)), work, phases)
        stop(work, restored.replica.name)
        if restored.ttft_s is None:
            raise Unavailable(f"golden {self.golden} has no canary")
        rows = [row for row in phases.as_list() if row["name"] not in ("canary", UNACCOUNTED)]
        return {
            "ttft_s": round(restored.ttft_s, 6),
            "wall_s": round(phases.wall_seconds, 6),
            "restore_s": round(restore_seconds(rows), 6),
            "canary_match": restored.canary_match,
            "phases": harness.with_rest(rows, restored.ttft_s),
        }


@dataclass
class Frozen:
    """A warm replica that is only frozen: `podman unpause`, then the first token. It holds its memory all the time."""

    name: str
    goldens: Goldens
    server: Server
    golden: str
    n: int | None = None

    def prepare(self) -> None:
        self.canary = self.goldens.need(self.golden, self.server, "mapped")["canary"]

    def measure(self) -> Sample:
        gpuckpt = self.goldens.gpuckpt
        outcome = gpuckpt.restore(self.golden)
        container = container_name(str(outcome.document["replica"]))
        try:
            endpoint = harness.endpoint_of(outcome.document)
            for _ in range(3):
                until_answered(endpoint, self.canary, timeout=60)
            proc.run([*podman_command(), "pause", container])
            time.sleep(1)
            spawned = now_ns()
            proc.run([*podman_command(), "unpause", container])
            back = now_ns()
            return timed(spawned, back, endpoint, self.canary, "podman unpause")
        finally:
            gpuckpt.stop_replica(outcome)

    def close(self) -> None:
        pass


def timed(
    spawned: int, back: int, endpoint: Endpoint, canary: dict[str, Any], command: str, timeout: float = 120
) -> Sample:
    """A sample of a command that was spawned and came back at these times, and of the first token after it."""
    answered = until_answered(endpoint, canary, timeout=timeout)
    restored = (back - spawned) / 1e9
    first = (answered.first_token_ns - spawned) / 1e9
    return {
        "ttft_s": round(first, 6),
        "restore_s": round(restored, 6),
        "canary_match": answered.difference is None,
        "phases": [
            {"name": command, "seconds": round(restored, 6)},
            {"name": "first token", "seconds": round(first - restored, 6)},
        ],
    }


def no_such_program(name: str, package: str) -> Unavailable:
    """Why a program cannot be had: what the distribution says about its package."""
    policy = (
        proc.run(["apt-cache", "policy", package], check=False).stdout if Path("/usr/bin/apt-cache").exists() else ""
    )
    candidate = next((line.split()[-1] for line in policy.splitlines() if "Candidate:" in line), "(none)")
    if candidate == "(none)":
        return Unavailable(f"{name} is not installed, and this distribution has no package {package}")
    return Unavailable(
        f"{name} is not installed; the distribution has {package} {candidate}: apt-get install {package}"
    )
