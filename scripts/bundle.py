"""What scripts/offline-bundle needs logic for: which wheels, which libraries, and the pieces.

    python -m scripts.bundle requirements [--guest | --no-cuda]
    python -m scripts.bundle missing WHEELS VERSION
    python -m scripts.bundle programs STAGE --prefix PREFIX --patchelf PROGRAM --python 3.11,3.12
    python -m scripts.bundle pack STAGE OUT --piece-mb 60

Programs are taken as this machine has them, with all libraries that they load and the dynamic loader that belongs to
these: a host's own libc may be older or newer. They cannot be started through that loader by hand, as CRIU is in
scripts/setup: podman and runc start themselves again by /proc/self/exe, which would be the loader. So each names its
loader and the folder of its libraries itself. Both are absolute paths, which scripts/bundle_unpack.py fills in: a
loader's is by the kernel's rules, and one relative to the program ($ORIGIN) does not hold for runc, which starts itself
from an unnamed copy in memory.
"""

from __future__ import annotations

import argparse
import email
import hashlib
import io
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct

ROOT = Path(__file__).resolve().parents[1]
LOADER_MARK = "/gpuckpt-bundle-loader".ljust(255, "/")
"""Stands where a program names its dynamic loader until it is unpacked; as long as the longest path it can become."""
LIBRARIES_MARK = "/gpuckpt-bundle-libraries".ljust(255, "/")
"""The same for the folder of its libraries."""
NAME = "gpuckpt-bundle"
_MTIME = 315532800  # 1980-01-01, before which zip files know no time
_GUEST = ("fastapi", "safetensors", "uvicorn")  # what the guest server imports beside torch and transformers
_NEEDED = ("podman", "runc", "conmon")
_WANTED = ("netavark", "aardvark-dns", "ip")  # ip: the loopback of a restored network namespace
_HELPERS = ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/lib/podman", "/usr/local/libexec/podman")
_ARCHITECTURE = {"platform_machine": "x86_64", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}


class Program(Struct, frozen=True):
    """A program with what starts it: its dynamic loader, and the folders that this one is told to search."""

    name: str
    path: Path
    loader: Path | None  # None: a static program
    folders: str = ""


def requirements(project: Path, *, cuda: bool = True) -> list[str]:
    """What gpuckpt requires on a GPU host; without ``cuda``: on one that has none."""
    table = tomllib.loads(project.read_text())["project"]
    return [*table["dependencies"], *(table["optional-dependencies"]["cuda"] if cuda else [])]


def missing(wheels: Path, version: str) -> list[str]:
    """What the wheels in the folder require of Python ``version`` and is not there.

    pip answers the conditions of requirements ("only before 3.12") for the Python that it runs in, whatever it is asked
    to download for.
    """
    from pip._vendor.packaging.requirements import Requirement

    environment = {"python_version": version, "python_full_version": f"{version}.0", "extra": "", **_ARCHITECTURE}
    there = {_normal(file.name.partition("-")[0]) for file in wheels.glob("*.whl")}
    found = set()
    for file in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(file) as wheel:
            name = next(entry for entry in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
            lines = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist", [])
        for requirement in map(Requirement, lines):
            wanted = requirement.marker is None or requirement.marker.evaluate(environment)
            if wanted and _normal(requirement.name) not in there:
                requirement.marker = None
                found.add(str(requirement))
    return sorted(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return {"version": found[1], "commit": _first_line([*git]) if (checkout / ".git").exists() else ""}


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


class Pieces(io.RawIOBase):
    """A file that is written as pieces ``NAME.000``, ``NAME.001`` … of at most ``size`` bytes each."""

    def __init__(self, name: Path, size: int) -> None:
        self._name, self._size, self._free = name, size, 0
        self._file: io.BufferedWriter | None = None
        self.paths: list[Path] = []

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # whatever has bytes
        rest = view
        while rest:
            if self._free == 0:
                self._next()
            assert self._file
            part = rest[: self._free]
            self._file.write(part)
            self._free -= len(part)
            rest = rest[len(part) :]
        return len(view)

    def _next(self) -> None:
        if self._file:
            self._file.close()
        self.paths.append(self._name.with_name(f"{self._name.name}.{len(self.paths):03}"))
        self._file, self._free = self.paths[-1].open("wb"), self._size

    def close(self) -> None:
        if self._file:
            self._file.close()
        super().close()


def _entries(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():
            yield path


def pack(stage: Path, out: Path, piece: int) -> list[Path]:
    """Write ``stage`` as pieces of at most ``piece`` bytes to ``out``, with their digests; same input, same bytes.

    The digests come last: a folder without them is no bundle yet.
    """
    about = json.loads((stage / "bundle.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    (out / "SHA256SUMS").unlink(missing_ok=True)
    for old in out.glob(f"{NAME}-*.tar.xz.[0-9][0-9][0-9]"):
        old.unlink()
    with (
        Pieces(out / f"{NAME}-{about['version']}.tar.xz", piece) as pieces,
        lzma.open(pieces, "wb", preset=3) as packed,  # type: ignore[call-overload]  # a raw file is enough to write to
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in _entries(stage):
            info = archive.gettarinfo(path, str(path.relative_to(stage)))
            info.mtime, info.uid, info.gid, info.uname, info.gname = _MTIME, 0, 0, "", ""
            info.mode = 0o755 if info.mode & 0o100 else 0o644
            # Two names of one file are two files: which of them is stored would depend on the order of inodes.
            if info.islnk():
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
            if info.isreg():
                with path.open("rb") as content:
                    archive.addfile(info, content)
            else:
                archive.addfile(info)
    shutil.copyfile(stage / "bundle.json", out / "bundle.json")
    _copy(ROOT / "scripts" / "bundle_unpack.py", out / "unpack")
    (out / "unpack").chmod(0o755)
    files = [*pieces.paths, out / "bundle.json", out / "unpack"]
    lines = [f"{_sha256(file)}  {file.name}\n" for file in files]
    (out / "SHA256SUMS").write_text("".join(lines))
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = commands.add_parser("requirements")
    wanted.add_argument("--guest", action="store_true")
    wanted.add_argument("--no-cuda", action="store_true")
    lacking = commands.add_parser("missing")
    lacking.add_argument("wheels", type=Path)
    lacking.add_argument("version")
    collect = commands.add_parser("programs")
    collect.add_argument("stage", type=Path)
    collect.add_argument("--prefix", type=Path, required=True)
    collect.add_argument("--patchelf", type=Path, required=True)
    collect.add_argument("--python", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("stage", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("--piece-mb", type=float, default=60)
    given = parser.parse_args()
    match given.command:
        case "requirements":
            cuda = not given.no_cuda
            print(*(_GUEST if given.guest else requirements(ROOT / "pyproject.toml", cuda=cuda)), sep="\n")
        case "missing":
            print(*missing(given.wheels, given.version), sep="\n")
        case "programs":
            programs(given.stage, given.prefix, given.patchelf, given.python.split(","))
        case "pack":
            for file in pack(given.stage, given.out, int(given.piece_mb * 1_000_000)):
                print(file, file.stat().st_size)


if __name__ == "__main__":
    main()
