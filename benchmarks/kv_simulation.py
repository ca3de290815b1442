"""Policies over traces: who waits how long for a cache that is not on the device.

The guest's own decisions (gpuckpt_guest.kv.policy) against the least recently used, keeping all, and computing all
again. A discrete simulation: one bus with a bandwidth each way, each used by one copy after the other; a turn that
finds its cache on the device begins at once, else it waits for room, and for its bytes or for what makes them anew.
Computing itself is the same for all policies, and is not contended for: what is counted is what turns wait beside it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.kv_traces import TRACES, Script
from hooks.gpuckpt_guest.kv import policy
from hooks.gpuckpt_guest.kv.policy import Candidate, Choice, Costs


@dataclass
class Machine:
    """A device: ``budget`` bytes for caches, of ``token_bytes`` each token; seconds as measured."""

    budget: int
    token_bytes: int
    costs: Costs


@dataclass(eq=False)
class _Session:
    script: Script
    key: int
    turn: int = 0
    tokens: int = 0
    passes: int = 0
    resident: bool = False
    clean: int = 0  # tokens that have a copy in host memory
    dropped: bool = False
    busy: bool = False
    used: float = 0.0
    expected: float | None = None
    asked: float = 0.0  # when the turn that waits came
    free_at: float = 0.0  # when the copy that brings it in is done


Chooser = Callable[[Sequence[Candidate], int, Costs], list[Choice]]


def ours(candidates: Sequence[Candidate], needed: int, costs: Costs) -> list[Choice]:
    return policy.leaving(candidates, needed, costs, 1 << 62)


def lru(candidates: Sequence[Candidate], needed: int, costs: Costs) -> list[Choice]:
    """The one that was used longest ago first, always by copying."""
    return _oldest(candidates, needed, drop=False)


def recompute(candidates: Sequence[Candidate], needed: int, costs: Costs) -> list[Choice]:
    """The one that was used longest ago first; nothing is copied."""
    return _oldest(candidates, needed, drop=True)


def keep(candidates: Sequence[Candidate], needed: int, costs: Costs) -> list[Choice]:
    """Nobody leaves; who finds no room is turned away."""
    return []


def _oldest(candidates: Sequence[Candidate], needed: int, *, drop: bool) -> list[Choice]:
    chosen, freed = [], 0
    for candidate in sorted(candidates, key=lambda one: -one.idle):
        if freed >= needed:
            break
        chosen.append(Choice(candidate.key, drop))
        freed += candidate.bytes
    return chosen


POLICIES: dict[str, tuple[Chooser, bool]] = {  # and whether what clients say is used to bring caches back early
    "gpuckpt": (ours, True),
    "unhinted": (ours, False),
    "lru": (lru, False),
    "recompute": (recompute, False),
    "keep": (keep, False),
}


@dataclass
class Outcome:
    """Seconds that each turn waited, those turned away, and bytes copied each way."""

    waits: list[float] = field(default_factory=list)
    refused: int = 0
    out: int = 0
    into: int = 0
    recomputed: int = 0

    def add(self, other: Outcome) -> None:
        """Take the other's numbers in."""
        self.waits += other.waits
        self.refused += other.refused
        self.out += other.out
        self.into += other.into
        self.recomputed += other.recomputed

    def summary(self) -> dict[str, Any]:
        """As JSON: seconds, bytes, counts."""
        ordered = sorted(self.waits)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

        return {
            "turns": len(ordered),
            "refused": self.refused,
            "waited_s": round(math.fsum(ordered), 3),
            "p50_ms": round(at(0.5) * 1e3, 3),
            "p99_ms": round(at(0.99) * 1e3, 3),
            "out_bytes": self.out,
            "in_bytes": self.into,
            "recomputed_tokens": self.recomputed,
        }


