"""Time to the first token of the same server, by every way there is of bringing it back.

    python -m benchmarks.restore                          vLLM, about 40 minutes on 2 cores
    python -m benchmarks.restore --quick --server filler:256
    python -m benchmarks.restore --methods mapped,podman_tmpfs

Writes restore.json: for each method `ttft_s` (p50, p95, n, interval of the median, samples) and the median phases.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server
from benchmarks.journal import Document, answers_equal, summary
from benchmarks.ours import Frozen, Goldens, Prepared, Resident, Restore
from benchmarks.statistics import median
from benchmarks.stock import Bench, Cold, Dmtcp, Import, Podman
from benchmarks.suite import Method, Run
from benchmarks.targets import ratios

BUDGET = 4500.0
TRIVIAL_MEGABYTES = 8
ABOUT = {
    "cold": "podman run, files in the page cache",
    "cold_first": "gpuckpt create, whatever was in the page cache",
    "cold_create": "gpuckpt create up to its first token",
    "mapped": "gpuckpt restore, memory mapped from files in tmpfs, into a container that waits prepared",
    "mapped_unprepared": "the same, making the container on the way",
    "mapped_resident": "the same as mapped, asked of a process that runs already (no interpreter's start)",
    "copy_tmpfs": "gpuckpt restore, memory copied from tmpfs, huge pages",
    "copy_small_pages": "gpuckpt restore, memory copied from tmpfs, no huge pages",
    "podman_tmpfs": "podman container restore, images in tmpfs",
    "podman_tmpfs_huge": "podman container restore, images in tmpfs, huge pages switched on",
    "podman_disk": "podman container restore, images on disk and in the page cache",
    "podman_disk_evicted": "podman container restore, images on disk, not in the page cache",
    "podman_import": "podman container restore --import, plain archive",
    "podman_import_zstd": "podman container restore --import, archive with zstd",
    "lazy_pages": "podman container restore with CRIU's lazy pages, images in tmpfs",
    "dmtcp": "dmtcp_restart",
    "podman_pause": "podman unpause of a replica that kept its memory",
    "trivial": f"gpuckpt restore, mapped, prepared, of a Python HTTP server with {TRIVIAL_MEGABYTES} MB",
}


def methods(run: Run) -> dict[str, Method]:
    """Every method by name, none of them prepared yet."""
    gpuckpt = Gpuckpt(run.space)
    server = Server.chosen(run.options)
    goldens = Goldens(gpuckpt, run.journal, server)
    trivial = Server.filler(TRIVIAL_MEGABYTES)
    stock = Bench(run.space, goldens, server, "mapped", run.journal)
    found: list[Method] = [
        Prepared("mapped", goldens, server, "mapped", "mapped"),
        Restore("mapped_unprepared", goldens, server, "mapped", "mapped"),
        Resident("mapped_resident", goldens, server, "mapped", "mapped"),
        Restore("copy_tmpfs", goldens, server, "copy", "copy"),
        Restore("copy_small_pages", goldens, server, "copy", "copy", ("--no-huge-pages",)),
        Prepared("trivial", goldens, trivial, "trivial", "mapped"),
        Frozen("podman_pause", goldens, server, "mapped"),
        Cold(stock, n=run.options.cold_n),
        Podman("podman_tmpfs", stock, "tmpfs"),
        Podman("podman_tmpfs_huge", stock, "tmpfs", huge=True),
        Podman("podman_disk", stock, "disk"),
        Podman("podman_disk_evicted", stock, "disk", evicted=True),
        Import("podman_import", stock, "none"),
        Import("podman_import_zstd", stock, "zstd"),
        Podman("lazy_pages", stock, "tmpfs", lazy=True),
        Dmtcp(stock),
    ]
    return {method.name: method for method in found}


def body(run: Run) -> None:
    known = methods(run)
    wanted = run.options.methods.split(",") if run.options.methods else list(known)
    run.journal.fact("about", ABOUT)
    with contextlib.ExitStack() as stack:
        ready = run.prepare([known[name] for name in wanted], stack)
        run.rounds(ready)


def summarise(document: Document) -> Document:
    """The contract's keys: one object per method, and ratios between them."""
    found: dict[str, Any] = {}
    runs = dict(document["runs"])
    if created := runs.get("cold_create"):
        # Of the first creation nobody knows what was in the page cache: it is the first start after whatever was.
        runs["cold_first"] = [row for row in created if row["mode"] == "mapped"][:1]
    for name, samples in runs.items():
        ttft = summary(samples, "ttft_s")
        if ttft is None:
            continue
        found[name] = {
            "about": ABOUT.get(name, ""),
            "ttft_s": ttft,
            "restore_s": summary(samples, "restore_s"),
            "canaries_equal": answers_equal(document, name),
            "phases": median_phases(samples),
        }
    return found | {"ratios": ratios(found)}


def median_phases(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The median of each phase over the samples, in the order of the first; they need not add up to a median."""
    names = dict.fromkeys(row["name"] for sample in samples for row in sample.get("phases", []))
    times: dict[str, list[float]] = {name: [] for name in names}
    for sample in samples:
        rows = {row["name"]: float(row["seconds"]) for row in sample.get("phases", [])}
        for name in names:
            times[name].append(rows.get(name, 0.0))
    return {name: round(median(values), 6) for name, values in times.items()}


def parser() -> argparse.ArgumentParser:
    made = suite.parser("restore", __doc__, n=10, budget=BUDGET)
    suite.add_workload(made)
    made.add_argument("--cold-n", type=int, default=3, help="cold starts (default: %(default)s)")
    made.add_argument("--methods", help=f"only these, with commas: {', '.join(list(ABOUT)[3:])}, cold")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("restore", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
