"""What works on this host: the driver's checkpoints, CRIU, both together, podman. Each is tried on the smallest thing.

Each probe is a step of the acceptance (gpu_acceptance.py): a process of its own with a limit of its own. It notes facts
as it finds them and raises what went wrong; Unavailable where the host lacks what is to be tried.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from benchmarks.driver import Server
from benchmarks.gpu_commands import commands
from benchmarks.gpu_context import Answer, Context, told
from benchmarks.gpu_held import Criu, Held, holding
from benchmarks.gpu_record import Document
from benchmarks.harness import CommandFailed
from benchmarks.suite import Unavailable
from benchmarks.workspace import podman_command
from gpuckpt import proc
from gpuckpt.cuda.driver import Driver
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.suspend import Step, resume, suspend
from gpuckpt.errors import GpuckptError, VerificationError

SMALL = 64 << 20  # bytes of a process that is only to be there
# What an interpreter has to have, for servers and for making models; asked of it, as it may not be ours.
_ASKED = """
import importlib.util as u, json, sys
names = ("torch", "transformers", "tokenizers", "safetensors", "vllm", "msgspec", "uvicorn", "starlette")
found = {name: u.find_spec(name) is not None for name in names}
made = {"python": sys.version.split()[0], "has": found}
if found["torch"]:
    import torch
    made |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.version.cuda and torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        made |= {"gpu": torch.cuda.get_device_name(0), "capability": capability}
print(json.dumps(made))
"""


def interpreters(prefix: Path) -> list[str]:
    """Where PyTorch may be, in the order in which they are asked."""
    found = [str(prefix / "server" / "bin" / "python"), sys.executable, shutil.which("python3") or ""]
    return list(dict.fromkeys(word for word in found if word and Path(word).exists()))


def python(context: Context, answer: Answer) -> None:
    """Which interpreter has PyTorch for CUDA, and what else it has."""
    told_of: Document = {}
    candidates = [context.python] if context.python else interpreters(context.prefix)
    for one in candidates[:1] if context.dry else candidates:
        told_of[one] = {"python": "dry"} if context.dry else asked(one, max(context.left, 5.0))
        if told_of[one].get("gpu") or context.dry:
            answer.note("chosen", one)
            break
    answer.note("interpreters", told_of)
    chosen = told_of.get(answer.data.get("chosen", ""))
    if chosen is None:
        raise Unavailable("no Python here has PyTorch with a CUDA device: models cannot be made")
    for name in ("torch", "torch_cuda", "capability"):
        answer.note(name, chosen.get(name))
    answer.note("vllm", chosen.get("has", {}).get("vllm", False))
    # Of the same version, what our own environment has can be lent to it.
    lent = not chosen.get("has", {}).get("msgspec", True) and chosen["python"].split(".")[:2] == [
        str(part) for part in sys.version_info[:2]
    ]
    answer.note("site", _own_site() if lent else "")


def asked(interpreter: str, limit: float) -> Document:
    """What an interpreter says of itself; ``error`` if it says nothing."""
    try:
        done = subprocess.run(
            [interpreter, "-c", _ASKED], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=True,
            cwd="/",
        )  # fmt: skip
        found: Document = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        return {"error": "; ".join(proc.tail(said.decode(errors="replace"), 2)) or str(error)}
    return found


def _own_site() -> str:
    import msgspec

    return str(Path(msgspec.__file__).parents[1])


def driver_api(context: Context, answer: Answer) -> None:
    """Lock, checkpoint, restore and unlock a tiny CUDA process, through gpuckpt's helper."""
    with context.driver() as driver:
        began = time.monotonic()
        answer.note("driver", driver.version())
        answer.note("cuda", _cuda_version())
        answer.note("through", "program" if isinstance(driver, Program) else "helper")
        answer.note("helper_start_s", round(time.monotonic() - began, 3))
        answer.note("gpus", to_builtins(driver.gpus()))
        with holding(context, SMALL, "host" if context.dry else "driver") as held:
            answer.note("device_bytes", sum(driver.memory(held.pid).values()))
            steps = suspend(driver, [held.pid])
            answer.note("suspended_device_bytes", sum(driver.memory(held.pid).values()))
            answer.note("open_devices_while_suspended", devices_of(held.pid))
            steps += resume(driver, [held.pid])
            answer.note("steps_s", lengths(steps))
            compare(held)


