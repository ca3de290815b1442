"""Programs to freeze that count on what memory holds, and what their tests share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.golden.trial import REASON
from tests.integration.conftest import Bench

HERE = Path(__file__).resolve().parent
STORED = 2 << 20  # bytes that may still be copied of a golden in which nothing of interest is


def tool(*names: str) -> str:
    """The first of these programs that is installed; the test is skipped (with CI=true: fails) if there is none."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"no {' or '.join(names)} (make setup-tests)")


def library(stem: str) -> str:
    """The shared library whose file name begins with ``stem``, as the dynamic loader knows it."""
    known = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    for line in known.splitlines():
        name, _, path = line.strip().partition(" => ")
        if name.startswith(f"{stem}.so"):
            return path
    pytest.skip(f"no {stem} (make setup-tests)")


def compiled(folder: Path) -> str:
    """The C program."""
    program = folder / "memory"
    flags = ("-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-rdynamic")
    subprocess.run([tool("cc"), *flags, "-o", program, HERE / "memory.c", "-ldl"], check=True)
    return str(program)


def creation(
    bench: Bench,
    *command: str,
    warmup: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    mode: str = "mapped",
) -> tuple[str, ...]:
    """The command that makes a golden of a server, which sees the folder of its program."""
    folders = {str(Path(word).parent) for word in command if word.startswith("/") and not word.startswith("/usr/")}
    options = [word for folder in sorted(folders) for word in ("--volume", f"{folder}:{folder}")]
    options += [word for pair in (env or {}).items() for word in ("--env", "=".join(pair))]
    options += [word for path in warmup for word in ("--warmup-request", f"GET {path}")]
    options += ["--warmup", str(len(warmup)), "--canary", "GET /digest", "--mode", mode]
    return "create", bench.name(), *options, "--", *command


def freeze(bench: Bench, *command: str, mode: str = "mapped", **options: Any) -> str:
    """Make the golden; returns its name."""
    bench.ok(*creation(bench, *command, mode=mode, **options))
    return bench.name()


def restored(bench: Bench, name: str, times: int = 1) -> Iterator[str]:
    """Restore the golden so many times, one after the other: each begins where the golden ended."""
    for _ in range(times):
        assert bench.ok("restore", name, "--format", "json").json["canary_match"] is True
        yield name
        bench.ok("stop", name)
    assert bench.left() == []
    bench.ok("verify", name)  # the memory files are as they were made


def get(bench: Bench, name: str, path: str) -> str:
    """The answer's text; the programs say with another status than 200 that something is wrong."""
    answer = bench.endpoint(name).request("GET", path, timeout=120)
    assert answer.status == 200, answer.body.decode()
    return answer.body.decode()


def memory(bench: Bench, name: str) -> dict[str, Any]:
    """What the manifest says of the golden's memory, with the bytes that have to be copied of each process."""
    record: dict[str, Any] = bench.ok("inspect", name, "--format", "json").json["memory"]
    assert record["mode"] == "mapped"
    copied: dict[int, int] = {}
    for row in record["copied"]:
        if row["reason"] == REASON:
            continue  # could be mapped, too
        copied[row["pid"]] = copied.get(row["pid"], 0) + row["bytes"]
    return record | {"copied": copied}
