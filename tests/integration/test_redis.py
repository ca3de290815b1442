"""Redis (jemalloc, a child that saves) behind a front, both in one mapped golden: all values stay what was written."""

from __future__ import annotations

from tests.integration.conftest import Bench
from tests.integration.programs import HERE, STORED, freeze, get, memory, restored, tool


def test_redis_holds_what_was_written(bench: Bench) -> None:
    server = tool("redis-server", "valkey-server", "redis-check-rdb")
    name = freeze(bench, "/usr/bin/python3", str(HERE / "redis_front.py"), server, "{socket}")
    shown = memory(bench, name)
    assert shown["mapped"] > 64 << 20
    processes = bench.ok("inspect", name, "--format", "json").json["processes"]
    assert len(processes) == 2
    # Of neither process much is copied: both the front's table and the data set are mapped.
    assert len(shown["copied"]) == 2 and max(shown["copied"].values()) < STORED
    for replica in restored(bench, name):
        assert get(bench, replica, "/compare") == "200000 right"
        assert get(bench, replica, "/churn").endswith("right")
        assert get(bench, replica, "/bgsave").endswith("right")
    # What that replica changed and saved is its own.
    for replica in restored(bench, name):
        assert get(bench, replica, "/compare") == "200000 right"
