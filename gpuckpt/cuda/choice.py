"""Which way to the driver this machine has."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from gpuckpt import __version__, proc
from gpuckpt.cuda.driver import Driver
from gpuckpt.cuda.program import Program
from gpuckpt.cuda.remote import Remote

_PROGRAM = "cuda-checkpoint"


def driver(run: Path, prefix: Path) -> Driver:
    """The helper, where the Python packages are; NVIDIA's program, where only that is or the driver is too old for it.

    Where neither is, the helper: asked for the first time, it says what to install. ``run`` holds its socket,
    ``prefix / "bin"`` is looked in before PATH.
    """
    from gpuckpt.cuda.checks import driver_version, has_api  # which ask this module for the program

    fit = bindings_installed() and has_api(driver_version())
    if not fit and (program := find_program(prefix)) is not None:
        return Program(program)
    return Remote(run / "cuda" / f"helper-{__version__}.sock")


def bindings_installed() -> bool:
    """Whether the packages of the extra ``gpuckpt[cuda]`` are there; imports none of them."""
    try:
        return find_spec("cuda.bindings") is not None and find_spec("pynvml") is not None
    except ModuleNotFoundError:  # there is not even a package named cuda
        return False


def find_program(prefix: Path) -> Path | None:
    """The cuda-checkpoint program."""
    found = shutil.which(_PROGRAM, path=f"{prefix / 'bin'}:{proc.environment()['PATH']}")
    return Path(found) if found else None
