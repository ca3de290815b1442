"""Servers on the GPU: first tokens from the golden and from standby, memory in each tier, ten cycles, models in turns.

The clock runs from just before gpuckpt's command is spawned to the first streamed token, the container's creation
included. Standby is a replica whose device state is in host memory (`gpuckpt suspend`): it holds nothing of the GPU.
Every answer is compared with the golden's recorded one, tokens and log-probabilities.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks import gpu_models, memory
from benchmarks.driver import Server, sample_of
from benchmarks.gpu_commands import commands, device_bytes, golden, gpu_server, suspend, wake
from benchmarks.gpu_context import Answer, Context, seconds, told
from benchmarks.gpu_record import Document
from benchmarks.harness import Outcome
from benchmarks.suite import Unavailable
from gpuckpt.cuda.driver import Driver
from gpuckpt.errors import GpuckptError, VerificationError

RESTORES, CYCLES, TURNS = 10, 10, 9
_LONGEST_ANSWER = 60.0
# The guest server would take most of the device for keys and values; vLLM takes a share of it.
_WORDS = {
    "guest": ("--max-model-len", "4096", "--kv-mib", "2048"),
    "vllm": ("--max-model-len", "4096", "--gpu-memory-utilization", "0.5"),
}


def serve(context: Context, answer: Answer) -> None:
    """One server: created, restored again and again, suspended and woken again and again."""
    kind, shape, how = context.arguments
    if kind == "vllm" and not context.dry and not context.earlier.get("probe.python", {}).get("vllm"):
        raise Unavailable("vLLM is not installed")
    gpuckpt = commands(context)
    name = word_of(kind, shape, how)
    with context.driver() as driver:
        answer.note("device_bytes_before", device_bytes(driver, [])["device"])
        canary = _created(context, answer, gpuckpt, name)
        try:
            restored = _restores(context, answer, gpuckpt, name)
            try:
                _cycles(context, answer, gpuckpt, driver, restored, canary)
            finally:
                gpuckpt.stop_replica(restored)
            answer.note("device_bytes_golden", device_bytes(driver, [])["device"])
        finally:
            # Models in turns want goldens of theirs, as long as there is room for all.
            if memory.available() < 32 << 30 and not context.dry:
                gpuckpt.rm(name)


def word_of(kind: str, shape: str, how: str) -> str:
    """The golden's name, without the workspace's word."""
    return f"{kind}-{shape.replace('.', '-')}-{how}"


def _server(context: Context, kind: str, shape: str, how: str) -> Server:
    folder = gpu_models.need(context, shape)
    return gpu_server(context, kind, str(folder), _WORDS[kind], graphs=how == "graphs")


def _created(context: Context, answer: Answer, gpuckpt: Any, name: str) -> Document:
    """Its canary; the golden is made if a step before has not."""
    kind, shape, how = context.arguments
    answer.note(
        "model", {"shape": shape, "bytes": gpu_models.size(gpu_models.SHAPES[shape]), "server": kind, "how": how}
    )
    found = golden(gpuckpt, name)
    if found is None:
        began = time.monotonic()
        server = _server(context, kind, shape, how)
        answer.note("model_s", round(time.monotonic() - began, 2))
        told(context, "gpuckpt create")
        made: Outcome = gpuckpt.create(name, server)
        answer.note("create_s", round(made.wall_s, 3))
        answer.note("cold_ttft_s", round(made.ttft_s, 3))
        answer.note("image_bytes", made.document["image_bytes"])
        answer.note("create_phases", made.document["phases"])
        found = golden(gpuckpt, name)
    if found is None or not found.get("canary"):
        raise GpuckptError(f"the golden {name} has no canary")
    canary: Document = found["canary"]
    return canary


def _restores(context: Context, answer: Answer, gpuckpt: Any, name: str) -> Outcome:
    """First tokens from the golden; the last replica stays."""
    samples: list[Document] = []
    share = 0.5 * context.left
    began = time.monotonic()
    while True:
        restored: Outcome = gpuckpt.restore(name)
        samples.append(sample_of(restored))
        answer.note("golden_samples", samples)
        answer.note("golden_ttft_s", seconds([sample["ttft_s"] for sample in samples]))
        spent = time.monotonic() - began
        if len(samples) == RESTORES or spent + spent / len(samples) > share:
            p50 = answer.data["golden_ttft_s"]["p50"]
            told(context, "first tokens from the golden", f"{p50:.3f} s, n = {len(samples)}")
            return restored
        gpuckpt.stop_replica(restored)


def _cycles(
    context: Context, answer: Answer, gpuckpt: Any, driver: Driver, restored: Outcome, canary: Document
) -> None:
    """Suspend and wake: the memory in each tier, first tokens from standby, answers that stay the same."""
    replica = str(restored.document["replica"])
    pids = gpuckpt.pids(replica)
    samples: list[Document] = []
    differences: list[str] = []
    for number in range(CYCLES):
        if number > 1 and context.left < 15:
            break
        sample: Document = {"running": device_bytes(driver, pids)}
        away = suspend(gpuckpt, replica)
        sample["suspend_s"], sample["suspended"] = round(away.wall_s, 6), device_bytes(driver, pids)
        sample["suspend_phases"], sample["gpu_bytes"] = away.document.get("phases"), away.document.get("gpu_bytes")
        back = wake(gpuckpt, replica)
        answered = gpuckpt.ask(restored.document, canary, _LONGEST_ANSWER)
        sample["wake_s"] = round(back.wall_s, 6)
        sample["wake_phases"], sample["wake_own_s"] = back.document.get("phases"), back.document.get("seconds")
        sample["ttft_s"] = round((answered.first_token_ns - back.spawned_ns) / 1e9, 6)
        sample["awake"] = device_bytes(driver, pids)
        sample["difference"] = answered.difference
        differences += [answered.difference] if answered.difference else []
        samples.append(sample)
        answer.note("cycles", samples)
        answer.note("standby_ttft_s", seconds([one["ttft_s"] for one in samples]))
        answer.note("suspend_s", seconds([one["suspend_s"] for one in samples]))
        answer.note("answers_different", len(differences))
    answer.note("suspended_bytes_most", max(one["suspended"]["processes"] for one in samples))
    p50 = answer.data["standby_ttft_s"]["p50"]
    told(context, "first tokens from standby", f"{p50:.3f} s, n = {len(samples)}")
    if differences:
        raise VerificationError(f"{len(differences)} of {len(samples)} answers differ after a wake: {differences[0]}")
    if held := answer.data["suspended_bytes_most"]:
        raise VerificationError(f"suspended, it still held {held} bytes of the device")


def turns(context: Context, answer: Answer) -> None:
    """Several models take turns on one GPU: one is awake at a time, the others hold nothing of the device."""
    gpuckpt = commands(context)
    ready: list[tuple[str, Document, Document]] = []
    left_out: dict[str, str] = {}
    try:
        with context.driver() as driver:
            for shape in context.arguments:
                name = word_of("guest", shape, "eager")
                found = golden(gpuckpt, name)
                if found is None and len(ready) < 2 and (context.left > 80 or context.dry):
                    told(context, f"gpuckpt create, {shape}: an earlier run's golden is gone")
                    gpuckpt.create(name, _server(context, "guest", shape, "eager"))
                    found = golden(gpuckpt, name)
                if found is None:
                    left_out[shape] = "there is no golden of it in this run"
                    continue
                restored = gpuckpt.restore(name)
                ready.append((shape, restored.document, found["canary"]))
                suspend(gpuckpt, str(restored.document["replica"]))
            answer.note("left_out", left_out)
            if len(ready) < 2:
                raise Unavailable("fewer than two models have goldens in this run")
            _take_turns(context, answer, gpuckpt, driver, ready)
    finally:
        for _, restored, _ in ready:
            gpuckpt.stop_named(str(restored["replica"]))


def _take_turns(
    context: Context, answer: Answer, gpuckpt: Any, driver: Driver, ready: Sequence[tuple[str, Document, Document]]
) -> None:
    samples: list[Document] = []
    pids = {shape: gpuckpt.pids(str(restored["replica"])) for shape, restored, _ in ready}
    awake: str | None = None
    for number in range(TURNS):
        if number > 1 and context.left < 10:
            break
        shape, restored, canary = ready[number % len(ready)]
        began = time.monotonic()
        if awake is not None:
            suspend(gpuckpt, awake)
        awake = str(restored["replica"])
        wake(gpuckpt, awake)
        answered = gpuckpt.ask(restored, canary, _LONGEST_ANSWER)
        samples.append(
            {
                "model": shape,
                "ttft_s": round(answered.first_token_ns / 1e9 - began, 6),
                "difference": answered.difference,
                "device": device_bytes(driver, [])["device"],
                "by_model": {name: device_bytes(driver, its)["processes"] for name, its in pids.items()},
            }
        )
        answer.note("turns", samples)
        answer.note("swap_ttft_s", seconds([sample["ttft_s"] for sample in samples[1:]] or [samples[0]["ttft_s"]]))
    if wrong := [sample["difference"] for sample in samples if sample["difference"]]:
        raise VerificationError(f"{len(wrong)} of {len(samples)} answers differ: {wrong[0]}")
