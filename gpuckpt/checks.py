"""A precondition as data: what was found, why it matters, and what mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

Verdict = Literal["ok", "warn", "fail", "skip"]


class Check(Struct, frozen=True):
    """One line of ``gpuckpt doctor``.

    ``verdict``: ``fail`` stops create and restore, ``warn`` does not, ``skip`` means it does not apply here.
    ``mend``: the exact command that mends it, or None. ``apply``: the same as a function, where it is safe to run
    unasked by ``--fix`` (it changes nothing that the user may have set on purpose).
    """

    id: str
    title: str
    verdict: Verdict
    found: str
    why: str
    mend: str | None = None
    apply: Callable[[], None] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "verdict": self.verdict,
            "found": self.found,
            "why": self.why,
            "mend": self.mend,
            "safe_to_fix": self.apply is not None,
        }
