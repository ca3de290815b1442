"""nvidia-smi without a GPU: --query-gpu and --query-compute-apps as csv, in the format of versions 570 and later."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_FOLDER = Path(os.environ["GPUCKPT_STUB_DRIVER"])
_NOT_LOADED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running.\n"
)
_MIG = {"-": "[N/A]", "0": "Disabled", "1": "Enabled"}


def _processes() -> list[dict[str, str]]:
    """A row for each process and device."""
    told = not (_FOLDER / "refuse" / "used-0").exists()
    found = []
    for pid in (_FOLDER / "pids").read_text().split():
        state, *rows = (_FOLDER / "processes" / pid).read_text().splitlines()
        if state.split()[0] in ("running", "locked"):
            for uuid, count in map(str.split, rows):
                used = str(int(count) >> 20) if told else "[N/A]"
                found.append({"gpu_uuid": uuid, "pid": pid, "used_memory": used})
    return found


def _gpus() -> list[dict[str, str]]:
    found = []
    for line in (_FOLDER / "devices").read_text().splitlines():
        uuid, total, mig, name = line.split(maxsplit=3)
        row = {"uuid": uuid, "name": name, "mig.mode.current": _MIG[mig], "memory.total": "[N/A]"}
        row |= {"memory.free": "[N/A]", "driver_version": (_FOLDER / "version").read_text().strip()}
        if total != "-":
            used = sum(int(one["used_memory"]) for one in _processes() if one["gpu_uuid"] == uuid)
            row |= {"memory.total": str(int(total) >> 20), "memory.free": str((int(total) >> 20) - used)}
        found.append(row)
    return found


def main(query: str, form: str) -> int:
    if form != "--format=csv,noheader,nounits":
        sys.stdout.write("the stand-in has no other format\n")
        return 2
    if (_FOLDER / "refuse" / "nvml-0").exists():
        sys.stdout.write(_NOT_LOADED)
        return 9
    kind, _, columns = query.partition("=")
    rows = {"--query-gpu": _gpus, "--query-compute-apps": _processes}[kind]()
    for column in columns.split(","):
        if rows and column not in rows[0]:
            sys.stdout.write(f'Field "{column}" is not a valid field to query.\n')
            return 2
    if kind == "--query-gpu" and not rows:
        sys.stdout.write("No devices were found\n")
        return 6
    for row in rows:
        sys.stdout.write(", ".join(row[column] for column in columns.split(",")) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
