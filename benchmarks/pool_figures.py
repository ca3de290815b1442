"""The figures of the warm pool, each drawn from its JSON alone: of the demo, and of the benchmark.

python -m benchmarks.pool_figures build/bench/pool.json build/bench
python -m benchmarks.pool_figures build/demo/demo_pool.json build/demo
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.environment import in_words
from benchmarks.style import COLOURS, INK, QUIET, REST, STYLE, short

Document = dict[str, Any]
TIERS = {
    "cold": "cold start",
    "disk_evicted": "golden on disk, not cached",
    "disk": "golden on disk, cached",
    "tmpfs": "golden in memory",
    "standby": "standby, frozen",
    "hot": "hot",
}
_COLOURS = {"cold": REST, "disk_evicted": COLOURS[3], "disk": COLOURS[6], "tmpfs": COLOURS[1], "standby": COLOURS[4],
            "hot": COLOURS[0]}  # fmt: skip


def demo(result: Document, file: Path) -> Path:
    """Time to the first token by tier and model, as bars on one logarithmic scale; returns ``file``, a PNG."""
    found = result["ttft_s"]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(found), figsize=(11, 3.9), sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(left=0.125, right=0.985, top=0.74, bottom=0.2, wspace=0.08)
        for axes, (name, tiers) in zip(panels[0], found.items(), strict=True):
            _bars(axes, {tier: (each["p50"], each["all"]) for tier, each in tiers.items()})
            axes.set_title(f"{name}: {_briefly(result['models'][name])}", fontsize=9.5)
        _scale(panels[0], [value for tiers in found.values() for each in tiers.values() for value in each["all"]])
        gains = [tiers["cold"]["p50"] / tiers["tmpfs"]["p50"] for tiers in found.values() if "cold" in tiers]
        title = "Three models behind one address: the first token by what the request found"
        counts = ", ".join(f"{tier} {min(tiers[tier]['n'] for tiers in found.values())}" for tier in TIERS
                           if all(tier in tiers for tiers in found.values()))  # fmt: skip
        note = f"Bar: median; dots: every sample; n at least: {counts}. A golden in memory answers "
        note += f"{min(gains):.0f} to {max(gains):.0f} times as fast as a cold start. "
        _finish(figure, result, title, f"{note}Load at the begin: {result['load_average'][0]:.1f}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
        pyplot.close(figure)
    return file


def _briefly(about: str) -> str:
    return about.removesuffix(", random weights").replace(" of the ", " ").replace(" shape", "")


def _bars(axes: Axes, tiers: Mapping[str, tuple[float, Sequence[float]]]) -> None:
    """A bar for each tier, the slowest on top; ``tiers``: median and samples."""
    shown = [tier for tier in TIERS if tier in tiers][::-1]
    low = min(min(samples) for _, samples in tiers.values()) / 100  # left of every scale
    for row, tier in enumerate(shown):
        middle, samples = tiers[tier]
        axes.barh(row, middle - low, 0.62, left=low, color=_COLOURS[tier])
        axes.plot(samples, [row] * len(samples), "o", color="black", markersize=2.5, alpha=0.35, zorder=3)
        axes.text(max(samples) * 1.2, row, short(middle), va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(shown)), [TIERS[tier] for tier in shown])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _scale(panels: Sequence[Axes], values: Sequence[float]) -> None:
    low, high = min(values) / 2, max(values)
    for axes in panels:
        axes.set(xscale="log", xlim=(low, high * (high / low) ** 0.22))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1000:g} ms" if value < 1 else f"{value:g} s")
        axes.tick_params(axis="x", labelsize=8.5, colors=QUIET)
        axes.set_xlabel("first token after")


def _finish(figure: Figure, result: Document, title: str, note: str = "") -> None:
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.34 / height, title, fontsize=14, fontweight="bold")
    quick = "A trial, not a measurement. " if result.get("options", {}).get("quick") else ""
    lines = textwrap.wrap(f"{quick}{note} {in_words(result['machine'])}".strip(), int(figure.get_figwidth() * 18.5))
    figure.text(0.012, 0.1 / height, "\n".join(lines), fontsize=7, color=QUIET, va="bottom")
