"""Which caches leave the device, and when they come back: decisions, as functions of what is known.

What a cache costs is the time that somebody waits for it: to copy it out before another can come, and to have it back
when it is needed, by copying or by reading its tokens again, whichever takes less. What it brings is the memory, for as
long as it is not needed. So the first to go is who costs least per byte and second. How long it will not be needed is
what the client has said; else, as long again as it has been idle already (of a process of which nothing is known, that
is the estimate that is right within a factor of two as often as not).

No clock is read and nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Seconds: who has just been at work, or is expected this moment, is not thought to wait for no time at all.
_LEAST = 0.02
# A cache that is expected at a known time is brought back this many times its own time before.
_EARLY = 2.0
# Those who compute keep their place until they have computed for so many times what bringing them back costs, or for so
# many seconds: of their own, for those that take turns with many others get little done in a second.
_TENURE, _TENURE_LEAST = 4.0, 0.1


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured: bytes per second each way, seconds that a pass takes and each of its tokens besides."""

    out: float
    into: float
    pass_s: float
    token_s: float

    def replay(self, passes: int, tokens: int) -> float:
        """Seconds to read tokens again in so many passes."""
        return passes * self.pass_s + tokens * self.token_s


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cache that may leave.

    ``bytes`` become free; ``copied`` of them must be copied first. ``idle`` seconds it has not been used; ``expected``:
    in how many its client said that it will go on, None if it said nothing. ``replay``: seconds to compute it again,
    None if that would not give the same bits.
    """

    key: int
    bytes: int
    copied: int
    idle: float
    expected: float | None = None
    replay: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Who leaves; ``drop``: without being copied."""

    key: int
    drop: bool


def leaving(candidates: Iterable[Candidate], needed: int, costs: Costs, space: int) -> list[Choice]:
    """Who leaves so that ``needed`` bytes become free; ``space``: bytes that can be copied out.

    Fewer bytes, or none, if that is all there is.
    """
    chosen: list[tuple[Candidate, bool]] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda one: (score(one, costs), one.key)):
        if freed >= needed:
            break
        drop = _dropped(candidate, costs)
        if not drop and candidate.copied > space:
            if candidate.replay is None:
                continue
            drop = True
        space -= 0 if drop else candidate.copied
        chosen.append((candidate, drop))
        freed += candidate.bytes
    # Small ones may have been chosen before a large one that is enough without them.
    kept = []
    for candidate, drop in reversed(chosen):
        if freed - candidate.bytes >= needed:
            freed -= candidate.bytes
        else:
            kept.append(Choice(candidate.key, drop))
    return kept[::-1]


def score(candidate: Candidate, costs: Costs) -> float:
    """What it costs that a cache leaves, per byte and second."""
    copying = candidate.copied / costs.out + candidate.bytes / costs.into
    least = copying if candidate.replay is None else min(copying, candidate.replay)
    return least / max(1, candidate.bytes) / wait(candidate)


def wait(candidate: Candidate) -> float:
    """For how many seconds it is not thought to be needed."""
    if candidate.expected is not None and candidate.expected > 0:
        return max(_LEAST, candidate.expected)
    return max(_LEAST, candidate.idle)


def _dropped(candidate: Candidate, costs: Costs) -> bool:
    """Whether to compute it again is cheaper than to copy it out and back."""
    copying = candidate.copied / costs.out + candidate.bytes / costs.into
    return candidate.replay is not None and candidate.replay < copying


def early(bytes: int, costs: Costs) -> float:
    """How many seconds before it is expected a cache should be on its way."""
    return _EARLY * bytes / costs.into


def tenure(bytes: int, costs: Costs, replay: float = 0.0) -> float:
    """How many seconds of computing a cache that has been brought back may stay for while others wait.

    ``replay``: seconds to compute it again, if that is how it would come back.
    """
    return max(_TENURE_LEAST, _TENURE * max(replay, bytes / costs.into + bytes / costs.out))
