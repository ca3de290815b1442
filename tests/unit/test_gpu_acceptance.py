"""The acceptance on a GPU: its order and budget, what is kept of it, how a step ends, and what is never shown."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    environment,
    gpu_acceptance,
    gpu_children,
    gpu_context,
    gpu_models,
    gpu_pages,
    gpu_step,
    gpu_steps,
    gpu_summary,
    pages,
    report,
)
from benchmarks.gpu_acceptance import RESERVE, Run
from benchmarks.gpu_children import Ended
from benchmarks.gpu_context import Answer, Context
from benchmarks.gpu_record import Document, Mismatch, Record, Status
from benchmarks.gpu_steps import NAMES, STEPS, Step
from benchmarks.suite import Budget, Unavailable
from gpuckpt.errors import GpuckptError

MACHINE: Document = {
    "cpu_model": "A processor", "cores": 16, "kernel": "6.1", "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.1"],
    "memory_bytes": 1 << 37, "criu": "4.2", "podman": "5.0", "commit": "abc",
}  # fmt: skip
TIMES: Document = {"p50": 0.75, "p95": 0.8, "n": 12, "interval": [0.7, 0.8], "samples": [0.75]}


def record(folder: Path, *, dry: bool = False, resume: bool = False, machine: Document = MACHINE) -> Record:
    return Record(folder, dry=dry, machine=machine, options={}, resume=resume, summarise=gpu_summary.summarise)


class Clock:
    """Seconds that only pass when somebody lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Tried(Run):
    """A run whose steps take so many seconds and go as they are told."""

    def __init__(self, record: Record, clock: Clock, budget: float, how: dict[str, Status], takes: float = 10) -> None:
        context = Context("", "", record.document["dry"], 0.0, Path("/p"), Path("/f"), Path("/s"))
        super().__init__(record, context, Budget(budget, clock), Path("/w"))
        self.clock, self.how, self.takes, self.begun = clock, how, takes, list[str]()

    def step(self, step: Step) -> None:
        self.begun.append(step.name)
        self.clock.now += self.takes
        self._keep(step, self.how.get(step.name, "ok"), self.takes, "a reason", {})


# ---------------------------------------------------------------------- order, budget, needs


def test_probes_come_first_and_every_need_is_met_before() -> None:
    seen: set[str] = set()
    for step in STEPS:
        assert set(step.needs) <= seen and 0 < step.least <= step.limit
        seen.add(step.name)
        gpu_step.function(step.work)
    kinds = [name.partition(".")[0] for name in NAMES]
    assert kinds[:7] == ["probe"] * 6 + ["phases"] and kinds.index("server") == 7


def test_what_is_needed_comes_along_with_what_is_chosen() -> None:
    chosen = [step.name for step in gpu_steps.chosen(["phases"])]
    assert chosen[0] == "probe.driver" and set(chosen[1:]) == {name for name in NAMES if name.startswith("phases.")}
    assert gpu_steps.chosen([]) == STEPS
    with pytest.raises(ValueError, match=r"no step is called phase\b"):
        gpu_steps.chosen(["phase"])


def test_what_does_not_fit_into_the_budget_is_left_with_the_reason(tmp_path: Path) -> None:
    kept = record(tmp_path)
    run = Tried(kept, Clock(), RESERVE + 100, {})
    run.steps(STEPS)
    assert run.begun[:9] == list(NAMES[:7]) + ["phases.large", "phases.pair"]
    left = kept.document["steps"]["server.guest-8b-eager"]
    assert left["status"] == "left" and left["reason"] == "20 s were left, and it takes 90"
    assert set(kept.document["steps"]) == set(NAMES)


