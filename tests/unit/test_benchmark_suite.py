"""The suite's arithmetic, journals, rounds, merging and pages, on made-up numbers: nothing is measured here."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import analyze, density, memory, merge, pages, restore, steady, suite, sweep, targets, workspace
from benchmarks.driver import Gpuckpt, Server, restore_seconds
from benchmarks.harness import Outcome
from benchmarks.journal import Journal, summary
from benchmarks.ours import Goldens
from benchmarks.statistics import median, ratio_interval
from benchmarks.suite import Budget, Run, Unavailable, code_of, orders
from benchmarks.workspace import Workspace
from gpuckpt.errors import VerificationError

MACHINE = {
    "cpu_model": "Intel(R) Xeon(R) Processor @ 2.50GHz",
    "cores": 2,
    "memory_bytes": 24 << 30,
    "gpus": [],
    "kernel": "6.18.44",
    "criu": "4.2.1",
    "podman": "4.3.1",
    "vllm": "0.32.0",
    "torch": "2.13.0+cpu",
    "commit": "abc1234",
}


def journal(folder: Path, name: str = "restore", **options: Any) -> Journal:
    kept = {"n": 10, "quick": False, "server": "vllm", "model": "/m", **options}
    summarise = {
        "restore": restore.summarise,
        "density": density.summarise,
        "sweep": sweep.summarise,
        "steady": steady.summarise,
    }
    return Journal(folder, name, options=kept, machine=MACHINE, summarise=summarise[name])


@contextlib.contextmanager
def all_at_once(made: Journal) -> Iterator[None]:
    """Samples are added without all results being computed anew after each of them."""
    with mock.patch.object(made, "save"):
        yield


def sample(ttft: float, **more: Any) -> dict[str, Any]:
    phases = [{"name": "start-up", "seconds": ttft / 4}, {"name": "first token", "seconds": ttft / 4}]
    return {"ttft_s": ttft, "restore_s": ttft / 2, "canary_match": True, "phases": phases, **more}


def filled(folder: Path) -> dict[str, Any]:
    """Results of every part in ``folder``, as the commands write them; the merged document."""
    made = journal(folder)
    with all_at_once(made):
        for number in range(10):
            for name, ttft in (("mapped", 0.3), ("podman_tmpfs", 3.6), ("podman_import", 9.0), ("trivial", 0.2)):
                made.add(name, sample(ttft + number / 1000))
        for ttft in (31.0, 33.0, 32.0):
            made.add("cold", {"ttft_s": ttft, "canary_match": True})
    made.unavailable("dmtcp", "there is no package")
    made.end("complete")
    many = journal(folder, "density")
    for count in (1, 4, 16):
        many.add(
            f"replicas_{count}",
            {
                "replicas": count,
                "wall_s": 0.4 * count,
                "first_answer_s": 0.3,
                "all_answer_s": 0.4 * count,
                "all_answered": True,
                "canaries_equal": True,
                "available_drop_bytes": 50_000_000 + 80_000_000 * count,
                "pss_bytes": 90_000_000 * count,
                "private_bytes": 70_000_000 * count,
                "anonymous_bytes": 60_000_000 * count,
                "cgroup_bytes": None,
            },
        )
    many.end("complete")
    swept = journal(folder, "sweep", fixed=1.0)
    for mode, x, ttft in (("mapped", "0.5", 0.3), ("mapped", "8", 0.36), ("copy", "0.5", 0.5), ("copy", "8", 4.0)):
        swept.add(f"memory {x} {mode}", sample(ttft, x=float(x)))
    swept.add("memory 8 mapped reference", sample(0.3, x=0.5))
    swept.end("budget")
    working = journal(folder, "steady")
    with all_at_once(working):
        for number in range(12):
            rates = {"mapped": 19.8 + number / 100, "never_dumped": 20.0 + number / 100}
            row = {f"{who}_{what}": value for who, value in rates.items() for what in ("tokens_per_s", "first_s")}
            for length in ("short", "long"):
                working.add(f"decode {length}", row | {"ratio": rates["mapped"] / rates["never_dumped"]})
            working.add("first requests", {"mapped_latency_s": 0.5 if number else 2.0, "never_dumped_latency_s": 0.5})
    working.end("complete")
    return merge.merge(merge.read(folder))


# Statistics


def test_interval_of_a_ratio_of_constants_is_a_point() -> None:
    assert ratio_interval([6.0] * 5, [2.0] * 3, resamples=20) == (3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        ratio_interval([], [1.0])


def test_summary_has_the_contracts_keys_and_skips_what_was_not_measured() -> None:
    found = summary([{"x": 3}, {"x": 1.0}, {"y": 5}, {"x": 2.0}, {"x": None}], "x")
    assert found is not None
    assert found["p50"] == 2.0 and found["p95"] == 3.0 and found["n"] == 3
    assert found["samples"] == [3.0, 1.0, 2.0] and len(found["interval"]) == 2
    assert summary([{"y": 1}], "x") is None


def test_restore_seconds_leave_out_what_the_server_does() -> None:
    rows = [("start-up", 0.1), ("restore", 0.2), ("first token", 5.0), ("canary", 7.0), ("unaccounted", 0.01)]
    assert restore_seconds([{"name": n, "seconds": s} for n, s in rows]) == pytest.approx(0.31)


def test_median_phases_count_a_missing_phase_as_nothing() -> None:
    rows = [[("a", 1.0), ("b", 2.0)], [("a", 3.0)], [("a", 2.0), ("b", 4.0)]]
    samples = [{"phases": [{"name": name, "seconds": value} for name, value in row]} for row in rows]
    assert restore.median_phases(samples) == {"a": 2.0, "b": 2.0}


def test_steady_state_is_drawn_by_pairs_and_the_worse_length_speaks(tmp_path: Path) -> None:
    """Noise that both sides of a pair meet alike is in neither ratio nor interval; drawn apart it would be."""
    made = journal(tmp_path, "steady")
    with all_at_once(made):
        for length, ratio in (("short", 0.99), ("long", 0.97)):
            for number in range(12):
                speed = 5.0 + number
                row = {"mapped_tokens_per_s": speed * ratio, "never_dumped_tokens_per_s": speed, "ratio": ratio}
                made.add(f"decode {length}", row | {"mapped_first_s": 1.0, "never_dumped_first_s": 1.0})
    found = steady.summarise(made.document)["steady_state"]
    assert (found["ratio"], found["interval"], found["ratio_of"]) == (0.97, [0.97, 0.97], "long")
    assert found["ratio_of_medians"] == pytest.approx(0.97)
    low, high = found["ratio_of_medians_interval"]
    assert low < 0.9 and high > 1.05
    assert found["short"]["ratio"] == 0.99 and found["short"]["n"] == 12


# Journals, rounds


def test_journal_is_whole_after_every_sample(tmp_path: Path) -> None:
    made = journal(tmp_path)
    made.add("mapped", sample(0.5))
    found = json.loads((tmp_path / "restore.json").read_text())
    assert found["status"] == "running"
    assert found["mapped"]["ttft_s"]["p50"] == 0.5
    assert found["runs"]["mapped"][0]["load"] >= 0
    rows = list(csv.DictReader((tmp_path / "restore.csv").read_text().splitlines()))
    assert {row["quantity"] for row in rows} >= {"ttft_s", "phase: start-up", "canary_match"}


def test_journal_goes_on_where_an_interrupted_run_ended(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.add("mapped", sample(0.5))
    first.end("interrupted")
    options = first.document["options"]
    again = Journal(tmp_path, "restore", options=options, machine=MACHINE, resume=True)
    assert again.count("mapped") == 1 and again.document["resumed"] == 1
    assert Journal(tmp_path, "restore", options=options, machine=MACHINE).count("mapped") == 0
    for other in (
        {"options": options | {"model": "/other"}, "machine": MACHINE},
        {"options": options, "machine": MACHINE | {"kernel": "7.0"}},
    ):
        with pytest.raises(ValueError, match="cannot be resumed"):
            Journal(tmp_path, "restore", resume=True, **other)


def test_answers_are_equal_only_where_they_were_compared_and_no_command_failed_for_them(tmp_path: Path) -> None:
    made = journal(tmp_path)
    made.add("mapped", sample(0.5))
    made.add("cold_create", {"ttft_s": 9.0, "mode": "mapped"})
    made.add("copy_tmpfs", sample(0.5))
    made.fail("copy_tmpfs", "no memory", 11)
    made.add("mapped_resident", sample(0.5))
    made.fail("mapped_resident", "another answer", code_of(VerificationError("another answer")))
    found = restore.summarise(made.document)
    names = ("mapped", "cold_create", "cold_first", "copy_tmpfs", "mapped_resident")
    assert [found[name]["canaries_equal"] for name in names] == [True, None, None, True, False]
    page = pages.page(merge.merge({"restore": made.document | found}), "title", [])
    rows = {line.split("`")[1]: line.split("|")[-2].strip() for line in page.splitlines() if line.startswith("| `")}
    assert [rows[name] for name in names] == ["yes", "–", "–", "yes", "NO"]


def test_replicas_that_could_not_be_made_have_not_all_answered(tmp_path: Path) -> None:
    filled(tmp_path)
    document = json.loads((tmp_path / "density.json").read_text())
    for code, equal in ((10, True), (8, False)):
        document |= {"failures": {"replicas_16": ["no"]}, "failure_codes": {"replicas_16": [code]}}
        clones = density.summarise(document)["clones16"]
        assert (clones["all_answered"], clones["canaries_equal"]) == (False, equal)


def test_orders_differ_from_round_to_round() -> None:
    assert len({tuple(order) for order in orders(list("abcdef"), 20, 1)}) > 10


class Fake:
    """A method that takes no time; ``failing`` is how often it fails first."""

    def __init__(self, name: str, n: int | None = None, failing: int = 0, missing: bool = False) -> None:
        self.name, self.n, self.failing, self.missing = name, n, failing, missing
        self.closed = 0

    def prepare(self) -> None:
        if self.missing:
            raise Unavailable("there is none")

    def measure(self) -> dict[str, Any]:
        if self.failing:
            self.failing -= 1
            raise Unavailable("not now")
        return sample(1.0)

    def close(self) -> None:
        self.closed += 1


def run_of(tmp_path: Path, *, n: int = 3, quick: bool = False, seconds: float = 60, steps: float = 0.0) -> Run:
    """A run whose clock goes on by ``steps`` seconds each time that somebody looks."""
    ticks = iter(range(10**6))
    options = argparse.Namespace(n=n, quick=quick, seed=1)
    budget = Budget(seconds, clock=lambda: next(ticks) * steps)
    return Run(options, journal(tmp_path), budget, Workspace(tmp_path))


def test_rounds_give_each_method_its_number(tmp_path: Path) -> None:
    run = run_of(tmp_path, n=5)
    run.rounds([Fake("mapped"), Fake("cold", n=3)])
    assert (run.journal.count("mapped"), run.journal.count("cold")) == (5, 3)
    assert [row["round"] for row in run.journal.samples("mapped")] == [0, 1, 2, 3, 4]


def test_rounds_of_a_quick_run_take_one_sample_of_each(tmp_path: Path) -> None:
    run = run_of(tmp_path, n=1, quick=True)
    run.rounds([Fake("mapped"), Fake("cold", n=3)])
    assert (run.journal.count("mapped"), run.journal.count("cold")) == (1, 1)


def test_rounds_take_only_what_a_resumed_run_lacks(tmp_path: Path) -> None:
    run = run_of(tmp_path, n=4)
    run.rounds([Fake("mapped")])
    run.rounds([Fake("mapped")])
    assert run.journal.count("mapped") == 4


def test_rounds_stop_when_the_budget_is_spent_and_say_so(tmp_path: Path) -> None:
    run = run_of(tmp_path, n=1000, seconds=20, steps=1.0)
    run.rounds([Fake("mapped"), Fake("copy_tmpfs")])
    assert 0 < run.journal.count("mapped") < 20
    assert run.journal.document["status"] == "budget"


def test_a_method_that_fails_again_and_again_is_given_up_and_others_go_on(tmp_path: Path) -> None:
    run = run_of(tmp_path, n=6)
    run.rounds([Fake("once", failing=1), Fake("never", failing=99), Fake("mapped")])
    counts = [run.journal.count(name) for name in ("once", "never", "mapped")]
    assert counts == [5, 0, 6] or counts == [6, 0, 6]
    assert len(run.journal.document["failures"]["never"]) == 2
    assert "2 times in a row" in run.journal.document["unavailable"]["never"]


def test_methods_that_cannot_work_are_noted_and_everything_is_closed(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    methods = [Fake("mapped"), Fake("dmtcp", missing=True)]
    with contextlib.ExitStack() as stack:
        ready = run.prepare(methods, stack)
        assert [method.name for method in ready] == ["mapped"]
        assert [method.closed for method in methods] == [0, 0]
    assert [method.closed for method in methods] == [1, 1]
    assert run.journal.document["unavailable"] == {"dmtcp": "there is none"}


@pytest.mark.parametrize("number", ["0", "-1", "few"])
def test_numbers_of_samples_are_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.parser("restore", "", n=10, budget=1).parse_args(["--n", number])


@pytest.mark.parametrize(
    ("cores", "loads", "waited"),
    [(2, [0.4], 0), (2, [2.5, 1.6, 1.0, 0.9], 15), (16, [7.0], 0), (2, [50.0], 180)],
)
def test_a_run_waits_until_the_machine_is_at_rest(
    cores: int, loads: list[float], waited: float, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    assert suite.rest(cores, load=lambda: loads[min(len(slept), len(loads) - 1)], sleep=slept.append) == waited
    assert sum(slept) == waited
    assert ("waiting for the machine to come to rest" in capsys.readouterr().out) == bool(waited)


# Workspace


def test_a_living_runs_workspace_is_left_alone_and_a_dead_ones_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []
    monkeypatch.setattr(workspace, "remove", removed.append)
    dead = tmp_path / f"{workspace.PREFIX}-dead"
    dead.mkdir()
    (dead / "lock").touch()
    with workspace.workspace(parent=tmp_path, store_size="1GiB") as space:
        assert removed == [dead]
        workspace.sweep(tmp_path)
        assert removed == [dead, dead]
        assert space.env["GPUCKPT_STORE__SIZE"] == "1GiB"
        assert all(value.startswith(str(space.folder)) for key, value in space.env.items() if "PATH" in key)
    assert removed[-1] == space.folder


# Memory


def test_memory_of_processes_is_read_from_their_rollup() -> None:
    found = memory.rollup("00400000-7ff [rollup]\nRss: 100 kB\nPss:  40 kB\nPrivate_Dirty: 8 kB\nLocked: 3 kB\n")
    assert (found["Rss"], found["Pss"], found["Private_Dirty"], found["Swap"]) == (102400, 40960, 8192, 0)
    own = memory.of_processes([os.getpid(), 2**22 + 1])
    assert own["Private_Dirty"] > 0 and own["Rss"] >= own["Pss"]


@pytest.mark.parametrize(
    ("line", "file"),
    [("0::/a/b", "a/b/memory.current"), ("5:cpu,memory:/a/b", "memory/a/b/memory.usage_in_bytes"), ("3:cpu:/a", None)],
)
def test_memory_of_a_group_in_both_hierarchies(line: str, file: str | None, tmp_path: Path) -> None:
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "cgroup").write_text(f"{line}\n")
    if file:
        (tmp_path / "root" / file).parent.mkdir(parents=True)
        (tmp_path / "root" / file).write_text("4096\n")
    found = memory.cgroup_of(7, proc=tmp_path / "proc", root=tmp_path / "root")
    assert found == (4096 if file else None)
    assert memory.cgroup_of(8, proc=tmp_path / "proc", root=tmp_path / "root") is None


# Servers, points


def test_servers_are_chosen_by_the_options(tmp_path: Path) -> None:
    filler = Server.chosen(argparse.Namespace(server="filler:64", model=tmp_path))
    assert "64" in filler.words and not filler.streams
    (tmp_path / "config.json").write_text("{}")
    vllm = Server.chosen(argparse.Namespace(server="vllm", model=tmp_path))
    assert vllm.streams and vllm.words[:2] == ("--model", str(tmp_path))


def test_sweeps_vary_one_thing_at_a_time() -> None:
    found = sweep.points(sweep.parser().parse_args([]))
    assert {(point.axis, point.gigabytes) for point in found if point.axis != "memory"} == {
        ("processes", 1.0),
        ("mappings", 1.0),
    }
    assert [point.x for point in found if point.axis == "memory"] == [0.1, 0.5, 1, 2, 4, 8]
    assert all(point.processes == 1 or point.mappings == 1 for point in found)


# Merging, targets, pages


def test_merged_results_have_the_contracts_keys(tmp_path: Path) -> None:
    found = json.loads(json.dumps(filled(tmp_path)))
    assert found["mapped"]["ttft_s"]["p50"] == pytest.approx(0.3045)
    assert found["mapped"]["ttft_s"].keys() >= {"p50", "p95", "n", "interval", "samples"}
    assert found["mapped"]["phases"].keys() == {"start-up", "first token"}
    assert found["ratios"].keys() >= {"cold_over_mapped", "podman_tmpfs_over_mapped", "import_over_mapped"}
    assert found["ratios"]["cold_over_mapped"]["value"] == pytest.approx(32 / 0.3045, abs=1e-3)
    assert found["density"]["bytes_per_extra_replica"] == 80_000_000
    assert found["clones16"] | {"all_answer_s": None} == {
        "all_answered": True,
        "canaries_equal": True,
        "seconds_until_all_answer": pytest.approx(6.4),
        "all_answer_s": None,
    }
    assert found["flatness"] == pytest.approx(1.2)
    assert found["steady_state"]["ratio"] == pytest.approx(0.99, abs=0.001)
    assert found["steady_state"]["first_requests"]["mapped"]["max"] == 2.0


def test_targets_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    by_name = {target["path"]: target for target in filled(tmp_path)["targets"]}
    assert by_name["ratios.cold_over_mapped.value"]["met"] is True
    assert by_name["mapped.ttft_s.p50"]["met"] is True
    assert by_name["ratios.import_over_mapped.value"]["met"] is True
    assert by_name["flatness"]["met"] is True
    assert by_name["clones16.all_answered"]["met"] is True
    alone = {target["path"]: target for target in targets.targets({"flatness": 1.3})}
    assert alone["flatness"]["met"] is False
    unknown: dict[str, Any] = {"met": None, "value": None, "n": None, "enough": False}
    measured = by_name["density.bytes_per_extra_replica"]
    assert alone["density.bytes_per_extra_replica"] == measured | unknown


def test_targets_know_the_n_of_their_smallest_series(tmp_path: Path) -> None:
    found = {target["path"]: (target["n"], target["enough"]) for target in filled(tmp_path)["targets"]}
    assert found == {
        "ratios.cold_over_mapped.value": (3, False),
        "ratios.podman_tmpfs_over_mapped.value": (10, True),
        "ratios.import_over_mapped.value": (10, True),
        "mapped.ttft_s.p50": (10, True),
        "density.bytes_per_extra_replica": (1, False),
        "steady_state.ratio": (12, True),
        "flatness": (1, False),
        "clones16.all_answered": (1, False),
        "clones16.canaries_equal": (1, False),
        "ratios.restore_over_trivial.value": (10, True),
    }


def test_merging_twice_changes_nothing(tmp_path: Path) -> None:
    once = filled(tmp_path)
    (tmp_path / "restore.json").write_text(json.dumps(once))
    assert merge.merge(merge.read(tmp_path)) == once


def test_merging_says_what_a_reader_must_know(tmp_path: Path) -> None:
    filled(tmp_path)
    file = tmp_path / "density.json"
    changed = json.loads(file.read_text())
    changed["machine"]["commit"] = "def5678"
    changed["failures"] = {"replicas_16": ["no memory"]}
    file.write_text(json.dumps(changed))
    notes = " / ".join(merge.merge(merge.read(tmp_path))["notes"])
    assert "different values of commit: abc1234, def5678" in notes
    assert "sweep ended early (budget)" in notes
    assert "1 of the attempts of replicas_16 failed, for example: no memory" in notes


def test_cold_starts_of_a_run_of_their_own_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    made = journal(tmp_path)
    made.add("mapped", sample(0.5))
    made.end("complete")
    part = json.loads((tmp_path / "restore.json").read_text())
    alone = part | {"benchmark": "cold", "cold": {"ttft_s": summary([sample(50.0)], "ttft_s")}}
    found = merge.merge({"restore": part, "cold": alone})
    assert found["ratios"]["cold_over_mapped"]["value"] == 100
    assert any("two runs" in note for note in found["notes"])
    with pytest.raises(ValueError, match="no results"):
        merge.merge({})


def test_page_and_index_come_from_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pytest.importorskip("benchmarks.report")
    charts = pytest.importorskip("benchmarks.charts")
    source, results = tmp_path / "bench", tmp_path / "results"
    source.mkdir()
    begun = filled(source)["begun"][:10]
    older = results / "2025-01-01-older"
    older.mkdir(parents=True)
    times = {"p50": 2.0, "p95": 3.0, "n": 5}
    (older / "demo.json").write_text(json.dumps({"cold_ttft_s": 50, "restore_ttft_s": times, "machine": MACHINE}))
    target = report.make(source, results)
    assert target == results / f"{begun}-xeon-2c"
    page = (target / "README.md").read_text()
    assert "**First token 0.30 s after the command" in page
    assert "105 × faster" in page
    assert "Not measured: dmtcp, because there is no package." in page
    assert "![" in page and all((target / name).exists() for name in ("methods.png", "methods.svg", "steady.png"))
    assert "| cold start over mapped restore | at least 90 × | 105 × | 3 | met (n = 3) |" in page
    assert "| decoding against the never-dumped server | at least 0.98 | 0.99 | 12 | met |" in page
    assert "n by replicas: 1 × 1, 1 × 4, 1 × 16." in page
    assert len(page.splitlines()) < 110
    first = (results / "README.md").read_text()
    assert f"[{begun}-xeon-2c]({begun}-xeon-2c/README.md)" in first and "[2025-01-01-older]" in first
    assert "25 ×" in first and " of 10, 5 more with n < 10 |" in first
    monkeypatch.setattr(charts, "draw", lambda result, folder: list(charts.FIGURES))  # they are there
    report.make(source, results)
    assert (target / "README.md").read_text() == page


def test_page_of_a_poor_run_still_says_what_there_is(tmp_path: Path) -> None:
    made = journal(tmp_path, quick=True)
    made.add("podman_tmpfs", sample(3.0, canary_match=False))
    made.end("interrupted")
    result = merge.merge(merge.read(tmp_path))
    page = pages.page(result, "title", [])
    assert "not measured in this run" in page and "| NO |" in page and "ended early (interrupted)" in page


@pytest.mark.parametrize(
    ("cpu", "gpus", "name"),
    [
        ("AMD EPYC 9654 96-Core Processor", ["NVIDIA H100 80GB HBM3, 81559 MiB, 580"], "2026-01-02-epyc-2c-h100"),
        ("aarch64", [], "2026-01-02-aarch64-2c"),
    ],
)
def test_folders_are_named_by_date_and_machine(cpu: str, gpus: list[str], name: str) -> None:
    report = pytest.importorskip("benchmarks.report")
    machine = MACHINE | {"cpu_model": cpu, "gpus": gpus}
    assert report.folder_name({"begun": "2026-01-02T10:00:00+00:00", "machine": machine}) == name


def test_charts_group_every_phase_and_lose_no_time() -> None:
    charts = pytest.importorskip("benchmarks.charts")
    phases = {"start-up": 0.1, "podman: restore": 0.2, "criu: processes and memory": 0.3, "something new": 0.4}
    found = charts.grouped(phases)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["memory and processes"] == 0.3 and found[charts.OTHER] == 0.4


# Analyze


def test_analyze_compares_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, ttft in (("one", 1.0), ("two", 0.5)):
        made = journal(tmp_path / folder)
        made.add("mapped", sample(ttft))
        made.end("complete")
    assert analyze.main([str(tmp_path / folder / "restore.json") for folder in ("one", "two")]) == 0
    printed = capsys.readouterr().out
    assert "mapped.ttft_s" in printed and "0.500" in printed
    assert analyze.main([str(tmp_path / "none.json")]) == 2


def test_analyze_finds_quantities_at_every_depth(tmp_path: Path) -> None:
    found = dict(analyze.quantities(filled(tmp_path)))
    assert {"mapped.ttft_s", "density.by_replicas.16.wall_s", "sweeps.memory.mapped.8.ttft_s"} <= found.keys()
    assert all(value["p50"] == pytest.approx(median(value["samples"])) for value in found.values())


def test_a_sweep_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.parser().parse_args(["--axes", "memory,size"])
    assert "no sweep is called size" in capsys.readouterr().err


# Goldens


def test_only_the_compared_servers_creations_are_cold_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [{"name": "cold: first token", "seconds": 1.0}]
    document = {"phases": phases, "image_bytes": 1, "first_token_monotonic_ns": 10**9, "cold_ttft_s": 1.0}
    monkeypatch.setattr(Gpuckpt, "create", lambda *_: Outcome(document, 0, 2 * 10**9))
    monkeypatch.setattr(Gpuckpt, "inspect", lambda *_: {})
    made, compared = journal(tmp_path), Server.filler(64)
    goldens = Goldens(Gpuckpt(Workspace(tmp_path)), made, compared)
    for name, server in (("mapped", compared), ("trivial", Server.filler(8)), ("copy", Server.filler(64))):
        goldens.need(name, server, "mapped")
    assert {name: len(samples) for name, samples in made.document["runs"].items()} == {
        "cold_create": 2,
        "create_trivial": 1,
    }
