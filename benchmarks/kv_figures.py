"""The figures of KV paging: what lay where with more sessions than memory, what a cycle costs, weights in turns.

    python -m benchmarks.kv_figures build/bench/kv.json build/bench

Drawn from the samples that the run took, never from a formula; PNG and SVG.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE

Document = dict[str, Any]
_WAYS = {
    "gpuckpt": "gpuckpt: out, back, a token",
    "swap": "whole cache by hand",
    "recompute": "read again in one pass",
    "offloaded": "transformers, offloaded",
}


def draw(document: Document, folder: Path) -> list[str]:
    """Draw what the document has numbers for; the figures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"kv": ("oversubscribe", _sessions), "kv_weights": ("weights", _weights)}
    drawn = []
    with pyplot.rc_context(STYLE):
        for name, (key, made) in known.items():
            if key not in document:
                continue
            figure = made(document)
            for suffix in (".png", ".svg"):
                figure.savefig(
                    folder / f"{name}{suffix}", dpi=150, metadata={"Date": None} if suffix == ".svg" else None
                )
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _sessions(document: Document) -> Figure:
    factors = document["oversubscribe"]["factors"]
    cycles = document.get("baselines", {}).get("cycles", {})
    figure, axes = pyplot.subplots(1, len(factors) + bool(cycles), figsize=(4.2 * (len(factors) + 1), 4.6))
    panels = list(axes) if hasattr(axes, "__len__") else [axes]
    for panel, (factor, run) in zip(panels, factors.items(), strict=False):
        _memory(panel, factor, run)
    if cycles:
        _cycles(panels[-1], cycles)
    sessions = document["oversubscribe"]["sessions"]
    figure.suptitle(
        f"{sessions} sessions in less memory than they need: all answered, tokens as undisturbed"
        if not document.get("token_mismatches") and document.get("completed_share") == 1
        else f"{sessions} sessions in less memory than they need: NOT all as undisturbed",
        x=0.012, ha="left", fontsize=14 if len(panels) > 2 else 11, fontweight="bold",
    )  # fmt: skip
    machine = document["machine"]
    quick = "A trial, not a measurement. " if document["options"]["quick"] else ""
    words = (
        f"{quick}Bytes in use, sampled every 50 ms while it ran; dashed: the device's budget. Right: median of n "
        f"cycles and 95 % interval. {machine['cpu_model']}, {machine['cores']} cores."
    )
    figure.text(0.012, 0.01, "\n".join(textwrap.wrap(words, 150)), fontsize=7, color=QUIET, va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 0.97))
    return figure


def _memory(axes: Axes, factor: str, run: Document) -> None:
    rows = run["samples"]["rows"]
    times = [row[0] for row in rows]
    axes.plot(times, [row[2] / 1e9 for row in rows], color=COLOURS[1], label="host memory")
    axes.plot(times, [row[1] / 1e9 for row in rows], color=COLOURS[0], label="device")
    axes.axhline(run["budget_bytes"] / 1e9, color=INK, linestyle="--", linewidth=1)
    moved = (run["out_bytes"] + run["in_bytes"]) / 1e9
    axes.set_title(
        f"demand {run['demand_over_budget']:.2f} × the device\n{moved:.1f} GB moved, "
        f"{run['seconds_over_undisturbed']:.2f} × the time",
        loc="left", fontsize=10,
    )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, loc="lower right")


def _cycles(axes: Axes, cycles: Document) -> None:
    length, ways = max(cycles.items(), key=lambda item: int(item[0]))
    named = [(who, ways[who]) for who in _WAYS if who in ways]
    for place, (who, found) in enumerate(named):
        low, high = found["interval"]
        axes.barh(place, found["p50"], color=COLOURS[0] if who == "gpuckpt" else REST, height=0.6)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
        axes.text(0, place - 0.38, f"{_WAYS[who]}: {found['p50']:.1f} ms, n = {found['n']}", fontsize=8, va="bottom")
    axes.set(yticks=[], ylim=(len(named) - 0.5, -0.7), xlabel="ms", xlim=(0, None))
    axes.set_title(f"one session of {length} tokens leaves,\ncomes back and writes a token", loc="left", fontsize=10)


def _note(document: Document) -> str:
    same = "NOT the tokens of all layers" if document["weights"]["token_mismatches"] else "tokens as with all"
    quick = "A trial, not a measurement. " if document["options"]["quick"] else ""
    machine = document["machine"]
    return f"{quick}Median and 95 % interval; {same}. {machine['cpu_model']}, {machine['cores']} cores."


def _weights(document: Document) -> Figure:
    found = document["weights"]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    whole = found["fit"][str(found["layers"])]["token_ms"]
    for prefetch, colour, words in ((True, COLOURS[0], "copied ahead"), (False, COLOURS[1], "copied when needed")):
        fits = sorted((int(name.split(",")[0]), fit["token_ms"]) for name, fit in found["fit"].items()
                      if fit.get("prefetch") is prefetch)  # fmt: skip
        points = [*fits, (found["layers"], whole)]
        values = [it["p50"] for _, it in points]
        spread = [
            [it["p50"] - it["interval"][0] for _, it in points],
            [it["interval"][1] - it["p50"] for _, it in points],
        ]
        axes.errorbar([fit for fit, _ in points], values, spread, color=colour, marker="o", capsize=2, label=words)
    axes.set(xlabel="layers on the device", ylabel="ms a token", ylim=(0, None), xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower left")
    figure.suptitle(
        f"{document['settings'][next(key for key in document['settings'] if key.startswith('weights'))]['model']}: "
        f"{found['layers']} layers, on a device that holds fewer",
        x=0.02, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    figure.text(0.02, 0.01, _note(document), fontsize=7, color=QUIET)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
