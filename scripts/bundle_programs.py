"""The programs of a bundle for hosts without network, and what each needs to run there.

Programs are taken as this machine has them, with all libraries that they load and the dynamic loader that belongs to
these: a host's own libc may be older or newer. They cannot be started through that loader by hand, as CRIU is in
scripts/setup: podman and runc start themselves again by /proc/self/exe, which would be the loader. So each names its
loader and the folder of its libraries itself. Both are absolute paths, which scripts/bundle_unpack.py fills in: a
loader's is by the kernel's rules, and one relative to the program ($ORIGIN) does not hold for runc, which starts itself
from an unnamed copy in memory.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[1]
LOADER_MARK = "/gpuckpt-bundle-loader".ljust(255, "/")
"""Stands where a program names its dynamic loader until it is unpacked; as long as the longest path it can become."""
LIBRARIES_MARK = "/gpuckpt-bundle-libraries".ljust(255, "/")
"""The same for the folder of its libraries."""
_NEEDED = ("podman", "runc", "conmon")
_WANTED = ("netavark", "aardvark-dns", "ip")  # ip: the loopback of a restored network namespace
_HELPERS = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman", "/usr/local/libexec/podman")


class Program(Struct, frozen=True):
    """A program with what starts it: its dynamic loader, and the folders that this one is told to search."""

    name: str
    path: Path
    loader: Path | None  # None: a static program
    folders: str = ""


def libraries(listing: str) -> dict[str, Path]:
    """The libraries in what ``ld.so --list`` printed, by the names under which they are looked for.

    Raises ValueError if one was not found.
    """
    found = {}
    for line in listing.splitlines():
        match = re.fullmatch(r"\s*(\S+) => (.+?)(?: \(0x[0-9a-f]+\))?", line)
        if match and match[2] == "not found":
            raise ValueError(f"the library {match[1]} was not found")
        if match and "/" not in match[1]:
            found[match[1]] = Path(match[2])
    return found


def starter(script: str) -> tuple[Path, str, Path]:
    """The loader, its library folders and the program of a wrapper that scripts/setup wrote; ValueError for others."""
    words = next((shlex.split(line) for line in script.splitlines() if line.startswith("exec ")), [])
    if "--library-path" not in words[:-3]:
        raise ValueError("it is a script, but not one that scripts/setup wrote")
    at = words.index("--library-path")
    return Path(words[1]), words[at + 1], Path(words[at + 2])


def _program(name: str, patchelf: Path) -> Program | None:
    path = shutil.which(name, path=":".join([os.environ["PATH"], "/usr/sbin", "/sbin", *_HELPERS]))
    return _described(name, Path(path).resolve(), patchelf) if path else None


def _described(name: str, path: Path, patchelf: Path) -> Program:
    if path.read_bytes()[:2] == b"#!":
        try:
            loader, folders, binary = starter(path.read_text())
        except ValueError as error:
            raise SystemExit(f"{path} cannot be taken along: {error}") from error
        return Program(name, binary, loader, folders)
    done = subprocess.run([patchelf, "--print-interpreter", path], capture_output=True, text=True, check=False)
    return Program(name, path, Path(done.stdout.strip()) if done.returncode == 0 else None)


def _closure(program: Program) -> dict[str, Path]:
    assert program.loader
    argv = [str(program.loader), *(["--library-path", program.folders] if program.folders else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
    done = subprocess.run(
        [*argv, "--list", str(program.path)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{program.path}: {done.stderr.strip()}")
    try:
        return libraries(done.stdout)
    except ValueError as error:
        raise SystemExit(f"{program.path}: {error}") from error


def programs(stage: Path, prefix: Path, patchelf: Path, pythons: list[str]) -> None:
    """Copy podman, what it starts, CRIU and pycriu to ``stage``, each able to run from wherever it is unpacked to."""
    found = {name: _program(name, patchelf) for name in (*_NEEDED, *_WANTED)}
    if lacking := [name for name in _NEEDED if found[name] is None]:
        raise SystemExit(f"not on this machine: {', '.join(lacking)}; scripts/setup installs them")
    criu = prefix / "bin" / "criu"
    chosen = [each for each in found.values() if each] + [_described("criu", criu.resolve(), patchelf)]
    for program in chosen:
        print(f"{program.name}: {program.path}", flush=True)
        # The podman that users call is a script, see scripts/bundle_unpack.py.
        target = stage / ("libexec" if program.name == "podman" else "bin") / program.name
        _copy(program.path, target)
        if program.loader:
            # CRIU's libraries are of a newer release than the others': two folders, and a loader in each.
            folder = stage / "lib" / ("criu" if program.folders else "system")
            _with_libraries(program, target, folder, patchelf)
    _pycriu(prefix, stage)
    _licences(chosen, stage / "licences")
    seccomp = Path("/usr/share/containers/seccomp.json")
    if seccomp.exists():
        _copy(seccomp, stage / "etc" / "containers" / "seccomp.json")
    about = {
        **_version(ROOT),
        "pythons": pythons,
        "programs": {
            each.name: _first_line([*_start(each), "-V" if each.name == "ip" else "--version"]) for each in chosen
        },
        "loaders": {
            f"{'libexec' if each.name == 'podman' else 'bin'}/{each.name}": (
                f"lib/{'criu' if each.folders else 'system'}/{each.loader.name}"
            )
            for each in chosen
            if each.loader
        },
    }
    (stage / "bundle.json").write_text(json.dumps(about, indent=2) + "\n")


def _with_libraries(program: Program, target: Path, folder: Path, patchelf: Path) -> None:
    assert program.loader
    for name, path in {**_closure(program), program.loader.name: program.loader}.items():
        library = folder / name
        if library.exists():
            continue
        _copy(path.resolve(), library)
        told = subprocess.run([patchelf, "--print-rpath", library], capture_output=True, text=True, check=False)
        if told.stdout.strip():
            subprocess.run([patchelf, "--remove-rpath", library], check=True)
    # RPATH, not RUNPATH: it holds for the libraries' own libraries, too, and goes before LD_LIBRARY_PATH.
    words = ["--set-interpreter", LOADER_MARK, "--force-rpath", "--set-rpath", LIBRARIES_MARK]
    subprocess.run([patchelf, *words, target], check=True)
    content = target.read_bytes()
    if not content.count(LOADER_MARK.encode() + b"\0") == content.count(LIBRARIES_MARK.encode() + b"\0") == 1:
        raise SystemExit(f"{target}: the places of its loader and libraries cannot be filled in")


def _pycriu(prefix: Path, stage: Path) -> None:
    code = "import pycriu; print(*pycriu.__path__)"
    done = subprocess.run([prefix / "venv" / "bin" / "python", "-Ic", code], capture_output=True, text=True, check=True)
    source = Path(done.stdout.strip()).resolve()
    shutil.copytree(source, stage / "python" / "pycriu", ignore=shutil.ignore_patterns("__pycache__"))


def _licences(chosen: Iterable[Program], target: Path) -> None:
    """The licences of what is copied, where a package manager or scripts/setup has left them."""
    files = []
    for program in chosen:
        if program.folders:
            files += list(program.path.parents[2].glob("usr/share/doc/*/copyright"))
            continue
        paths = [program.path, *(_closure(program).values() if program.loader else [])]
        for package in _packages(paths):
            files += list(Path("/usr/share/doc", package).glob("copyright"))
    for file in files:
        _copy(file.resolve(), target / file.parent.name)


def _packages(paths: Iterable[Path]) -> list[str]:
    if not shutil.which("dpkg-query"):
        return []
    # With /lib a link to /usr/lib, a package may name a file either way.
    names = {str(name) for path in paths for name in (path, path.resolve())}
    names |= {name.removeprefix("/usr") for name in names}
    done = subprocess.run(["dpkg-query", "-S", *sorted(names)], capture_output=True, text=True, check=False)
    return sorted({line.partition(":")[0] for line in done.stdout.splitlines() if line.count(":") > 0})


def _start(program: Program) -> list[Path | str]:
    if program.loader and program.folders:
        return [program.loader, "--library-path", program.folders, program.path]
    return [program.path]


def _first_line(argv: list[Path | str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def _version(checkout: Path) -> dict[str, str]:
    found = re.search(r'__version__ = "([^"]+)"', (checkout / "gpuckpt" / "__init__.py").read_text())
    assert found
    # A checkout of another user is refused by git unless it is named as trusted; we only read.
    git = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout)]
    git += ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = ""
    if (checkout / ".git").exists() and shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"version": found[1], "commit": commit}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
