"""Find the criu program and learn its version."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from msgspec import Struct

from gpuckpt import proc, programs
from gpuckpt.config import Settings
from gpuckpt.errors import NotFoundError, PreflightError


class Criu(Struct, frozen=True):
    """A criu program and its version, e.g. ``4.2.1``."""

    path: Path
    version: str


def find(settings: Settings, override: Path | None = None, *, cache: Path | None = None) -> Criu:
    """The criu to use: ``override`` (--criu), else the configured one, else the prefix's, else the one on PATH.

    ``cache`` is for :func:`gpuckpt.programs.ask`. Raises NotFoundError if there is none, PreflightError if it does not
    run.
    """
    explicit = override or settings.criu.path
    if explicit:
        path = Path(explicit)
        if not path.is_file():
            raise NotFoundError(f"no CRIU at {path}", remedy="correct --criu or criu.path in the configuration")
    else:
        private = settings.paths.prefix / "bin" / "criu"
        found = str(private) if private.exists() else shutil.which("criu", path=proc.environment()["PATH"])
        if not found:
            raise NotFoundError("no CRIU on this machine", remedy="install one that works here: make setup")
        path = Path(found)
    try:
        output = programs.ask([path, "--version"], timeout=10, cache=cache)
    except (proc.CommandError, PermissionError, OSError) as error:
        raise PreflightError(f"{path} does not run", cause=str(error), remedy="make setup") from error
    match = re.search(r"Version:\s*(\S+)", output)
    if not match:
        raise PreflightError(f"{path} is not CRIU", cause=f"its --version printed: {output.strip()[:100]}")
    return Criu(path.absolute(), match.group(1))
