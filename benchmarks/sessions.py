"""Measure the session engine: every part, on one model after the other, into build/bench/sessions.json and figures.

    make bench-sessions                        about 35 minutes on 2 cores
    python -m benchmarks.sessions --quick      the tiny model, a trial: under 3 minutes
    python -m benchmarks.sessions --only checkpoint,interference

The parts run in the server's environment, one process each (`python -m benchmarks.sessions_resume --help`); nothing
else of ours runs meanwhile. A part that fails is noted and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, parts
from benchmarks.journal import Document
from benchmarks.parts import Part
from benchmarks.suite import say
from benchmarks.targets import Target

VERSION = 1


# Shapes and the folders that hold them. The 0.5B shape runs in float32: many processors have no instructions for its
# own bfloat16. Its prompt is shorter and its cuts are fewer, so that the whole run stays near half an hour.
MODELS = {"gpt2-124m": "gpt2-124m-random", "0.5b": "qwen2-0.5b-random", "tiny": "tiny-random"}
PARTS = (
    Part("checkpoint", "gpt2-124m", 40),
    Part("interference", "gpt2-124m", 90),
    Part("overhead", "gpt2-124m", 600),
    Part("concurrency", "gpt2-124m", 90),
    Part("branch", "gpt2-124m", 200),
    Part("resume", "gpt2-124m", 480, ("--cuts", "1,3,6,9,12")),
    Part("resume", "0.5b", 330, ("--dtype", "float32", "--prompt", "128", "--cuts", "1,12,24")),
)
QUICK = tuple(
    Part(name, "tiny", 20, ("--quick", "--dtype", "float32", "--prompt", "128"))
    for name in ("checkpoint", "interference", "overhead", "concurrency", "branch", "resume")
)
EXACT_SECONDS = 900
PEER_SECONDS = 300.0

TARGETS = (
    Target("layers cut without an exact continuation", "exact.failures", 0, (), at_most=True),
    Target(
        "dispatch of a checkpoint beyond a bare launch, p50 of the slowest size",
        "dispatch_us.worst_beyond_launch",
        20,
        ("dispatch_us.by_size",),
        at_most=True,
        unit="µs",
    ),
    Target(
        "completion over 1.5 × bytes / bandwidth + 20 µs, p50 of the slowest size",
        "complete_us.worst_over_bound",
        1,
        ("complete_us.by_size",),
        at_most=True,
        unit="×",
    ),
    Target(
        "resume over HTTP beside its layers and head, p50 of the slowest cut",
        "resume_rtt_ms.worst",
        5,
        ("resume_rtt_ms.by_model",),
        at_most=True,
        unit="ms",
    ),
    Target(
        "a session's time per token beside another's checkpoint",
        "interference_ratio.value",
        1.01,
        ("interference_ratio",),
        at_most=True,
        unit="×",
    ),
    Target("tokens per second over generate's, one session", "generate_ratio.value", 0.97, ("generate_ratio",)),
    Target("tokens as undisturbed beside a stopped session", "concurrency.tokens_equal", 1, ("concurrency",)),
    Target("a steered run repeats", "steering.repeats", 1, ()),
    Target("4 variants over 4 whole runs", "branch_cost.4.value", 1, ("branch_cost.4",), at_most=True, unit="×"),
    Target("8 variants over 8 whole runs", "branch_cost.8.value", 1, ("branch_cost.8",), at_most=True, unit="×"),
)


def merge(parts: dict[str, Document], exact: Document | None) -> Document:
    """The contract's keys out of the parts' documents; a part that is not there leaves its keys out."""
    made: Document = {
        "settings": {key: part["setting"] for key, part in parts.items()},
        "commits": {key: part.get("commit") for key, part in parts.items()},
    }
    if exact is not None:
        made["exact"] = {key: exact[key] for key in ("architectures", "cuts", "failures")}
    first = {part["part"].removeprefix("sessions_"): part for part in reversed(list(parts.values()))}
    if found := first.get("checkpoint"):
        made |= _checkpoint(found)
    if found := first.get("interference"):
        made["interference_ratio"] = found["own"] | {"large": found["large"]}
    if found := first.get("overhead"):
        made["generate_ratio"] = found["one"] | {"eight": found["eight"]}
        made["pause_overhead"] = found["pause"]
    if found := first.get("branch"):
        made["branch_cost"], made["steering"] = found["branches"], found["steering"]
    if found := first.get("concurrency"):
        made["concurrency"] = {key: found[key] for key in found if key not in ("setting", "load_average", "part")}
    resumed = {key: part for key, part in parts.items() if part["part"] == "sessions_resume"}
    if resumed:
        made |= _resume(resumed)
    return made


def _checkpoint(found: Document) -> Document:
    sizes = found["by_size"]

    def of(*names: str) -> Document:
        return {size: {name: entry[name] for name in ("bytes", *names)} for size, entry in sizes.items()}

    def worst(name: str) -> float:
        return float(max(entry[name]["p50"] for entry in sizes.values()))

    return {
        "dispatch_us": {
            "by_size": of("dispatch_us", "launch_us", "beyond_launch_us"),
            "worst_beyond_launch": worst("beyond_launch_us"),
        },
        "complete_us": {
            "by_size": of("complete_us", "landed_us", "plain_us", "bound_us", "complete_over_bound"),
            "worst_over_bound": worst("complete_over_bound"),
            "bandwidth_bytes_per_s": found["bandwidth_bytes_per_s"],
            "pinned": found["pinned"],
        },
        "restore_us": {"by_size": of("restore_us", "restore_over_bound")},
    }


def _resume(resumed: dict[str, Document]) -> Document:
    """Floors, ways and what HTTP adds, by model, kind of pass and layer."""
    rtt: Document = {"by_model": {}, "in_process": {}}
    made: Document = {"tail_floor_ms": {}, "resume_ms": {}, "resume_rtt_ms": rtt, "unavailable": {}}
    for part in resumed.values():
        model = part["setting"]["model"]
        phases = {name: part[name] for name in ("prefill", "decode")}

        def each(pick: Callable[[Document], Any], phases: Document = phases) -> Document:
            return {name: {layer: pick(entry) for layer, entry in phase.items()} for name, phase in phases.items()}

        made["tail_floor_ms"][model] = each(lambda entry: entry["tail_floor_ms"])
        made["resume_ms"][model] = each(lambda entry: entry["ways_ms"])
        rtt["by_model"][model] = each(lambda entry: entry["around_ms"]["http"])
        rtt["in_process"][model] = each(lambda entry: entry["around_ms"]["engine"])
        made["unavailable"] |= part["unavailable"]
    rtt["worst"] = max(
        layer["p50"] for phases in rtt["by_model"].values() for layers in phases.values() for layer in layers.values()
    )
    return made


# ---------------------------------------------------------------------- running


class Runner(parts.Runner):
    """Also: the exactness test, and a peer with an environment of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, "sessions", MODELS)
        self.unavailable: dict[str, str] = {}

    def measure(self, part: Part, peer: Path | None) -> Document | None:
        """One part's document."""
        return self.part(part, *(("--nnsight", peer) if part.name == "resume" and peer else ()))

    def earlier(self, wanted: Sequence[Part]) -> tuple[dict[str, Document], list[str]]:
        """With --only: the documents of the parts that are not measured now, and their keys."""
        others = [part for part in PARTS if part not in wanted] if self.options.only and not self.options.quick else []
        found = {part.key: made for part in others if (made := self.document(part.key)) is not None}
        return found, list(found)

    def exact(self) -> Document | None:
        """What the tests of many architectures found, in the server's environment."""
        out = self.work / "exact.json"
        out.unlink(missing_ok=True)
        say(f"[{self.budget.elapsed:5.0f} s] exact continuation, over architectures")
        done = self.run("exact", [self.python, "-m", "tests.guest.architectures", "--json", out], EXACT_SECONDS)
        # A failure that it found is a result; none is there only if it could not run.
        if not done and out.exists():
            say("  it reports failures")
        return self.document("exact")

    def peer(self) -> Path | None:
        """Python of an environment with nnsight beside the server's packages; made once, under build."""
        folder = harness.ROOT / "build" / "nnsight"
        python = folder / "bin" / "python"
        if (folder / "ready").exists():
            return python
        say(f"[{self.budget.elapsed:5.0f} s] an environment for nnsight")
        site = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if self.run("nnsight", [self.python, "-m", "venv", "--clear", folder], PEER_SECONDS):
            link = next(folder.glob("lib/python3*/site-packages")) / "server.pth"
            link.write_text(site + "\n")
            if self.run("nnsight", [python, "-m", "pip", "install", "--quiet", "nnsight"], PEER_SECONDS):
                (folder / "ready").touch()
                return python
        # A peer that cannot be had is no failure of ours.
        self.unavailable["nnsight"] = f"its installation failed: {self.failures.pop('nnsight')}"
        return None


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.out = options.out.absolute()
    runner = Runner(options)
    wanted = [part for part in (QUICK if options.quick else PARTS) if not options.only or part.name in options.only]

    def measure(document: Document) -> None:
        merged = merge(*_measure(runner, wanted, document))
        document |= merged
        document["unavailable"] = merged.get("unavailable", {}) | runner.unavailable

    from benchmarks import session_figures  # matplotlib takes a second to import

    return parts.main(runner, VERSION, measure, TARGETS, session_figures.draw)


def _measure(runner: Runner, wanted: Sequence[Part], document: Document) -> tuple[dict[str, Document], Document | None]:
    for shape in dict.fromkeys(part.model for part in wanted):
        runner.model(shape)
    peer = runner.peer() if any(part.name == "resume" for part in wanted) else None
    runner.rest(document)
    measured, taken = runner.earlier(wanted)
    for part in wanted:
        if (made := runner.measure(part, peer)) is not None:
            measured[part.key] = made
    only = runner.options.only
    exact = None
    if only and "exact" not in only:
        exact = runner.document("exact")
        taken += ["exact"] * (exact is not None)
    elif not runner.options.quick:
        # Last, and not in a trial: it is a test that takes minutes, not a measurement.
        exact = runner.exact()
    document["of_an_earlier_run"] = taken
    return {part.key: measured[part.key] for part in (*PARTS, *QUICK) if part.key in measured}, exact


def parser() -> argparse.ArgumentParser:
    return parts.parser("sessions", __doc__, sorted({part.name for part in PARTS} | {"exact"}), budget=2400)


if __name__ == "__main__":
    sys.exit(main())
