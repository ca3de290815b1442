"""The figures of the acceptance on a GPU, drawn from its document alone: what was not measured is not in them.

    python -m benchmarks.gpu_figures build/bench/gpu.json build/bench

A dry run's figures have names of their own and bear in large letters that nothing in them was measured. They have no
numbers at their axes: only that every part can be drawn is to be seen.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.gpu_record import Document
from benchmarks.gpu_summary import TARGETS, numbers
from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE, short, size

DRY = "DRY RUN\nnothing was measured"
_TIERS = ("running", "suspended", "awake")


def draw(document: Document, folder: Path) -> list[str]:
    """Draw what the document has numbers for, as PNG and SVG; the figures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    found = numbers(document["steps"])  # of a dry run, too: here, and only here, it is seen, and marked
    figures: dict[str, Callable[[Document, Document], Figure | None]] = {
        "suspend": _suspend, "servers": _servers, "memory": _memory,
    }  # fmt: skip
    drawn = []
    with pyplot.rc_context(STYLE | {"svg.hashsalt": "gpuckpt"}):
        for word, function in figures.items():
            figure = function(document, found)
            if figure is None:
                continue
            name = f"gpu-dry-{word}" if document["dry"] else f"gpu_{word}"
            if document["dry"]:
                _title(figure, f"Dry run: {figure.get_suptitle()}")
            _finish(figure, document)
            for suffix in (".png", ".svg"):
                figure.savefig(
                    folder / f"{name}{suffix}", dpi=150, metadata={"Date": None} if suffix == ".svg" else None
                )
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _suspend(document: Document, found: Document) -> Figure | None:
    sizes = sorted(found["phases"].values(), key=lambda one: one["bytes"])
    if not sizes:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.4, 4.6))
    bytes_ = [one["bytes"] / 1e9 for one in sizes]
    for step, colour in zip(("lock", "checkpoint", "restore", "unlock"), COLOURS, strict=False):
        times = [one[f"{step}_s"] for one in sizes]
        middle = [max(one["p50"], 1e-6) for one in times]
        spread = [
            [max(0.0, it["p50"] - it["interval"][0]) for it in times],
            [max(0.0, it["interval"][1] - it["p50"]) for it in times],
        ]
        left.errorbar(bytes_, middle, spread, color=colour, marker="o", capsize=2, label=step)
        if step in ("checkpoint", "restore"):
            right.plot(bytes_, [one[f"{step}_gbps"]["p50"] for one in sizes], color=colour, marker="o", label=step)
    left.set(xscale="log", yscale="log", xlabel="GB held by the process", ylabel="seconds")
    right.set(xscale="log", xlabel="GB held by the process", ylabel="GB/s of what it holds", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(bytes_, [f"{value:g}" for value in bytes_])
        axes.minorticks_off()
        axes.legend(frameon=False)
    left.set_title("each step, median and 95 % interval", loc="left", fontsize=10)
    right.set_title("speed", loc="left", fontsize=10)
    _title(figure, "Device memory of a process: to host memory and back")
    return figure


def _servers(document: Document, found: Document) -> Figure | None:
    rows = [(name, one) for name, one in found["ttft"].items() if "golden" in one or "standby" in one]
    if not rows:
        return None
    rows.sort(key=lambda item: (item[1]["server"], item[1]["how"], item[1]["bytes"]))
    wanted = {target.path: target.limit for target in TARGETS}
    figure, axes = pyplot.subplots(figsize=(9.4, 1.9 + 0.75 * len(rows)))
    for place, (name, one) in enumerate(rows):
        for tier, colour, offset in (("golden", COLOURS[0], -0.19), ("standby", COLOURS[2], 0.19)):
            if tier not in one:
                continue
            low, high = one[tier]["interval"]
            axes.barh(place + offset, one[tier]["p50"], 0.34, color=colour, label=tier if place == 0 else None)
            axes.plot([low, high], [place + offset] * 2, color=INK, linewidth=1.2)
            if not document["dry"]:
                text = f" {short(one[tier]['p50'])}, p95 {short(one[tier]['p95'])}, n = {one[tier]['n']}"
                axes.text(max(high, one[tier]["p50"]), place + offset, text, va="center", fontsize=8)
            if (limit := wanted.get(f"ttft.{name}.{tier}.p50")) is not None:
                axes.plot([limit] * 2, [place + offset - 0.2, place + offset + 0.2], color=COLOURS[6], linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{one['server']} {one['shape'].upper()}\n{one['how']}" for _, one in rows])
    axes.set(xlabel="seconds from the command to the first token (red: the target)", ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _title(figure, "First tokens from the golden and from standby")
    return figure


def _memory(document: Document, found: Document) -> Figure | None:
    steps = document["steps"]
    servers = [(step["data"]["model"], step["data"]["cycles"]) for step in steps.values() if step["data"].get("cycles")]
    turns = steps.get("server.turns", {}).get("data", {}).get("turns", [])
    if not servers and not turns:
        return None
    panels = int(bool(servers)) + int(bool(turns))
    figure, made = pyplot.subplots(1, panels, figsize=(9.4, max(4.4, 2.2 + 0.5 * len(servers))), squeeze=False)
    axes = list(made[0])
    if servers:
        panel = axes.pop(0)
        for place, tier in enumerate(_TIERS):
            values = [max(cycle[tier]["processes"] for cycle in cycles) for _, cycles in servers]
            where = [number + 0.27 * (place - 1) for number in range(len(servers))]
            colour = (COLOURS[0], REST, COLOURS[2])[place]
            panel.barh(where, [value / 1e9 for value in values], 0.25, color=colour, label=tier)
            if not document["dry"]:
                for y, value in zip(where, values, strict=True):
                    panel.text(value / 1e9, y, f" {size(value) if value else '0'}", va="center", fontsize=7)
        names = [f"{model['server']} {model['shape'].upper()}\n{model['how']}" for model, _ in servers]
        panel.set_yticks(range(len(servers)), names, fontsize=8)
        panel.set(xlabel="GB of the device (NVML), the most of all cycles", ylim=(len(servers) - 0.4, -1.2))
        panel.set_xlim(0, 1.25 * panel.get_xlim()[1])
        panel.legend(frameon=False, ncols=3, loc="upper left", fontsize=8)
        panel.set_title("a replica's processes", loc="left", fontsize=10)
    if turns:
        panel = axes.pop(0)
        bottom = [0.0] * len(turns)
        for colour, model in zip(COLOURS, turns[0]["by_model"], strict=False):
            heights = [turn["by_model"][model] / 1e9 for turn in turns]
            panel.bar(range(1, len(turns) + 1), heights, 0.7, bottom=bottom, color=colour, label=model.upper())
            bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
        panel.set(xlabel="turn", ylabel="GB of the device (NVML)", ylim=(0, 1.3 * max(*bottom, 1e-9)))
        panel.legend(frameon=False, ncols=3, loc="upper left", fontsize=8)
        panel.set_title("models in turns: one awake, the others hold nothing", loc="left", fontsize=10)
    _title(figure, "Device memory of what runs and of what is suspended")
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.012, ha="left", fontsize=13, fontweight="bold")


def _finish(figure: Figure, document: Document) -> None:
    """The machine in the last line; of a dry run no number at any axis, and the mark over everything."""
    machine = document["machine"]
    gpu = "; ".join(machine["gpus"]) or "no GPU"
    words = f"{gpu}. {machine['cpu_model']}, {machine['cores']} cores, Linux {machine['kernel']}"
    if document["dry"]:
        words = "A dry run on stand-ins: no device, no measurement, no numbers."
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_label_text():  # the others bear names
                    axis.set_ticklabels([])
        figure.text(
            0.5, 0.5, DRY, rotation=20, ha="center", va="center", fontsize=38, fontweight="bold", color=COLOURS[6],
            alpha=0.55, zorder=100,
        )  # fmt: skip
    figure.text(0.012, 0.012, "\n".join(textwrap.wrap(words, 150)), fontsize=7, color=QUIET, va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 0.97))


if __name__ == "__main__":
    print("\n".join(draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))))
