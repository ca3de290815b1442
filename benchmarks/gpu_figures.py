"""The figures of the acceptance on a GPU, drawn from its document alone: what was not measured is not in them.

    python -m benchmarks.gpu_figures build/bench                   of gpu.json in there, else of gpu-dry.json
    python -m benchmarks.gpu_figures build/bench/gpu-dry.json

They are drawn beside the document, and its page (gpu.md, gpu-dry.md) is written anew with them.

A dry run's figures have names of their own and bear in large letters that nothing in them was measured. They have no
numbers at their axes, and what their parts measure is made up: only that every part can be drawn is to be seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import matplotlib
except ImportError:
    if __name__ == "__main__":
        sys.exit(
            f"matplotlib is not installed for {sys.executable}. Where there is no network: copy the folder of"
            " the results to a checkout whose Python has it (pip install matplotlib), and draw there"
        )
    raise

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import gpu_pages
from benchmarks.gpu_record import Document, file_name, read
from benchmarks.gpu_summary import TARGETS, numbers
from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE, short, size

DRY = "DRY RUN\nnothing was measured"
_TIERS = ("running", "suspended", "awake")
_STEPS = ("lock", "checkpoint", "restore", "unlock")
_TARGET = "#D00000"


def draw(document: Document, folder: Path) -> list[str]:
    """Draw what the document has numbers for, as PNG and SVG; the figures' names."""
    folder.mkdir(parents=True, exist_ok=True)
    if document["dry"]:
        document = _levelled(document)
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


def _levelled(document: Document) -> Document:
    """A dry run's, with the same number wherever one would be measured: what a stand-in took tells nothing."""
    made: Document = json.loads(json.dumps(document))
    same = {"p50": 1.0, "p95": 1.0, "n": 1, "interval": [1.0, 1.0]}
    for step in made["steps"].values():
        data = step["data"]
        for name in ("golden_ttft_s", "standby_ttft_s"):
            if name in data:
                data[name] = same
        for one in data.get("sizes", {}).values():
            for height, name in enumerate(_STEPS, start=1):  # one above the other, to be told apart
                if f"{name}_s" in one:
                    one[f"{name}_s"] = {"p50": height, "interval": [height, height], "n": 1}
                if f"{name}_gbps" in one:
                    one[f"{name}_gbps"] = {"p50": height, "interval": [height, height], "n": 1}
        for cycle in data.get("cycles", []):
            for tier in _TIERS:
                cycle[tier]["processes"] = 1e9 if cycle[tier]["processes"] else 0
        for turn in data.get("turns", []):
            turn["by_model"] = {name: 1e9 if held else 0 for name, held in turn["by_model"].items()}
    return made


def _row(model: Document) -> tuple[Any, ...]:
    """Rows of a figure are in this order: of each server the smaller models first."""
    return model["server"], model["how"], model["bytes"]


def _suspend(document: Document, found: Document) -> Figure | None:
    sizes = sorted(found["phases"].values(), key=lambda one: one["bytes"])
    if not sizes:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.4, 4.6))
    bytes_ = [one["bytes"] / 1e9 for one in sizes]
    for step, colour in zip(_STEPS, COLOURS, strict=False):
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
    right.set(xscale="log", xlabel="GB held by the process", ylim=(0, None))
    right.set_ylabel("GB/s of what it holds")
    right.yaxis.set_label_position("right")  # the two would stand side by side in the middle
    right.yaxis.tick_right()
    for axes in (left, right):
        axes.set_xticks(bytes_, [f"{value:g}" for value in bytes_])
        axes.minorticks_off()
        axes.legend(frameon=False, ncols=2, loc="upper left")
    low, high = left.get_ylim()
    left.set_ylim(low, high * (high / low) ** 0.35)  # the legends have room of their own
    right.set_ylim(0, 1.3 * right.get_ylim()[1])
    left.set_title("each step, median and 95 % interval", loc="left", fontsize=10)
    right.set_title("speed", loc="left", fontsize=10)
    _title(figure, "Device memory of a process: to host memory and back")
    return figure


