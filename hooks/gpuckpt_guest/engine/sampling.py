"""From logits to a token, each session with random numbers of its own.

The draw is made on the host in 64-bit floats from logits in 32-bit floats, one row at a time: what a session gets does
not depend on which others share its batch, nor on the device's generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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
    scaled = logits.to("cpu", torch.float64) / sampling.temperature
    if sampling.top_k:
        scaled, kept = scaled.topk(min(sampling.top_k, scaled.numel()))
    else:
        kept = None
    if sampling.top_p < 1:
        scaled, order = scaled.sort(descending=True)
        kept = order if kept is None else kept[order]
        shares = scaled.softmax(0)
        # The first token always stays: what is dropped is what lies wholly behind top_p.
        scaled = scaled[: max(1, int((shares.cumsum(0) - shares < sampling.top_p).sum()))]
    chosen = int(torch.multinomial(scaled.softmax(0), 1, generator=random).item())
    return chosen if kept is None else int(kept[chosen].item())


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
