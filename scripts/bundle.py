"""What scripts/offline-bundle needs logic for: which wheels it takes, and the pieces (programs: bundle_programs).

python -m scripts.bundle requirements [--guest | --no-cuda]
python -m scripts.bundle missing WHEELS VERSION
python -m scripts.bundle programs STAGE --prefix PREFIX --patchelf PROGRAM --python 3.11,3.12
python -m scripts.bundle pack STAGE OUT --piece-mb 60
"""

from __future__ import annotations

import argparse
import email
import hashlib
import io
import json
import lzma
import re
import shutil
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "gpuckpt-bundle"
_MTIME = 315532800  # 1980-01-01, before which zip files know no time
_GUEST = ("fastapi", "safetensors", "uvicorn")  # what the guest server imports beside torch and transformers
_ARCHITECTURE = {"platform_machine": "x86_64", "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}


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
    shutil.copyfile(ROOT / "scripts" / "bundle_unpack.py", out / "unpack")
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
            from scripts.bundle_programs import programs

            programs(given.stage, given.prefix, given.patchelf, given.python.split(","))
        case "pack":
            for file in pack(given.stage, given.out, int(given.piece_mb * 1_000_000)):
                print(file, file.stat().st_size)


if __name__ == "__main__":
    main()
