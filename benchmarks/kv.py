"""Measure KV paging: more sessions than memory, its speed, and its policy, into build/bench/kv.json and figures.

    make bench-kv                        about 15 minutes on 2 cores
    python -m benchmarks.kv --quick      few sessions, few samples, a trial: under 3 minutes
    python -m benchmarks.kv --only oversubscribe

The parts run in the server's environment, one process each (`python -m benchmarks.kv_paging --help`), on a model of
random weights whose keys and values are large beside its layers. A CPU's "device" is a limited part of its memory: the
copies and the limits are real, the bus is the memory's. The simulation of policies computes with what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environment, harness, kv_simulation, parts
from benchmarks.journal import Document
from benchmarks.parts import Part
from benchmarks.sessions import table
from benchmarks.statistics import median
from benchmarks.suite import rest, say
from benchmarks.targets import Target, targets
from gpuckpt.errors import InterruptedByUser
from hooks.gpuckpt_guest.kv.policy import Costs

VERSION = 1
MODELS = {"kv-heavy": "qwen2-kv-heavy-random"}
PARTS = (
    Part("paging", "kv-heavy", 180),
    Part("baselines", "kv-heavy", 240, ("--prompt", "512")),
    Part("oversubscribe", "kv-heavy", 900, ("--prompt", "384")),
)
QUICK = tuple(Part(part.name, part.model, 30, ("--quick", "--prompt", "128")) for part in PARTS)
MAIN = "2"  # the factor whose run the contract's keys are of
SIMULATED, BUDGET_SHARE = 48, 0.4  # sessions of a trace; the device's memory over what they come to

TARGETS = (
    Target("sessions that were answered in full", "completed_share", 1, ()),
    Target("sessions with other tokens than undisturbed", "token_mismatches", 0, (), at_most=True),
    Target("speed over bare copies, the slower way", "gbps_over_memcpy", 0.85, ("paging.copies.out",)),
    Target("bytes per appended token, at 4,096 over at 256", "append_cost_flat", 1.05, (), at_most=True),
    Target("LRU's waiting over ours, over all traces", "policy_gain_over_lru", 1, ()),
)


def merge(documents: dict[str, Document]) -> Document:
    """The contract's keys out of the parts' documents; a part that is not there leaves its keys out."""
    found = {part["part"].removeprefix("kv_"): part for part in documents.values()}
    made: Document = {
        "settings": {key: part["setting"] for key, part in documents.items()},
        **{key: found[key] for key in ("paging", "baselines", "oversubscribe") if key in found},
    }
    if over := found.get("oversubscribe"):
        run = over["factors"][MAIN]
        made |= {
            "sessions": over["sessions"],
            "demand_over_budget": run["demand_over_budget"],
            "completed": min(each["completed"] for each in over["factors"].values()),
            "token_mismatches": sum(each["token_mismatches"] for each in over["factors"].values()),
        }
        made["completed_share"] = made["completed"] / made["sessions"]
    if paging := found.get("paging"):
        largest = max(paging["wakes"].values(), key=lambda wake: wake["bytes"])
        made |= {
            "gbps_over_memcpy": min(paging["copies"][way]["value"] for way in ("out", "in")),
            "append_cost_flat": paging["append"]["ours_flat"],
            "wake_p99_ms": _p99(largest["all_ms"]["samples"]),
            "wake_bytes": largest["bytes"],
        }
    if "paging" in found and "oversubscribe" in found:
        made["policy"] = simulated(found["paging"], found["oversubscribe"])
        made["policy_gain_over_lru"] = made["policy"]["gain_over_lru"]
    return made


def _p99(samples: Sequence[float]) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def simulated(paging: Document, over: Document) -> Document:
    """Policies over traces, with the speeds of this run, and with those of a GPU as they are assumed to be."""
    copies = paging["copies"]
    token_bytes = paging["setting"]["token_bytes"]
    costs = Costs(
        out=copies["out"]["gbps"]["p50"] * 1e9,
        into=copies["in"]["gbps"]["p50"] * 1e9,
        pass_s=over["setting"]["pass_s"],
        token_s=over["setting"]["token_s"],
    )
    made: Document = {"machines": {}}
    gains = []
    for name, machine in (
        ("this", (token_bytes, costs)),
        # Llama-2-13B in bfloat16 on PCIe 5: 820 kB a token, 50 GB/s, 15 ms a pass, 0.1 ms a token read. Not measured.
        ("a GPU, assumed", (819200, Costs(5e10, 5e10, 0.015, 0.0001))),
    ):
        width, speeds = machine
        traces = kv_simulation.compare(width, speeds, SIMULATED, seeds=range(5), share=BUDGET_SHARE)
        made["machines"][name] = {
            "token_bytes": width,
            "costs": {key: getattr(speeds, key) for key in ("out", "into", "pass_s", "token_s")},
            "traces": traces,
        }
        gains.append(median([trace["gain_over_lru"] for trace in traces.values()]))
    made["gain_over_lru"] = round(gains[0], 4)
    made["sessions"], made["budget_share"] = SIMULATED, BUDGET_SHARE
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.out = options.out.absolute()
    runner = parts.Runner(options, "kv", MODELS)
    if not runner.python.exists():
        print(f"there is no {runner.python}: make setup-server", file=sys.stderr)
        return 4
    runner.work.mkdir(parents=True, exist_ok=True)
    chosen = QUICK if options.quick else PARTS
    wanted = [part for part in chosen if not options.only or part.name in options.only]
    document: Document = {
        "version": VERSION,
        "benchmark": "kv",
        "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": {"quick": options.quick, "only": options.only, "seed": options.seed, "device": options.device},
        "machine": environment.machine(),
    }
    runner.commit = document["machine"]["commit"]
    try:
        with harness.interrupts():
            runner.model("kv-heavy")
            if not options.quick:
                document["waited_for_rest_s"] = rest(document["machine"]["cores"])
            document["load_average"] = environment.load()
            measured = {part.key: made for part in wanted if (made := runner.part(part)) is not None}
            earlier = {part.key: made for part in chosen if part not in wanted and (made := runner.document(part.key))}
    except InterruptedByUser as interrupted:
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    document |= merge(earlier | measured)
    document["of_an_earlier_run"] = list(earlier)
    document["failures"] = runner.failures
    document["load_average_at_end"] = environment.load()
    document["elapsed_s"] = round(runner.budget.elapsed, 1)
    document["targets"] = targets(document, TARGETS)
    file = options.out / "kv.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    from benchmarks import kv_figures  # matplotlib takes a second to import

    drawn = kv_figures.draw(document, options.out)
    for line in table(document):
        say(line)
    say(f"{file}; figures: {', '.join(drawn) or 'none'}")
    wrong = document.get("token_mismatches", 0) or document.get("completed_share", 1) < 1
    return 1 if runner.failures or wrong else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kv", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few sessions, few samples: does it work at all?")
    made.add_argument(
        "--only",
        type=lambda words: tuple(words.split(",")),
        help="measure only these (paging, baselines, oversubscribe); the others are as the last run in --out left them",
    )
    made.add_argument("--device", default="auto", help="auto (the default), cpu, cuda")
    made.add_argument("--seed", type=int, default=1, help="of prompts and orders (default: %(default)s)")
    made.add_argument("--budget", type=float, default=1800.0, help="seconds for all parts (default: %(default)g)")
    made.add_argument("--out", type=Path, default=Path("build/bench"), help="folder (default: %(default)s)")
    return made


if __name__ == "__main__":
    raise SystemExit(main())
