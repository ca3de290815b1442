"""The figures of the warm pool, each drawn from its JSON alone: of the demo, and of the benchmark.

python -m benchmarks.pool_figures build/bench/pool.json build/bench
python -m benchmarks.pool_figures build/demo/demo_pool.json build/demo
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.environment import in_words
from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE, ink_on, short, size

Document = dict[str, Any]
Drawn = tuple[Figure, str, str]  # a figure, its title, what is to be known beside it
TIERS = {
    "cold": "cold start",
    "disk_evicted": "golden on disk, not cached",
    "disk": "golden on disk, cached",
    "tmpfs": "golden in memory",
    "standby": "standby, frozen",
    "hot": "hot",
}
_OURS, _COLD = COLOURS[0], REST

# Groups of phases by the begin of their names; the first that fits counts.
_GROUPS = (
    ("cold start, golden", ("gpuckpt create",)),
    ("memory and processes", ("criu: processes and memory",)),
    ("podman, CRIU", ("podman", "criu", "runtime", "container", "checks")),
    ("pool, thaw", ("pool:", "woken", "health")),
    ("first token", ("model:",)),
)
_OTHER = "everything else"
_PARTS = dict(zip([name for name, _ in _GROUPS], (COLOURS[3], COLOURS[0], COLOURS[1], COLOURS[6], COLOURS[2]),
                  strict=True)) | {_OTHER: REST}  # fmt: skip


def demo(result: Document, file: Path) -> Path:
    """Time to the first token by tier and model, as bars on one logarithmic scale; returns ``file``, a PNG."""
    found = result["ttft_s"]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(found), figsize=(11, 4.1), sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(left=0.125, right=0.985, top=0.77, bottom=0.235, wspace=0.1)
        for axes, (name, tiers) in zip(panels[0], found.items(), strict=True):
            _bars(axes, {tier: (each["p50"], each["all"]) for tier, each in tiers.items()})
            axes.set_title(f"{name}: {_briefly(result['models'][name])}", fontsize=8.5)
        _scale(panels[0], [value for tiers in found.values() for each in tiers.values() for value in each["all"]])
        gains = [tiers["cold"]["p50"] / tiers["tmpfs"]["p50"] for tiers in found.values() if "cold" in tiers]
        title = "Three models behind one address: the first token by what the request found"
        counts = ", ".join(f"{tier} {min(tiers[tier]['n'] for tiers in found.values())}" for tier in TIERS
                           if all(tier in tiers for tiers in found.values()))  # fmt: skip
        note = f"n at least: {counts}. A golden in memory answers "
        note += f"{min(gains):.0f} to {max(gains):.0f} times as fast as a cold start. "
        _finish(figure, result, title, f"{note}Load at the begin: {result['load_average'][0]:.1f}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
    return file


def _briefly(about: str) -> str:
    return about.removesuffix(", random weights").replace(" of the ", " ").replace(" shape", "")


def _bars(
    axes: Axes, tiers: Mapping[str, tuple[float, Sequence[float]]], labels: Mapping[str, str] | None = None
) -> None:
    """A bar for each tier, the slowest on top; ``tiers``: median and samples; ``labels``: instead of the median."""
    shown = [tier for tier in TIERS if tier in tiers][::-1]
    low = min(min(samples) for _, samples in tiers.values()) / 100  # left of every scale
    for row, tier in enumerate(shown):
        middle, samples = tiers[tier]
        axes.barh(row, middle - low, 0.62, left=low, color=_COLD if tier == "cold" else _OURS)
        axes.plot(samples, [row] * len(samples), "o", color="black", mec="white", mew=0.4, markersize=3.2, zorder=3)
        text = (labels or {}).get(tier, short(middle))
        axes.text(max(samples) * 1.2, row, text, va="center", fontsize=8.5, color=INK)
    axes.set_yticks(range(len(shown)), [TIERS[tier] for tier in shown])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _scale(panels: Sequence[Axes], values: Sequence[float], *, room: float = 0.2) -> None:
    """One logarithmic scale for all; ``room``: for what is written right of the longest bar."""
    low, high = min(values) / 2, max(values)
    for axes in panels:
        axes.set(xscale="log", xlim=(low, high * (high / low) ** room))
        axes.set_xticks([10.0**power for power in range(-4, 5) if low <= 10.0**power <= high * 1.5])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1000:g} ms" if value < 1 else f"{value:g} s")
        axes.tick_params(axis="x", labelsize=8.5, colors=QUIET)
    panels[len(panels) // 2].set_xlabel("first token after (bar: median; dots: every sample)")


def _finish(figure: Figure, result: Document, title: str, note: str = "") -> None:
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.34 / height, title, fontsize=14, fontweight="bold")
    quick = "A trial, not a measurement. " if result.get("options", {}).get("quick") else ""
    lines = textwrap.wrap(f"{quick}{note} {in_words(result['machine'])}".strip(), int(figure.get_figwidth() * 18.5))
    figure.text(0.012, 0.1 / height, "\n".join(lines), fontsize=7, color=QUIET, va="bottom")


def tiers(document: Document) -> Drawn:
    """The first token by tier, and beside it what the time is made of."""
    found = document["tiers"]
    shown = [tier for tier in TIERS if tier in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.9 + 0.42 * len(shown)), width_ratios=(1.25, 1))
    top, bottom = (1 - 1.0 / figure.get_figheight()), 0.95 / figure.get_figheight()
    figure.subplots_adjust(left=0.18, right=0.972, top=top, bottom=bottom, wspace=0.06)
    _bars(left, {tier: (found[tier]["ttft_s"]["p50"], found[tier]["ttft_s"]["samples"]) for tier in shown},
          {tier: f"{short(found[tier]['ttft_s']['p50'])}   (p95 {short(found[tier]['ttft_s']['p95'])}, "
                 f"n {found[tier]['ttft_s']['n']})" for tier in shown})  # fmt: skip
    _scale([left], [value for tier in shown for value in found[tier]["ttft_s"]["samples"]], room=0.6)
    left.set_xlabel("first token after (bar: median; dots: every sample)")
    for row, tier in enumerate(shown[::-1]):
        parts = grouped(found[tier]["phases"])
        total, begin = sum(parts.values()) or 1.0, 0.0
        for name, seconds in parts.items():
            share = seconds / total * 100
            right.barh(row, share, 0.62, left=begin, color=_PARTS[name], edgecolor="white", linewidth=0.6)
            if share > 13:
                right.text(begin + share / 2, row, short(seconds), ha="center", va="center", fontsize=7.5,
                           color=ink_on(_PARTS[name]))  # fmt: skip
            begin += share
    right.set(xlim=(0, 100), ylim=left.get_ylim(), yticks=[], xlabel="share of the phases' medians")
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    right.tick_params(axis="x", labelsize=8.5, colors=QUIET)
    right.spines[["top", "right", "left"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in _PARTS.values()]
    place = (0.99, 1 - 0.42 / figure.get_figheight())
    figure.legend(handles, list(_PARTS), loc="upper right", ncols=3, fontsize=7.5, frameon=False, bbox_to_anchor=place)
    title = "The first token by what the request finds"
    if "tmpfs" in found and "cold" in found:
        gain = found["cold"]["ttft_s"]["p50"] / found["tmpfs"]["ttft_s"]["p50"]
        title += f": a golden in memory is {gain:.0f} × faster than a cold start"
    return figure, title, "vLLM behind the warm pool's address; client's clock, one token streamed."


def scale(document: Document) -> Drawn:
    """When each of eight replicas answers: by order, and under a burst; the run in the middle of each."""
    figure, axes = pyplot.subplots(figsize=(8.4, 4.2))
    figure.subplots_adjust(left=0.085, right=0.975, top=0.84, bottom=0.24)
    kinds = (("scale_out", "by order, each asked for one token", COLOURS[0], "o-"),
             ("burst", "a burst of streams, which decode meanwhile", COLOURS[1], "s--"))  # fmt: skip
    most = 0
    for name, label, colour, style in kinds:
        if name in document:
            times = document[name]["answered_s"]
            counts = range(1, len(times) + 1)
            most = max(most, len(times))
            axes.plot(times, counts, style, color=colour, label=f"{label} (n {document[name]['all_s']['n']})")
            axes.annotate(short(times[-1]), (times[-1], len(times)), xytext=(0, 7), textcoords="offset points",
                          ha="center", fontsize=9, color=colour)  # fmt: skip
    axes.axvline(3, color=REST, linestyle=":", label="wanted: all within 3 s")
    axes.set(xlabel="seconds from the order, or from the burst", ylabel="replicas that have answered", xlim=(0, None),
             ylim=(0, most + 1))  # fmt: skip
    axes.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=8.5, loc="upper left")
    axes.grid(axis="y", color="#EEEEEE")
    axes.spines[["top", "right"]].set_visible(False)
    title = "From one replica to eight"
    if "scale_out" in document:
        title += f": all have answered after {short(document['scale_out']['all_s']['p50'])} (median)"
    return figure, title, "The run in the middle of each."


def held(document: Document) -> Drawn:
    """What twelve replicas hold together, against the same servers started separately."""
    many = document["many"]
    figure, axes = pyplot.subplots(figsize=(9.2, 3.4))
    figure.subplots_adjust(left=0.17, right=0.975, top=0.78, bottom=0.3)
    goldens, names = many["goldens_bytes"], list(many["by_model"])
    rows: list[tuple[str, list[tuple[str, float, str]]]] = []
    if alone := many.get("separately"):
        parts = [(f"{many['by_model'][name]['replicas']} × {name}", alone["by_model"][name]["bytes"], COLOURS[index])
                 for index, name in enumerate(names)]  # fmt: skip
        rows.append(("started separately", parts))
    parts = [(f"golden {name}", goldens[name], COLOURS[index]) for index, name in enumerate(names)]
    rows.append(("in the pool", [*parts, (f"{many['replicas']} replicas", many["available_drop_bytes"], COLOURS[4])]))
    total = float(many["memory_total_bytes"])
    for row, (_, parts) in enumerate(reversed(rows)):
        begin = 0.0
        for name, taken, colour in parts:
            axes.barh(row, taken / 1e9, 0.6, left=begin / 1e9, color=colour, edgecolor="white", linewidth=0.8)
            if taken > 0.11 * total:
                axes.text((begin + taken / 2) / 1e9, row, f"{name}\n{size(taken)}", ha="center", va="center",
                          fontsize=8, color=ink_on(colour))  # fmt: skip
            begin += taken
        words = size(begin)
        if row == 0:
            words += f": {', '.join(f'{name} {size(taken)}' for name, taken, _ in parts)}"
        axes.text((begin + 0.01 * total) / 1e9, row, words, va="center", fontweight="bold" if row else "normal",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.axvline(total / 1e9, color=QUIET, linestyle=":")
    axes.annotate(f"the machine's {size(total)}", (total / 1e9, 1), xycoords=("data", "axes fraction"), fontsize=8,
                  color=QUIET, ha="center", va="bottom")  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
    axes.tick_params(axis="y", length=0)
    longest = max(total, *(sum(taken for _, taken, _ in parts) for _, parts in rows))
    axes.set(xlabel="memory, GB", xlim=(0, longest * 1.12 / 1e9))
    axes.spines[["top", "right", "left"]].set_visible(False)
    note = "Replicas: the fall of MemAvailable, all hot, each asked once. Separately: anonymous and shared memory of "
    note += "the servers before they were frozen."
    title = f"{many['replicas']} replicas of {len(names)} models at once"
    if alone:
        title += f": {size(sum(goldens.values()) + many['available_drop_bytes'])} instead of {size(alone['bytes'])}"
    return figure, title, note


FIGURES: dict[str, tuple[str, Callable[[Document], Drawn]]] = {
    "pool_tiers": ("tiers", tiers),
    "pool_scale": ("scale_out", scale),
    "pool_memory": ("many", held),
}


def grouped(phases: Mapping[str, float]) -> dict[str, float]:
    """The phases' seconds by group, in the groups' order; what fits none, and below zero, is the last."""
    found = dict.fromkeys([*(name for name, _ in _GROUPS), _OTHER], 0.0)
    for phase, seconds in phases.items():
        group = next((name for name, begins in _GROUPS if phase.startswith(begins)), _OTHER)
        found[group] += seconds
    return {name: max(seconds, 0.0) for name, seconds in found.items()}


def draw(document: Document, folder: Path) -> list[str]:
    """Draw the figures that the document has numbers for, as PNG and SVG; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (key, function) in FIGURES.items():
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


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    document = json.loads(source.read_text())
    if "benchmark" in document:
        print(*draw(document, target), sep="\n")
    else:
        print(demo(document, target / "demo_pool.png"))


if __name__ == "__main__":
    main()
