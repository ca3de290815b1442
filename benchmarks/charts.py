"""The figures of the suite, each drawn from the merged results alone; what was not measured is left out.

    python -m benchmarks.charts build/bench/restore.json build/bench

Every figure has values at its marks, n, units, and the machine in its last line; PNG and SVG.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from benchmarks.environment import in_words
from benchmarks.statistics import median
from benchmarks.style import COLOURS, METHODS, QUIET, REST, STYLE, ink_on, short, size

Document = dict[str, Any]
# Groups of phases by the begin of their names; the first that fits counts.
GROUPS = (
    ("start-up and checks", ("start-up", "preflight", "checks", "podman service")),
    ("container", ("container",)),
    ("memory and processes", ("criu: processes and memory",)),
    ("podman, CRIU", ("podman", "criu", "runtime", "dmtcp", "restore")),
    ("server start", ("server start",)),
    ("first token", ("first token",)),
)
OTHER = "everything else"
_GROUP_COLOURS = dict(zip([name for name, _ in GROUPS], ("#56B4E9", "#F0E442", "#0072B2", "#E69F00", "#D55E00",
                                                         "#009E73"), strict=True)) | {OTHER: REST}  # fmt: skip
_OURS, _STOCK = COLOURS[0], REST
_MODES = {"mapped": COLOURS[0], "copy": COLOURS[1]}


def grouped(phases: dict[str, float]) -> dict[str, float]:
    """The phases' seconds by group, in the groups' order; what fits none, and below zero, is `everything else`."""
    found = dict.fromkeys([*(name for name, _ in GROUPS), OTHER], 0.0)
    for phase, seconds in phases.items():
        group = next((name for name, begins in GROUPS if phase.startswith(begins)), OTHER)
        found[group] += seconds
    return {name: max(seconds, 0.0) for name, seconds in found.items()}


def methods(result: Document, file: Path) -> None:
    """Time to the first token by method on a logarithmic scale, and beside it what the time is made of."""
    shown = [name for name in METHODS if name in result and result[name].get("ttft_s")]
    shown.sort(key=lambda name: -float(result[name]["ttft_s"]["p50"]))
    figure = pyplot.figure(figsize=(11.5, 1.9 + 0.36 * len(shown)))
    top = 1 - 0.95 / figure.get_figheight()
    bottom = 1.0 / figure.get_figheight()
    times = figure.add_axes((0.205, bottom, 0.42, top - bottom))
    shares = figure.add_axes((0.68, bottom, 0.295, top - bottom))
    low = min(float(result[name]["ttft_s"]["min"]) for name in shown) / 1.7
    for row, name in enumerate(reversed(shown)):
        ttft = result[name]["ttft_s"]
        ours = name.startswith(("mapped", "copy"))
        times.barh(row, ttft["p50"] - low, 0.62, left=low, color=_OURS if ours else _STOCK)
        times.plot(ttft["samples"], [row] * ttft["n"], "o", color="black", markersize=2.5, alpha=0.35, zorder=3)
        text = f"{short(ttft['p50'])}   (p95 {short(ttft['p95'])}, n {ttft['n']})"
        times.text(ttft["max"] * 1.12, row, text, va="center", fontsize=8.5)
        _composition(shares, row, result[name].get("phases") or {})
    times.set_yticks(range(len(shown)), [METHODS[name] for name in reversed(shown)])
    high = max(float(result[name]["ttft_s"]["max"]) for name in shown)
    times.set(xscale="log", xlim=(low, high * (high / low) ** 0.55), ylim=(-0.6, len(shown) - 0.4))
    times.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
    times.set_xlabel("first token after (bar: median; dots: every sample)")
    shares.set(xlim=(0, 100), ylim=times.get_ylim(), yticks=[])
    shares.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    shares.set_xlabel("share of the phases' medians")
    for axes in (times, shares):
        _plain(axes)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in _GROUP_COLOURS.values()]
    figure.legend(handles, list(_GROUP_COLOURS), loc="upper right", ncols=4, fontsize=7.5, frameon=False,
                  bbox_to_anchor=(0.99, 1 - 0.42 / figure.get_figheight()))  # fmt: skip
    title = "The same server, brought back by every way there is"
    if cold := result.get("ratios", {}).get("cold_over_mapped"):
        title += f": mapped is {cold['value']:.0f} × faster than a cold start"
    _finish(figure, result, file, title, "From spawning the command to the first streamed token.")


def _composition(axes: Axes, row: int, phases: dict[str, float]) -> None:
    parts = grouped(phases)
    total = sum(parts.values())
    if not total:
        axes.text(1, row, "one piece", va="center", fontsize=8, color=QUIET)
        return
    begin = 0.0
    for name, seconds in parts.items():
        share = seconds / total * 100
        axes.barh(row, share, 0.62, left=begin, color=_GROUP_COLOURS[name], edgecolor="white", linewidth=0.6)
        if share > 13:
            ink = ink_on(_GROUP_COLOURS[name])
            axes.text(begin + share / 2, row, short(seconds), ha="center", va="center", fontsize=7.5, color=ink)
        begin += share


def sweeps(result: Document, file: Path) -> None:
    """The first token over memory, processes and mappings; mapped and copied."""
    fixed = f"{result.get('sweeps_fixed_gb', 1):g} GB in all"
    names = {
        "memory": "memory of the server, GB",
        "processes": f"processes ({fixed})",
        "mappings": f"mappings ({fixed})",
    }
    shown = [axis for axis in names if axis in result.get("sweeps", {})]
    figure, panels = pyplot.subplots(
        1,
        len(shown),
        figsize=(width := max(9.0, 1.5 + 3.6 * len(shown)), 4.4),
        sharey=True,
        squeeze=False,
        gridspec_kw={"wspace": 0.07},
    )
    figure.subplots_adjust(left=0.8 / width, right=0.985, top=0.82, bottom=0.24)
    least = 10
    for axes, axis in zip(panels[0], shown, strict=True):
        for mode, points in sorted(result["sweeps"][axis].items()):
            xs = sorted(points, key=float)
            values = [points[x]["ttft_s"] for x in xs]
            middles = [value["p50"] for value in values]
            least = min([least, *(value["n"] for value in values)])
            errors = [
                [middle - value["interval"][0] for middle, value in zip(middles, values, strict=True)],
                [value["interval"][1] - middle for middle, value in zip(middles, values, strict=True)],
            ]
            axes.errorbar([float(x) for x in xs], middles, yerr=errors, fmt="o-", color=_MODES[mode], capsize=3,
                          label=mode, linewidth=1.6, markersize=5)  # fmt: skip
            above = mode == "copy"
            for x, middle in zip(xs, middles, strict=True):
                axes.annotate(short(middle), (float(x), middle), xytext=(0, 7 if above else -14), ha="center",
                              textcoords="offset points", fontsize=7.5, color=_MODES[mode])  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=names[axis])
        axes.set_xticks([float(x) for x in xs], [f"{float(x):g}" for x in xs])
        axes.minorticks_off()
        axes.margins(x=0.12, y=0.22)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        axes.grid(axis="y", color="#EEEEEE")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("first token after (median, 95 % interval)")
    panels[0][0].legend(frameon=False, fontsize=8.5, loc="upper left")
    flat = result.get("flatness")
    title = "What the time of a restore depends on" + (f": 8 GB takes {flat:.2f} × as long as 0.5 GB" if flat else "")
    _finish(figure, result, file, title, f"Synthetic server; n ≥ {least} for each point; both scales logarithmic.")


def density(result: Document, file: Path) -> None:
    """Memory and time over the number of replicas that one command brings back."""
    by = result["density"]["by_replicas"]
    counts = sorted(map(int, by))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.4))
    figure.subplots_adjust(left=0.085, right=0.975, top=0.8, bottom=0.24, wspace=0.22)
    kinds = {"available_drop_bytes": ("fall of MemAvailable", COLOURS[0], "o-"),
             "pss_bytes": ("sum of Pss", COLOURS[1], "s--"),
             "private_bytes": ("sum of private pages written to", COLOURS[2], "^:")}  # fmt: skip
    for quantity, (label, colour, style) in kinds.items():
        values = [by[str(count)][quantity]["p50"] for count in counts]
        left.plot(counts, [value / 1e9 for value in values], style, color=colour, label=label, markersize=5)
        if quantity == "available_drop_bytes":
            for count, value in zip(counts, values, strict=True):
                left.annotate(size(value), (count, value / 1e9), xytext=(-4, 5), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
    left.set(ylabel="memory of all replicas, GB", xlabel="replicas")
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    for quantity, label, colour in (
        ("first_answer_s", "first replica answers", COLOURS[4]),
        ("all_answer_s", "all answer", COLOURS[0]),
    ):
        values = [by[str(count)][quantity]["p50"] for count in counts]
        right.plot(counts, values, "o-", color=colour, label=label, markersize=5)
        for count, value in zip(counts, values, strict=True):
            if quantity == "all_answer_s":
                right.annotate(short(value), (count, value), xytext=(0, 7), textcoords="offset points", ha="center",
                               fontsize=8)  # fmt: skip
    right.set(ylabel="seconds from the command (median)", xlabel="replicas")
    right.legend(frameon=False, fontsize=8.5, loc="upper left")
    for axes in (left, right):
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_ylim(bottom=0)
        axes.margins(y=0.2)
        axes.grid(axis="y", color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
    extra = result["density"].get("bytes_per_extra_replica")
    least = min(int(entry["wall_s"]["n"]) for entry in by.values())
    title = "Replicas of one golden" + (f": a further one takes {size(extra)}" if extra is not None else "")
    _finish(figure, result, file, title, f"Memory after one request each; medians of n ≥ {least}.")


def steady(result: Document, file: Path) -> None:
    """Decoding speed in pairs, and the latencies of the first requests after a restore."""
    state = result["steady_state"]
    lengths = [name for name in state if isinstance(state[name], dict) and "mapped_tokens_per_s" in state[name]]
    figure, panels = pyplot.subplots(1, len(lengths) + 1, figsize=(3.4 * (len(lengths) + 1) + 0.6, 4.3), squeeze=False)
    figure.subplots_adjust(left=0.075, right=0.98, top=0.74, bottom=0.23, wspace=0.3)
    for axes, length in zip(panels[0], lengths, strict=False):
        sides = [state[length][f"{who}_tokens_per_s"]["samples"] for who in ("never_dumped", "mapped")]
        for pair in zip(*sides, strict=True):
            axes.plot([0, 1], pair, "o-", color=REST, markerfacecolor=COLOURS[0], markeredgecolor="white", markersize=6)
        for column, side in enumerate(sides):
            text = f"median {median(side):.1f}"
            axes.text(column, min(side) * 0.97, text, ha="center", va="top", fontsize=8.5)
        low, high = state[length]["interval"]
        axes.set_title(f"{length} prompt: ratio {state[length]['ratio']:.3f} ({low:.3f} – {high:.3f})", fontsize=9.5)
        axes.set_xticks([0, 1], ["never dumped", "mapped replica"])
        axes.set(xlim=(-0.35, 1.35), ylabel=f"tokens per second (n = {state[length]['n']} pairs)")
        axes.set_ylim(0, max(map(max, sides)) * 1.15)
    last = panels[0][-1]
    if first := state.get("first_requests"):
        for index, who in enumerate(("never_dumped", "mapped")):
            values = [first[who][key] for key in ("p50", "p99", "max")]
            places = [place + (index - 0.5) * 0.36 for place in range(3)]
            last.bar(places, values, 0.34, color=(REST, COLOURS[0])[index], label=who.replace("_", " "))
            for place, value in zip(places, values, strict=True):
                last.text(place, value, short(value), ha="center", va="bottom", fontsize=7.5)
        last.set_xticks(range(3), ["p50", "p99", "slowest"])
        last.set_title(f"first {first['n']} requests after the restore", fontsize=9.5)
        last.set_ylabel("seconds for a whole answer")
        last.margins(y=0.2)
        last.legend(frameon=False, fontsize=8)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#EEEEEE")
        axes.set_axisbelow(True)
    _finish(figure, result, file, "A mapped replica at work, against a server that was never dumped")


FIGURES: dict[str, tuple[str, Callable[[Document, Path], None]]] = {
    "methods": ("ratios", methods),
    "sweeps": ("sweeps", sweeps),
    "density": ("density", density),
    "steady": ("steady_state", steady),
}
_NEEDS = {"density": "by_replicas", "steady": "ratio"}


def draw(result: Document, folder: Path) -> list[str]:
    """Draw every figure that the merged ``result`` has numbers for; the names of those that were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (key, function) in FIGURES.items():
        part = result.get(key)
        if not part or (name in _NEEDS and not part.get(_NEEDS[name])):
            continue
        if name == "methods" and not any(method in result for method in METHODS):
            continue
        with pyplot.rc_context(STYLE):
            function(result, folder / name)
        drawn.append(name)
    return drawn


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _finish(figure: Figure, result: Document, file: Path, title: str, note: str = "") -> None:
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.34 / height, title, fontsize=14, fontweight="bold")
    quick = "One sample each: a trial, not a measurement. " if result.get("options", {}).get("quick") else ""
    words = f"{quick}{note} {in_words(result['machine'])}".strip()
    lines: Sequence[str] = textwrap.wrap(words, int(figure.get_figwidth() * 19))
    figure.text(0.012, 0.1 / height, "\n".join(lines), fontsize=7, color=QUIET, va="bottom")
    for suffix in (".png", ".svg"):
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(file.with_suffix(suffix), dpi=150, metadata=metadata)
    pyplot.close(figure)


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    print(*draw(json.loads(source.read_text()), target), sep="\n")


if __name__ == "__main__":
    main()
