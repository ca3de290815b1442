"""KV paging's benchmark: traces, the simulation of policies, and what becomes of the parts' numbers."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kv, kv_pages, kv_simulation, report
from benchmarks.harness import ROOT
from benchmarks.kv_simulation import POLICIES, Machine, Simulation
from benchmarks.kv_traces import TRACES, Script, Turn
from hooks.gpuckpt_guest.kv.policy import Costs

# A byte for each token, a thousand of them a second each way; ten milliseconds a pass.
COSTS = Costs(out=1000.0, into=1000.0, pass_s=0.01, token_s=0.001)


def run(scripts: list[Script], budget: int, who: str, costs: Costs = COSTS) -> kv_simulation.Outcome:
    choose, early = POLICIES[who]
    return Simulation(Machine(budget, 1, costs), scripts, choose, early=early).run()


# ---------------------------------------------------------------------- traces and policies


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_the_same_for_a_seed(name: str) -> None:
    one, again, other = (list(TRACES[name](random.Random(seed), 12)) for seed in (1, 1, 2))
    assert one == again != other and len(one) == 12
    for script in one:
        assert script.begin >= 0 and script.turns[0].pause == 0
        assert all(turn.pause >= 0 and turn.read >= 1 and turn.write >= 1 for turn in script.turns)


@pytest.mark.parametrize("who", POLICIES)
@pytest.mark.parametrize("name", TRACES)
def test_with_memory_for_all_nobody_waits(name: str, who: str) -> None:
    scripts = list(TRACES[name](random.Random(1), 9))
    found = run(scripts, 10**9, who)
    assert len(found.waits) == sum(len(script.turns) for script in scripts)
    assert not any(found.waits) and not found.refused and not found.out and not found.into


def two(said: float | None) -> list[Script]:
    """Sessions of 100 tokens that take turns, each coming back 10 s after its last turn."""
    turns = (Turn(0.0, 60, 40, said), Turn(10.0, 1, 1, said), Turn(10.0, 1, 1))
    return [Script(0.0, turns), Script(5.0, turns)]


def test_who_has_left_waits_for_its_bytes() -> None:
    found = run(two(None), 150, "lru")
    # The second one's first turn waits for the first to be copied out; then each waits for both copies, of which the
    # one out is of what was written since; the last one finds room.
    assert found.waits == pytest.approx([0.0, 0.1, 0.1 + 0.1, 0.002 + 0.1, 0.002 + 0.102, 0.102])
    assert found.out and found.into and not found.refused and not found.recomputed
    assert run(two(None), 300, "lru").waits == [0.0] * 6


def test_whoever_keeps_all_turns_others_away() -> None:
    found = run(two(None), 150, "keep")
    assert found.refused == 1 and len(found.waits) == 3 and not found.out


def test_recomputing_copies_nothing() -> None:
    found = run(two(None), 150, "recompute")
    assert not found.out and not found.into and found.recomputed > 300


def test_who_says_when_it_comes_back_is_there_in_time() -> None:
    # Three of 100 tokens where two fit: one is away for a minute, and says so; the others come in quick succession.
    long = Script(0.0, (Turn(0.0, 60, 40, 60.0), Turn(60.0, 1, 1)))
    short = [Script(1.0 + n, (Turn(0.0, 60, 40), *(Turn(2.0, 1, 1) for _ in range(10)))) for n in range(2)]
    mine, lru = (run([long, *short], 290, who) for who in ("gpuckpt", "lru"))
    assert mine.waits[-1] == 0.0 and lru.waits[-1] > 0.1  # it was brought back when the others had ended
    assert sum(mine.waits) < sum(lru.waits)


def test_what_is_cheap_to_compute_is_dropped() -> None:
    slow_bus = Costs(out=10.0, into=10.0, pass_s=0.0001, token_s=0.0001)
    found = run(two(None), 150, "gpuckpt", slow_bus)
    assert found.recomputed and not found.out and not found.into


def test_a_comparison_is_over_the_same_turns() -> None:
    found = kv_simulation.compare(1, COSTS, 6, seeds=range(2), share=0.4)
    assert set(found) == set(TRACES)
    for trace in found.values():
        policies = trace["policies"]
        assert policies["gpuckpt"]["turns"] == policies["lru"]["turns"] > 0
        assert trace["gain_over_lru"] == pytest.approx(
            policies["lru"]["waited_s"] / policies["gpuckpt"]["waited_s"], rel=0.01
        )


# ---------------------------------------------------------------------- the document


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    """The newest that is published."""
    (file, *_) = sorted(ROOT.glob("results/*-kv/kv.json"), reverse=True)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture
def documents(published: dict[str, Any]) -> dict[str, Any]:
    """What the parts wrote."""
    made = {}
    for key, setting in published["settings"].items():
        name = key.split("-")[0]
        made[key] = copy.deepcopy(published[name]) | {"part": f"kv_{name}", "setting": setting}
    return made


def test_the_contract_s_keys(documents: dict[str, Any]) -> None:
    merged = kv.merge(documents)
    assert merged["sessions"] == merged["completed"] == 50 and merged["token_mismatches"] == 0
    assert merged["demand_over_budget"] == pytest.approx(2, abs=0.01)
    ways = merged["paging"]["copies"]
    assert merged["gbps_over_memcpy"] == min(ways["out"]["value"], ways["in"]["value"])
    assert merged["append_cost_flat"] <= 1.05 and merged["wake_p99_ms"] > 0 and merged["policy_gain_over_lru"] > 0
    assert not any(wrong(merged) for wrong in kv.WRONG.values())


def test_what_is_wrong_is_found(documents: dict[str, Any]) -> None:
    over = next(part for part in documents.values() if part["part"] == "kv_oversubscribe")
    over["factors"]["4"]["token_mismatches"] = 1
    over["factors"]["1.15"]["completed"] -= 1
    found = {what for what, wrong in kv.WRONG.items() if wrong(kv.merge(documents))}
    assert found == {"sessions with wrong tokens", "sessions without all their tokens"}


@pytest.mark.parametrize("left", [(), ("paging",), ("oversubscribe",), ("weights", "baselines")])
def test_a_part_alone_makes_a_page(
    published: dict[str, Any], documents: dict[str, Any], tmp_path: Path, left: tuple[str, ...]
) -> None:
    from benchmarks.parts import table
    from benchmarks.targets import targets

    parts = {key: part for key, part in documents.items() if key.split("-")[0] in left}
    whole = {key: published[key] for key in ("begun", "machine", "options", "version")} | kv.merge(parts)
    whole |= {"targets": targets(whole, kv.TARGETS), "failures": {"weights-tiny": "it ended with status 1"}}
    (tmp_path / "kv.json").write_text(json.dumps(whole))
    results = tmp_path / "results"
    results.mkdir()
    page = (report.make_suite("kv", tmp_path, results) / "README.md").read_text()
    assert "`weights-tiny` failed" in page and "None" not in page and "nan" not in page
    assert ("sessions that want up to" in page) == ("oversubscribe" in left)
    assert (results / "README.md").read_text().count("-kv/README.md") == 1
    assert len(table(whole)) == len(kv.TARGETS)


def test_the_published_page_is_that_of_its_document(published: dict[str, Any]) -> None:
    (folder, *_) = sorted(ROOT.glob("results/*-kv"), reverse=True)
    assert (folder / "README.md").read_text() == kv_pages.page(published, folder.name, ["kv", "kv_weights"])
