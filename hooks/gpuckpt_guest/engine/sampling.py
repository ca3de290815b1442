"""From logits to a token, each session with random numbers of its own.

The draw is made on the host in 64-bit floats from logits in 32-bit floats, one row at a time: what a session gets does
not depend on which others share its batch, nor on the device's generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# So many of the most likely tokens are looked at first.
_FIRST = 1024


@dataclass(frozen=True, slots=True)
class Sampling:
    """``temperature`` 0 is greedy; ``top_p`` keeps the most likely tokens that make up so much, ``top_k`` so many."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Scores:
    """Natural logarithms of probabilities, before temperature: the chosen token's and the ``top`` most likely ones'."""

    chosen: float
    top: tuple[tuple[int, float], ...]


def generator(seed: int | None) -> torch.Generator:
    """A generator of random numbers; without a seed, seeded from the process' (which differs between clones)."""
    made = torch.Generator()
    made.manual_seed(int(torch.randint(0, 2**63 - 1, (1,)).item()) if seed is None else seed % 2**63)
    return made


def draw(logits: Any, sampling: Sampling, random: torch.Generator) -> int:
    """One token id out of ``logits`` [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax().item())
    scaled = logits.to("cpu", torch.float64)
    scaled = (scaled - scaled.max()) / sampling.temperature  # the largest is 0: nothing overflows
    shares = scaled.softmax(0)
    kept = None
    if sampling.top_k and sampling.top_k < shares.numel():
        shares, kept = shares.topk(sampling.top_k)
        shares = shares / shares.sum()
    if sampling.top_p < 1:
        shares, order = _likely(shares, sampling.top_p)
        kept = order if kept is None else kept[order]
    # One uniform number, and where it falls in the running sum.
    sums = shares.cumsum(0)
    number = torch.rand((), dtype=torch.float64, generator=random) * sums[-1]
    chosen = int(torch.searchsorted(sums, number, right=True))
    if chosen >= sums.numel() or not shares[chosen]:  # rounding at the very end of the sum
        chosen = int(shares.nonzero()[-1])
    return chosen if kept is None else int(kept[chosen])


def _likely(shares: Any, top_p: float) -> tuple[Any, Any]:
    """The most likely tokens that make up ``top_p``, in order; one at least. What lies wholly behind is dropped."""
    wanted = _FIRST
    while True:
        best, order = shares.topk(min(wanted, shares.numel()))
        before = best.cumsum(0) - best
        count = max(1, int((before < top_p).sum()))
        if count < best.numel() or best.numel() == shares.numel():
            return best[:count], order[:count]
        wanted *= 16  # a flat distribution; sorting it all is dear, and seldom needed


def scores(logits: Any, chosen: int, top: int) -> Scores:
    """Log-probabilities of the chosen and the ``top`` most likely tokens under ``logits`` [vocabulary]."""
    logs = logits.float().log_softmax(-1)
    best: tuple[tuple[int, float], ...] = ()
    if top:
        values, ids = logs.topk(min(top, logs.numel()))
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Scores(float(logs[chosen]), best)


def entropy(logits: Any) -> float:
    """Of the distribution under ``logits`` [vocabulary], in nats."""
    logs = logits.float().log_softmax(-1)
    return float(-(logs.exp() * logs).sum())
