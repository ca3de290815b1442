"""Edits of the hidden state between two layers.

``scale``    h · factor
``add``      h + factor · v
``set``      factor · v
``project``  h − factor · (h·v̂) v̂, which takes the direction v out where factor is 1 (v̂ is v of length 1)

An edit after layer N changes what the layers behind N read. The keys and values that the layers up to N have written
for these tokens in this step stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit after ``layer`` layers, of the tokens ``first`` ≤ position < ``last`` (None: without limit)."""

    kind: str
    layer: int
    factor: float = 1.0
    vector: Any = None
    first: int = 0
    last: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which dimensions of a model's hidden state count rows and tokens; the last one counts features."""

    rows: int
    tokens: int

    def select(self, hidden: Any, rows: list[int]) -> Any:
        """Some rows of a hidden state, as a copy."""
        return hidden.index_select(self.rows, torch.tensor(rows, device=hidden.device))

    def join(self, parts: list[Any]) -> Any:
        """Hidden states of several sessions as one batch."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.rows)

    def token(self, hidden: Any, row: int) -> Any:
        """The hidden state [features] of a row's last token, as a copy."""
        if hidden.numel() != hidden.shape[-1]:  # else it is all there is
            hidden = hidden.narrow(self.rows, row, 1).narrow(self.tokens, hidden.shape[self.tokens] - 1, 1)
        return hidden.flatten().clone()


def apply(edit: Edit, hidden: Any, layout: Layout, position: int) -> Any:
    """The hidden state of one row, whose first token is at ``position``, after the edit; the given one stays."""
    count = hidden.shape[layout.tokens]
    low = max(edit.first - position, 0)
    high = count if edit.last is None else min(edit.last - position, count)
    if low >= high:
        return hidden
    if low == 0 and high == count:
        return _changed(edit, hidden)
    made = hidden.clone()
    part = made.narrow(layout.tokens, low, high - low)
    part.copy_(_changed(edit, part))
    return made


def _changed(edit: Edit, state: Any) -> Any:
    if edit.kind == "scale":
        return state * edit.factor
    vector = edit.vector.to(device=state.device, dtype=state.dtype)
    if edit.kind == "add":
        return state + edit.factor * vector
    if edit.kind == "set":
        return (edit.factor * vector).expand_as(state).contiguous()
    unit = vector / vector.norm()
    return state - edit.factor * (state * unit).sum(dim=-1, keepdim=True) * unit