def test_what_needs_what_does_not_work_is_not_tried(tmp_path: Path) -> None:
    kept = record(tmp_path)
    run = Tried(kept, Clock(), 10_000, {"probe.podman": "failed"})
    run.steps(STEPS)
    assert not [name for name in run.begun if name.startswith("server.")]
    assert [name for name in NAMES if name not in run.begun] == [name for name in NAMES if name.startswith("server.")]
    assert kept.document["steps"]["server.turns"]["reason"] == "it needs probe.podman, which did not go well"
    assert json.loads(kept.file.read_text())["counts"]["skipped"] == sum(name.startswith("server.") for name in NAMES)


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    first = Tried(record(tmp_path), Clock(), RESERVE + 100, {"phases.small": "failed"})
    first.steps(STEPS)
    first.record.end("budget", 90.0)
    kept = record(tmp_path, resume=True)
    second = Tried(kept, Clock(), 10_000, {})
    second.steps(STEPS)
    done = {name for name in first.begun if name != "phases.small"}
    assert set(second.begun) == set(NAMES) - done
    assert second.begun[-1] == "phases.small"  # what has failed is tried last
    kept.end("complete", 200.0)
    assert kept.document["resumed"] == 1 and kept.document["elapsed_s"] == 290.0
    third = Tried(record(tmp_path, resume=True), Clock(), 10_000, {})
    third.steps(STEPS)
    assert third.begun == []


def test_what_was_found_before_a_step_was_cut_off_stays_where_there_is_no_time_to_try_again(tmp_path: Path) -> None:
    kept = record(tmp_path)
    kept.keep("phases.large", "left", seconds=9.0, reason="it was cut off after 9 s", data={"sizes": {}})
    Tried(kept, Clock(), RESERVE, {}).steps(STEPS)
    assert kept.document["steps"]["phases.large"]["data"] == {"sizes": {}}
    assert kept.document["steps"]["phases.large"]["reason"] == "it was cut off after 9 s"


def test_a_chosen_step_is_done_again_and_the_others_results_stay(tmp_path: Path) -> None:
    Tried(record(tmp_path), Clock(), 10_000, {}).steps(STEPS)
    kept = record(tmp_path, resume=True)
    again = Tried(kept, Clock(), 10_000, {"engine.paging": "failed"})
    again.steps(gpu_steps.chosen(["engine"]), gpu_steps.named(["engine"]))
    assert again.begun == [name for name in NAMES if name.startswith("engine.")]
    assert kept.status("engine.paging") == "failed" and kept.status("phases.small") == "ok"


def test_a_result_is_not_lost_to_a_budget_that_was_too_short(tmp_path: Path) -> None:
    Tried(record(tmp_path), Clock(), 10_000, {}).steps(STEPS)
    kept = record(tmp_path, resume=True)
    tried = Tried(kept, Clock(), RESERVE, {})
    tried.steps(STEPS, NAMES)
    assert tried.begun == [] and all(kept.status(name) == "ok" for name in NAMES)


def test_a_dry_runs_steps_are_all_done_unless_a_budget_is_given(tmp_path: Path) -> None:
    first = Tried(record(tmp_path, dry=True), Clock(), math.inf, {}, takes=1000)
    first.steps(STEPS)
    assert first.begun == list(NAMES)
    kept = record(tmp_path / "other", dry=True)
    second = Tried(kept, Clock(), 15, {})
    second.steps(STEPS)
    assert second.begun == list(NAMES[:2])
    assert kept.document["steps"][NAMES[2]]["reason"] == "the budget of 15 s was spent"


def test_what_needs_what_was_not_reached_was_not_reached_either(tmp_path: Path) -> None:
    kept = record(tmp_path, dry=True)
    Tried(kept, Clock(), 0, {}).steps(STEPS)
    assert {one["status"] for one in kept.document["steps"].values()} == {"left"}
    assert "probe.driver, which was not reached" in kept.document["steps"]["phases.small"]["reason"]


def test_results_are_not_replaced_unasked(tmp_path: Path) -> None:
    record(tmp_path).keep("probe.driver", "ok", seconds=1.0)
    before = (tmp_path / "gpu.json").read_text()
    with pytest.raises(Mismatch, match=r"results of 1 steps already: go on with --resume"):
        record(tmp_path)
    assert (tmp_path / "gpu.json").read_text() == before
    (tmp_path / "gpu.json").write_text("[]")
    for resume in (False, True):
        with pytest.raises(Mismatch, match="no document of the acceptance"):
            record(tmp_path, resume=resume)


