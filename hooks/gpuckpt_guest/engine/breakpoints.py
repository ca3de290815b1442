"""When a generation stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold at the stop, all of it. Entropies are in nats."""

    tokens: frozenset[int] | None = None  # the last token that the pass reads is one of these
    entropy_above: float | None = None  # of the next token, by the model's own head on the hidden state at the stop
    entropy_below: float | None = None
    norm_above: float | None = None  # of the last token's hidden state
    norm_below: float | None = None


@dataclass(slots=True, eq=False)
class Breakpoint:
    """A stop after ``layer`` layers: 0 is behind the embeddings, the number of layers before the last norm.

    None stops between any two layers. ``position`` is that of a token in the session, ``step`` counts the passes of one
    generation, of which 0 reads the prompt. ``once``: it goes when it was hit.
    """

    id: str
    layer: int | None
    phase: str = "any"
    position: int | None = None
    step: int | None = None
    condition: Condition = field(default_factory=Condition)
    once: bool = False
    hits: int = 0

    def ahead(self, layer: int, step: int, position: int, tokens: int) -> bool:
        """Whether the pass that has run ``layer`` layers could stop here or further on, its condition left aside.

        The pass is the generation's ``step``-th and reads ``tokens`` tokens from ``position`` on.
        """
        return (
            (self.layer is None or self.layer >= layer)
            and (self.phase == "any" or (self.phase == "prefill") == (step == 0))
            and (self.step is None or self.step == step)
            and (self.position is None or position <= self.position < position + tokens)
        )

    def due(self, at: Stop) -> bool:
        """Whether the pass stops here."""
        if self.layer not in (None, at.layer) or not self.ahead(at.layer, at.step, at.position, at.tokens):
            return False
        want = self.condition
        return (
            (want.tokens is None or at.last_token in want.tokens)
            and _within(at.norm, want.norm_above, want.norm_below)
            and _within(at.entropy, want.entropy_above, want.entropy_below)
        )


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a pass of one session is, between two layers. ``norm`` and ``entropy`` are only computed when asked for."""

    layer: int
    step: int
    position: int
    tokens: int
    last_token: int
    norm: Callable[[], float]
    entropy: Callable[[], float]


def _within(value: Callable[[], float], above: float | None, below: float | None) -> bool:
    if above is None and below is None:
        return True
    found = value()
    return (above is None or found > above) and (below is None or found < below)
