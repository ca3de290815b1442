"""Does a replica whose memory is mapped work as fast as a server that was never dumped?

    python -m benchmarks.steady

Both are alive on the same machine, one is asked at a time, in pairs whose order alternates by chance: both get the
same prompt, which neither has seen. Writes steady.json with `steady_state.ratio` (tokens per second, replica over
never-dumped server, median over the pairs) for short and long prompts, and the latencies of the first hundred requests
after the restore.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import harness, suite
from benchmarks.asking import complete, until_answered
from benchmarks.driver import SERVED, Gpuckpt, Server
from benchmarks.journal import Document, Sample, summary
from benchmarks.ours import Goldens
from benchmarks.peers import Peer, build_image
from benchmarks.statistics import Summary, median, percentile
from benchmarks.suite import Run
from benchmarks.targets import ratio
from gpuckpt.errors import UsageError
from gpuckpt.workload.endpoint import Endpoint

BUDGET = 2400.0
GOLDEN = "steady"
PROMPTS = {"short": 8, "long": 512}
TOKENS = 64
FIRST_REQUESTS = 100
FIRST_TOKENS = 8
_OF_THE_WORSE = ("ratio", "interval", "ratio_of_medians", "ratio_of_medians_interval")


@dataclass
class Pair:
    """The replica and the never-dumped server."""

    replica: Endpoint
    server: Endpoint
    vocabulary: int

    def ask(self, seed: str, prompt_tokens: int, tokens: int) -> dict[str, dict[str, float]]:
        """Both, in an order that the seed decides, with one prompt that the seed makes."""
        chance = random.Random(seed)
        prompt = [chance.randrange(self.vocabulary // 2, self.vocabulary) for _ in range(prompt_tokens)]
        order = [("mapped", self.replica), ("never_dumped", self.server)]
        chance.shuffle(order)
        found = {}
        for name, endpoint in order:
            decoded = complete(endpoint, SERVED, prompt, tokens)
            found[name] = {
                "first_s": round(decoded.first_s, 6),
                "whole_s": round(decoded.whole_s, 6),
                "tokens_per_s": round(decoded.tokens_per_s, 4),
            }
        return found


@dataclass
class Decoding:
    """One pair of completions with a prompt of a length, each of both servers."""

    name: str
    pair: Pair
    prompt_tokens: int
    tokens: int
    seed: int
    n: int | None = None
    taken: int = 0

    def prepare(self) -> None:
        # Every length once, for what a server does only the first time (the pages of its buffers).
        self.pair.ask(f"warm {self.name}", self.prompt_tokens, self.tokens)

    def measure(self) -> Sample:
        self.taken += 1
        found = self.pair.ask(f"{self.seed} {self.name} {self.taken}", self.prompt_tokens, self.tokens)
        sample: Sample = {f"{who}_{what}": value for who, row in found.items() for what, value in row.items()}
        return sample | {"ratio": round(found["mapped"]["tokens_per_s"] / found["never_dumped"]["tokens_per_s"], 6)}

    def close(self) -> None:
        pass


def body(run: Run) -> None:
    gpuckpt = Gpuckpt(run.space)
    server = Server.chosen(run.options)
    if not server.streams:
        raise UsageError("the steady state is that of a server that generates tokens", remedy="leave --server out")
    golden = Goldens(gpuckpt, run.journal, server).need(GOLDEN, server, "mapped")
    with contextlib.ExitStack() as stack:
        peer = Peer(run.space, build_image(run.space), golden, "never-dumped")
        stack.callback(peer.remove)
        run.say("start the server that is never dumped")
        peer.start()
        peer.first_token()
        warm_up(peer.endpoint, golden["canary"])
        stack.callback(gpuckpt.stop, GOLDEN)
        run.say("restore the replica")
        restored = gpuckpt.restore(GOLDEN)
        pair = Pair(harness.endpoint_of(restored.document), peer.endpoint, vocabulary(run))
        first_requests(run, pair)
        methods: list[suite.Method] = [
            Decoding(f"decode {name}", pair, length, run.options.tokens, run.options.seed)
            for name, length in PROMPTS.items()
        ]
        run.rounds(run.prepare(methods, stack))


def warm_up(endpoint: Endpoint, canary: dict[str, Any]) -> None:
    """As the golden was warmed up before it was frozen: a few answers."""
    for _ in range(5):
        until_answered(endpoint, canary, timeout=60)


def first_requests(run: Run, pair: Pair) -> None:
    """The first requests after the restore, each followed or preceded by the same one to the other server."""
    wanted = FIRST_REQUESTS if not run.options.quick else 5
    for number in range(run.journal.count("first requests"), wanted):
        if run.out_of_time():
            return
        found = pair.ask(f"first {run.options.seed} {number}", PROMPTS["short"], FIRST_TOKENS)
        run.journal.add("first requests", {f"{who}_latency_s": row["whole_s"] for who, row in found.items()})
    run.say(f"  the first {wanted} requests are answered")


def vocabulary(run: Run) -> int:
    return int(json.loads((run.options.model / "config.json").read_text())["vocab_size"])


def summarise(document: Document) -> Document:
    """Ratios per prompt length, over all pairs, and the percentiles of the first requests.

    A pair meets the same noise, so a ratio is the median of the pairs' and its interval draws pairs; the ratio of the
    two medians, each side drawn on its own, stays beside it.
    """
    found: Document = {}
    for name, samples in document["runs"].items():
        if not name.startswith("decode ") or not samples:
            continue
        sides = [[float(sample[f"{who}_tokens_per_s"]) for sample in samples] for who in ("mapped", "never_dumped")]
        unpaired = ratio(*sides)
        pairs = Summary(tuple(float(sample["ratio"]) for sample in samples))
        found[name.removeprefix("decode ")] = {
            "ratio": round(pairs.p50, 4),
            "interval": [round(end, 4) for end in pairs.interval],
            "ratio_of_medians": unpaired["value"],
            "ratio_of_medians_interval": unpaired["interval"],
            "n": pairs.n,
            "mapped_tokens_per_s": summary(samples, "mapped_tokens_per_s"),
            "never_dumped_tokens_per_s": summary(samples, "never_dumped_tokens_per_s"),
            "mapped_first_s": summary(samples, "mapped_first_s"),
            "never_dumped_first_s": summary(samples, "never_dumped_first_s"),
        }
    if found:
        # The worse of the prompt lengths speaks for both.
        worst = min(found, key=lambda name: float(found[name]["ratio"]))
        found |= {key: found[worst][key] for key in _OF_THE_WORSE} | {"ratio_of": worst}
    if samples := document["runs"].get("first requests"):
        found["first_requests"] = {"n": len(samples)} | {
            who: latencies([float(sample[f"{who}_latency_s"]) for sample in samples])
            for who in ("mapped", "never_dumped")
        }
    return {"steady_state": found}


def latencies(values: Sequence[float]) -> Document:
    return {
        "p50": round(median(values), 6),
        "p99": round(percentile(values, 99), 6),
        "max": round(max(values), 6),
        "first": round(values[0], 6),
    }


def parser() -> argparse.ArgumentParser:
    made = suite.parser("steady", __doc__, n=10, budget=BUDGET)
    suite.add_workload(made)
    made.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each completion (default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("steady", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
