"""The warm pool's demo and benchmark: what they compute, on made-up numbers and scripted answers."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import memory, pool_pages, pool_results, pool_states, report
from benchmarks.demo_pool_words import memory_table, result_table
from benchmarks.pool_client import Reply, ask, parse_timing
from benchmarks.pool_memory import Reading, read, whole
from benchmarks.pool_setup import bigrams, config, vllm
from benchmarks.workspace import Workspace
from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.pool import config as configuration
from gpuckpt.service.view import EventView
from gpuckpt.workload.endpoint import RequestFailed
from tests.unit.test_benchmark_suite import MACHINE

SECOND = 1_000_000_000


# ---------------------------------------------------------------------- the client


class Scripted(http.server.BaseHTTPRequestHandler):
    """Answers with the next of ``answers``: a status, headers, pieces of a body."""

    answers: ClassVar[list[tuple[int, dict[str, str], list[bytes]]]] = []
    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        status, headers, pieces = self.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who has heard enough hangs up
            for piece in pieces:
                self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    Scripted.answers, Scripted.bodies = [], []
    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
TIMING = 'tier;desc="standby", wait;dur=12.5, model;dur=100.0, total;dur=112.5, retries;desc="2"'


def test_what_the_service_says_is_read_from_the_headers(port: int) -> None:
    headers = {"x-gpuckpt-tier": "standby", "x-gpuckpt-replica": "a.1", "server-timing": TIMING}
    Scripted.answers = [(200, headers, [event("one"), event(" two"), DONE])]
    reply = ask(port, "m", "prompt", 2, more={"temperature": 0})
    assert (reply.tier, reply.replica, reply.retries) == ("standby", "a.1", 2)
    assert reply.told == {"wait": 0.0125, "model": 0.1, "total": 0.1125}
    assert (reply.text, reply.tokens) == ("one two", 2)
    assert 0 < reply.first_s <= reply.whole_s
    assert Scripted.bodies == [{"model": "m", "prompt": "prompt", "max_tokens": 2, "stream": True, "temperature": 0}]


def test_a_head_that_went_ahead_is_completed_by_a_comment(port: int) -> None:
    pieces = [b": waiting for the model, 5 s\n\n", b": waiting for the model, 10 s\n\n"]
    pieces += [b': tier;desc="cold", total;dur=12000.0\n\n', event("x"), DONE]
    Scripted.answers = [(200, {}, pieces)]
    reply = ask(port, "m", "p", 1)
    assert (reply.tier, reply.told, reply.comments) == ("cold", {"total": 12.0}, 2)


def test_who_has_heard_enough_hangs_up(port: int) -> None:
    Scripted.answers = [(200, {}, [event("one"), event("two"), DONE])]
    assert ask(port, "m", "p", 9, first=lambda reply: False).text == "one"


def test_an_answer_that_is_no_stream(port: int) -> None:
    content = {"choices": [{"text": "all"}], "usage": {"completion_tokens": 3}}
    Scripted.answers = [(200, {}, [json.dumps(content).encode()])]
    reply = ask(port, "m", "p", 3, stream=False)
    assert (reply.text, reply.tokens) == ("all", 3)


@pytest.mark.parametrize(
    ("status", "pieces", "kind"),
    [
        (503, [b"no"], RequestFailed),
        (200, [event("half")], DaemonUnreachableError),
        (200, [b'data: {"error": {"message": "the replica has failed"}}\n\n'], GpuckptError),
    ],
)
def test_what_goes_wrong_is_an_error(port: int, status: int, pieces: list[bytes], kind: type[Exception]) -> None:
    Scripted.answers = [(status, {}, pieces)]
    with pytest.raises(kind):
        ask(port, "m", "p", 1)


def test_timing_without_anything() -> None:
    assert parse_timing("") == ("", {}, 0)


# ---------------------------------------------------------------------- the configuration


def test_the_pool_understands_the_configuration(tmp_path: Path) -> None:
    from benchmarks import models

    space = Workspace(tmp_path / "gpuckpt-bench-abc")
    served = [vllm(space, "qwen", models.QWEN, Path("/opt/x"), 2048, max_replicas=4), bigrams(space)]
    file = tmp_path / "pool.toml"
    file.write_text(config(served, {"idle_freeze": "2s"}, {"keep_alive": "1min"}))
    found = configuration.load(file)
    assert found.front.keep_alive == 60.0
    assert list(found.models) == ["qwen", "bigrams"]
    qwen, small = found.models["qwen"], found.models["bigrams"]
    assert (qwen.golden, qwen.max_replicas, qwen.idle_freeze, small.idle_freeze) == ("bench-abc-qwen", 4, 2.0, 2.0)
    assert qwen.create[-2:] == ("--max-model-len", "2048")
    assert json.loads(small.create[3].partition(" /v1/completions ")[2])["model"] == "bigrams"


# ---------------------------------------------------------------------- phases


def test_phases_of_a_restore_add_up_to_the_client_s_time() -> None:
    reply = Reply(0, first_ns=SECOND, told={"wait": 0.7, "model": 0.25, "total": 0.95})
    came = EventView(
        seq=1, time=0.0, kind="restored", seconds=0.65, phases={"checks": 0.1, "criu": 0.5, "unaccounted": 0.05}
    )
    rows = pool_states.phases_of(reply, came)
    assert [row["name"] for row in rows] == [
        "checks", "criu", "pool: decision, threads, accounts", "model: first token", "unaccounted",
    ]  # fmt: skip
    assert [row["seconds"] for row in rows] == pytest.approx([0.1, 0.5, 0.05, 0.25, 0.1])
    started = EventView(seq=1, time=0.0, kind="started", seconds=0.69, phases=came.phases)
    rows = pool_states.phases_of(reply, started)
    assert rows[0] == {"name": "gpuckpt create", "seconds": 0.04}
    assert sum(row["seconds"] for row in rows) == pytest.approx(1.0)
    (hot, rest) = pool_states.phases_of(reply, None)
    assert (hot["name"], rest["name"], rest["seconds"]) == ("model: first token", "unaccounted", 0.75)
    thawed = pool_states.phases_of(reply, EventView(seq=1, time=0.0, kind="woken", seconds=0.5))
    assert thawed[0] == {"name": "woken", "seconds": 0.5}


def test_a_server_is_whole_when_all_of_its_processes_are_there() -> None:
    def reading(processes: int, anonymous: int) -> Reading:
        return Reading(processes, {"Pss_Anon": anonymous, "Pss_Shmem": 5, "Swap": 0, "Pss": 0, "Rss": 0})

    assert whole([]) is None
    readings = [
        reading(1, 10),
        reading(9, 11),
        *[reading(2, 20)] * 3,
        reading(2, 30),
        reading(1, 7),
        *[reading(0, 0)] * 9,
    ]
    found = whole(readings)
    assert found is not None and found.alone == 35
    books = memory.rollup("Rss: 8 kB\nPss: 4 kB\nPss_Anon: 2 kB\n")
    assert read([books, memory.rollup(""), books]) == Reading(2, {key: 2 * value for key, value in books.items()})


# ---------------------------------------------------------------------- results


def sample(ttft: float) -> dict[str, Any]:
    phases = [{"name": "podman: restore", "seconds": ttft / 2}, {"name": "model: first token", "seconds": ttft / 2}]
    return {"ttft_s": ttft, "phases": phases, "round": 0}


def document(n: int = 10) -> dict[str, Any]:
    """What a whole run leaves."""
    middles = {"hot": 0.1, "standby": 0.15, "tmpfs": 0.5, "disk": 0.7, "disk_evicted": 2.0, "direct": 0.099}
    runs: dict[str, list[dict[str, Any]]] = {
        name: [sample(middle + index / 1000) for index in range(n)] for name, middle in middles.items()
    }
    runs["cold"] = [sample(50.0) | {"model": "qwen", "alone_bytes": 4_000_000_000} for _ in range(3)]
    runs["cold_gpt2"] = [sample(40.0) | {"model": "gpt2", "alone_bytes": 2_000_000_000}]
    scaled = {"replicas": 8, "answered_s": [0.1, 1.0, 2.0], "phases": sample(1.0)["phases"]}
    runs["scale_out"] = [scaled | {"all_s": 2.0 + index / 10} for index in range(5)]
    runs["burst"] = [scaled | {"all_s": 4.0}]
    each = {"own_bytes": 50_000_000, "private_bytes": 60_000_000, "pss_bytes": 400_000_000, "rss_bytes": 2 * 10**9}
    runs["many"] = [
        {
            "replicas": 12, "all_hot_s": 5.0, "all_answered": True, "canaries_equal": True, "differences": [],
            "available_before": 16 * 10**9, "available_after": 15 * 10**9, "available_drop_bytes": 10**9,
            "memory_total_bytes": 24 * 10**9, "goldens_bytes": {"qwen": 2_700_000_000, "gpt2": 1_700_000_000},
            "own_bytes": 6 * 10**8, "pss_bytes": 5 * 10**9, "private_bytes": 7 * 10**8,
            "by_model": {"qwen": each | {"replicas": 6}, "gpt2": each | {"replicas": 6}}, "round": 0,
        }
    ]  # fmt: skip
    added = {"added_event_p50_ms": 0.3, "added_event_p99_ms": 2.0, "cpu_per_event_us": 40.0}
    runs["64 streams"] = [dict(added) for _ in range(n)]
    made: dict[str, Any] = {
        "benchmark": "pool", "status": "complete", "begun": "2026-11-22T10:00:00+00:00", "machine": MACHINE,
        "options": {"quick": False}, "load_average": [0.1, 0.2, 0.3], "load_average_at_end": [1.5, 1.0, 0.5],
        "failures": {"burst": ["it broke"]}, "unavailable": {}, "runs": runs,
    }  # fmt: skip
    return made | pool_results.summarise(made)


def test_summaries_and_targets() -> None:
    found = document()
    assert found["tiers"]["tmpfs"]["ttft_s"]["p50"] == pytest.approx(0.5045)
    assert found["standby_beyond_hot"]["value"] == pytest.approx(0.05)
    assert found["standby_beyond_hot"]["interval"] == pytest.approx([0.05, 0.05])
    assert found["front_beyond_direct"]["value"] == pytest.approx(0.001)
    assert found["scale_out"]["all_s"]["p50"] == pytest.approx(2.2)
    assert found["many"]["separately"]["bytes"] == 6 * 4_000_000_000 + 6 * 2_000_000_000
    assert found["many"]["separately"]["fits"] is False
    assert found["many"]["separately"]["over_with_goldens"] == pytest.approx(36 / 5.4, abs=0.001)
    met = {target["name"]: (target["met"], target["enough"]) for target in found["targets"]}
    assert list(met.values()) == [(True, True), (True, True), (True, False), *[(True, True)] * 4]


def test_an_interrupted_run_is_summarised_too() -> None:
    assert [target["met"] for target in pool_results.summarise({"runs": {}})["targets"]] == [None] * 7
    half = pool_results.summarise({"runs": {"hot": [sample(0.1)], "standby": []}})
    assert list(half["tiers"]) == ["hot"] and "standby_beyond_hot" not in half
    twelve = {"runs": {"many": document()["runs"]["many"]}}
    assert "separately" not in pool_results.summarise(twelve)["many"]


def test_median_phases_count_what_is_missing_as_nothing() -> None:
    tables = [{"phases": [{"name": "a", "seconds": 1.0}]}, {"phases": [{"name": "b", "seconds": 2.0}]}]
    assert pool_results.median_phases(tables) == {"a": 0.5, "b": 1.0}


def test_tables_of_phases_side_by_side_end_with_the_rest() -> None:
    rows = pool_pages.phase_rows({"x": {"a": 1.0, "unaccounted": 0.1}, "y": {"b": 2.0, "model: first token": 0.5}})
    assert [name for name, _ in rows] == ["a", "b", "model: first token", "unaccounted"]
    assert rows[1] == ("b", ["–", "2.000"])


def test_the_report_makes_page_figures_and_index(tmp_path: Path) -> None:
    source, results = tmp_path / "bench", tmp_path / "results"
    source.mkdir()
    results.mkdir()
    (source / "pool.json").write_text(json.dumps(document()))
    (source / "pool.csv").write_text("series,index,quantity,value\n")
    folder = report.make_pool(source, results)
    assert folder.name == "2026-11-22-xeon-2c-pool"
    figures = {f"{name}.{kind}" for name in pool_pages.CAPTIONS for kind in ("png", "svg")}
    assert {file.name for file in folder.iterdir()} == {"README.md", "pool.json", "pool.csv"} | figures
    page = (folder / "README.md").read_text()
    assert "A standby takes 50.0 ms longer than a hot replica" in page
    assert "does not fit into the machine's 24.00 GB" in page
    assert "1 of the attempts of burst failed" in page
    assert "| 64 streams: each event | 0.30 ms | 2.00 ms | 10 |" in page
    assert "load and chaos" not in page
    soak = {"minutes": 10.0, "seed": 1, "models": ["a", "b"], "requests": 9, "outcomes": {"ok": 7, "cut": 2}}
    soak |= {"left": [], "cut_without_a_kill": 0, "chaos": {"daemon": 3}, "events": {"adopted": 4}}
    soak |= {"doubtful": {"a": ["the"]}}
    (source / "soak.json").write_text(json.dumps(soak))
    page = (report.make_pool(source, results) / "README.md").read_text()
    assert json.loads((folder / "soak.json").read_text()) == soak
    assert "7 as expected, 0 wrong, 0 without an answer. 2 streams" in page and "Left behind: nothing." in page
    assert "| the daemon killed (SIGKILL) | 3 |" in page and "a: 'the'" in page
    index = (results / "README.md").read_text()
    assert "| [2026-11-22-xeon-2c-pool](2026-11-22-xeon-2c-pool/README.md) | 104 ms |" in index.replace(
        "0.10 s", "104 ms"
    )


def test_groups_of_phases_lose_nothing() -> None:
    phases = {
        "gpuckpt create": 40.0,
        "criu: processes and memory": 0.2,
        "woken": 0.1,
        "strange": 0.5,
        "unaccounted": -1,
    }
    from benchmarks import pool_figures  # matplotlib takes a second to import

    found = pool_figures.grouped(phases)
    assert found["cold start, golden"] == 40.0 and found["pool, thaw"] == 0.1
    assert found["everything else"] == 0.0  # together below zero


def test_the_demo_s_words(tmp_path: Path) -> None:
    tiers = {tier: {"p50": middle, "n": 5, "all": [middle] * 5} for tier, middle in
             (("cold", 50.0), ("tmpfs", 0.5), ("standby", 0.12), ("hot", 0.1))}  # fmt: skip
    cold = {"alone_bytes": 4_000_000_000}
    held = {"golden_bytes": 2_700_000_000, "own_bytes": 50_000_000, "pss_bytes": 10**9}
    result: dict[str, Any] = {
        "ttft_s": {"qwen": tiers, "small": {name: tiers[name] for name in ("tmpfs", "standby", "hot")}},
        "models": {"qwen": "vLLM, Qwen2 of the 0.5B shape, random weights", "small": "a small one"},
        "killed": {"answered_s": 3.0, "undisturbed_s": 2.0, "same_text": True},
        "burst": {"streams": 8, "replicas": 4, "first_s": [1.0, 2.0], "whole_s": [3.0, 4.0], "same_text": True},
        "machine": MACHINE,
        "load_average": [0.5, 0.5, 0.5],
    }
    table = result_table(result)
    assert table[1].split() == ["qwen", "50.0", "s", "0.50", "s", "0.12", "s", "0.10", "s", "100", "×"]
    assert table[2].split()[1] == "–" and table[2].endswith("–")
    held_by: dict[str, Any] = {
        "models": {"qwen": held | {"cold": cold}},
        "available_before": 9 * 10**9,
        "available_with_all": 6 * 10**9,
    }
    assert any("Servers by themselves, one of each, take 4.00 GB" in line for line in memory_table(held_by))
    held_by["models"] |= {"small": held | {"cold": None}}
    assert not any("by themselves" in line for line in memory_table(held_by))
    from benchmarks import pool_figures

    assert pool_figures.demo(result, tmp_path / "demo_pool.png").stat().st_size > 10_000
