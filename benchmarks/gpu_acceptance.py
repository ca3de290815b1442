"""Prove gpuckpt's side of the GPU on a host that has one: what works, how fast, whether every byte and answer is right.

    python -m benchmarks.gpu_acceptance                   under eight minutes; build/bench/gpu.json, gpu.md and figures
    python -m benchmarks.gpu_acceptance --resume          goes on with what is left, in as much time again
    python -m benchmarks.gpu_acceptance --only probe      only some steps, and what they need
    python -m benchmarks.gpu_acceptance --resume --only engine
                                                          does these again, and keeps the results of all others
    python -m benchmarks.gpu_acceptance --dry-run         every step on stand-ins, anywhere; gpu-dry.json
    python -m benchmarks.gpu_figures build/bench          draws anew, for instance where there is matplotlib
    python -m benchmarks.report --gpu                     build/bench → results/DATE-MACHINE-gpu/

It needs root, NVIDIA's driver from 570 on, this checkout with gpuckpt's environment (GPU packages included), CRIU,
podman and runc, and for servers a Python with PyTorch for CUDA and transformers; vLLM is measured where it is
installed. No network: models are made on the spot, of the shapes of 0.6, 1.5 and 8 billion parameters, with random
weights.

It asks first what works on the host (probes), then goes on with that, in the order of what each second tells: device
memory suspended and resumed by its size, servers from the golden and from standby, the session engine. Each step is a
process with a limit of its own, the JSON file is whole after each, and a step that cannot be done, failed or was not
reached says so with its reason. What a step has started is ended with it.

Results are never replaced unasked: a folder that has some is refused without --resume.

Exit codes: 0 nothing failed, also where the budget was spent before all had run (--resume goes on); 1 something failed;
2 usage, or results that are there already; 3 no GPU (and no --dry-run); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from msgspec import structs

from benchmarks import environment, gpu_children, gpu_context, gpu_steps, gpu_summary, harness
from benchmarks.gpu_commands import python_path
from benchmarks.gpu_context import Context
from benchmarks.gpu_record import Document, Mismatch, Record, Status
from benchmarks.gpu_steps import Step
from benchmarks.memory import available
from benchmarks.suite import Budget, say
from benchmarks.workspace import Workspace, workspace
from gpuckpt import proc
from gpuckpt.cuda.checks import driver_version
from gpuckpt.errors import GpuckptError, InterruptedByUser

BUDGET = 470.0
# Seconds of the budget that are kept for putting everything back, the figures and the page.
RESERVE = 20.0
_DRY_LIMIT = 300.0  # seconds of a dry step, which takes less than one: only what hangs is to be cut off
_CONTROL = Path("/dev/nvidiactl")  # every driver has it, also where /proc is not the kernel's own
_IN_MEMORY = 24 << 30  # bytes that are free where temporary files are kept in memory


class Run:
    """The steps of one run, one after the other."""

    def __init__(self, record: Record, context: Context, budget: Budget, work: Path) -> None:
        self.record = record
        self._context = context
        self._budget = budget
        self._work = work
        self._before = gpu_children.descendants()

    @property
    def left(self) -> float:
        """Seconds that steps still have."""
        return self._budget.seconds - RESERVE - self._budget.elapsed

    def steps(self, steps: Sequence[Step], again: Collection[str] = ()) -> None:
        """Do what is not done yet, and those whose names are in ``again``, as long as there is time."""
        for step in gpu_steps.order(steps, self.record.status, again):
            if missing := gpu_steps.missing(step, self.record.status):
                if all(self.record.status(need) == "left" for need in missing):
                    self._pass(step, "left", f"it needs {' and '.join(missing)}, which was not reached")
                else:
                    self._pass(step, "skipped", f"it needs {' and '.join(missing)}, which did not go well")
            elif self._context.dry:
                if self._budget.spent:
                    self._pass(step, "left", f"the budget of {self._budget.seconds:g} s was spent")
                else:
                    self.step(step)
            elif self.left < step.least:
                self._pass(step, "left", f"{max(0.0, self.left):.0f} s were left, and it takes {step.least:g}")
            else:
                self.step(step)

    def _pass(self, step: Step, status: Status, reason: str) -> None:
        """A step that is not tried; what an earlier run has of it, even if it did not go well, stays."""
        if self.record.data(step.name) or self.record.status(step.name) == "ok":
            self._say(f"{step.name}: {reason}; its earlier result stays")
        else:
            self._keep(step, status, 0.0, reason, {})

    def step(self, step: Step) -> None:
        """One step, in a process; whatever becomes of it, it is in the record, and nothing of it is left."""
        self._say(f"{step.name}: {step.about}")
        limit = _DRY_LIMIT if self._context.dry else min(step.limit, self.left)
        python = self.record.data("probe.python")
        file = self._work / f"{step.name}.json"
        answer = gpu_context.answer_file(file)
        answer.unlink(missing_ok=True)
        gpu_context.write(
            structs.replace(
                self._context,
                step=step.name,
                work=step.work,
                arguments=step.arguments,
                deadline=time.monotonic() + limit,
                python=python.get("chosen") or self._context.python,
                site=python.get("site", ""),
                earlier={"probe.python": python},
            ),
            file,
        )
        argv = [sys.executable, "-m", "benchmarks.gpu_step", str(file)]
        environ = {**os.environ, **python_path()}
        began = time.monotonic()
        try:
            ended = gpu_children.run(argv, limit=limit, log=file.with_suffix(".log"), env=environ, cwd=harness.ROOT)
        except InterruptedByUser:
            self._keep(step, "left", time.monotonic() - began, "the run was interrupted", _read(answer).get("data", {}))
            raise
        finally:
            stuck = gpu_children.sweep(self._before)
        found = _read(answer)
        status, reason = found.get("status", "failed"), found.get("reason")
        if ended.code is None:
            # With less time than it may take it is the budget that was too short, and it is worth another try.
            status = "left" if limit < step.limit and not self._context.dry else "failed"
            reason = f"it was cut off after {limit:.0f} s"
        elif not found or status == "cut":
            status, reason = "failed", "; ".join([f"it ended with status {ended.code}", *ended.said[-4:]])
        if stuck:
            status = "failed"
            reason = "; ".join(filter(None, [reason, f"these could not be ended: {', '.join(stuck)}"]))
        self._keep(step, status, ended.seconds, reason, found.get("data", {}))

    def _keep(self, step: Step, status: Status, seconds: float, reason: str | None, data: Document) -> None:
        if status == "left" and self.record.status(step.name) == "ok":
            self._say(f"  {step.name}: {reason}; its earlier result stays")
            return
        self.record.keep(step.name, status, seconds=seconds, reason=reason, data=data)
        self._say(f"  {step.name}: {status}, {seconds:.1f} s" + (f": {reason}" if reason else ""))

    def _say(self, text: str) -> None:
        say(f"[{self._budget.elapsed:5.0f} s] {text}")


def _read(answer: Path) -> Document:
    try:
        found: Document = json.loads(answer.read_text())
    except (OSError, ValueError):
        return {}
    return found


def _folder(space: Workspace, *, dry: bool) -> Path:
    """For models and images: in memory where there is enough, else on the disk."""
    if not dry and available() > 2 * _IN_MEMORY:
        with contextlib.suppress(GpuckptError, OSError):
            return space.mount_ram()
    made = space.folder / "work"
    made.mkdir()
    return made


def machine(prefix: Path, *, dry: bool) -> Document:
    """This host; of a dry run without asking its programs."""
    if dry:
        return {"cpu_model": environment.cpu_model(), "cores": os.cpu_count(), "kernel": os.uname().release,
                "gpus": [], "commit": environment.commit()}  # fmt: skip
    found = environment.machine(prefix)
    return found | {"gpus": found["gpus"] or _gpus()}


def _gpus() -> list[str]:
    """As the environment's record has them, by an nvidia-smi that is on our own search path alone."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/local/nvidia/bin")
    if program is None:
        return []
    try:
        done = proc.run([program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    except GpuckptError:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=harness.ROOT / "build" / "bench", help="folder of the results")
    made.add_argument(
        "--budget",
        type=float,
        help=f"seconds after which to stop (default: {BUDGET:g}; a dry run's steps are all done, unless this is given)",
    )
    made.add_argument(
        "--resume", action="store_true", help="go on with the results that are there: with what is not “ok” yet"
    )
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STEPS",
        help="steps, or probe, phases, server, engine; with commas. With --resume they are done again, also those"
        " that went well, and their results are replaced; what they need is done only if it is not “ok” yet",
    )
    made.add_argument("--dry-run", action="store_true", help="every step on stand-ins: no number is a measurement")
    made.add_argument("--prefix", type=Path, default=environment.prefix(), help="where CRIU and the environments are")
    made.add_argument("--python", default="", help="an interpreter with PyTorch for CUDA (default: look for one)")
    made.add_argument("--list", action="store_true", help="only list the steps, in their order")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    only = [word for words in options.only for word in words.split(",")]
    try:
        steps = gpu_steps.chosen(only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        for step in steps:
            say(f"{step.name:<28} at most {step.limit:>4.0f} s  {step.about}")
        return 0
    if not options.dry_run and driver_version() is None and not _CONTROL.exists():
        print(
            "there is no NVIDIA GPU here (no driver is loaded): nothing can be measured; try --dry-run", file=sys.stderr
        )
        return 3
    # gpuckpt's own commands read it.
    os.environ["GPUCKPT_PREFIX"] = str(options.prefix.absolute())
    seconds = options.budget
    if seconds is None and not options.dry_run:
        seconds = BUDGET
    budget = Budget(math.inf if seconds is None else seconds)
    try:
        record = Record(
            options.out.absolute(),
            dry=options.dry_run,
            machine=machine(options.prefix, dry=options.dry_run),
            options={"budget_s": seconds, "only": options.only},
            resume=options.resume,
            summarise=gpu_summary.summarise,
        )
    except (Mismatch, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        return 2
    return measure(record, steps, budget, options, again=gpu_steps.named(only))


def measure(
    record: Record, steps: Sequence[Step], budget: Budget, options: argparse.Namespace, again: Collection[str] = ()
) -> int:
    """Do the steps, those in ``again`` in any case, draw, write the page; the exit status."""
    status = "interrupted"
    try:
        with harness.interrupts():
            gpu_children.adopt_orphans()
            with workspace() as space:
                folder = _folder(space, dry=options.dry_run)
                context = Context(
                    "", "", options.dry_run, 0.0, options.prefix.absolute(), folder, space.folder, python=options.python
                )
                Run(record, context, budget, space.folder).steps(steps, again)
        left = any(record.status(step.name) == "left" for step in steps)
        status = "budget" if left else "complete"
    except InterruptedByUser as interrupted:
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    finally:
        record.end(status, budget.elapsed)
    show(record, steps)
    failed = [step.name for step in steps if record.status(step.name) == "failed"]
    return 1 if failed else 0


def show(record: Record, steps: Sequence[Step]) -> None:
    """Figures and page beside the JSON, and the run in a few lines."""
    from benchmarks import gpu_pages

    drawn: list[str] = []
    try:
        from benchmarks import gpu_figures

        drawn = gpu_figures.draw(record.document | gpu_summary.summarise(record.document), record.file.parent)
    except ImportError:
        folder = shlex.quote(str(record.file.parent))
        say("no figures: matplotlib is not installed. With a Python that has it and what gpuckpt requires, here or")
        say(f"where the folder was copied to: python -m benchmarks.gpu_figures {folder}")
    document = json.loads(record.file.read_text())
    gpu_pages.write(document, record.file, drawn)
    for line in gpu_pages.lines(document):
        say(line)
    words = ", ".join(f"{count} {word}" for word, count in document["counts"].items())
    say(f"{record.file}: {words}; figures: {', '.join(drawn) or 'none'}")
    if document["counts"].get("left"):
        say("the budget was spent before all was done: --resume goes on")


if __name__ == "__main__":
    sys.exit(main())
