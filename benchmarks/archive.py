"""How long a golden takes to become a file and to come back: export and import, plain and with zstd.

    python -m benchmarks.archive

The file lies on the disk, in the page cache when it is imported. Writes archive.json.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server
from benchmarks.journal import Document, Sample, summary
from benchmarks.ours import Goldens
from benchmarks.suite import Run

GOLDEN = "archive"
QUANTITIES = ("export_s", "import_s", "export_bytes_per_s", "import_bytes_per_s", "archive_bytes")


@dataclass
class Archive:
    """`gpuckpt export` and `gpuckpt import` of one golden under another name."""

    name: str
    goldens: Goldens
    server: Server
    options: tuple[str, ...] = field(default=())
    n: int | None = None

    def prepare(self) -> None:
        self.goldens.need(GOLDEN, self.server, "mapped")

    def measure(self) -> Sample:
        gpuckpt, copy = self.goldens.gpuckpt, f"{GOLDEN}-copy"
        file = gpuckpt.space.disk / f"{self.name}.tar"
        try:
            exported = gpuckpt.run("export", gpuckpt.name(GOLDEN), str(file), *self.options, "--format", "json")
            size = file.stat().st_size
            digest = str(exported.document["blake3"])
            words = (
                "import",
                str(file),
                "--name",
                gpuckpt.name(copy),
                "--trust",
                "--digest",
                digest,
                "--format",
                "json",
            )
            imported = gpuckpt.run(*words)
        finally:
            file.unlink(missing_ok=True)
            gpuckpt.rm(copy)
        golden_bytes = int(self.goldens.made[GOLDEN]["image_bytes"])
        return {
            "export_s": round(exported.wall_s, 6),
            "import_s": round(imported.wall_s, 6),
            "archive_bytes": size,
            "export_bytes_per_s": round(golden_bytes / exported.wall_s),
            "import_bytes_per_s": round(golden_bytes / imported.wall_s),
        }

    def close(self) -> None:
        pass


def body(run: Run) -> None:
    server = Server.chosen(run.options)
    goldens = Goldens(Gpuckpt(run.space), run.journal, server)
    with contextlib.ExitStack() as stack:
        methods = [Archive("plain", goldens, server), Archive("zstd", goldens, server, ("--zstd",))]
        run.rounds(run.prepare(methods, stack))


def summarise(document: Document) -> Document:
    runs = {name: samples for name, samples in document["runs"].items() if name in ("plain", "zstd")}
    return {name: {key: summary(samples, key) for key in QUANTITIES} for name, samples in runs.items()}


def parser() -> argparse.ArgumentParser:
    made = suite.parser("archive", __doc__, n=10, budget=1800)
    suite.add_workload(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("archive", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