def test_a_run_does_not_go_on_with_another_machines_or_a_dry_one(tmp_path: Path) -> None:
    record(tmp_path).end("complete", 1.0)
    with pytest.raises(Mismatch, match="another gpus"):
        record(tmp_path, resume=True, machine=MACHINE | {"gpus": []})
    dry = tmp_path / "gpu-dry.json"
    (tmp_path / "gpu.json").rename(dry)  # a measurement is never taken for a dry run, nor the other way round
    with pytest.raises(Mismatch, match="another version"):
        record(tmp_path, resume=True, dry=True)


# ---------------------------------------------------------------------- the file


def test_the_file_is_whole_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = record(tmp_path)
    kept.keep("probe.driver", "ok", seconds=1.0, data={"driver": "580"})
    before = kept.file.read_text()
    assert json.loads(before)["steps"]["probe.driver"]["data"] == {"driver": "580"}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("benchmarks.gpu_record.json.dump", full)
    with pytest.raises(OSError, match="No space"):
        kept.keep("probe.criu", "ok", seconds=1.0)
    assert kept.file.read_text() == before


def test_a_step_that_is_cut_off_keeps_what_it_had_found(tmp_path: Path) -> None:
    answer = Answer(tmp_path / "answer")
    answer.note("sizes", {"1": 2})
    assert json.loads((tmp_path / "answer").read_text()) == {
        "status": "cut", "reason": "it was cut off", "data": {"sizes": {"1": 2}},
    }  # fmt: skip


# ---------------------------------------------------------------------- processes


def child(program: str, tmp_path: Path, *, limit: float, grace: float = 5.0) -> Ended:
    return gpu_children.run([sys.executable, "-c", program], limit=limit, log=tmp_path / "log", grace=grace)


def test_a_probe_that_hangs_is_cut_off(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = child("import time; time.sleep(60)", tmp_path, limit=0.2)
    assert ended.code is None and time.monotonic() - began < 50  # not 60


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    assert child(program, tmp_path, limit=0.4, grace=0.2).code is None
    assert time.monotonic() - began < 50


def test_its_last_words_are_kept(tmp_path: Path) -> None:
    ended = child("import sys; sys.exit('the driver is gone')", tmp_path, limit=60)
    assert ended.code == 1 and ended.said[-1] == "the driver is gone"


def test_what_a_step_has_left_is_ended_by_its_id_and_nobody_else(tmp_path: Path) -> None:
    import subprocess

    other = subprocess.Popen(["sleep", "60"])
    try:
        before = gpu_children.descendants()
        left = subprocess.Popen(["sleep", "60"])
        assert gpu_children.sweep(before) == []
        assert left.wait(60) is not None and other.poll() is None
    finally:
        other.kill()
        other.wait()


# ---------------------------------------------------------------------- one step


def works(context: Context, answer: Answer) -> None:
    answer.note("argument", context.arguments[0])


def lacks(context: Context, answer: Answer) -> None:
    raise Unavailable("there is no podman")


def breaks(context: Context, answer: Answer) -> None:
    answer.note("found", 1)
    raise GpuckptError("it broke", cause="for a reason", log=("a line",))


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        ("works", "ok", None),
        ("lacks", "skipped", "there is no podman"),
        ("breaks", "failed", "it broke; for a reason; a line"),
    ],
)
def test_a_steps_answer_says_how_it_went(tmp_path: Path, function: str, status: str, reason: str | None) -> None:
    file = tmp_path / "step.json"
    work, earlier = f"{__name__}:{function}", {"b": {"c": 1}}
    context = Context("a", work, True, 1.0, Path("/p"), tmp_path, tmp_path, arguments=("x",), earlier=earlier)
    gpu_context.write(context, file)
    assert gpu_context.read(file) == context
    assert gpu_step.main([str(file)]) == 0
    found = json.loads(gpu_context.answer_file(file).read_text())
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["data"] == {"works": {"argument": "x"}, "breaks": {"found": 1}}.get(function, {})


