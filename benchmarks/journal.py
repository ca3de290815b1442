"""What a benchmark has measured so far, on disk after every sample: an interrupted run keeps what it has.

A journal is one JSON file. ``runs`` holds every sample of every series in the order of measurement; everything else
that a reader wants (medians, ratios) is computed from it again at each save, so that the file is whole at any time.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.environment import load
from benchmarks.statistics import Summary
from gpuckpt.errors import VerificationError

VERSION = 1
Document = dict[str, Any]
Sample = dict[str, Any]
Summarise = Callable[[Document], Document]
CLOCK = "from just before the command is spawned to the first streamed token, CLOCK_MONOTONIC"
# What a resumed run must share with the one it goes on: the same question on the same machine.
_SAME = ("cpu_model", "cores", "kernel", "criu", "podman", "vllm", "torch", "gpus")


class Journal:
    """The record of one benchmark under ``folder``: NAME.json and NAME.csv."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        options: Document,
        machine: Document,
        summarise: Summarise = lambda document: {},
        resume: bool = False,
    ) -> None:
        self.file = folder / f"{name}.json"
        self._summarise = summarise
        self.document: Document = {
            "version": VERSION,
            "benchmark": name,
            "status": "running",
            "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "clock": CLOCK,
            "options": options,
            "machine": machine,
            "load_average": load(),
            "facts": {},
            "unavailable": {},
            "failures": {},
            "failure_codes": {},
            "runs": {},
        }
        if resume and self.file.exists():
            self._go_on(json.loads(self.file.read_text()))

    def _go_on(self, earlier: Document) -> None:
        differing = [key for key in _SAME if earlier["machine"].get(key) != self.document["machine"].get(key)]
        differing += [
            f"option {key}"
            for key in ("model", "server")
            if earlier["options"].get(key) != self.document["options"].get(key)
        ]
        if differing:
            raise ValueError(f"{self.file} cannot be resumed: it was measured with another {', '.join(differing)}")
        self.document["begun"] = earlier["begun"]
        for key in ("facts", "failures", "failure_codes", "runs"):
            self.document[key] = earlier.get(key, {})
        self.document["resumed"] = int(earlier.get("resumed", 0)) + 1

    def count(self, series: str) -> int:
        return len(self.document["runs"].get(series, []))

    def samples(self, series: str) -> list[Sample]:
        found: list[Sample] = self.document["runs"].get(series, [])
        return found

    def add(self, series: str, sample: Sample) -> None:
        """Keep a sample; the load of the machine at its end goes with it."""
        kept = sample | {"load": load()[0]}
        self.document["runs"].setdefault(series, []).append(kept)
        self.save()

    def fail(self, series: str, reason: str, code: int | None = None) -> int:
        """Note a sample that could not be taken, and the exit status; returns how many of the series have failed."""
        failures: list[str] = self.document["failures"].setdefault(series, [])
        failures.append(reason)
        self.document["failure_codes"].setdefault(series, []).append(code)
        self.save()
        return len(failures)

    def unavailable(self, series: str, reason: str) -> None:
        """This way of doing it does not exist or does not work here, and why."""
        self.document["unavailable"][series] = reason
        self.save()

    def fact(self, name: str, value: Any) -> None:
        """Something measured or found once."""
        self.document["facts"][name] = value
        self.save()

    def end(self, status: str) -> None:
        self.document["status"] = status
        self.save()

    def save(self) -> None:
        """Write the JSON and the table; one rename each, so that a reader never sees half a file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.document | self._summarise(self.document)
        _replace(self.file, json.dumps(whole, indent=1) + "\n")
        _replace(self.file.with_suffix(".csv"), _table(self.document["runs"]))


def summary(samples: list[Sample], quantity: str) -> Document | None:
    """The contract's form of a quantity over samples: p50, p95, n, interval, samples; None where nobody has it."""
    values = tuple(float(sample[quantity]) for sample in samples if sample.get(quantity) is not None)
    if not values:
        return None
    found = Summary(values)
    low, high = found.interval
    return {
        "p50": round(found.p50, 6),
        "p95": round(found.p95, 6),
        "n": found.n,
        "min": round(min(values), 6),
        "max": round(max(values), 6),
        "interval": [round(low, 6), round(high, 6)],
        "samples": [round(value, 6) for value in values],
    }


def answers_equal(document: Document, series: str, key: str = "canary_match") -> bool | None:
    """Were all answers of a series the recorded ones? None where none was compared.

    gpuckpt itself fails when an answer differs: then there is no sample, only the exit status.
    """
    if VerificationError.exit_code in document.get("failure_codes", {}).get(series, ()):
        return False
    found = [sample[key] for sample in document["runs"].get(series, ()) if sample.get(key) is not None]
    return all(found) if found else None


def rows(runs: dict[str, list[Sample]]) -> Iterator[tuple[str, int, str, float]]:
    """Every number of every sample, one a row: (series, index, quantity, value)."""
    for series, samples in runs.items():
        for index, sample in enumerate(samples):
            for quantity, value in sample.items():
                if isinstance(value, bool | int | float):
                    yield series, index, quantity, float(value)
                elif quantity == "phases":
                    for phase in value:
                        yield series, index, f"phase: {phase['name']}", float(phase["seconds"])


def _table(runs: dict[str, list[Sample]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("series", "index", "quantity", "value"))
    writer.writerows(rows(runs))
    return table.getvalue()


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(text)
    temporary.replace(file)
