"""The figures of the benchmarks, drawn from their JSON results alone, so that they can be drawn again later.

python -m benchmarks.figures build/demo/demo.json build/demo/ttft.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from benchmarks.environment import in_words
from benchmarks.style import COLOURS, QUIET, REST, STYLE, ink_on, short

_WEDGE = "#F1F1F1"
_OTHER = "everything else"
# Phases whose short names say too little by themselves.
_SAID = {
    "server start": "server start (imports, weights, KV cache)",
    "podman: restore": "podman, runc",
    "criu: processes and memory": "CRIU: processes and their memory",
}
_BAR = 0.62


def ttft(result: dict[str, Any], file: Path) -> Path:
    """Draw `demo.json`: cold start, copying and mapping on one true scale, and the mapped restore again, enlarged.

    Returns ``file``, which is written as a PNG.
    """
    cold, restore = result["cold_ttft_s"], result["restore_ttft_s"]
    cold_parts = _merged(result["phases"]["cold"], at_most=1)
    parts = _merged(result["phases"]["restore"], at_most=len(COLOURS) - 1)
    copy, copy_parts = result["copy_ttft_s"], _merged(result["phases"]["copy"], at_most=1)
    palette = _palette(cold_parts, [*parts, *(part for part in copy_parts if part not in parts)])
    title = f"First token after {short(restore['p50'])} instead of {short(cold)}: {result['speedup']:.0f}× faster"
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(9.2, 4.9))
        scale = figure.add_axes((0.105, 0.5, 0.86, 0.28))
        zoom = figure.add_axes((0.105, 0.18, 0.86, 0.145))
        figure.text(0.02, 0.935, title, fontsize=15, fontweight="bold")
        figure.text(0.02, 0.882, _subtitle(result), fontsize=9.5, color=QUIET)

        clones = result["clones"]
        _stack(scale, 3, cold_parts, palette, gaps=True)
        _stack(scale, 2, copy_parts, palette, gaps=False)
        _stack(scale, 1, [(_OTHER, clones["all_answered_s"])], palette, gaps=False)
        _stack(scale, 0, parts, palette, gaps=False)
        _label_cold(scale, cold_parts, cold, palette)
        for row, seconds in ((2, copy["p50"]), (1, clones["all_answered_s"]), (0, restore["p50"])):
            scale.text(seconds + cold * 0.01, row, short(seconds), va="center", fontweight="bold")
        scale.set_yticks([3, 2, 1, 0], ["cold start", "copied", f"{clones['replicas']} at once", "mapped"])
        scale.set(xlim=(0, cold * 1.09), ylim=(-_BAR / 2, 3 + _BAR / 2 + 0.12))
        scale.xaxis.tick_top()

        _stack(zoom, 0, parts, palette, gaps=True)
        _label_parts(zoom, parts, restore["p50"], palette)
        zoom.set_yticks([0], ["mapped,\nenlarged"])
        zoom.set(xlim=(0, restore["p50"]), ylim=(-_BAR / 2 - 0.12, _BAR / 2))
        zoom.set_xlabel("time from spawning the command to the first streamed token")
        _plain(scale, "top")
        _plain(zoom, "bottom")
        _lens(scale, zoom, restore["p50"])
        figure.text(0.02, 0.025, in_words(result["machine"]), fontsize=7.5, color=QUIET)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
    return file


Parts = list[tuple[str, float]]


def _merged(phases: Sequence[dict[str, Any]], at_most: int, least: float = 0.04) -> Parts:
    """The phases as (name, seconds) in order; all but the ``at_most`` longest, and slivers, become one last part."""
    rows = [(str(row["name"]), float(row["seconds"])) for row in phases]
    total = sum(seconds for _, seconds in rows)
    named = sorted((row for row in rows if row[0] != "unaccounted"), key=lambda row: -row[1])[:at_most]
    kept = {name for name, seconds in named if seconds >= least * total}
    # Signed: an `unaccounted` below zero (a table of medians) takes from the other slivers, so that the bar fits.
    rest = sum(seconds for name, seconds in rows if name not in kept)
    parts = [row for row in rows if row[0] in kept]
    return [*parts, (_OTHER, rest)] if rest > 0 else parts


def _palette(cold: Parts, restore: Parts) -> dict[str, str]:
    """The same phase has the same colour in both; what only the cold start has is coloured from the other end."""
    ours = [name for name, _ in restore if name != _OTHER]
    its = [name for name, _ in cold if name != _OTHER and name not in ours]
    return dict(zip(ours, COLOURS, strict=False)) | dict(zip(its, reversed(COLOURS), strict=False)) | {_OTHER: REST}


def _stack(axes: Axes, row: float, parts: Parts, palette: dict[str, str], *, gaps: bool) -> None:
    begin = 0.0
    for name, seconds in parts:
        # On the true scale a white gap would be wider than the phases that it parts.
        axes.barh(row, seconds, _BAR, left=begin, color=palette[name], edgecolor="white", linewidth=0.8 * gaps)
        begin += seconds


def _label_cold(axes: Axes, parts: Parts, total: float, palette: dict[str, str]) -> None:
    begin = 0.0
    for name, seconds in parts:
        if seconds > 0.3 * total:
            text = f"{_words(name)}: {short(seconds)}"
            axes.text(begin + seconds / 2, 3, text, ha="center", va="center", color=ink_on(palette[name]))
        begin += seconds
    axes.text(total * 1.01, 3, short(total), va="center", fontweight="bold")


def _label_parts(axes: Axes, parts: Parts, total: float, palette: dict[str, str]) -> None:
    """Names above the bar, times inside it; a name that would touch its neighbour's goes one line up."""
    begin = 0.0
    taken = [-1.0, -1.0, -1.0]  # how far each line of names is filled
    led: list[tuple[int, float]] = []  # each name's line and where the line to it stands
    for (name, seconds), (_, following) in zip(parts, [*parts[1:], ("", total)], strict=True):
        middle = begin + seconds / 2
        words = _words(name)
        width = len(words) * 0.0098 * total  # of letters of this size on this figure
        # Not over the line that leads up from the next phase, nor over the bar's ends.
        next_middle = begin + seconds + following / 2
        left = max(min(middle - width / 2, next_middle - width - 0.005 * total, total - width), 0.0)
        line = next((index for index, filled in enumerate(taken) if left > filled), len(taken) - 1)
        # Nor under a name that is higher up, through the line that leads to it.
        if any(line < other and at + 0.005 * total > left for other, at in led):
            left = min(max(at for _, at in led) + 0.01 * total, total - width)
        led.append((line, middle))
        taken[line] = left + width + 0.008 * total
        height = _BAR / 2 + 0.08 + 0.22 * line
        axes.plot([middle, middle], [_BAR / 2, height - 0.01], color=QUIET, linewidth=0.7, clip_on=False)
        axes.text(left + width / 2, height, words, ha="center", va="bottom", fontsize=8.5)
        if seconds > 0.05 * total:
            ink = ink_on(palette[name])
            axes.text(middle, 0, short(seconds), ha="center", va="center", fontsize=8.5, color=ink)
        begin += seconds