# ---------------------------------------------------------------------- numbers, pages


def steps(dry: bool) -> Document:
    """Two steps' findings; the numbers are easily told in a text."""
    server = {
        "model": {"shape": "8b", "bytes": 16_381_000_000, "server": "guest", "how": "eager"},
        "golden_samples": [{"phases": [{"name": "checks", "seconds": 0.25}, {"name": "first token", "seconds": 0.5}]}],
        "golden_ttft_s": TIMES | {"p50": 1.2345, "p95": 1.3456},
        "standby_ttft_s": TIMES,
        "cycles": [{"running": {"processes": 5}, "suspended": {"processes": 0}, "awake": {"processes": 5}}],
        "answers_different": 0,
    }
    return {"server.guest-8b-eager": {"status": "ok", "seconds": 12.5, "reason": None, "dry": dry, "data": server}}


def document(dry: bool) -> Document:
    head = {"version": 1, "benchmark": "gpu", "dry": dry, "begun": "2026-11-22T01:02:03+00:00", "machine": MACHINE}
    made: Document = head | {"steps": steps(dry)}
    return made | gpu_summary.summarise(made)


def test_a_page_has_what_was_measured_and_why_the_rest_was_not() -> None:
    page = gpu_pages.page(document(False), "A page", ["gpu_servers"])
    assert "**The 8B model's first token: 1.23 s from the golden, 0.75 s from standby" in page
    assert "| first token of the 8B model from the golden, p50 | at most 1.4 s | 1.234 s | 12 | met |" in page
    assert "- From the golden, to the first token: checks 0.25 s, first token 0.50 s." in page
    assert "it was not reached" in page and "not measured" in page and "![" in page
    row = gpu_pages.index([("a-folder", document(False))])
    assert "| [a-folder](a-folder/README.md) | 1.23 s | 0.75 s | – | – | 0 | 1 of 25 | 4 of 4 |" in row


def test_no_dry_number_is_ever_shown() -> None:
    dry = document(True)
    assert "ttft" not in dry and not any(target["value"] for target in dry["targets"])
    page = gpu_pages.page(dry, "A page", ["gpu-dry-servers"])
    assert gpu_pages.DRY in page and "dry run: nothing was measured" in page
    assert not re.search(r"1\.23|0\.75|1\.34|12\.5|16\.3", page)
    assert gpu_pages.index([("a-folder", dry)]) == []
    assert gpu_pages.lines(dry) == ["  a dry run: nothing was measured"]


def test_a_dry_run_becomes_no_result(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(document(True)))
    with pytest.raises(ValueError, match="dry run"):
        report.make_suite("gpu", tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_page_of_a_dry_run_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "gpu-dry.json").write_text(json.dumps(document(True)))
    with pytest.raises(ValueError, match=r"gpu-dry.json is a dry run's"):
        report.make_suite("gpu", tmp_path, tmp_path / "results")
    with pytest.raises(ValueError, match=r"there is no gpu.json in"):
        report.make_suite("gpu", tmp_path / "none", tmp_path / "results")


@pytest.mark.parametrize(
    ("unit", "limit", "value", "words"),
    [
        ("bool", 1, 1, ["yes", "yes"]),
        ("bool", 1, 0, ["yes", "no"]),
        ("bool", 1, None, ["yes", "–"]),
        ("B", 0, 0, ["none", "none"]),
        ("B", 0, 3_000_000, ["none", "3 MB"]),
        ("s", 1.4, 1.2345, ["at most 1.4 s", "1.234 s"]),
        ("", 50, 50, ["at most 50", "50"]),
    ],
)
def test_a_targets_row_is_in_words(unit: str, limit: float, value: float | None, words: list[str]) -> None:
    target = {"name": "a", "unit": unit, "limit": limit, "value": value, "n": 10, "direction": "at most",
              "met": True, "enough": True}  # fmt: skip
    assert pages.verdict(target) == ["a", *words, "10", "met"]


