"""The figures of the session engine's results, each drawn from the merged document alone.

    python -m benchmarks.session_figures build/bench/sessions.json build/bench

What was not measured is left out; every figure has n, units, and the machine in its last line; PNG and SVG.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE

Document = dict[str, Any]
Drawn = tuple[Figure, str, str]  # a figure, its title, what is to be known beside it
_WAYS = {
    "recompute": "whole pass again",
    "nnsight": "nnsight, layers before skipped",
    "http": "gpuckpt, over HTTP",
    "engine": "gpuckpt, in process",
    "offload": "hand-written offload",
}


def draw(document: Document, folder: Path) -> list[str]:
    """Draw the figures that the document has numbers for, as PNG and SVG; their names."""
    figures: dict[str, tuple[str, Callable[[Document], Drawn]]] = {
        "sessions_crossover": ("resume_ms", crossover),
        "sessions_interference": ("interference_ratio", interference),
        "sessions_branching": ("branch_cost", branching),
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (key, function) in figures.items():
        if not document.get(key):
            continue
        with pyplot.rc_context(STYLE):
            figure, title, note = function(document)
            _finish(figure, document, title, note)
            for suffix in (".png", ".svg"):
                metadata = {"Date": None} if suffix == ".svg" else None
                figure.savefig(folder / f"{name}{suffix}", dpi=150, metadata=metadata)
            pyplot.close(figure)
        drawn.append(name)
    return drawn


def _finish(figure: Figure, document: Document, title: str, note: str) -> None:
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.34 / height, title, fontsize=14, fontweight="bold")
    quick = "A trial, not a measurement. " if document["options"]["quick"] else ""
    setting = next(iter(document["settings"].values()))
    machine = document["machine"]
    where = setting["device"] if setting["device"] != "cpu" else f"{machine['cpu_model']}, {machine['cores']} cores"
    words = f"{quick}{note} {where}; torch {setting['torch']}, transformers {setting['transformers']}"
    lines = textwrap.wrap(words, int(figure.get_figwidth() * 18))
    figure.text(0.012, 0.1 / height, "\n".join(lines), fontsize=7, color=QUIET, va="bottom")


def crossover(document: Document) -> Drawn:
    """How long until the token, by the layer after which the pass stopped: every way, and the floor."""
    panels = [
        (model, phase, layers) for model, phases in document["resume_ms"].items() for phase, layers in phases.items()
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(1.0 + 3.5 * len(panels), 4.8), squeeze=False)
    # Two panels leave no room for one row of names.
    columns = len(_WAYS) + 1 if len(panels) > 2 else 3
    bottom = 0.25 if len(panels) > 2 else 0.3
    figure.subplots_adjust(left=0.62 / figure.get_figwidth(), right=0.985, top=0.78, bottom=bottom, wspace=0.22)
    colours = dict(zip(_WAYS, (QUIET, COLOURS[3], COLOURS[1], COLOURS[0], COLOURS[2]), strict=True))
    settings = {setting["model"]: setting for setting in document["settings"].values()}
    resumed = {part["model"]: part for key, part in document["settings"].items() if key.startswith("resume")}
    least = 10**9
    for panel, (model, phase, layers) in zip(axes[0], panels, strict=True):
        places = [int(layer) for layer in layers]
        floor = document["tail_floor_ms"][model][phase]
        panel.fill_between(places, [floor[str(layer)]["p50"] for layer in places], color="#EEEEEE", label="floor")
        for way, label in _WAYS.items():
            values = [layers[str(layer)].get(way) for layer in places]
            if not all(values):
                continue
            middles = [value["p50"] for value in values]
            least = min([least, *(value["n"] for value in values)])
            errors = [
                [middle - value["interval"][0] for middle, value in zip(middles, values, strict=True)],
                [value["interval"][1] - middle for middle, value in zip(middles, values, strict=True)],
            ]
            panel.errorbar(
                places, middles, yerr=errors, fmt="o--" if way == "recompute" else "o-", color=colours[way],
                label=label, capsize=2.5, linewidth=1.5, markersize=4.5,
            )  # fmt: skip
            if way == "http":
                for place, middle in zip(places, middles, strict=True):
                    panel.annotate(f"{middle:.3g}", (place, middle), xytext=(4, 6), textcoords="offset points",
                                   fontsize=7.5, color=INK)  # fmt: skip
        what = f"{resumed[model]['prompt']} tokens" if phase == "prefill" else "one token"
        panel.set_title(f"{model}\n{settings[model]['dtype']}, {what}", fontsize=9.5)
        panel.set_xticks(places)
        panel.set_ylim(bottom=0)
        panel.margins(x=0.08, y=0.12)
        panel.set_xlabel(f"layers run before the stop, of {settings[model]['layers']}")
        panel.grid(axis="y", color="#EEEEEE")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("ms until the token")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8.5, ncols=columns, loc="lower center",
                  bbox_to_anchor=(0.5, 0.075))  # fmt: skip
    note = f"Medians and their 95 % intervals, n ≥ {least}, in turn; floor: the remaining layers and the head alone."
    return figure, "Going on from a stop, or computing anew", note


def interference(document: Document) -> Drawn:
    """The distribution of B's times per token, with and without a copy in flight."""
    found = document["interference_ratio"]
    runs = [found, found["large"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4.3), squeeze=False)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.76, bottom=0.22, wspace=0.16)
    for panel, run in zip(axes[0], runs, strict=True):
        low, high = run["interval"]
        for side, label, colour in (("below", "alone", REST), ("above", "a copy in flight", COLOURS[0])):
            values = sorted(run[side]["samples"])
            shares = [(index + 1) / len(values) for index in range(len(values))]
            panel.step(
                values, shares, where="post", color=colour, linewidth=2, label=f"{label}: p50 {run[side]['p50']:.2f} ms"
            )
        both = sorted(run["below"]["samples"] + run["above"]["samples"])
        # The slowest few, whatever held them up, would squeeze the rest into a line.
        panel.set_xlim(both[0] * 0.98, both[int(len(both) * 0.98)] * 1.02)
        panel.set(xlabel="ms per token of B", ylim=(0, 1.02))
        panel.set_title(f"{run['bytes'] / 1e6:.2g} MB each: {run['value']:.3f} × ({low:.3f} – {high:.3f})", fontsize=10)
        panel.legend(frameon=False, fontsize=8.5, loc="lower right")
        panel.grid(color="#EEEEEE")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of tokens that came by then")
    note = (
        f"{found['n']} pairs of tokens, one with a checkpoint of A in flight, one without; the slowest 2 % not shown."
    )
    return figure, "A session's tokens while another's checkpoint is copied", note


