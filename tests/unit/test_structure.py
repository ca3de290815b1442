"""The shape of the source: import directions, the cost of importing the command line, nothing left undone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from gpuckpt.workload.guest import VLLM_PLUGIN

ROOT = Path(__file__).resolve().parents[2]
IMPORT_LIMIT_MS = 150
UNNEEDED = (
    "asyncio", "click.shell_completion", "concurrent.futures", "ctypes", "difflib", "email", "hashlib", "http",
    "importlib.metadata", "importlib.resources", "logging", "podman", "pydantic", "random", "requests", "rich",
    "sqlite3", "ssl", "tarfile", "tempfile", "tomllib", "zstandard",
)  # fmt: skip
HEAVY = ("msgspec", "podman", "rich", "torch")
# Split, so that this file does not match itself.
UNFINISHED = re.compile(rb"\b(?:TO" rb"DO|FIX" rb"ME)\b")


def python(code: str) -> str:
    """What a fresh interpreter prints for ``code``, with this checkout first on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def source_files() -> Iterator[Path]:
    """Every file of the checkout but Git's own, caches and build output (all in folders that .gitignore names)."""
    skipped = {"__pycache__", "build", "dist"}
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if n not in skipped and (not n.startswith(".") or n == ".ci")]
        yield from (Path(folder, name) for name in files if not name.endswith((".pyc", ".png")))


def test_import_contracts() -> None:
    """The layers and the doors of DESIGN: [tool.importlinter] in pyproject.toml."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_the_command_line_is_cheap() -> None:
    # Of the processor's time: on a busy machine the clock tells about the others.
    code = (
        "import time; begin = time.process_time_ns(); import gpuckpt.cli; print((time.process_time_ns() - begin) / 1e6)"
    )
    times = [float(python(code)) for _ in range(5)]
    assert min(times) < IMPORT_LIMIT_MS, f"best of {[round(each) for each in times]} ms"


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = set(python("import sys, gpuckpt.cli; print(*sys.modules)").split())
    assert "gpuckpt.cli" in loaded
    assert not loaded.intersection(HEAVY)


def test_a_restore_loads_nothing_that_it_does_not_need() -> None:
    """All that `gpuckpt restore NAME` imports; a millisecond for each of these is one of every restore."""
    modules = ("cli.restore", "cli.progress", "golden.doctor", "golden.restore", "golden.sweep", "config_load")
    imports = ", ".join(f"gpuckpt.{name}" for name in modules)
    code = f"import sys, gpuckpt.cli, {imports}; from gpuckpt.config_load import load; "
    code += "load(None, environ={}, env_file=None, flags={}); print(*sys.modules)"
    loaded = set(python(code).split())
    assert "gpuckpt.golden.restore" in loaded
    assert not loaded.intersection(UNNEEDED)


def test_the_checkout_is_what_is_tested() -> None:
    assert Path(python("import gpuckpt; print(gpuckpt.__file__)").strip()).is_relative_to(ROOT)


def test_hooks_do_not_import_the_host_side() -> None:
    """What runs in a container or under CRIU has no gpuckpt beside it."""
    for path in (ROOT / "hooks").rglob("*.py"):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
        assert "gpuckpt" not in imported, path


def test_the_guest_needs_nothing_of_the_server_s_environment() -> None:
    """Imported at once: the standard library; and any Python that a server may still run on understands it.

    The session engine is not meant: it is a server itself, with torch and transformers.
    """
    for name in ("__init__", "lifecycle", "vllm_plugin"):
        path = ROOT / "hooks" / "gpuckpt_guest" / f"{name}.py"
        for node in ast.parse(path.read_bytes(), feature_version=(3, 9)).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names, path


def test_the_wheel_carries_what_is_mounted() -> None:
    """The folder that gpuckpt.workload.guest and gpuckpt.criu.operation look for in an installed package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["hooks"] == "gpuckpt/data/hooks"
    points = (ROOT / "hooks" / "gpuckpt_guest.dist-info" / "entry_points.txt").read_text()
    assert points == f"[vllm.general_plugins]\n{VLLM_PLUGIN} = gpuckpt_guest.vllm_plugin:register\n"


def test_types_are_looked_at_when_they_are_imported() -> None:
    """msgspec looks at a type when it first decodes one: threads that do so at once have ended the pool's daemon."""
    alone = {"service/admin.py", "service/client.py", "sessions/client.py"}  # one thread decodes there
    for path in sorted((ROOT / "gpuckpt").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        typed = [call for call in calls if any(word.arg == "type" for word in call.keywords)]
        found = [call.lineno for call in typed if ast.unparse(call.func) in ("msgspec.json.decode", "msgspec.convert")]
        assert not found or str(path.relative_to(ROOT / "gpuckpt")) in alone, f"{path}: {found}"


def test_nothing_is_marked_as_left_to_do() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in source_files()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert not found
