"""Whether a session's tokens come later while another's checkpoint is being copied.

Session B decodes. Before every second token, in pairs of which one has it and one has not, the engine dispatches a
checkpoint of session A's activation, which flies while B's layers run; B's time holds the dispatch too. The ratio is
the median over the pairs, so what B's growing context costs falls out.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig, Watch, paired, quantity

_WARM = 4  # tokens before the first pair
_LARGE = 8_000_000  # bytes of the second, larger checkpoint


class Copies(Watch):
    """B's sink. On the engine's thread, between B's tokens: notes the time; sends A's checkpoint off or does not."""

    def __init__(self, rig: Rig, tensor: Any, pairs: int) -> None:
        super().__init__()
        self._ring = rig.engine.ring
        self._tensor = tensor
        # For each token after the warm-up: with a copy or without; each pair in an order of its own.
        self._plan = [copied for _ in range(pairs) for copied in rig.shuffled((True, False))]
        self._seen = 0
        self._began = 0.0
        self._flying: Any = None
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.landed_us: list[float] = []

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.perf_counter()
        if event["type"] == "token":
            index = self._seen - _WARM
            if 0 <= index < len(self._plan):
                self.times[self._plan[index]].append(now - self._began)
            if self._flying is not None:
                self._flying.wait()
                self.landed_us.append(self._flying.complete_us)
                self._ring.drop(self._flying)
                self._flying = None
            self._seen += 1
            index += 1
            self._began = time.perf_counter()
            if 0 <= index < len(self._plan) and self._plan[index]:
                self._flying = self._ring.save(self._tensor)
        super().__call__(event)


def measure(rig: Rig, size: int, pairs: int) -> Document:
    """B's time per token with and without a checkpoint of ``size`` bytes in flight."""
    tensor = rig.do(lambda: rig.torch.randn(size // 4, device=rig.device))
    session = rig.session()
    copies = Copies(rig, tensor, pairs)
    from hooks.gpuckpt_guest.engine.engine import Request

    # One more: a copy is dropped when the token behind it comes.
    wanted = Request(read=rig.prompt(64), max_tokens=_WARM + 2 * pairs + 1, ignore_stops=True)
    rig.do(rig.engine.generate, session, wanted, copies)
    copies.until("done")
    rig.do(rig.engine.delete, session)
    milliseconds = {copied: [taken * 1000 for taken in times] for copied, times in copies.times.items()}
    return {
        "bytes": size,
        **paired(milliseconds[True], milliseconds[False]),
        "complete_us": quantity(copies.landed_us),
        "unit": "ms per token of B; above: with a copy in flight",
    }


def body(rig: Rig) -> Document:
    # What A's stop in the middle of its prompt has to copy.
    own = rig.options.prompt * rig.loaded.features * rig.loaded.dtype.itemsize
    room = (rig.loaded.limit - 64 - _WARM - 1) // 2
    pairs = min(rig.options.n, room)
    # Two runs each, in turn: the second is what tells chance from a difference.
    found: dict[str, list[Document]] = {"own": [], "large": []}
    for _ in rig.rounds(1 if rig.quick else 2, f"{pairs} pairs of tokens, with two sizes"):
        for name, size in rig.shuffled([("own", own), ("large", _LARGE)]):
            found[name].append(measure(rig, size, pairs))
    return {name: joined(runs) for name, runs in found.items()}


def joined(runs: list[Document]) -> Document:
    """Several runs of the same as one."""
    sides = {side: [value for run in runs for value in run[side]["samples"]] for side in ("above", "below")}
    return {
        **runs[0],
        **paired(sides["above"], sides["below"]),
        "complete_us": quantity([value for run in runs for value in run["complete_us"]["samples"]]),
        "of_each_run": [run["value"] for run in runs],
    }


if __name__ == "__main__":
    raise SystemExit(
        sessions_common.main(
            "sessions_interference",
            sessions_common.parser("sessions_interference", __doc__, n=200, budget=120),
            body,
        )
    )
