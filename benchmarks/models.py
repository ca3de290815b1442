"""The models that the demos and benchmarks serve: made on the spot where there are none, nothing is downloaded."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from gpuckpt.errors import GpuckptError


class Shape(NamedTuple):
    """A model with random weights: the shape that scripts/make_model.py knows, its folder, its size on disk (about)."""

    shape: str
    folder: str
    about: str
    size: int


QWEN = Shape("0.5b", "qwen2-0.5b-random", "Qwen2 of the 0.5B shape, random weights", 990_000_000)
TINY = Shape("tiny", "tiny-random", "Qwen2 of a tiny shape, random weights", 20_000_000)
GPT2 = Shape("gpt2-124m", "gpt2-124m-random", "GPT-2 of the 124M shape, random weights", 500_000_000)


def made(prefix: Path, model: Shape) -> bool:
    """Whether its folder is there."""
    return (prefix / "models" / model.folder / "made.json").exists()


def make(prefix: Path, model: Shape, tick: Callable[[], None]) -> Path:
    """Make the model below ``prefix`` if its folder does not hold this very one; returns the folder.

    ``tick`` is called five times a second. Whatever interrupts it, no half-made folder remains.
    """
    folder = prefix / "models" / model.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    argv = [prefix / "server" / "bin" / "python", harness.ROOT / "scripts" / "make_model.py"]
    process = subprocess.Popen(
        [*argv, "--shape", model.shape, folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while True:
            try:
                printed, _ = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    finally:
        for staging in _staging(folder):
            shutil.rmtree(staging, ignore_errors=True)
    if process.returncode != 0:
        log = tuple(printed.decode(errors="replace").splitlines()[-20:])
        raise GpuckptError("the model could not be made", log=log, remedy="is there 1 GB of space left?")
    return folder


def progress(prefix: Path, model: Shape) -> str:
    """How far :func:`make` has come."""
    folder = prefix / "models" / model.folder
    written = sum(path.stat().st_size for staging in _staging(folder) for path in staging.iterdir() if path.is_file())
    return f"making the model: {written / 1e9:.2f} of {model.size / 1e9:.2f} GB written"


def _staging(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.*"))
