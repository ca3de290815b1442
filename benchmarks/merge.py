"""Put the parts that were measured by different commands together into one document, the merged restore.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.targets import ratio, targets

Document = dict[str, Any]
# What other commands add: the file, and the keys that are taken over from it.
PARTS: dict[str, tuple[str, ...]] = {
    "density": ("density", "clones16"),
    "steady": ("steady_state",),
    "sweep": ("sweeps", "sweeps_fixed_gb", "flatness", "flatness_interval", "flatness_reference"),
}
# Whole documents that become one key each.
WHOLE = ("create", "archive", "ignore_flags", "criu_binaries")
_BOOKKEEPING = (
    "version", "benchmark", "status", "begun", "clock", "options", "machine", "load_average", "load_average_at_end",
    "facts", "unavailable", "failures", "failure_codes", "runs", "elapsed_s", "resumed",
)  # fmt: skip
_SAME = ("cpu_model", "cores", "memory_bytes", "kernel", "criu", "podman", "vllm", "commit")


def read(folder: Path) -> dict[str, Document]:
    """Every part that lies in ``folder``, by its name."""
    names = ("restore", "cold", *PARTS, *WHOLE)
    return {name: json.loads(file.read_text()) for name in names if (file := folder / f"{name}.json").exists()}


def merge(parts: dict[str, Document]) -> Document:
    """One document of all parts; raises ValueError where there is no part at all.

    Measurements of one part are never compared with those of another, but for what is said in ``notes``.
    """
    if not parts:
        raise ValueError("there are no results to merge: make bench")
    base = parts.get("restore") or next(iter(parts.values()))
    found: Document = {key: base[key] for key in _BOOKKEEPING if key in base}
    if "restore" in parts:
        # It may be a merged one already: what others added then is taken from them anew.
        added = (*(key for keys in PARTS.values() for key in keys), *WHOLE, "notes", "parts", "targets")
        found |= {key: value for key, value in parts["restore"].items() if key not in added}
    else:
        found |= {"benchmark": "restore", "runs": {}, "facts": {}, "failures": {}}
    found["notes"] = _notes(parts)
    if "cold" not in found and "cold" in parts.get("cold", {}):
        found["cold"] = parts["cold"]["cold"]
        if "mapped" in found:
            found.setdefault("ratios", {})["cold_over_mapped"] = ratio(
                found["cold"]["ttft_s"]["samples"], found["mapped"]["ttft_s"]["samples"]
            )
            found["notes"].append("cold starts and mapped restores were measured in two runs, one after the other")
    for name, keys in PARTS.items():
        found |= {key: parts[name][key] for key in keys if name in parts and key in parts[name]}
    for name in WHOLE:
        if name in parts:
            found[name] = {key: value for key, value in parts[name].items() if key not in _BOOKKEEPING}
    found["unavailable"] = {
        key if name == "restore" else f"{name}: {key}": reason
        for name, part in parts.items()
        for key, reason in part["unavailable"].items()
        if not (name == "restore" and key.partition(": ")[0] in parts)
    }
    found["parts"] = {
        name: {
            key: part.get(key)
            for key in ("status", "begun", "elapsed_s", "load_average", "load_average_at_end", "options")
        }
        | {"commit": part["machine"].get("commit"), "failures": {k: len(v) for k, v in part["failures"].items()}}
        for name, part in parts.items()
    }
    found["targets"] = targets(found)
    return found


def _notes(parts: dict[str, Document]) -> list[str]:
    """What a reader must know before comparing the parts with one another."""
    notes = []
    for key in _SAME:
        values = dict.fromkeys(str(part["machine"].get(key)) for part in parts.values())
        if len(values) > 1:
            notes.append(f"the parts were measured with different values of {key}: {', '.join(values)}")
    for name, part in parts.items():
        if part["status"] != "complete":
            notes.append(f"{name} ended early ({part['status']}); what it had measured is shown")
        if part["options"].get("quick"):
            notes.append(f"{name} was run with --quick: a trial, not a measurement")
        if part["options"].get("server", "vllm") != "vllm" and name in ("restore", "density", "create", "archive"):
            notes.append(f"{name} was measured with the synthetic server {part['options']['server']}, not with vLLM")
        for series, reasons in part["failures"].items():
            notes.append(f"{name}: {len(reasons)} of the attempts of {series} failed, for example: {reasons[-1]}")
    return notes
