"""Make a page of results out of what was measured, and the index of all pages.

    python -m benchmarks.report                      build/bench → results/DATE-MACHINE/, results/README.md
    python -m benchmarks.report --results /tmp/out   the same elsewhere
    python -m benchmarks.report --sessions           the session engine's → results/DATE-MACHINE-sessions/
    python -m benchmarks.report --kv                 KV paging's → results/DATE-MACHINE-kv/
    python -m benchmarks.report --gpu                a GPU's → results/DATE-MACHINE-gpu/
    python -m benchmarks.report --pool               the warm pool's → results/DATE-MACHINE-pool/
    python -m benchmarks.report --index              only the index anew

Everything in the pages is computed from the JSON files; nothing in them is written by hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_pages, harness, kv_pages, merge, pages, pool_pages, session_pages

Document = dict[str, Any]
# What writes the words of a suite's page, and what draws.
SUITES: dict[str, tuple[Any, str]] = {
    "sessions": (session_pages, "benchmarks.session_figures"),
    "kv": (kv_pages, "benchmarks.kv_figures"),
    "gpu": (gpu_pages, "benchmarks.gpu_figures"),
}
_WORDS = ("xeon", "epyc", "ryzen", "core", "neoverse", "graviton", "ampere", "arm")


def folder_name(result: Document) -> str:
    """DATE-MACHINE, for example 2026-11-21-xeon-2c or 2026-11-21-epyc-16c-h100."""
    machine = result["machine"]
    model = machine["cpu_model"].lower()
    word = next((word for word in _WORDS if word in model), re.split(r"\W+", model.strip())[0] or "machine")
    parts = [result["begun"][:10], word, f"{machine['cores']}c"]
    if machine["gpus"]:
        names = machine["gpus"][0].lower().split(",")[0].split()
        parts.append(next((name for name in names if re.fullmatch(r"[a-z]+\d+\w*", name)), "gpu"))
    return "-".join(parts)


def make(source: Path, results: Path) -> Path:
    """Merge, draw, write the page and the index; returns the folder of the page."""
    result = merge.merge(merge.read(source))
    merged = json.dumps(result, indent=1) + "\n"
    (source / "restore.json").write_text(merged)
    target = results / folder_name(result)
    target.mkdir(parents=True, exist_ok=True)
    (target / "restore.json").write_text(merged)
    for name in (*merge.PARTS, *merge.WHOLE, "cold"):
        for suffix in (".json", ".csv"):
            if (file := source / f"{name}{suffix}").exists():
                shutil.copyfile(file, target / file.name)
    if (table := source / "restore.csv").exists():
        shutil.copyfile(table, target / table.name)
    from benchmarks import charts  # matplotlib takes a second to import

    drawn = charts.draw(result, target)
    for name in drawn:
        for suffix in (".png", ".svg"):
            shutil.copyfile(target / f"{name}{suffix}", source / f"{name}{suffix}")
    (target / "README.md").write_text(pages.page(result, target.name, drawn))
    index(results)
    return target


def make_suite(name: str, source: Path, results: Path) -> Path:
    """The same for a suite of parts, whose document is SUITE.json: the session engine's, KV paging's, a GPU's.

    Raises ValueError for a dry run's, which is no result.
    """
    kept = source / f"{name}.json"
    if not kept.exists():
        if (dry := source / f"{name}-dry.json").exists():
            raise ValueError(
                f"{dry} is a dry run's: nothing in it was measured, so there is no page of results to make"
            )
        raise ValueError(f"there is no {kept.name} in {source}: nothing was measured there, or --out is another folder")
    document: Document = json.loads(kept.read_text())
    if document.get("dry"):
        raise ValueError(f"{kept} is a dry run's: nothing in it was measured")
    target = results / f"{folder_name(document)}-{name}"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / f"{name}.json", target / f"{name}.json")
    words, figures = SUITES[name]
    drawn = importlib.import_module(figures).draw(document, target)  # matplotlib takes a second to import
    (target / "README.md").write_text(words.page(document, target.name, drawn))
    index(results)
    return target


def make_pool(source: Path, results: Path) -> Path:
    """The same for the warm pool's pool.json."""
    document: Document = json.loads((source / "pool.json").read_text())
    target = results / f"{folder_name(document)}-pool"
    target.mkdir(parents=True, exist_ok=True)
    kept = source / "soak.json"
    soak: Document | None = json.loads(kept.read_text()) if kept.is_file() else None
    for name in ("pool.json", "pool.csv", *(["soak.json"] if soak else [])):
        shutil.copyfile(source / name, target / name)
    from benchmarks import pool_figures

    drawn = pool_figures.draw(document, target)
    (target / "README.md").write_text(pool_pages.page(document, target.name, drawn, soak))
    index(results)
    return target


def index(results: Path) -> Path:
    """Write README.md of all results: one row for each folder, the newest first."""
    found, pools = [], []
    suites: dict[str, list[tuple[str, Document]]] = {name: [] for name in SUITES}
    for folder in sorted(results.iterdir(), reverse=True):
        for name in ("restore.json", "demo.json"):
            if (file := folder / name).is_file():
                found.append((folder.name, name, json.loads(file.read_text())))
        for name, held in suites.items():
            if (file := folder / f"{name}.json").is_file():
                held.append((folder.name, json.loads(file.read_text())))
        if (file := folder / "pool.json").is_file():
            pools.append((folder.name, json.loads(file.read_text())))
    page = results / "README.md"
    others = [line for name, held in suites.items() for line in SUITES[name][0].index(held)]
    page.write_text(pages.index(found, [*pool_pages.index(pools), *others]))
    return page


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=harness.ROOT / "build" / "bench", help="what was measured")
    made.add_argument("--results", type=Path, default=harness.ROOT / "results", help="where pages go")
    made.add_argument("--sessions", action="store_true", help="the session engine's results")
    made.add_argument("--kv", action="store_true", help="KV paging's results")
    made.add_argument("--gpu", action="store_true", help="the acceptance on a GPU")
    made.add_argument("--pool", action="store_true", help="the warm pool's results")
    made.add_argument("--index", action="store_true", help="only write the index anew")
    options = made.parse_args(argv)
    try:
        if options.index:
            written = index(options.results)
        else:
            suite = next((name for name in SUITES if getattr(options, name)), None)
            if suite is not None:
                written = make_suite(suite, options.out, options.results)
            else:
                written = (make_pool if options.pool else make)(options.out, options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
