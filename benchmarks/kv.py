"""Measure KV paging: more sessions than memory, its speed, and its policy, into build/bench/kv.json and figures.

    make bench-kv                        about 15 minutes on 2 cores
    python -m benchmarks.kv --quick      few sessions, few samples, a trial: about a minute
    python -m benchmarks.kv --only oversubscribe

The parts run in the server's environment, one process each (`python -m benchmarks.kv_paging --help`), on a model of
random weights whose keys and values are large beside its layers. A CPU's "device" is a limited part of its memory: the
copies and the limits are real, the bus is the memory's. The simulation of policies computes with what was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from benchmarks import kv_simulation, parts
from benchmarks.journal import Document
from benchmarks.parts import Part
from benchmarks.statistics import median
from benchmarks.targets import Target
from hooks.gpuckpt_guest.kv.policy import Costs

VERSION = 1
MODELS = {"kv-heavy": "qwen2-kv-heavy-random", "0.5b": "qwen2-0.5b-random", "tiny": "tiny-random"}
# In float32: many processors have no instructions for the checkpoints' own bfloat16.
FLOAT = ("--dtype", "float32")
PARTS = (
    Part("paging", "kv-heavy", 180, FLOAT),
    Part("baselines", "kv-heavy", 240, FLOAT),
    Part("oversubscribe", "kv-heavy", 900, (*FLOAT, "--prompt", "384")),
    Part("weights", "0.5b", 240, (*FLOAT, "--prompt", "128")),
)
QUICK = (
    *(Part(part.name, part.model, 30, (*FLOAT, "--quick", "--prompt", "128", "-n", "3")) for part in PARTS[:3]),
    Part("weights", "tiny", 30, (*FLOAT, "--quick", "--prompt", "32", "-n", "3")),
)
MAIN = "2"  # the factor whose run the contract's keys are of
SIMULATED, BUDGET_SHARE = 48, 0.4  # sessions of a trace; the device's memory over what they come to

TARGETS = (
    Target("sessions that were answered in full", "completed_share", 1, ()),
    Target("sessions with other tokens than undisturbed", "token_mismatches", 0, (), at_most=True),
    Target("sessions with other logits than undisturbed", "logits_mismatches", 0, (), at_most=True),
    Target(
        "speed over bare copies, the slower way", "gbps_over_memcpy", 0.85, ("paging.copies.out", "paging.copies.in")
    ),
    Target("bytes per appended token, at 4,096 over at 256", "append_cost_flat", 1.05, (), at_most=True),
    Target("LRU's waiting over ours, over all traces", "policy_gain_over_lru", 1, ()),
)


# What is no matter of speed: a run that finds it has failed.
WRONG: dict[str, Callable[[Document], bool]] = {
    "sessions with wrong tokens": lambda document: document.get("token_mismatches", 0) > 0,
    "sessions with wrong bits": lambda document: document.get("logits_mismatches", 0) > 0,
    "sessions that were not resumed three times": lambda document: document.get("resumed_least", 3) < 3,
    "sessions without all their tokens": lambda document: document.get("completed_share", 1) < 1,
    "weights that come in turns": lambda document: document.get("weights", {}).get("token_mismatches", 0) > 0,
}


def merge(documents: dict[str, Document]) -> Document:
    """The contract's keys out of the parts' documents; a part that is not there leaves its keys out."""
    found = {part["part"].removeprefix("kv_"): part for part in documents.values()}
    made: Document = {
        "settings": {key: part["setting"] for key, part in documents.items()},
        **{key: found[key] for key in ("paging", "baselines", "oversubscribe", "weights") if key in found},
    }
    if over := found.get("oversubscribe"):
        run = over["factors"][MAIN]
        made |= {
            "sessions": over["sessions"],
            "demand_over_budget": run["demand_over_budget"],
            "completed": min(each["completed"] for each in over["factors"].values()),
            "token_mismatches": sum(each["token_mismatches"] for each in over["factors"].values()),
            "logits_mismatches": sum(each["logits_mismatches"] for each in over["factors"].values()),
            "resumed_least": min(each["resumed_least"] for each in over["factors"].values()),
        }
        made["completed_share"] = made["completed"] / made["sessions"]
    if paging := found.get("paging"):
        largest = max(paging["wakes"].values(), key=lambda wake: wake["bytes"])
        made |= {
            "gbps_over_memcpy": min(paging["copies"][way]["value"] for way in ("out", "in")),
            "gbps_over_memcpy_small": min(paging["small_copies"][way]["value"] for way in ("out", "in")),
            "append_cost_flat": paging["append"]["ours_flat"],
            "wake_p99_ms": _p99(largest["all_ms"]["samples"]),
            "wake_bytes": largest["bytes"],
            "wake_n": largest["all_ms"]["n"],
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
    options = parts.parser("kv", __doc__, [part.name for part in PARTS], budget=1800).parse_args(argv)
    options.out = options.out.absolute()
    runner = parts.Runner(options, "kv", MODELS)
    chosen = QUICK if options.quick else PARTS
    wanted = [part for part in chosen if not options.only or part.name in options.only]

    def measure(document: Document) -> None:
        for shape in dict.fromkeys(part.model for part in wanted):
            runner.model(shape)
        runner.rest(document)
        found = {part.key: made for part in wanted if (made := runner.part(part)) is not None}
        earlier = {part.key: made for part in chosen if part not in wanted and (made := runner.document(part.key))}
        document |= merge(earlier | found)
        document["of_an_earlier_run"] = list(earlier)
        for what, is_wrong in WRONG.items():
            if is_wrong(document):
                runner.failures[what] = "this must not be: see the document"

    from benchmarks import kv_figures  # matplotlib takes a second to import

    return parts.main(runner, VERSION, measure, TARGETS, kv_figures.draw)


if __name__ == "__main__":
    sys.exit(main())
