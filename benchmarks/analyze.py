"""Print what is in results, or compare two of them.

python -m benchmarks.analyze build/bench/*.json
python -m benchmarks.analyze results/DATE-MACHINE/restore.json build/bench/restore.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import ratio

Document = dict[str, Any]
_LEVELS = 4  # how deep quantities lie in a document: density.by_replicas.16.wall_s


def quantities(document: Document, path: str = "", level: int = 0) -> Iterator[tuple[str, Document]]:
    """Everything in a document that has a median and samples, by its dotted path."""
    for key, value in document.items():
        if not isinstance(value, dict) or key in ("runs", "machine", "options", "facts"):
            continue
        here = f"{path}.{key}".lstrip(".")
        if {"p50", "samples"} <= value.keys():
            yield here, value
        elif level < _LEVELS:
            yield from quantities(value, here, level + 1)


def shown(value: float) -> str:
    """A number in four figures; large ones (bytes) in millions."""
    if abs(value) >= 1e7:
        return f"{value / 1e6:,.1f} M"
    return f"{value:.4g}"


def table(documents: Sequence[Document]) -> list[str]:
    """Median, interval, p95 and n of every quantity of one document; of two also the ratio of their medians."""
    found = [dict(quantities(document)) for document in documents]
    rows = [["quantity", "p50", "interval of p50", "p95", "n"]]
    if len(documents) == 2:
        rows[0] += ["p50 of the other", "n", "ratio", "interval of ratio"]
    for name in dict.fromkeys(name for each in found for name in each):
        row = [name]
        for index, each in enumerate(found):
            if name not in each:
                row += ["", "", "", ""] if index == 0 else ["", ""]
                continue
            value = each[name]
            low, high = value["interval"]
            middle = shown(value["p50"])
            row += (
                [middle, f"{shown(low)} – {shown(high)}", shown(value["p95"]), str(value["n"])]
                if index == 0
                else [middle, str(value["n"])]
            )
        if len(found) == 2 and all(name in each for each in found):
            of = ratio(found[1][name]["samples"], found[0][name]["samples"])
            row += [f"{of['value']:.3f}", f"{of['interval'][0]:.3f} – {of['interval'][1]:.3f}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def scalars(document: Document) -> list[str]:
    """Single numbers of a document: ratios, flatness, and what was not measured and why."""
    lines = [
        f"{name}: {value['value']:.3f}  ({value['interval'][0]:.3f} – {value['interval'][1]:.3f})"
        for name, value in document.get("ratios", {}).items()
    ]
    lines += [f"{key}: {document[key]}" for key in ("flatness",) if document.get(key) is not None]
    lines += [f"{name} is unavailable: {reason}" for name, reason in document.get("unavailable", {}).items()]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results; two of the same benchmark: compare")
    files: list[Path] = made.parse_args(argv).files
    try:
        documents = [json.loads(file.read_text()) for file in files]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    same = len(documents) == 2 and documents[0].get("benchmark") == documents[1].get("benchmark")
    groups = [documents] if same else [[document] for document in documents]
    titles = [" against ".join(map(str, files))] if same else list(map(str, files))
    for title, group in zip(titles, groups, strict=True):
        print(f"\n{title}  ({', '.join(str(each.get('status', '')) for each in group)})")
        print(*table(group), sep="\n")
        print(*scalars(group[-1]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
