"""The steps of the acceptance on a GPU, in the order of what each second of them tells.

A step names the function that does it, the seconds under which it is not begun and those that it may take at the most,
and the steps that must have gone well before: what cannot work is not tried, and the record says for want of what.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from msgspec import Struct

from benchmarks.gpu_record import Status


class Step(Struct, frozen=True):
    """``work`` is `module:function` with ``arguments``; ``least`` and ``limit`` are seconds."""

    name: str
    about: str
    work: str
    least: float
    limit: float
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


_DRIVER, _CRIU, _PODMAN, _TORCH = "probe.driver", "probe.criu-cpu", "probe.podman", "probe.python"
_SERVER = (_TORCH, _DRIVER, _CRIU, _PODMAN)


def _server(kind: str, shape: str, how: str, least: float, limit: float) -> Step:
    about = f"{kind} with the {shape} model, {how}: first tokens, memory, ten cycles"
    return Step(
        f"server.{kind}-{shape}-{how}", about, "benchmarks.gpu_servers:serve", least, limit, _SERVER, (kind, shape, how)
    )


def _phases(name: str, about: str, function: str, least: float, limit: float, *arguments: str) -> Step:
    return Step(f"phases.{name}", about, f"benchmarks.gpu_phases:{function}", least, limit, (_DRIVER,), arguments)


def _probe(name: str, about: str, function: str, limit: float, needs: tuple[str, ...] = (), *arguments: str) -> Step:
    return Step(f"probe.{name}", about, f"benchmarks.gpu_probe:{function}", 5, limit, needs, arguments)


def _engine(name: str, about: str, part: str, least: float, limit: float, *options: str) -> Step:
    return Step(
        f"engine.{name}", about, "benchmarks.gpu_engine:part", least, limit, (_TORCH,), (part, "0.6b", *options)
    )


STEPS = (
    _probe("driver", "the driver suspends and resumes a tiny CUDA process", "driver_api", 60),
    _probe("criu", "criu check", "criu", 20),
    _probe("criu-cpu", "CRIU dumps and restores a process without a device", "criu_cpu", 30),
    _probe("criu-cuda", "CRIU dumps and restores a suspended CUDA process", "criu_cuda", 60,
           (_DRIVER, _CRIU), "driver"),
    _probe("python", "a Python with PyTorch for CUDA", "python", 60),
    _probe("podman", "gpuckpt creates and restores the smallest of servers", "podman", 60, (_CRIU,)),
    _phases("small", "suspend and resume 0.25, 1 and 4 GB", "by_bytes", 15, 60, "0.25", "1", "4"),
    _server("guest", "0.6b", "eager", 60, 180),
    _phases("large", "suspend and resume 16 and 40 GB", "by_bytes", 20, 75, "16", "40"),
    _server("guest", "8b", "eager", 90, 240),
    _engine("checkpoint", "activations leave and return by pinned memory", "sessions_checkpoint", 30, 60, "-n", "100"),
    _phases("pair", "two processes side by side, and one after the other", "pair", 15, 45),
    _server("guest", "1.5b", "eager", 60, 180),
    Step("server.turns", "models take turns on one GPU", "benchmarks.gpu_servers:turns", 20, 180, _SERVER,
         ("0.6b", "1.5b", "8b")),
    _phases("criu", "CRIU carries 1 and 4 GB of device memory in its image", "through_criu", 20, 60, "1", "4"),
    _phases("program", "the helper, and NVIDIA's program", "program", 15, 60),
    _probe("criu-torch", "CRIU dumps and restores a suspended PyTorch process", "criu_cuda", 60,
           (_DRIVER, _CRIU, _TORCH), "torch"),
    _engine("paging", "sessions leave the device and return", "kv_paging", 40, 100, "-n", "5"),
    _engine("oversubscribe", "50 sessions in half of the memory that they need", "kv_oversubscribe", 90, 300,
            "--factors", "2", "--prompt", "384"),
    _server("vllm", "0.6b", "eager", 90, 240),
    _server("vllm", "8b", "eager", 120, 300),
    _server("vllm", "1.5b", "eager", 90, 240),
    _server("vllm", "0.6b", "graphs", 120, 300),
    _server("vllm", "1.5b", "graphs", 120, 300),
    _server("vllm", "8b", "graphs", 120, 300),
)  # fmt: skip
# The guest server is always eager: it is vLLM that captures graphs.
NAMES = tuple(step.name for step in STEPS)


def chosen(only: Sequence[str]) -> tuple[Step, ...]:
    """Those whose names are, or begin with, one of ``only``, and what they need; all of none. Raises ValueError."""
    if not only:
        return STEPS
    if unknown := [word for word in only if not any(_is(name, word) for name in NAMES)]:
        raise ValueError(
            f"no step is called {', '.join(unknown)}; there are {', '.join(NAMES)}; or probe, phases, server, engine"
        )
    wanted = named(only)
    needed = {need for step in STEPS if step.name in wanted for need in step.needs}
    return tuple(step for step in STEPS if step.name in wanted | needed)


def named(only: Sequence[str]) -> set[str]:
    """Those whose names are, or begin with, one of ``only``; what they need is not among them."""
    return {name for name in NAMES if any(_is(name, word) for word in only)}


def _is(name: str, word: str) -> bool:
    return name == word or name.startswith(f"{word}.")


def order(steps: Sequence[Step], status: Callable[[str], Status | None], again: Collection[str] = ()) -> list[Step]:
    """What is still to be done, and ``again``: what failed or could not be done the last time comes last."""
    left = [step for step in steps if status(step.name) != "ok" or step.name in again]
    return sorted(left, key=lambda step: status(step.name) in ("failed", "skipped") and not _is(step.name, "probe"))


def missing(step: Step, status: Callable[[str], Status | None]) -> list[str]:
    """The steps that this one needs and that have not gone well."""
    return [need for need in step.needs if status(need) != "ok"]
