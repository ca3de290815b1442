"""What variants cost that begin in the middle of a pass; and what an edit there does.

Branching: a prompt is read up to half of the layers, then k variants go on from there as one batch, each with an edit
of its own, until each has its token. `branch_cost` is the time from the prompt to all k tokens over that of k whole
runs, one after the other, turn about; counted in layers run it is (1 + k) / 2k (`least`; a batch may do better).

Steering: the hidden state after one layer times 0.9; the share of tokens that change, at each position of a prompt and
in an answer, made twice to see that it repeats.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig, Watch, paired, quantity
from benchmarks.sessions_resume import HandLoop

COUNTS = (4, 8)
FACTOR = 0.9  # of the steering demonstration


def body(rig: Rig) -> Document:
    return {"branches": branches(rig), "steering": steering(rig)}


def branches(rig: Rig) -> Document:
    """By number of variants: whole runs, branched runs, their ratio, and the tails alone."""
    middle = rig.layers // 2
    found: dict[int, dict[str, list[float]]] = {
        count: {"full": [], "branched": [], "prefix": [], "tails": []} for count in COUNTS
    }
    for index in rig.rounds(rig.options.n + 1, "branches"):
        for count in rig.shuffled(COUNTS):
            prompt = rig.prompt(rig.options.prompt)
            taken: dict[str, float] = {}
            for who in rig.shuffled(("full", "branched")):
                if who == "full":
                    taken["full"] = full(rig, prompt, middle, count)
                else:
                    taken["prefix"], taken["tails"] = branched(rig, prompt, middle, count)
                    taken["branched"] = taken["prefix"] + taken["tails"]
            if index:  # the first round warms up
                for name, seconds in taken.items():
                    found[count][name].append(seconds * 1000)
    return {
        str(count): {
            **paired(times["branched"], times["full"]),
            "prefix_ms": quantity(times["prefix"]),
            "tails_ms": quantity(times["tails"]),
            "layer": middle,
            "least": round((1 + count) / (2 * count), 4),
            "unit": "ms; above: branched, below: whole runs",
        }
        for count, times in found.items()
    }


def _edit(layer: int, variant: int) -> Any:
    from hooks.gpuckpt_guest.engine.steering import Edit

    return Edit("scale", layer, 1 + variant / 100)


def full(rig: Rig, prompt: Sequence[int], layer: int, count: int) -> float:
    """Seconds of so many whole runs, each with its edit as a standing one, one after the other."""
    return sum(rig.generate(prompt, 1, edits=[_edit(layer, variant)])[0] for variant in range(count))


def branched(rig: Rig, prompt: Sequence[int], layer: int, count: int) -> tuple[float, float]:
    """Seconds until the parent has stopped, and from there until all variants have their token."""
    from hooks.gpuckpt_guest.engine.engine import Variant

    engine = rig.engine
    parent = rig.session()
    rig.do(engine.stop_at, parent, layer=layer, once=True)
    began, watch = rig.begin(parent, prompt, 1)
    stopped, _ = watch.until("paused")
    watches = [Watch() for _ in range(count)]
    variants = [Variant(edits=(_edit(layer, variant),)) for variant in range(count)]
    branching = time.perf_counter()
    children = rig.do(engine.branch, parent, variants, resume=True, sinks=watches)
    ended = max(one.until("token")[0] for one in watches)
    for session in (parent, *children):
        rig.do(engine.delete, session)
    return stopped - began, ended - branching


def steering(rig: Rig) -> Document:
    """How many tokens an edit changes, and whether it does so again."""
    from hooks.gpuckpt_guest.engine.steering import Edit

    edit = Edit("scale", rig.layers // 2, FACTOR)
    prompt = rig.prompt(rig.options.prompt)
    answer = 16 if rig.quick else 64
    positions = {
        name: [rig.do(argmaxes, rig, prompt, edits) for _ in range(2)]
        for name, edits in (("plain", ()), ("steered", (edit,)))
    }
    start = prompt[:64]
    answers = {
        name: [rig.generate(start, answer, edits=edits)[1] for _ in range(2)]
        for name, edits in (("plain", ()), ("steered", (edit,)))
    }
    return {
        "layer": edit.layer,
        "factor": edit.factor,
        "positions": len(prompt),
        "positions_changed": changed(positions["plain"][0], positions["steered"][0]),
        "answer": answer,
        "answer_changed": changed(answers["plain"][0], answers["steered"][0]),
        "first_difference": next(
            (at for at, (one, other) in enumerate(zip(answers["plain"][0], answers["steered"][0], strict=True))
             if one != other),
            None,
        ),
        "repeats": all(first == second for runs in (positions, answers) for first, second in runs.values()),
    }  # fmt: skip


def changed(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of places at which two texts of one length differ."""
    return round(sum(left != right for left, right in zip(one, other, strict=True)) / len(one), 4)


def argmaxes(rig: Rig, prompt: Sequence[int], edits: Sequence[Any]) -> list[int]:
    """The most likely next token at every position, with the layers driven, and edited between, as the engine does."""
    from hooks.gpuckpt_guest.engine.steering import apply

    stepper = rig.loaded.stepper
    ids = rig.torch.tensor([prompt], device=rig.device)
    forward = stepper.begin(stepper.inputs(ids, past=[0]), rig.cache(len(prompt)))
    for _ in range(rig.layers):
        stepper.step(forward)
        for edit in edits:
            if edit.layer == forward.layer:
                forward.hidden = apply(edit, forward.hidden, rig.loaded.verdict.layout, 0)
    # The engine's head gives the last position only.
    logits = HandLoop(rig.model).head(forward.hidden, last=False)
    return [int(token) for token in logits[0].argmax(-1).tolist()]


if __name__ == "__main__":
    raise SystemExit(
        sessions_common.main(
            "sessions_branch",
            sessions_common.parser("sessions_branch", __doc__, n=10, budget=300),
            body,
        )
    )
