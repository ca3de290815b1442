"""What the pool's demo says in tables, out of its results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.environment import in_words
from benchmarks.pool_client import Reply
from benchmarks.style import short, size
from benchmarks.terminal import Terminal

TIERS = ("cold", "tmpfs", "standby", "hot")
_COLUMN = 11


def times(name: str, reply: Reply, terminal: Terminal) -> str:
    """One answer on a line: the tier that it found and when its first token came, by our clock and the service's."""
    told = reply.told.get("total")
    service = f" (the service: {short(told)})" if told is not None else ""
    words = f"tier {reply.tier:<8} first token after {terminal.bold(short(reply.first_s)):>8}{service}"
    return f"{name:<8} {words}" if name else words


def memory_table(found: Mapping[str, Any]) -> list[str]:
    """What each model holds, against its server started by itself."""
    rows = [("", "started separately", "golden (once)", "a replica's own", "a replica's Pss")]
    alone: list[int | None] = []
    for name, held in found["models"].items():
        cold = held["cold"]
        alone.append(cold["alone_bytes"] if cold else None)
        rows.append(
            (
                name,
                size(cold["alone_bytes"]) if cold else "not seen",
                *(size(held[key]) for key in ("golden_bytes", "own_bytes", "pss_bytes")),
            )
        )
    lines = [f"  {row[0]:<9}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows]
    taken = found["available_before"] - found["available_with_all"]
    lines += [
        "  Started separately: anonymous and shared memory of the server that the golden was made of, before it was",
        "  frozen. Own: what a replica has written to; the rest it shares with the golden and with its siblings.",
        f"  The machine's available memory fell by {size(taken)} with three goldens, three hot replicas, the service.",
    ]
    if all(value is not None for value in alone):
        lines.append(f"  Servers by themselves, one of each, take {size(sum(value or 0 for value in alone))}.")
    return lines


def result_table(result: Mapping[str, Any]) -> list[str]:
    """Time to the first token by model and tier, and the rest in a line each."""
    lines = [
        f"  {'first token after, p50':<24}" + "".join(f"{tier:>{_COLUMN}}" for tier in TIERS) + "     cold / tmpfs"
    ]
    for name, tiers in result["ttft_s"].items():
        values = {tier: tiers[tier]["p50"] for tier in TIERS if tier in tiers}
        cells = "".join(f"{short(values[tier]) if tier in values else '–':>{_COLUMN}}" for tier in TIERS)
        gain = f"{values['cold'] / values['tmpfs']:.0f} ×" if {"cold", "tmpfs"} <= values.keys() else "–"
        lines.append(f"  {name:<24}{cells}{gain:>17}")
    counts = {tier: min((tiers[tier]["n"] for tiers in result["ttft_s"].values() if tier in tiers), default=0)
              for tier in TIERS}  # fmt: skip
    lines.append(f"  {'n at least':<24}" + "".join(f"{counts[tier]:>{_COLUMN}}" for tier in TIERS))
    killed, burst = result["killed"], result["burst"]
    lines += [
        "",
        f"  killed with -9 at work: answered after {short(killed['answered_s'])} instead of "
        f"{short(killed['undisturbed_s'])}, {'the same words' if killed['same_text'] else 'OTHER WORDS'}",
        f"  {burst['streams']} streams at once: {burst['replicas']} replicas, first tokens within "
        f"{short(max(burst['first_s']))}, whole answers within {short(max(burst['whole_s']))}",
        f"  {in_words(result['machine'])}; load at the begin {result['load_average'][0]:.1f}",
    ]
    return lines
