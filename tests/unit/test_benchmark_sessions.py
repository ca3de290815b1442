"""The session benchmarks' arithmetic, merging, targets and figures, on made-up numbers: nothing is measured here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sessions, sessions_branch, sessions_checkpoint, sessions_common, sessions_interference
from benchmarks.harness import ROOT
from benchmarks.parts import Part, table
from benchmarks.sessions import TARGETS, Runner, merge
from benchmarks.sessions_common import Child, Watch, beyond, paired, quantity
from benchmarks.sessions_resume import Phase
from benchmarks.suite import Unavailable
from benchmarks.targets import targets

SETTING = {
    "model": "gpt2",
    "architecture": "GPT2LMHeadModel",
    "layers": 12,
    "features": 768,
    "dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "torch": "2.13.0",
    "transformers": "5.19.0",
    "prompt": 512,
    "quick": False,
}
MACHINE = {"cpu_model": "Xeon", "cores": 2, "memory_bytes": 24 << 30, "gpus": []} | dict.fromkeys(
    ("kernel", "criu", "podman", "vllm", "torch"), "1.0"
)


def values(middle: float, n: int = 11) -> list[float]:
    """Values around ``middle``, which is their median."""
    return [middle * (1 + (index - n // 2) / 1000) for index in range(n)]


def part(name: str, **found: Any) -> dict[str, Any]:
    return {"part": f"sessions_{name}", "setting": SETTING, "load_average": [0.0, 0.0, 0.0], "elapsed_s": 1.0, **found}


def phase(floor: float, *, queued: bool = False, **ways: float) -> dict[str, Any]:
    made = Phase([1, 12], tuple(ways), queued=queued)
    for layer in (1, 12):
        for value in values(floor):
            for way, extra in {"floor": 0.0, **ways}.items():
                made.add(layer, way, (value + extra) / 1000)
            made.add(layer, "head", 0.002)
            for way in ("engine", "http"):
                made.add(layer, f"{way}_layers", (value - 1) / 1000)
    return made.document()


def measured() -> dict[str, Any]:
    """A document of each part, in its own form."""
    sizes = {
        name: {
            "bytes": size,
            **{
                key: quantity(values(middle))
                for key, middle in {
                    "dispatch_us": 15.0,
                    "launch_us": 5.0,
                    "beyond_launch_us": 10.0 + size / 1e6,
                    "complete_us": size / 1e4,
                    "landed_us": size / 1e4,
                    "plain_us": size / 1e4,
                    "complete_over_bound": size / 1e7,
                    "restore_us": 9.0,
                    "restore_over_bound": 0.1,
                }.items()
            },
            "bound_us": 1.0,
        }
        for name, size in sessions_checkpoint.SIZES.items()
    }
    ratio = paired(values(10.05), values(10.0))
    run = {**ratio, "bytes": 1_572_864, "complete_us": quantity(values(300.0))}
    return {
        "checkpoint-m": part("checkpoint", by_size=sizes, bandwidth_bytes_per_s=quantity(values(8e9)), pinned=False),
        "interference-m": part("interference", own=run, large={**run, "bytes": 8_000_000}),
        "overhead-m": part(
            "overhead",
            one={**paired(values(98.0), values(100.0)), "tokens_equal": True},
            eight={"sessions": 8, "over_batch": ratio, "over_in_a_row": ratio},
            pause={"ratio": {"breakpoint": ratio}},
        ),
        "branch-m": part(
            "branch",
            branches={
                count: {
                    **paired(values(60.0), values(100.0)),
                    "prefix_ms": quantity(values(20.0)),
                    "tails_ms": quantity(values(40.0)),
                    "layer": 6,
                    "least": 0.6,
                }
                for count in ("4", "8")
            },
            steering={"repeats": True},
        ),
        "concurrency-m": part("concurrency", **ratio, tokens_equal=True),
        "resume-m": part(
            "resume",
            prefill=phase(100.0, engine=1.0, http=3.0, offload=0.5, recompute=60.0),
            decode=phase(10.0, engine=1.0, http=4.0, offload=0.5, recompute=6.0),
            unavailable={"nnsight": "not here"},
        ),
    }


def whole() -> dict[str, Any]:
    exact = {"architectures": 57, "cuts": 400, "failures": 0, "other": 1}
    return merge(measured(), exact) | {"options": {"quick": False}, "machine": MACHINE}


# Statistics


def test_what_slows_both_of_a_pair_is_not_in_their_ratio() -> None:
    below = [10.0, 40.0, 10.0, 90.0]
    assert paired([value * 1.5 for value in below], below)["value"] == 1.5


def test_sides_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired([1.0, 2.0], [1.0])


def test_what_is_beyond_a_floor_may_be_below_it() -> None:
    assert beyond([3.0, 1.0], [1.0, 2.0])["samples"] == [2.0, -1.0]


def test_a_quantity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        quantity([])


def test_the_share_of_changed_tokens() -> None:
    assert sessions_branch.changed([1, 2, 3, 4], [1, 0, 3, 0]) == 0.5


def test_the_bound_of_a_completion() -> None:
    assert sessions_checkpoint.bound_us(8_000_000, 8e9) == pytest.approx(1520.0)


def test_runs_of_the_same_are_joined_pair_by_pair() -> None:
    run = {"bytes": 1, "complete_us": quantity([1.0])}
    made = sessions_interference.joined([run | paired([2.0], [1.0]), run | paired([9.0], [3.0])])
    assert (made["n"], made["value"], made["of_each_run"]) == (2, 2.5, [2.0, 3.0])
    assert made["complete_us"]["n"] == 2


# Waiting


def test_a_watch_tells_when_an_event_came_and_passes_over_others() -> None:
    watch = Watch()
    for event in ({"type": "resumed"}, {"type": "token", "token": 7}, {"type": "token", "token": 8}):
        watch(event)
    first, event = watch.until("token")
    second, _ = watch.until("token")
    assert event["token"] == 7 and first <= second


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_a_generation_that_fails_ends_the_measurement(reason: str) -> None:
    watch = Watch()
    watch({"type": "done", "reason": reason, "error": "out of memory"})
    with pytest.raises(RuntimeError, match=reason):
        watch.until("done")


def test_what_never_comes_is_not_waited_for() -> None:
    watch = Watch()
    watch({"type": "done", "reason": "length"})
    with pytest.raises(RuntimeError, match="before it was paused"):
        watch.until("paused")


def child(program: str) -> Child:
    return Child([sys.executable, "-c", program], name="the peer")


def test_a_child_answers_line_by_line() -> None:
    echo = child("import sys, json\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)")
    try:
        assert [echo.ask({"n": n}) for n in (1, 2)] == [{"got": {"n": 1}}, {"got": {"n": 2}}]
    finally:
        echo.close()


@pytest.mark.parametrize(
    ("program", "reason"),
    [('print(\'{"error": "no such model"}\')', "no such model"), ("raise SystemExit(3)", "status 3")],
)
def test_a_child_that_cannot_says_why(program: str, reason: str) -> None:
    failing = child(program)
    try:
        with pytest.raises(Unavailable, match=reason):
            failing.ask({})
    finally:
        failing.close()


# Merging and targets


def test_the_contracts_keys_are_there() -> None:
    document = whole()
    assert document["exact"] == {"architectures": 57, "cuts": 400, "failures": 0}
    keys = {"dispatch_us", "complete_us", "resume_rtt_ms", "tail_floor_ms", "interference_ratio", "generate_ratio"}
    assert keys | {"branch_cost", "steering", "concurrency", "pause_overhead", "restore_us"} <= set(document)
    assert document["dispatch_us"]["worst_beyond_launch"] == pytest.approx(18.0)
    assert document["resume_rtt_ms"]["by_model"]["gpt2"]["prefill"]["1"]["p50"] == pytest.approx(2.0)
    assert document["resume_rtt_ms"]["worst"] == pytest.approx(3.0)
    assert document["tail_floor_ms"]["gpt2"]["decode"]["12"]["p50"] == pytest.approx(10.0)
    assert document["unavailable"] == {"nnsight": "not here"}
    json.dumps(document)


def test_the_first_models_numbers_are_the_headlines() -> None:
    parts = measured()
    parts["overhead-other"] = part(
        "overhead", one=paired(values(1.0), values(2.0)) | {"tokens_equal": True}, eight={}, pause={}
    )
    assert merge(parts, None)["generate_ratio"]["value"] == pytest.approx(0.98)


def test_two_models_stand_side_by_side() -> None:
    parts = measured()
    other = part(
        "resume", prefill=phase(9.0, http=7.0, engine=1.0), decode=phase(9.0, http=1.0, engine=1.0), unavailable={}
    )
    parts["resume-other"] = other | {"setting": SETTING | {"model": "qwen2"}}
    document = merge(parts, None)
    assert set(document["tail_floor_ms"]) == {"gpt2", "qwen2"}
    assert document["resume_rtt_ms"]["worst"] == pytest.approx(6.0)


def test_what_a_resume_takes_beside_its_own_layers_and_the_head() -> None:
    own = phase(10.0, engine=3.0, http=5.0)["1"]
    assert own["beyond_floor_ms"]["http"]["p50"] == pytest.approx(5.0)
    assert own["around_ms"]["http"]["p50"] == pytest.approx(4.0)  # its layers 9, the head 2
    # Where layers are only queued, their own times say nothing.
    assert phase(10.0, queued=True, engine=3.0, http=5.0)["1"]["around_ms"]["http"]["p50"] == pytest.approx(5.0)


def test_targets_are_met_with_enough_samples_only() -> None:
    document = whole()
    found = {target["path"]: target for target in targets(document, TARGETS)}
    assert all(target["met"] and target["enough"] for target in found.values())
    assert found["interference_ratio.value"]["n"] == 11
    document["interference_ratio"] |= paired(values(10.0, 5), values(10.0, 5))
    # What has more samples does not make up for it: the least counts.
    assert not {target["path"]: target for target in targets(document, TARGETS)}["interference_ratio.value"]["enough"]


def test_a_missed_target_and_an_unmeasured_one_are_said() -> None:
    document = whole() | {"exact": {"architectures": 57, "cuts": 400, "failures": 1}}
    del document["branch_cost"]
    document["targets"] = targets(document, TARGETS)
    lines = table(document)
    assert sum("MISSED" in line for line in lines) == 1
    assert sum("not measured" in line for line in lines) == 2


def test_nothing_measured_is_merged_to_nothing() -> None:
    assert merge({}, None) == {"settings": {}, "commits": {}}
    assert all(target["met"] is None and not target["enough"] for target in targets({}, TARGETS))


# Running


def runner(tmp_path: Path, python: str = sys.executable) -> Runner:
    options = sessions.parser().parse_args(["--out", str(tmp_path), "--budget", "5"])
    made = Runner(options)
    made.python = Path(python)
    return made


def test_a_process_that_fails_is_noted_and_one_that_hangs_is_ended(tmp_path: Path) -> None:
    made = runner(tmp_path)
    assert made.run("good", [sys.executable, "-c", ""], 60)
    assert not made.run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert not made.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 0.3)
    assert made.failures == {"bad": "it ended with status 3", "slow": "it took more than 0.3 s"}


def test_no_part_begins_when_the_budget_is_spent(tmp_path: Path) -> None:
    made = runner(tmp_path)
    made.budget.seconds = 0
    assert made.part(Part("checkpoint", "tiny", 1)) is None
    assert "budget" in made.failures["checkpoint-tiny"]


def test_what_is_not_measured_anew_is_taken_from_the_last_run_and_named(tmp_path: Path) -> None:
    made = runner(tmp_path)
    made.work.mkdir(parents=True)
    again = [part for part in sessions.PARTS if part.name == "resume"]
    for part in (*sessions.PARTS, *sessions.QUICK):
        (made.work / f"{part.key}.json").write_text(json.dumps({"part": part.key}))
    assert made.earlier(again) == ({}, [])  # a whole run takes nothing over
    made.options.only = ["resume"]
    found, keys = made.earlier(again)
    assert keys == [part.key for part in sessions.PARTS if part.name != "resume"]
    assert found == {key: {"part": key} for key in keys}
    made.options.quick = True
    assert made.earlier(again) == ({}, [])


def test_parts_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sessions.parser().parse_args(["--only", "checkpoint,speed"])
    assert "no part is called speed" in capsys.readouterr().err


def test_each_part_is_a_script_with_the_options_that_it_is_given(tmp_path: Path) -> None:
    for one in (*sessions.PARTS, *sessions.QUICK):
        module = f"benchmarks.sessions_{one.name}"
        assert (ROOT / "benchmarks" / f"sessions_{one.name}.py").is_file()
        made = sessions_common.parser(module, "", n=10, budget=1.0)
        if one.name == "resume":
            from benchmarks.sessions_resume import parser

            made = parser()
        given = made.parse_args(["--model", "m", "--out", str(tmp_path), *one.options])
        assert isinstance(given, argparse.Namespace) and one.model in sessions.MODELS


def test_the_scripts_are_read_without_torch() -> None:
    modules = ["checkpoint", "interference", "overhead", "branch", "concurrency", "resume"]
    names = ", ".join(f"benchmarks.sessions_{name}" for name in modules)
    program = f"import sys; sys.modules['torch'] = None; import benchmarks.sessions, {names}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# Figures


def test_the_figures_are_drawn_from_the_document_alone(tmp_path: Path) -> None:
    document = json.loads(json.dumps(whole()))
    session_figures = pytest.importorskip("benchmarks.session_figures")
    drawn = session_figures.draw(document, tmp_path)
    assert drawn == ["sessions_crossover", "sessions_interference", "sessions_branching"]
    for name in drawn:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_figures_without_numbers_are_left_out(tmp_path: Path) -> None:
    session_figures = pytest.importorskip("benchmarks.session_figures")
    missing = ("resume_ms", "interference_ratio")
    document = {key: value for key, value in whole().items() if key not in missing}
    assert session_figures.draw(document, tmp_path) == ["sessions_branching"]
    assert {file.name for file in tmp_path.iterdir()} == {"sessions_branching.png", "sessions_branching.svg"}


def test_the_page_says_what_the_document_says() -> None:
    from benchmarks import session_pages

    document = whole() | {"machine": MACHINE, "unavailable": {"nnsight": "no network"}, "failures": {}}
    document |= {"targets": targets(document, TARGETS), "of_an_earlier_run": ["checkpoint-m"]}
    page = session_pages.page(document, "title", ["sessions_branching"])
    exact = document["exact"]
    assert f"{exact['architectures']} architectures" in page and f"{exact['cuts']:,} cuts" in page
    assert "![Variants" in page and "nnsight` is missing: no network" in page and "checkpoint-m" in page
    assert page.count("| met |") + page.count("| met (n < 10) |") == sum(
        target["met"] is True for target in document["targets"]
    )
    (line,) = [line for line in session_pages.index([("folder", document)]) if line.startswith("| [folder]")]
    assert "0.98 ×" in line and " of " in line
    assert session_pages.index([]) == []
    poor = {"machine": MACHINE, "settings": {}, "targets": targets({}, TARGETS)}
    assert "not tried" in session_pages.page(poor, "title", [])
