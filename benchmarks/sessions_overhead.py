"""What driving a model layer by layer costs, against transformers' own `generate`; and what being watched costs.

`generate_ratio` is the engine's tokens per second over `model.generate`'s, greedy, the same prompts, turn about: for
one session, whose tokens must be equal; for eight, against a batch of eight and against eight one after the other.
`pause_overhead` is the engine's speed with breakpoints that never fire, and with standing edits, over that with none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig, Watch, paired, quantity

PROMPT = 64  # tokens that each session reads first
_NEVER = 10**9


def body(rig: Rig) -> Document:
    tokens = 16 if rig.quick else 64
    return {
        "tokens": tokens,
        "prompt": PROMPT,
        "one": one(rig, tokens),
        # Shorter answers for what has many of them.
        "eight": several(rig, 8, tokens // 2),
        "pause": watched(rig, tokens // 2),
    }


def one(rig: Rig, tokens: int) -> Document:
    """One session; raises RuntimeError if its tokens are not those of `generate`."""
    ours: list[float] = []
    theirs: list[float] = []
    for index in rig.rounds(rig.options.n + 1, "one session"):
        prompt = rig.prompt(PROMPT)
        got: dict[str, tuple[float, list[int]]] = {}
        for who in rig.shuffled(("ours", "theirs")):
            if who == "ours":
                got[who] = rig.generate(prompt, tokens)
            else:
                took, rows = rig.plainly([prompt], tokens)
                got[who] = took, rows[0]
        if got["ours"][1] != got["theirs"][1]:
            raise RuntimeError("the engine's tokens are not those of generate")
        if index:  # the first round warms up
            ours.append(got["ours"][0])
            theirs.append(got["theirs"][0])
    return {**speeds(theirs, ours, tokens), "tokens_equal": True}


def speeds(theirs: Sequence[float], ours: Sequence[float], tokens: int) -> Document:
    """Tokens per second: ours over theirs, from the seconds that the same tokens took in turn."""
    return paired([tokens / took for took in ours], [tokens / took for took in theirs])


def several(rig: Rig, count: int, tokens: int) -> Document:
    """Some sessions at once, against `generate` on a batch of them, and on one after the other."""
    found: dict[str, list[float]] = {"ours": [], "batch": [], "in_a_row": []}
    same = 0
    asked = 0
    for index in rig.rounds(max(3, rig.options.n) + 1, f"{count} sessions"):
        prompts = [rig.prompt(PROMPT) for _ in range(count)]
        took: dict[str, float] = {}
        made: dict[str, list[list[int]]] = {}
        for who in rig.shuffled(list(found)):
            if who == "ours":
                took[who], made[who] = together(rig, prompts, tokens)
            elif who == "batch":
                took[who], made[who] = rig.plainly(prompts, tokens)
            else:
                rows = [rig.plainly([prompt], tokens) for prompt in prompts]
                took[who], made[who] = sum(row[0] for row in rows), [row[1][0] for row in rows]
        if index:
            for who, seconds in took.items():
                found[who].append(seconds)
            asked += count
            # Of another batch size the sums have another order: equal tokens are counted, not demanded.
            same += sum(mine == theirs for mine, theirs in zip(made["ours"], made["in_a_row"], strict=True))
    total = count * tokens
    return {
        "sessions": count,
        "tokens": tokens,
        "over_batch": speeds(found["batch"], found["ours"], total),
        "over_in_a_row": speeds(found["in_a_row"], found["ours"], total),
        "answers_as_in_a_row": same,
        "answers": asked,
    }


def together(rig: Rig, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds until all of some sessions that begin at once are done, and their tokens."""
    from hooks.gpuckpt_guest.engine.engine import Request

    engine = rig.engine
    made = [rig.session() for _ in prompts]
    watches = [Watch() for _ in prompts]

    def begin() -> None:
        for session, prompt, watch in zip(made, prompts, watches, strict=True):
            engine.generate(session, Request(read=prompt, max_tokens=tokens, ignore_stops=True), watch)

    began = time.perf_counter()
    rig.do(begin)
    ended = max(watch.until("done")[0] for watch in watches)
    rows = [list(session.tokens[PROMPT:]) for session in made]
    for session in made:
        rig.do(engine.delete, session)
    return ended - began, rows


def watched(rig: Rig, tokens: int) -> Document:
    """The speed with breakpoints that never fire and with standing edits, each over that of a session without."""
    from hooks.gpuckpt_guest.engine.breakpoints import Condition
    from hooks.gpuckpt_guest.engine.steering import Edit

    engine, middle = rig.engine, rig.layers // 2
    vector = rig.do(lambda: rig.torch.zeros(rig.loaded.features))

    def stop(**what: Any) -> Callable[[Any], Any]:
        return lambda session: engine.stop_at(session, **what)

    def rule(*edits: Edit) -> Callable[[Any], Any]:
        return lambda session: engine.steer(session, edits, standing=True)

    ways: dict[str, Callable[[Any], Any]] = {
        "none": lambda session: None,
        "none_again": lambda session: None,
        "breakpoint": stop(layer=middle, step=_NEVER),
        "breakpoint_any_layer": stop(layer=None, step=_NEVER),
        "breakpoint_norm": stop(layer=middle, condition=Condition(norm_above=1e30)),
        "breakpoint_entropy": stop(layer=middle, condition=Condition(entropy_above=1e9)),
        "steering": rule(Edit("scale", middle, 1.0)),
        "steering_all_layers": rule(
            *(Edit("add", layer, 1.0, vector, name=f"r{layer}") for layer in range(1, rig.layers + 1))
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for index in rig.rounds(rig.options.n + 1, "watched sessions"):
        prompt = rig.prompt(PROMPT)
        for name in rig.shuffled(list(ways)):
            session = rig.session()
            rig.do(ways[name], session)
            began, watch = rig.begin(session, prompt, tokens)
            ended, _ = watch.until("done")
            rig.do(engine.delete, session)
            if index:
                found[name].append(tokens / (ended - began))
    plain = found.pop("none")
    return {
        "tokens": tokens,
        "tokens_per_s": quantity(plain),
        "ratio": {name: paired(speed, plain) for name, speed in found.items()},
    }


if __name__ == "__main__":
    raise SystemExit(
        sessions_common.main(
            "sessions_overhead",
            sessions_common.parser("sessions_overhead", __doc__, n=10, budget=240),
            body,
        )
    )