def _lens(scale: Axes, zoom: Axes, end: float) -> None:
    """A pale wedge from the small bar to its enlargement, behind everything."""
    figure = scale.figure
    figure.canvas.draw()  # fixes where things are
    corners = [(scale, 0.0), (scale, end), (zoom, end), (zoom, 0.0)]
    edges = {scale: -_BAR / 2, zoom: _BAR / 2}
    points = [axes.transData.transform((x, edges[axes])) for axes, x in corners]
    inside = figure.transFigure.inverted().transform(points)
    figure.add_artist(Polygon(inside, closed=True, facecolor=_WEDGE, edgecolor="none", zorder=-1))
    for axes in (scale, zoom):
        axes.patch.set_visible(False)


def _plain(axes: Axes, keep: str) -> None:
    """No frame but the line with the scale."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == keep)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9, colors=QUIET)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")


def _words(name: str) -> str:
    return _SAID.get(name, name.replace("criu:", "CRIU:"))


def _subtitle(result: dict[str, Any]) -> str:
    restore = result["restore_ttft_s"]
    equal = "same tokens each time" if result["canary_match"] else "TOKENS DIFFER"
    return (
        f"vLLM {result['machine']['vllm']}, {result['model']}. Restores: medians of {restore['n']}, mapped p95 "
        f"{short(restore['p95'])}; {equal}."
    )


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    ttft(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main()
