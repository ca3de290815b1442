"""What sessions do over time, for the simulation of policies: agents that call tools, people who chat, bursts.

A trace is made from a seed. Times are seconds, lengths are tokens. The distributions are assumptions, stated here:
turns of agents come in quick succession with tool calls between that last from a fraction of a second to minutes, and
whose length their client knows to within a fifth or so; people think for half a minute or so, and some come back after
a long time; bursts are groups that all work in the same minute and then not for several.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """Something to read and to write. ``idle``: how long the client said, behind it, that it will not go on."""

    pause: float  # since the end of the turn before, or since the begin
    read: int
    write: int
    idle: float | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """One session's turns, the first of them at ``begin``."""

    begin: float
    turns: tuple[Turn, ...]


def agents(chance: random.Random, sessions: int) -> Iterator[Script]:
    """Tool calls: short ones mostly, some builds and test runs of a minute; the client knows about how long."""
    for _ in range(sessions):
        turns, said = [Turn(0.0, int(chance.lognormvariate(7.6, 0.4)), _answer(chance))], list[float | None]()
        for _ in range(chance.randint(6, 14)):
            call = chance.lognormvariate(3.6, 0.6) if chance.random() < 0.35 else chance.lognormvariate(0.7, 0.8)
            said.append(call * chance.lognormvariate(0.0, 0.2))
            turns.append(Turn(call, int(chance.lognormvariate(5.3, 0.9)), _answer(chance)))
        yield _said(chance.uniform(0, 120), turns, [*said, 3600.0])


def chat(chance: random.Random, sessions: int) -> Iterator[Script]:
    """People: nobody says when they come back."""
    for _ in range(sessions):
        turns = [Turn(0.0, int(chance.lognormvariate(5.0, 1.2)), _answer(chance))]
        for _ in range(chance.randint(2, 9)):
            away = chance.lognormvariate(5.6, 0.5) if chance.random() < 0.2 else chance.lognormvariate(3.2, 0.7)
            turns.append(Turn(away, int(chance.lognormvariate(4.2, 0.8)), _answer(chance)))
        yield _said(chance.uniform(0, 300), turns, [None] * len(turns))


def bursts(chance: random.Random, sessions: int) -> Iterator[Script]:
    """Groups that work together, then rest: one long pause between every few short ones, unannounced."""
    for _ in range(sessions):
        group = chance.randrange(4)
        turns = [Turn(0.0, int(chance.lognormvariate(7.0, 0.6)), _answer(chance))]
        for burst in range(3):
            if burst:
                turns.append(Turn(chance.gauss(160, 8), 64, _answer(chance)))
            turns += [Turn(chance.lognormvariate(1.2, 0.5), 64, _answer(chance)) for _ in range(4)]
        yield _said(group * 45 + chance.uniform(0, 10), turns, [None] * len(turns))


def _answer(chance: random.Random) -> int:
    return max(1, int(chance.lognormvariate(4.6, 0.7)))


def _said(begin: float, turns: list[Turn], said: list[float | None]) -> Script:
    told = (Turn(turn.pause, max(1, turn.read), turn.write, idle) for turn, idle in zip(turns, said, strict=True))
    return Script(begin, tuple(told))


def mixed(chance: random.Random, sessions: int) -> Iterator[Script]:
    """A third of each."""
    third = sessions // 3
    yield from agents(chance, third)
    yield from chat(chance, third)
    yield from bursts(chance, sessions - 2 * third)


TRACES: dict[str, Callable[[random.Random, int], Iterator[Script]]] = {
    "agents": agents,
    "chat": chat,
    "bursts": bursts,
    "mixed": mixed,
}