def _cuda_version() -> str | None:
    """The newest CUDA that the driver can; None if its library is not found."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    found = ctypes.c_int()
    return (
        None if library.cuDriverGetVersion(ctypes.byref(found)) else f"{found.value // 1000}.{found.value % 1000 // 10}"
    )


def criu(context: Context, answer: Answer) -> None:
    """`criu check`."""
    made = criu_of(context)
    answer.note("version", made.version())
    answer.note("check", made.check())


def criu_cpu(context: Context, answer: Answer) -> None:
    """Dump and restore a process that has no device, without podman."""
    with holding(context, SMALL, "host") as held:
        answer.note("bytes", held.bytes)
        _round_trip(context, answer, held)


def criu_cuda(context: Context, answer: Answer) -> None:
    """Suspend a CUDA process, dump it, restore it, resume it, compare its bytes; of PyTorch if that is asked for."""
    (library,) = context.arguments
    if library == "torch":
        context.interpreter()
    suspended(context, answer, SMALL, "host" if context.dry else library)


def suspended(context: Context, answer: Answer, count: int, library: str) -> None:
    """The same with so many bytes."""
    with context.driver() as driver, holding(context, count, library) as held:
        answer.note("bytes", count)
        answer.note("device_bytes", sum(driver.memory(held.pid).values()))
        answer.note("suspend_s", lengths(suspend(driver, [held.pid])))
        answer.note("open_devices_while_suspended", devices_of(held.pid))
        try:
            _round_trip(context, answer, held, compared=False)
        except GpuckptError:
            _try_resume(driver, held, answer)
            raise
        answer.note("resume_s", lengths(resume(driver, [held.pid])))
        compare(held)


def _try_resume(driver: Driver, held: Held, answer: Answer) -> None:
    """If only CRIU failed the process is still there, and should run on."""
    try:
        resume(driver, [held.pid])
        compare(held)
        answer.note("runs_on_afterwards", True)
    except GpuckptError as error:
        answer.note("runs_on_afterwards", f"no: {error.message}")


def criu_of(context: Context) -> Criu:
    """CRIU, or what stands in for it."""
    if context.dry:
        from benchmarks import gpu_dry

        return gpu_dry.Criu()  # type: ignore[return-value]
    return Criu(context)


def _round_trip(context: Context, answer: Answer, held: Held, *, compared: bool = True) -> None:
    images = context.folder / f"images-{context.step}"
    made = criu_of(context)
    try:
        began = time.monotonic()
        made.dump(held, images)
        answer.note("dump_s", round(time.monotonic() - began, 4))
        answer.note("image_bytes", sum(file.stat().st_size for file in images.iterdir()))
        began = time.monotonic()
        made.restore(held, images)
        answer.note("restore_s", round(time.monotonic() - began, 4))
        if compared:
            compare(held)
    finally:
        shutil.rmtree(images, ignore_errors=True)


def compare(held: Held) -> None:
    """Raise VerificationError if its bytes are not what they were."""
    if (now := held.sum()) != held.first:
        raise VerificationError(f"its bytes are others than before: their sum is {now}, and was {held.first}")


def lengths(steps: list[Step]) -> dict[str, float]:
    """Seconds of each step, by its name."""
    return {step.name: round((step.end_ns - step.begin_ns) / 1e9, 6) for step in steps}


def devices_of(pid: int) -> list[str]:
    """NVIDIA's devices that a process has open or mapped; while it is suspended there should be none."""
    found: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(entry.readlink()))
        except OSError:
            continue
    return sorted(name for name in found | proc.mapped_files([pid]) if name.startswith("/dev/nvidia"))


def _doctor(gpuckpt: Any) -> list[Document] | str:
    """What `gpuckpt doctor` finds wrong here; why, if it cannot say."""
    try:
        found = gpuckpt.run("doctor", "--format=json").document
    except CommandFailed as failure:
        return str(failure)
    return [check for check in found["checks"] if check["verdict"] not in ("ok", "skip")]


def podman(context: Context, answer: Answer) -> None:
    """gpuckpt with the smallest of servers: create, restore with its answer compared, stop; and what doctor says."""
    if not context.dry and shutil.which("podman", path=proc.environment()["PATH"]) is None:
        raise Unavailable("podman is not installed")
    gpuckpt = commands(context)
    answer.note("podman", " ".join(podman_command()))
    answer.note("doctor", _doctor(gpuckpt))
    server = Server.filler(8)
    interpreter = shutil.which("python3", path=proc.environment()["PATH"])
    if interpreter is None:
        raise Unavailable("there is no python3 for a server")
    server = dataclasses.replace(server, words=(interpreter, *server.words[1:]))
    try:
        told(context, "gpuckpt create, of the smallest of servers")
        answer.note("create_s", round(gpuckpt.create("probe", server).wall_s, 3))
        restored = gpuckpt.restore("probe")
        answer.note("restore_ttft_s", round(restored.ttft_s, 4))
        answer.note("canary_match", restored.document["canary_match"])
        gpuckpt.stop_replica(restored)
    finally:
        gpuckpt.rm("probe")