def _servers(document: Document, found: Document) -> Figure | None:
    rows = [(name, one) for name, one in found["ttft"].items() if "golden" in one or "standby" in one]
    if not rows:
        return None
    rows.sort(key=lambda item: _row(item[1]))
    wanted = {target.path: target.limit for target in TARGETS}
    figure, axes = pyplot.subplots(figsize=(9.4, 1.9 + 0.75 * len(rows)))
    for place, (name, one) in enumerate(rows):
        for tier, colour, offset in (("golden", COLOURS[0], -0.19), ("standby", COLOURS[2], 0.19)):
            if tier not in one:
                continue
            low, high = one[tier]["interval"]
            axes.barh(place + offset, one[tier]["p50"], 0.34, color=colour)
            axes.plot([low, high], [place + offset] * 2, color=INK, linewidth=1.2)
            end = max(high, one[tier]["p50"])
            if (limit := wanted.get(f"ttft.{name}.{tier}.p50")) is not None:
                limit = 1.2 if document["dry"] else limit
                where = [place + offset - 0.17, place + offset + 0.17]  # as high as the bar
                axes.plot([limit] * 2, where, color=_TARGET, linewidth=2.5)
                end = max(end, limit)
            if not document["dry"]:
                text = f"  {short(one[tier]['p50'])}, p95 {short(one[tier]['p95'])}, n = {one[tier]['n']}"
                axes.text(end, place + offset, text, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{one['server']} {one['shape'].upper()}\n{one['how']}" for _, one in rows])
    axes.set(xlabel="seconds from the command to the first token", ylim=(len(rows) - 0.4, -0.6))
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    marks = [
        Patch(color=COLOURS[0], label="golden"),
        Patch(color=COLOURS[2], label="standby"),
        Line2D([], [], color=_TARGET, linestyle="", marker="|", markersize=12, markeredgewidth=2.5, label="target"),
    ]
    axes.legend(handles=marks, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _title(figure, "First tokens from the golden and from standby")
    return figure


def _memory(document: Document, found: Document) -> Figure | None:
    steps = document["steps"]
    servers = [(step["data"]["model"], step["data"]["cycles"]) for step in steps.values() if step["data"].get("cycles")]
    servers.sort(key=lambda item: _row(item[0]))
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
            for y, value in zip(where, values, strict=True):
                if not document["dry"]:
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
        panel.yaxis.set_label_position("right")
        panel.yaxis.tick_right()
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
            0.5, 0.5, DRY, rotation=20, ha="center", va="center", fontsize=34, fontweight="bold", color=COLOURS[6],
            alpha=0.45, zorder=100,
        )  # fmt: skip
    figure.text(0.012, 0.012, "\n".join(textwrap.wrap(words, 150)), fontsize=7, color=QUIET, va="bottom")
    figure.tight_layout(rect=(0, 0.05, 1, 0.97))


def find(given: Path) -> Path:
    """The document that is meant by a file or a folder. Raises ValueError."""
    if given.is_file():
        return given
    if not given.is_dir():
        raise ValueError(f"there is no {given}: name the folder of the results, or the JSON file in it")
    for name in map(file_name, (False, True)):
        if (given / name).is_file():
            return given / name
    raise ValueError(
        f"there is neither {file_name(False)} nor {file_name(True)} in {given}: python -m benchmarks.gpu_acceptance"
        f" --out {given} makes them"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="the folder of the results, or the JSON file in it")
    options = parser.parse_args(argv)
    try:
        file = find(options.results)
        document = read(file)
        drawn = draw(document, file.parent)
        print(gpu_pages.write(document, file, drawn))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"{file.parent / name}.png" for name in drawn) or "there is nothing to draw in it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
