"""One session waits between two layers while another runs, and both end as if they had been alone.

In each round session A stops in the middle of its prompt, session B reads and writes from begin to end, then A goes on;
and, turn about, B runs alone. Tokens are compared with those of transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig, paired, quantity

PROMPT = 64  # tokens that B reads


def body(rig: Rig) -> Document:
    tokens = 8 if rig.quick else 32
    alone: list[float] = []
    beside: list[float] = []
    equal = {"a": 0, "b": 0, "b_alone": 0}
    held = 0
    rounds = 0
    for index in rig.rounds(rig.options.n + 1, "pairs of sessions"):
        first, second = rig.prompt(rig.options.prompt), rig.prompt(PROMPT)
        wanted = {"a": rig.plainly([first], tokens)[1][0], "b": rig.plainly([second], tokens)[1][0]}
        taken: dict[str, float] = {}
        for who in rig.shuffled(("alone", "beside")):
            if who == "alone":
                taken[who], got = rig.generate(second, tokens)
                equal["b_alone"] += got == wanted["b"]
            else:
                taken[who], got, resumed, held = beside_stopped(rig, first, second, tokens)
                equal["b"] += got == wanted["b"]
                equal["a"] += resumed == wanted["a"]
        rounds += 1
        if index:  # the first round warms up
            alone.append(taken["alone"] * 1000)
            beside.append(taken["beside"] * 1000)
    return {
        **paired(beside, alone),
        "unit": "ms of B's whole answer; above: beside a stopped session",
        "tokens": tokens,
        "rounds": rounds,
        "equal": equal,
        "tokens_equal": all(count == rounds for count in equal.values()),
        "checkpoint_bytes": held,
        "b_ms_per_token": quantity([value / tokens for value in beside]),
    }


def beside_stopped(
    rig: Rig, first: Sequence[int], second: Sequence[int], tokens: int
) -> tuple[float, list[int], list[int], int]:
    """B's seconds and tokens with A stopped after half of its layers; A's tokens; bytes of A's checkpoint."""
    session = rig.session()
    rig.do(rig.engine.stop_at, session, layer=rig.layers // 2, once=True)
    _, watch = rig.begin(session, first, tokens)
    watch.until("paused")
    held = session.pause.checkpoint.bytes
    took, got = rig.generate(second, tokens)
    rig.do(rig.engine.resume, session)
    watch.until("done")
    resumed = list(session.tokens[len(first) :])
    rig.do(rig.engine.delete, session)
    return took, got, resumed, int(held)


if __name__ == "__main__":
    raise SystemExit(
        sessions_common.main(
            "sessions_concurrency",
            sessions_common.parser("sessions_concurrency", __doc__, n=10, budget=180),
            body,
        )
    )