def branching(document: Document) -> Drawn:
    """Whole runs one after the other against branches from the middle."""
    found = document["branch_cost"]
    figure, axes = pyplot.subplots(figsize=(9.2, 0.5 + 1.45 * len(found)))
    figure.subplots_adjust(left=0.16, right=0.97, top=0.8, bottom=0.28)
    rows: list[str] = []
    for count, run in sorted(found.items(), key=lambda item: -int(item[0])):
        full, prefix, tails = (run[key]["p50"] for key in ("below", "prefix_ms", "tails_ms"))
        place = len(rows)
        axes.barh(place, prefix, 0.6, color=COLOURS[4], label=None if rows else "layers up to the stop, once")
        axes.barh(place, tails, 0.6, left=prefix, color=COLOURS[0], label=None if rows else "the rest, as one batch")
        axes.text(prefix + tails, place, f"  {run['above']['p50']:.0f} ms, {run['value']:.2f} × (layers alone: "
                  f"{run['least']:.2f})", va="center", fontsize=9, color=INK)  # fmt: skip
        axes.barh(place + 1, full, 0.6, color=REST, label=None if rows else "whole runs")
        axes.text(full, place + 1, f"  {full:.0f} ms", va="center", fontsize=9, color=INK)
        rows += [f"{count} branches", f"{count} whole runs"]
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("ms until all have their token (median)")
    axes.margins(x=0.2)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.99))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    setting = next(part for key, part in document["settings"].items() if key.startswith("branch"))
    layer = next(iter(found.values()))["layer"]
    note = (
        f"{setting['model']} in {setting['dtype']}, a prompt of {setting['prompt']} tokens, variants after layer "
        f"{layer} of {setting['layers']}; n = {min(run['n'] for run in found.values())} pairs, in turn."
    )
    return figure, "Variants from the middle of a pass", note


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    print(*draw(json.loads(source.read_text()), target), sep="\n")


if __name__ == "__main__":
    main()
