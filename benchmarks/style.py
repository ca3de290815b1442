"""How figures and pages look: names of the methods, colours, letters, and numbers as people read them."""

from __future__ import annotations

from typing import Any

# The order of the list, and what each method is called in a figure.
METHODS = {
    "cold": "cold start",
    "podman_import_zstd": "podman, zstd archive",
    "podman_import": "podman, plain archive",
    "podman_disk_evicted": "podman, disk, not cached",
    "podman_disk": "podman, disk, cached",
    "podman_tmpfs": "podman, tmpfs",
    "podman_tmpfs_huge": "podman, tmpfs, huge pages",
    "lazy_pages": "podman, lazy pages",
    "dmtcp": "DMTCP",
    "copy_small_pages": "gpuckpt copy, small pages",
    "copy_tmpfs": "gpuckpt copy",
    "mapped_unprepared": "gpuckpt mapped, unprepared",
    "mapped": "gpuckpt mapped",
    "mapped_resident": "gpuckpt mapped, resident",
    "podman_pause": "frozen process (unpause)",
    "trivial": "trivial Python server, mapped",
}
# Okabe and Ito's palette: told apart with every common kind of colour blindness, and in print by its lightness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00")
REST = "#BBBBBB"
INK = "#222222"
QUIET = "#666666"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the figure is the same on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "gpuckpt",  # the same numbers give the same file
}


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on ``colour`` (its relative luminance, roughly)."""
    red, green, blue = (int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK


def short(seconds: float) -> str:
    """Three figures, which is more than such times repeat to."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    if abs(count) < 999.5e3:
        return f"{count / 1e3:.0f} kB"
    if abs(count) < 999.5e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.2f} GB"
