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

    def due(self, at: Stop) -> bool:
        """Whether the pass stops here."""
        if self.layer is not None and self.layer != at.layer:
            return False
        if self.phase != "any" and (self.phase == "prefill") != (at.step == 0):
            return False
        if self.step is not None and self.step != at.step:
            return False
        if self.position is not None and not at.position <= self.position < at.position + at.tokens:
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