class Simulation:
    """One policy over one trace."""

    def __init__(self, machine: Machine, scripts: Iterable[Script], choose: Chooser, *, early: bool) -> None:
        self.machine = machine
        self.outcome = Outcome()
        self._choose = choose
        self._early = early
        self._sessions = [_Session(script, key) for key, script in enumerate(scripts)]
        self._used = 0  # tokens on the device
        self._out_free = self._in_free = self._now = 0.0
        self._events: list[tuple[float, int, str, _Session]] = []
        self._order = itertools.count()
        self._waiting: list[_Session] = []
        for session in self._sessions:
            self._at(session.script.begin, "turn", session)

    def run(self) -> Outcome:
        """Until all scripts have ended."""
        while self._events:
            self._now, _, what, session = heapq.heappop(self._events)
            getattr(self, f"_{what}")(session)
        return self.outcome

    def _at(self, when: float, what: str, session: _Session) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, session))

    # ------------------------------------------------------------------ what happens

    def _turn(self, session: _Session) -> None:
        session.asked, session.expected = self._now, None
        self._waiting.append(session)
        self._serve()

    def _serve(self) -> None:
        for session in list(self._waiting):
            if not self._begin(session):
                return  # in the order in which they came

    def _begin(self, session: _Session) -> bool:
        turn = session.script.turns[session.turn]
        grows = turn.read + turn.write
        need = grows + (0 if session.resident else session.tokens)
        if not self._room(need, session):
            if self._choose is not keep:
                return False
            self._waiting.remove(session)  # and the rest of its turns never come
            self.outcome.refused += 1
            return True
        self._waiting.remove(session)
        ready = max(self._now, self._out_free if self._made_room else self._now, session.free_at)
        if not session.resident:
            ready = self._bring(session, ready)
        self._used += grows
        session.busy, session.tokens = True, session.tokens + grows
        # Ours must give the same bits; who reads all tokens in one pass gets others, but is done sooner.
        session.passes = 1 if self._choose is recompute else session.passes + 1 + turn.write
        self.outcome.waits.append(ready - session.asked)
        computing = self.machine.costs.replay(1 + turn.write, turn.read)
        self._at(ready + computing, "end", session)
        return True

    def _bring(self, session: _Session, ready: float) -> float:
        costs, bytes = self.machine.costs, session.tokens * self.machine.token_bytes
        self._used += session.tokens
        session.resident = True
        if session.dropped:
            session.dropped = False
            self.outcome.recomputed += session.tokens
            return ready + costs.replay(session.passes, session.tokens)
        begin = max(ready, self._in_free)
        self._in_free = begin + bytes / costs.into
        self.outcome.into += bytes
        session.free_at = self._in_free
        return self._in_free

    def _end(self, session: _Session) -> None:
        session.busy, session.used = False, self._now
        said = session.script.turns[session.turn].idle
        session.turn += 1
        if session.turn < len(session.script.turns):
            self._at(self._now + session.script.turns[session.turn].pause, "turn", session)
            if self._early and said is not None:
                session.expected = self._now + said
                size = session.tokens * self.machine.token_bytes
                self._at(max(self._now, session.expected - policy.early(size, self.machine.costs)), "fetch", session)
        else:
            self._used -= session.tokens if session.resident else 0
            session.resident, session.tokens = False, 0  # it has ended
        self._serve()

    def _fetch(self, session: _Session) -> None:
        """It is expected soon: if there is room that nobody waits for, it is brought back."""
        if session.resident or session.busy or session.expected is None or self._waiting or session in self._waiting:
            return
        if session.tokens and self._used + session.tokens <= self.machine.budget // self.machine.token_bytes:
            self._bring(session, self._now)
            session.expected = None

    # ------------------------------------------------------------------ room

    def _room(self, tokens: int, session: _Session) -> bool:
        width = self.machine.token_bytes
        lacking = self._used + tokens - self.machine.budget // width
        self._made_room = lacking > 0
        if lacking <= 0:
            return True
        candidates = [
            Candidate(
                key=other.key,
                bytes=other.tokens * width,
                copied=(other.tokens - other.clean) * width,
                idle=self._now - other.used,
                expected=None if other.expected is None else other.expected - self._now,
                replay=self.machine.costs.replay(other.passes, other.tokens),
            )
            for other in self._sessions
            if other.resident
            and not other.busy
            and other is not session
            and other.tokens
            and other not in self._waiting
            and other.free_at <= self._now
        ]
        chosen = self._choose(candidates, lacking * width, self.machine.costs)
        if sum(self._sessions[choice.key].tokens for choice in chosen) < lacking:
            return False
        for choice in chosen:
            other = self._sessions[choice.key]
            other.resident = False
            self._used -= other.tokens
            if choice.drop:
                other.dropped, other.clean = True, 0
            else:
                copied = (other.tokens - other.clean) * width
                self._out_free = max(self._now, self._out_free) + copied / self.machine.costs.out
                self.outcome.out += copied
                other.clean = other.tokens
        return True


def compare(token_bytes: int, costs: Costs, sessions: int, *, seeds: Iterable[int], share: float) -> dict[str, Any]:
    """All policies over all traces, the same for each, by trace.

    The device's memory is ``share`` of what the sessions of a trace come to in the end. ``gain_over_lru``: the seconds
    that turns wait with LRU, over those with ours, all seeds together.
    """
    found: dict[str, Any] = {}
    for name, make in TRACES.items():
        outcomes: dict[str, Outcome] = {who: Outcome() for who in POLICIES}
        for seed in seeds:
            scripts = list(make(random.Random(seed), sessions))
            whole = sum(turn.read + turn.write for script in scripts for turn in script.turns)
            largest = max(sum(turn.read + turn.write for turn in script.turns) for script in scripts)
            machine = Machine(max(int(whole * share), 2 * largest) * token_bytes, token_bytes, costs)
            for who, (choose, early) in POLICIES.items():
                outcomes[who].add(Simulation(machine, scripts, choose, early=early).run())
        mine, others = (sum(outcomes[who].waits) for who in ("gpuckpt", "lru"))
        found[name] = {
            "policies": {who: outcome.summary() for who, outcome in outcomes.items()},
            "gain_over_lru": round(others / mine, 4) if mine else math.inf,
        }
    return found
