"""The session engine and its keys and values on the GPU: the benchmarks that run on processors elsewhere, told `cuda`.

Each is a process in the environment that has PyTorch (`python -m benchmarks.sessions_checkpoint --help`); the device is
theirs to choose by `--device`. Nothing of them is changed here but their number of samples, so that they end in time.
"""

from __future__ import annotations

import json
import subprocess

from benchmarks import gpu_models, harness
from benchmarks.gpu_context import Answer, Context, told
from benchmarks.gpu_record import Document
from gpuckpt import proc
from gpuckpt.errors import GpuckptError, VerificationError

_LOADING = 30.0  # seconds of a part's time that its budget does not count: imports, the model
# Numbers that a figure of another suite needs and nobody here.
_BULKY = ("samples", "append", "undisturbed", "batched")


def part(context: Context, answer: Answer) -> None:
    """One of the session engine's benchmarks, on a model of this size; the rest of the arguments are its options."""
    name, shape, *options = context.arguments
    answer.note("model", shape)
    if context.dry:
        from benchmarks import gpu_dry

        gpu_models.need(context, shape)
        found = gpu_dry.part(name)
    else:
        found = _run(context, name, shape, options)
    for key, value in found.items():
        if key not in _BULKY:
            answer.note(key, slim(value))
    if wrong := bad(found):
        raise VerificationError(wrong)


def _run(context: Context, name: str, shape: str, options: list[str]) -> Document:
    interpreter = context.interpreter()
    model = gpu_models.need(context, shape)
    out = context.folder / f"{context.step}.json"
    budget = max(5.0, context.left - _LOADING)
    argv = [interpreter, "-m", f"benchmarks.{name}", "--model", str(model), "--out", str(out), "--device", "cuda"]
    argv += ["--budget", f"{budget:.0f}", *options]
    told(context, f"{name} on {shape}, for {budget:.0f} s at the most")
    with (context.folder / f"{context.step}.log").open("w+") as log:
        process = subprocess.Popen(
            argv, cwd=harness.ROOT, env=context.environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(max(10.0, context.left))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        log.seek(0)
        said = proc.tail(log.read(), 6)
    if code != 0 or not out.exists():
        raise GpuckptError(f"benchmarks.{name} ended with status {code}", log=said)
    made: Document = json.loads(out.read_text())
    return made


def slim(value: object) -> object:
    """Without the rows that only another suite's figure needs."""
    if isinstance(value, dict):
        return {key: slim(kept) for key, kept in value.items() if key not in ("rows", "columns")}
    return value


def bad(found: Document) -> str | None:
    """What must never be in such a document."""
    for factor, run in found.get("factors", {}).items():
        if run["token_mismatches"] or run["logits_mismatches"]:
            return (
                f"at {factor} times the memory {run['token_mismatches']} sessions wrote other tokens and"
                f" {run['logits_mismatches']} computed other bits than undisturbed"
            )
        if run["completed"] != found["sessions"]:
            return f"at {factor} times the memory {run['completed']} of {found['sessions']} sessions were answered"
    return None