def test_a_bundles_commit_is_the_one_that_it_was_made_of(tmp_path: Path) -> None:
    checkout = tmp_path / "bundle" / "src"
    checkout.mkdir(parents=True)
    assert environment.commit(checkout) is None
    (checkout.parent / "bundle.json").write_text('{"commit": "abc123"}')
    assert environment.commit(checkout) == "abc123"


# ---------------------------------------------------------------------- figures


@pytest.fixture
def figures() -> Any:
    pytest.importorskip("matplotlib")
    from benchmarks import gpu_figures

    return gpu_figures


def test_figures_are_drawn_again_from_a_folder_and_its_page_with_them(
    tmp_path: Path, figures: Any, capsys: Any
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(document(False)))
    assert figures.main([str(tmp_path)]) == 0
    assert (tmp_path / "gpu_servers.png").stat().st_size > 10_000
    assert "gpu_servers.png" in (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "gpu.md")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is neither gpu.json nor gpu-dry.json"),
        ("[]", "no document of the acceptance"),
        ("{", "acceptance"),
    ],
)
def test_what_is_no_result_is_told(tmp_path: Path, figures: Any, capsys: Any, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "gpu.json").write_text(content)
    assert figures.main([str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.md"))


def test_every_length_in_a_dry_figure_is_the_same(figures: Any) -> None:
    level = figures._levelled(document(True))["steps"]["server.guest-8b-eager"]["data"]
    assert level["golden_ttft_s"] == level["standby_ttft_s"]
    assert level["cycles"][0]["running"]["processes"] == 1e9 and level["cycles"][0]["suspended"]["processes"] == 0


def test_a_process_that_nvml_does_not_name_proves_nothing() -> None:
    made = steps(False)
    made["server.guest-8b-eager"]["data"]["cycles"][0]["running"]["processes"] = 0
    assert "suspended_bytes_most" not in gpu_summary.numbers(made)
    assert gpu_summary.numbers(steps(False))["suspended_bytes_most"] == 0


# ---------------------------------------------------------------------- models, the command


@pytest.mark.parametrize(("name", "billions"), [("0.6b", 0.596), ("1.5b", 1.544), ("8b", 8.19)])
def test_models_have_the_sizes_that_they_are_named_for(name: str, billions: float) -> None:
    assert gpu_models.size(gpu_models.SHAPES[name]) / 2e9 == pytest.approx(billions, rel=0.01)


def test_a_models_file_is_as_its_header_says(tmp_path: Path) -> None:
    file, shape = tmp_path / "model.safetensors", gpu_models.SHAPES["tiny"]
    gpu_models.write(file, shape, gpu_models.zeros)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    at = 0
    for (name, dims), (written, one) in zip(gpu_models.tensors(shape), header.items(), strict=True):
        assert (name, list(dims)) == (written, one["shape"])
        assert one["data_offsets"] == [at, at + 2 * math.prod(dims)]
        at = one["data_offsets"][1]
    assert len(data) == 8 + length + at == 8 + length + gpu_models.size(shape) and length % 8 == 0


def command(*words: str) -> int:
    return gpu_acceptance.main(words)


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_acceptance, "driver_version", lambda: None)
    monkeypatch.setattr(gpu_acceptance, "_CONTROL", tmp_path / "none")
    assert command("--out", str(tmp_path)) == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_step_that_does_not_exist_is_a_wrong_use(capsys: Any) -> None:
    assert command("--only", "probes") == 2
    assert "no step is called probes" in capsys.readouterr().err


def test_the_list_has_every_step(capsys: Any) -> None:
    assert command("--list") == 0
    lines: Sequence[str] = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
