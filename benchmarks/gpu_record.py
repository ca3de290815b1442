"""What the acceptance on a GPU has found so far: one JSON file, whole after every step, with which a run can go on.

A dry run's file has another name than a measurement's, and says of itself, and of each of its steps, that it is dry.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Document = dict[str, Any]
Status = Literal["ok", "failed", "skipped", "left"]
"""``skipped``: it cannot be done on this host; ``left``: there was no time for it. Both have their reason."""

VERSION = 1
BENCHMARK = "gpu"
# What a run that goes on must share with the one before it: the same question on the same machine.
SAME = ("cpu_model", "cores", "kernel", "gpus")


class Mismatch(Exception):
    """The file that is there is not to be replaced, or of another machine, another version, or another kind of run."""


class Record:
    """The document and its file, below ``folder``."""

    def __init__(
        self,
        folder: Path,
        *,
        dry: bool,
        machine: Document,
        options: Document,
        resume: bool = False,
        summarise: Callable[[Document], Document] = lambda document: {},
    ) -> None:
        """``summarise`` makes the keys that are computed from the steps, anew at each save. Raises Mismatch."""
        self.file = folder / file_name(dry)
        self._summarise = summarise
        self.document: Document = {
            "version": VERSION,
            "benchmark": BENCHMARK,
            "dry": dry,
            "status": "running",
            "begun": _now(),
            "resumed": 0,
            "options": options,
            "machine": machine,
            "elapsed_s": 0.0,
            "steps": {},
        }
        if self.file.exists():
            try:
                earlier = read(self.file)
            except ValueError as error:
                raise Mismatch(f"{error}: move it away, or name another --out") from error
            if resume:
                self._go_on(earlier)
            elif earlier.get("steps"):
                raise Mismatch(
                    f"{self.file} has the results of {len(earlier['steps'])} steps already: go on with --resume, or"
                    " begin anew with another --out"
                )
        self.earlier_s = float(self.document["elapsed_s"])

    def _go_on(self, earlier: Document) -> None:
        if (earlier.get("version"), earlier.get("dry")) != (VERSION, self.document["dry"]):
            raise Mismatch(f"{self.file} is of another version of this benchmark: name another --out")
        mine, its = self.document["machine"], earlier["machine"]
        if differing := [key for key in SAME if mine.get(key) != its.get(key)]:
            raise Mismatch(f"{self.file} cannot be resumed: it was measured with another {', '.join(differing)}")
        self.document |= {key: earlier[key] for key in ("begun", "elapsed_s", "steps")}
        self.document["resumed"] = int(earlier["resumed"]) + 1

    def status(self, step: str) -> Status | None:
        """How it went; None if it was never reached."""
        found: Status | None = self.document["steps"].get(step, {}).get("status")
        return found

    def data(self, step: str) -> Document:
        """What it found; empty if nothing."""
        found: Document = self.document["steps"].get(step, {}).get("data", {})
        return found

    def keep(
        self, step: str, status: Status, *, seconds: float, reason: str | None = None, data: Document | None = None
    ) -> None:
        """How a step went and what it found, on disk before this returns."""
        self.document["steps"][step] = {
            "status": status,
            "seconds": round(seconds, 3),
            "reason": reason,
            "ended": _now(),
            "commit": self.document["machine"].get("commit"),
            "dry": self.document["dry"],
            "data": data or {},
        }
        self.save()

    def end(self, status: str, elapsed: float) -> None:
        """How the run ended: complete, budget, interrupted; ``elapsed`` seconds of this run."""
        self.document["status"] = status
        self.document["elapsed_s"] = round(self.earlier_s + elapsed, 1)
        self.save()

    def save(self) -> None:
        """One rename: a reader never sees half a file, and a killed run leaves the last whole one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.new")
        with temporary.open("w") as file:
            json.dump(self.document | self._summarise(self.document), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.file)


def read(file: Path) -> Document:
    """The document in a file. Raises ValueError if it is none of this benchmark, OSError."""
    try:
        found: Document = json.loads(file.read_text())
        if found["benchmark"] != BENCHMARK:
            raise ValueError(f"it is of the benchmark {found['benchmark']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no document of the acceptance on a GPU ({error})") from error
    return found


def file_name(dry: bool) -> str:
    """Of the document; a dry run's is never looked for where measurements are."""
    return "gpu-dry.json" if dry else "gpu.json"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
