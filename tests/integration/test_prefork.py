"""Workers forked by one server, in a mapped golden: CRIU restores what they share with their parent by forking too."""

from __future__ import annotations

import json
import subprocess

from tests.integration.conftest import Bench
from tests.integration.programs import HERE, STORED, freeze, get, memory, restored

PROGRAM = str(HERE / "prefork.py")


def test_each_worker_has_its_own_memory(bench: Bench) -> None:
    line = ["/usr/bin/python3", PROGRAM, "--once"]
    never_frozen = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    parent, changed, unchanged = never_frozen
    assert parent == unchanged != changed
    name = freeze(bench, "/usr/bin/python3", PROGRAM, "{socket}")
    shown = memory(bench, name)
    assert shown["mode"] == "mapped"
    assert shown["mapped"] > 3 * 16 << 20
    # What the second worker did not change, and the first in one of the four areas, is stored once.
    assert shown["shared"] >= 20 << 20
    assert sum(shown["copied"].values()) < 3 * STORED
    assert len(bench.ok("inspect", name, "--format", "json").json["processes"]) >= 3
    for replica in restored(bench, name, times=2):
        assert json.loads(get(bench, replica, "/digest")) == never_frozen
        # What the parent writes is the parent's alone.
        written, *workers = json.loads(get(bench, replica, "/write"))
        assert written not in never_frozen and workers == [changed, unchanged]
        assert json.loads(get(bench, replica, "/digest")) == [written, changed, unchanged]
