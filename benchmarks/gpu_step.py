"""One step of the acceptance on a GPU, in a process of its own: ``python -m benchmarks.gpu_step CONTEXT``.

CONTEXT is a file; what is found goes into another beside it. The exit status is 0 however the step went: how it did is
in its answer. One that has to be killed has answered with what it had found until then.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_context, harness
from benchmarks.gpu_context import Answer, Context
from benchmarks.suite import Unavailable, reason_of
from gpuckpt.cuda.driver import DriverError
from gpuckpt.errors import GpuckptError, InterruptedByUser

_FAILURES = (harness.CommandFailed, DriverError, GpuckptError, OSError, RuntimeError, ValueError, LookupError)


def function(work: str) -> Callable[[Context, Answer], None]:
    """What `module:function` names."""
    module, _, name = work.partition(":")
    found: Callable[[Context, Answer], None] = getattr(importlib.import_module(module), name)
    return found


def main(argv: list[str] | None = None) -> int:
    (file,) = map(Path, sys.argv[1:] if argv is None else argv)
    context = gpu_context.read(file)
    answer = Answer(gpu_context.answer_file(file))
    answer.end("cut", "it was cut off before it had found anything")
    try:
        with harness.interrupts():
            function(context.work)(context, answer)
        answer.end("ok", None)
    except InterruptedByUser:
        answer.end("cut", "it was cut off")
    except Unavailable as error:
        answer.end("skipped", str(error))
    except _FAILURES as error:
        kind = "" if isinstance(error, GpuckptError | harness.CommandFailed) else f"{type(error).__name__}: "
        answer.end("failed", f"{kind}{reason_of(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
