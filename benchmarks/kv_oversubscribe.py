"""More sessions than memory: all are answered, with the bits that they would have had to themselves.

Each session reads a prompt of its own and then, three times over, is asked to go on, in an order that is drawn anew
each time, many at once. The memory on the device is demand / factor; a session that is still there when its turn
comes is suspended first, so that every turn is a resumption. What is compared with a run that has memory for all, and
in which nobody leaves: the tokens, and the logits behind each turn, bit by bit, which depend on every key and value.
Another run with memory for all forms batches, as one would: what oversubscription costs is also given over that.
Samples of what lies where are taken while it runs, for the figure.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.kv_common import KvRig
from benchmarks.kv_paging import moved
from benchmarks.sessions_common import Watch, quantity
from benchmarks.suite import say

SESSIONS = 50
TURNS, WRITE, READ = 3, 12, 4  # after the prompt's own turn, which writes as many
AT_ONCE = 24
FACTORS = (1.15, 2.0, 4.0)
_SAMPLE = 0.05


def body(rig: KvRig) -> Document:
    quick = rig.quick
    sessions = 8 if quick else SESSIONS
    length = min(rig.options.prompt, 64 if quick else rig.options.prompt)
    prompts = [rig.prompt(length + rig.chance.randrange(length // 2)) for _ in range(sessions)]
    orders = [rig.shuffled(range(sessions)) for _ in range(TURNS)]
    more = [[rig.prompt(READ) for _ in range(sessions)] for _ in range(TURNS)]
    longest = [len(prompt) + TURNS * (READ + WRITE) + WRITE for prompt in prompts]
    # What is needed at the least; blocks that are not full come on top.
    demand = sum(longest) * rig.token_bytes
    work = (prompts, orders, more)
    alone = Run(rig, work, 2 * demand, 0, leave=False, max_batch=1)
    batched = Run(rig, work, 4 * demand, 0, leave=False)
    say(f"  undisturbed: {alone.seconds:.1f} s, in batches {batched.seconds:.1f} s")
    made: Document = {
        "sessions": sessions,
        "tokens": {"prompt": quantity([float(len(prompt)) for prompt in prompts]), "written": (TURNS + 1) * WRITE},
        "demand_bytes": demand,
        "at_once": AT_ONCE,
        "undisturbed": alone.document(),
        "batched": batched.document(),
        "factors": {},
    }
    for factor in rig.options.factors or (FACTORS[1:2] if quick else FACTORS):
        run = Run(rig, work, int(demand / factor), 2 * demand, leave=True, max_batch=1)
        tokens, logits = (
            sum(one != other for one, other in zip(mine, theirs, strict=True))
            for mine, theirs in ((run.tokens, alone.tokens), (run.logits, alone.logits))
        )
        say(f"  {factor:g} times the memory: {run.seconds:.1f} s, {tokens} with other tokens, {logits} with other bits")
        made["factors"][f"{factor:g}"] = run.document() | {
            "demand_over_budget": round(demand / run.budget, 4),
            "token_mismatches": tokens,
            "logits_mismatches": logits,
            "seconds_over_undisturbed": round(run.seconds / alone.seconds, 4),
            "seconds_over_batched": round(run.seconds / batched.seconds, 4),
        }
    return made


@dataclass(frozen=True)
class _Turn:
    number: int
    began: float
    kind: str
    first: Watch
    watch: Watch
    turn: Any


class Run:
    """One engine's run over the work."""

    def __init__(self, rig: KvRig, work: Any, device: int, host: int, *, leave: bool, **options: Any) -> None:
        """``leave``: every turn but the first begins with the cache off the device."""
        prompts, orders, more = work
        self.budget = device
        self.samples: list[list[float]] = []
        self.first_ms: dict[str, list[float]] = {"prompt": [], "here": [], "away": []}
        self.logits: list[list[str]] = [[] for _ in prompts]
        self.left = [0] * len(prompts)  # that others, or the order to suspend, had sent away
        with rig.serving(device, host, **options) as engine:
            self._engine = engine
            began = time.perf_counter()
            ended = threading.Event()
            sampler = threading.Thread(target=self._sample, args=(rig, began, ended), name="samples")
            sampler.start()
            try:
                sessions = [rig.do(engine.create) for _ in prompts]
                self.resumed = [0] * len(sessions)
                self._round(rig, sessions, range(len(sessions)), prompts, leave=False, prompt=True)
                for order, texts in zip(orders, more, strict=True):
                    self._round(rig, sessions, order, texts, leave=leave)
            finally:
                ended.set()
                sampler.join()
            self.seconds = time.perf_counter() - began
            self.tokens = [list(session.tokens) for session in sessions]
            self.completed = sum(
                len(session.tokens) == len(prompt) + TURNS * (READ + WRITE) + WRITE
                for session, prompt in zip(sessions, prompts, strict=True)
            )
            self.report = rig.do(engine.memory.report)
            self.waited = list(engine.memory.residency.counters.waited_s)

    def _round(self, rig: KvRig, sessions: Any, order: Any, texts: Any, *, leave: bool, prompt: bool = False) -> None:
        """Each session's turn, so many at once."""
        under_way: list[_Turn] = []
        for number in order:
            if len(under_way) >= AT_ONCE:
                self._finish(under_way.pop(0))
            session = sessions[number]
            away = rig.do(lambda session=session: not session.cache.shown)
            self.left[number] += away
            if leave and not away:
                moved(rig, self._engine, session, "suspend")
                away = True
            if session.suspended:
                rig.do(self._engine.wake, session)
            self.resumed[number] += away
            first = Watch()
            session.listeners[:] = [first]
            began, watch = rig.begin(session, texts[number], WRITE, keep_logits=True)
            kind = "prompt" if prompt else "away" if away else "here"
            under_way.append(_Turn(number, began, kind, first, watch, session.turn))
        for one in under_way:
            self._finish(one)

    def _finish(self, one: _Turn) -> None:
        at, _ = one.first.until("token")
        one.watch.until("done")
        self.first_ms[one.kind].append((at - one.began) * 1000)
        self.logits[one.number].append(hashlib.blake2b(one.turn.logits.numpy(), digest_size=16).hexdigest())

    def _sample(self, rig: KvRig, began: float, ended: threading.Event) -> None:
        while not ended.wait(_SAMPLE):
            # Read from beside: numbers that may be a moment old.
            memory = self._engine.memory
            size = memory.arena.memory.size
            self.samples.append(
                [
                    round(time.perf_counter() - began, 3),
                    (memory.arena.memory.places - memory.arena.free) * size,
                    (memory.pager.host.slots - memory.pager.host.free) * size,
                    memory.pager.out.bytes,
                    memory.pager.into.bytes,
                    memory.residency.waiting,
                ]
            )

    def document(self) -> Document:
        """All that was seen, as JSON."""
        report = self.report
        return {
            "seconds": round(self.seconds, 3),
            "budget_bytes": self.budget,
            "completed": self.completed,
            "resumed_least": min(self.resumed),
            "left_by_themselves": sum(self.left),
            "first_token_ms": {kind: quantity(times) if times else None for kind, times in self.first_ms.items()},
            "waited_ms": quantity([seconds * 1000 for seconds in self.waited]) if self.waited else None,
            "out_bytes": report["out"]["bytes"],
            "in_bytes": report["in"]["bytes"],
            "out_gbps": _speed(report["out"]),
            "in_gbps": _speed(report["in"]),
            "blocks_left_without_a_copy": report["out"]["spared"],
            "evicted": report["evicted"],
            "preempted": report["preempted"],
            "dropped": report["dropped"],
            "device_bytes_most": int(max((sample[1] for sample in self.samples), default=0)),
            "samples": {
                "columns": ["seconds", "device_bytes", "host_bytes", "out_bytes", "in_bytes", "waiting"],
                "rows": self.samples[:: max(1, len(self.samples) // 1500)],
            },
        }


def _speed(traffic: Any) -> float | None:
    return round(traffic["bytes"] / traffic["seconds"] / 1e9, 4) if traffic["seconds"] else None


def _factors(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


if __name__ == "__main__":
    made = sessions_common.parser("kv_oversubscribe", __doc__, n=10, budget=900)
    made.add_argument("--factors", type=_factors, help="demand over the device's memory (default: 1.15,2,4)")
    raise SystemExit(sessions_common.main("kv_oversubscribe", made, body, rig=KvRig))
