#!/usr/bin/env python3
"""Unpack the gpuckpt bundle that this file lies in, and try what works on this machine.

Checks every piece, unpacks beside the prefix, and puts the result in place with one rename: what was there is replaced
as a whole or stays. Needs no network; nothing outside of the prefix is written but the folders for podman's storage,
and what the self-test makes and removes.
"""

# Alone on a machine: Python's own modules only, in words that older Pythons understand, too, to be told that they are.
from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
LOADER_MARK = b"/gpuckpt-bundle-loader".ljust(255, b"/")  # as in scripts/bundle_programs.py
LIBRARIES_MARK = b"/gpuckpt-bundle-libraries".ljust(255, b"/")
OURS = ("bin", "bundle.json", "etc", "lib", "libexec", "licences", "python", "src", "venv")
_AT_FDCWD, _EXCHANGE = -100, 2
_PROBE = "import sys, venv, zlib, ctypes; print(*sys.version_info[:2], sep='.')"
_SERVER_PROBE = (
    "import sys, sysconfig; from importlib.util import find_spec as f; "
    "print(*sys.version_info[:2], sep='.') if f('torch') and f('transformers') else sys.exit(1); "
    "print(*{sysconfig.get_paths()[k] for k in ('purelib', 'platlib')}, sep='\\n')"
)


class Trouble(Exception):
    """Why it cannot be unpacked; nothing was changed."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """One line of progress."""
    started = time.monotonic()
    print(f"  {name + ' …':44} ", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        say("FAILED")
        raise
    say(f"ok ({time.monotonic() - started:.0f}s)")


def run(argv: list[str]) -> str:
    """Run a program without the caller's Python settings; raise Trouble with its last lines if it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "LD_"))}
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=False
    )
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise Trouble("{} failed:\n{}".format(" ".join(argv[:3]), "\n".join(text.splitlines()[-15:])))
    return text


def verified(folder: str) -> list[str]:
    """The bundle's pieces in order, every file compared; Trouble names what is missing or damaged."""
    try:
        with open(os.path.join(folder, "SHA256SUMS")) as file:
            sums = [line.rstrip("\n").split("  ", 1) for line in file]
    except OSError:
        raise Trouble(f"there is no SHA256SUMS in {folder}: the bundle is not complete") from None
    troubles, pieces = [], []
    for digest, name in sums:
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                found = hashlib.sha256()
                for block in iter(lambda: file.read(1 << 20), b""):
                    found.update(block)
        except OSError as error:
            troubles.append(
                "{}: {}".format(name, "missing" if isinstance(error, FileNotFoundError) else error.strerror)
            )
            continue
        if found.hexdigest() != digest:
            troubles.append(f"{name}: damaged, its digest is another")
        if re.search(r"\.tar\.xz\.\d+$", name):
            pieces.append(path)
    if troubles:
        raise Trouble("copy these once more:\n  " + "\n  ".join(troubles))
    return sorted(pieces)


class Joined(io.RawIOBase):
    """The pieces, read as one file."""

    def __init__(self, paths: list[str]) -> None:
        self._rest = list(paths)
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._rest:
                    return 0
                self._file = open(self._rest.pop(0), "rb")  # noqa: SIM115 - closed at its end
            count: int = self._file.readinto(buffer)
            if count:
                return count
            self._file.close()
            self._file = None

    def close(self) -> None:
        if self._file is not None:  # what follows the archive's end is not read
            self._file.close()
        super().close()


def extract(pieces: list[str], target: str) -> None:
    with io.BufferedReader(Joined(pieces), 1 << 20) as joined, tarfile.open(fileobj=joined, mode="r|xz") as archive:
        # Its bytes are those of SHA256SUMS; what the filter refuses cannot be in it, and Python asks for one by name.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(target, filter="data")
        else:
            archive.extractall(target)


def set_loaders(folder: str, prefix: str, loaders: dict[str, str]) -> None:
    """Have each program find the loader and the libraries that came with it, at the place where they will lie."""
    for program, name in loaders.items():
        loader = os.path.join(prefix, name).encode()
        with open(os.path.join(folder, program), "r+b") as file:
            content = file.read()
            for mark, path in ((LOADER_MARK, loader), (LIBRARIES_MARK, os.path.dirname(loader))):
                if content.count(mark) != 1:
                    raise Trouble(f"{program} is not as scripts/offline-bundle makes it")
                file.seek(content.index(mark))
                file.write(path.ljust(len(mark), b"\0"))


def choose_python(wanted: str | None, versions: list[str]) -> tuple[str, str]:
    """A Python of this machine that the bundle has wheels for."""
    names = [wanted] if wanted else [sys.executable, *(f"python{each}" for each in versions), "python3"]
    seen = []
    for name in names:
        path = shutil.which(name or "")
        if not path:
            continue
        done = subprocess.run([path, "-Ic", _PROBE], capture_output=True, check=False)
        version = done.stdout.decode().strip()
        if done.returncode == 0 and version in versions:
            return path, version
        lines = done.stderr.decode(errors="replace").split("\n")
        seen.append("{}: {}".format(path, f"Python {version}" if version else "".join(lines[-2:])))
    fit, found = " or ".join(versions), "\n  ".join(seen) or "none"
    raise Trouble(
        f"gpuckpt needs Python {fit} here, for which this bundle has wheels; found:\n  {found}\n"
        "name one with --python, or make a bundle for another: scripts/offline-bundle --python LIST"
    )


def install(python: str, venv: str, wheels: str) -> None:
    """An environment with what the wheels hold; pip is one of them, as Pythons may come without."""
    run([python, "-m", "venv", "--without-pip", "--symlinks", venv])
    add(venv, wheels, "requirements.txt")


def add(venv: str, wheels: str, requirements: str) -> None:
    """Install what the list in the folder of wheels names, and leave no programs but Python."""
    pip = glob.glob(os.path.join(wheels, "pip-*.whl"))[0]
    options = ["--no-index", "--find-links", wheels, "--no-compile", "--no-cache-dir", "--no-warn-script-location"]
    python = os.path.join(venv, "bin", "python")
    run([python, "-I", pip + "/pip", "--isolated", "install", *options, "-r", os.path.join(wheels, requirements)])
    # What else lies there names the folder in which it was made.
    for name in os.listdir(os.path.join(venv, "bin")):
        if not re.fullmatch(r"python[0-9.]*", name):
            os.unlink(os.path.join(venv, "bin", name))


def site_packages(venv: str, version: str) -> str:
    return os.path.join(venv, "lib", "python" + version, "site-packages")


def write(path: str, text: str, mode: int = 0o644) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, mode)


def storage_driver(storage: str) -> str:
    """overlay if it can be mounted where podman will keep its layers, else vfs, which copies them."""
    there = storage
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    folder = tempfile.mkdtemp(prefix=".gpuckpt-overlay-", dir=there)
    try:
        for name in ("low", "up", "work", "merged"):
            os.mkdir(os.path.join(folder, name))
        options = f"lowerdir={folder}/low,upperdir={folder}/up,workdir={folder}/work"
        merged = os.path.join(folder, "merged")
        done = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, merged],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode == 0:
            subprocess.run(["umount", "-l", merged], check=False)
        return "overlay" if done.returncode == 0 else "vfs"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def configure(folder: str, prefix: str, storage: str, volatile: str) -> None:
    """podman's configuration: its own programs, storage and locks, apart from those of a podman of the machine."""
    containers = os.path.join(prefix, "etc", "containers")
    here = os.path.join(folder, "etc", "containers")
    lines = ["# Made by gpuckpt's `unpack`: podman reads this file instead of the machine's.", "[containers]"]
    if os.path.exists(os.path.join(here, "seccomp.json")):
        lines.append(f'seccomp_profile = "{containers}/seccomp.json"')
    lines += ["[engine]", 'runtime = "runc"']
    if not os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        lines += ['cgroup_manager = "cgroupfs"', 'events_logger = "file"']
    lines += [
        f'conmon_path = ["{prefix}/bin/conmon"]',
        f'helper_binaries_dir = ["{prefix}/bin"]',
        f'tmp_dir = "{volatile}/libpod"',
        # The other kind lies in /dev/shm under one name for every podman of the machine.
        'lock_type = "file"',
        "[engine.runtimes]",
        f'runc = ["{prefix}/bin/runc"]',
        "[network]",
        'network_backend = "netavark"',
        f'network_config_dir = "{storage}/networks"',
    ]
    write(os.path.join(here, "containers.conf"), "\n".join(lines) + "\n")
    driver = storage_driver(storage)
    text = f'[storage]\ndriver = "{driver}"\ngraphroot = "{storage}"\nrunroot = "{volatile}/storage"\n'
    write(os.path.join(here, "storage.conf"), text)
    write(os.path.join(here, "policy.json"), '{"default": [{"type": "insecureAcceptAnything"}]}\n')
    write(os.path.join(here, "registries.conf"), "unqualified-search-registries = []\n")


def wrappers(folder: str, prefix: str) -> None:
    """The programs that are called by name: see what they are called with."""
    names = {"CONF": "containers", "STORAGE_CONF": "storage", "REGISTRIES_CONF": "registries"}
    exports = [f"export CONTAINERS_{k}={prefix}/etc/containers/{v}.conf" for k, v in names.items()]
    # Behind PATH, as gpuckpt puts the CRIU to use before it.
    lines = ["#!/bin/sh", *exports, f'export PATH="$PATH:{prefix}/bin"', f'exec {prefix}/libexec/podman "$@"']
    write(os.path.join(folder, "bin", "podman"), "\n".join(lines) + "\n", 0o755)
    own = '#!/bin/sh\nexport GPUCKPT_PREFIX="${GPUCKPT_PREFIX:-%s}"\nexec %s/venv/bin/%s "$@"\n'
    write(os.path.join(folder, "bin", "gpuckpt"), own % (prefix, prefix, "gpuckpt"), 0o755)
    test = f"python -I {prefix}/src/scripts/bundle_self_test.py {prefix}"
    write(os.path.join(folder, "bin", "self-test"), own % (prefix, prefix, test), 0o755)
    main = f"#!{prefix}/venv/bin/python -I\nimport sys\nfrom gpuckpt.cli import main\nsys.exit(main())\n"
    write(os.path.join(folder, "venv", "bin", "gpuckpt"), main, 0o755)


def server(prefix: str, wanted: str | None, versions: list[str], wheels: str) -> str | None:
    """Make prefix/server the machine's Python with torch and transformers, and what the guest server needs beside."""
    target = os.path.join(prefix, "server")
    if os.path.lexists(target):
        return None
    found = choose_server(wanted, versions)
    if found is None:
        return None
    path, version, places = found
    making = target + ".making"
    shutil.rmtree(making, ignore_errors=True)
    run([path, "-m", "venv", "--without-pip", "--symlinks", "--system-site-packages", making])
    # Of an environment, too, which --system-site-packages does not look into.
    write(os.path.join(site_packages(making, version), "machine.pth"), "\n".join(places))
    add(making, wheels, "guest.txt")
    os.rename(making, target)
    return path


def choose_server(wanted: str | None, versions: list[str]) -> tuple[str, str, list[str]] | None:
    """A Python of this machine with torch and transformers: its path, version, and where it looks for packages."""
    names = [wanted] if wanted else ["python3", *(f"python{each}" for each in versions), sys.executable]
    for path in filter(None, map(shutil.which, names)):
        done = subprocess.run([path, "-Ic", _SERVER_PROBE], capture_output=True, check=False)
        version, *places = done.stdout.decode().split("\n")
        if done.returncode == 0 and version in versions:
            return path, version, places
        if wanted and done.returncode == 0:
            raise Trouble(
                "{} is Python {}; this bundle has wheels for {}".format(wanted, version, " and ".join(versions))
            )
    if wanted and shutil.which(wanted) is None:
        raise Trouble(f"there is no program {wanted}")
    if wanted:
        raise Trouble(f"{wanted} has no torch and transformers: name a Python that has, or leave --server out")
    return None


def exchange(new: str, old: str) -> bool:
    """Let the two folders change names in one step; False where the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _EXCHANGE) == 0)


def put_in_place(new: str, prefix: str) -> None:
    """Make ``new`` the prefix; what was there and is not the bundle's (models, the server's environment) moves over."""
    replaced = prefix + ".replaced"
    if not os.path.lexists(prefix):
        os.rename(new, prefix)
    elif exchange(new, prefix):
        os.rename(new, replaced)
    else:
        os.rename(prefix, replaced)
        os.rename(new, prefix)
    clear(replaced, prefix)


def clear(replaced: str, prefix: str) -> None:
    """Remove an earlier prefix, but not what somebody has put there: also if it was not come to last time."""
    if not os.path.isdir(replaced):
        return
    if not os.path.lexists(prefix):
        os.rename(replaced, prefix)  # interrupted between two renames
        return
    for name in os.listdir(replaced):
        if name not in OURS and not os.path.lexists(os.path.join(prefix, name)):
            os.rename(os.path.join(replaced, name), os.path.join(prefix, name))
    shutil.rmtree(replaced)


def refuse(prefix: str) -> None:
    """Trouble if the prefix cannot be used, or holds what no bundle has put there."""
    if not re.fullmatch(r"/[A-Za-z0-9/._+-]*[A-Za-z0-9._+-]", prefix) or len(prefix) > 200:
        raise Trouble(f"{prefix} cannot be a prefix: letters, digits and . _ + - only, 200 at most")
    if os.path.lexists(prefix) and (os.path.islink(prefix) or not os.path.isdir(prefix)):
        raise Trouble(f"{prefix} is not a folder")
    mine = os.path.exists(os.path.join(prefix, "bundle.json"))
    if os.path.isdir(prefix) and os.listdir(prefix) and not mine:
        raise Trouble(f"{prefix} holds something that is not of a bundle: name another place with --prefix")


def unpack(given: argparse.Namespace) -> str:
    prefix: str = os.path.abspath(given.prefix)
    refuse(prefix)
    parent = os.path.dirname(prefix)
    os.makedirs(parent, exist_ok=True)
    lock = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Trouble(f"another unpack is at work in {parent}") from None
    with step("digests"):
        pieces = verified(HERE)
        with open(os.path.join(HERE, "bundle.json")) as file:
            about = json.load(file)
    python, version = choose_python(given.python, about["pythons"])
    say("  gpuckpt {}, for Python {} ({})".format(about["version"], version, python))
    if given.server:
        choose_server(given.server, about["pythons"])  # Trouble, while nothing is in place
    clear(prefix + ".replaced", prefix)
    new = os.path.join(parent, f".{os.path.basename(prefix)}.unpacking")
    shutil.rmtree(new, ignore_errors=True)  # of one that was interrupted
    wheels = os.path.join(new, "wheels")
    try:
        with step("unpacking"):
            os.mkdir(new, 0o755)
            extract(pieces, new)
            set_loaders(new, prefix, about["loaders"])
        with step("Python packages"):
            venv = os.path.join(new, "venv")
            install(python, venv, wheels)
            site = site_packages(venv, version)
            write(os.path.join(site, "gpuckpt.pth"), f"{prefix}/src\n{prefix}/python\n")
            # Tracebacks shall name the files where they will lie.
            folders = [site, *(os.path.join(new, "src", name) for name in ("gpuckpt", "hooks", "benchmarks"))]
            run([venv + "/bin/python", "-m", "compileall", "-q", "-s", new, "-p", prefix, *folders])
        with step("configuration"):
            configure(new, prefix, os.path.abspath(given.storage), os.path.abspath(given.run))
            wrappers(new, prefix)
        kept = new + "-wheels"
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(wheels, kept)
        try:
            with step(f"in place: {prefix}"):
                put_in_place(new, prefix)
            try:
                found = server(prefix, given.server, about["pythons"], kept)
                if found:
                    say(f"  servers run with {found} ({prefix}/server)")
                elif not os.path.lexists(os.path.join(prefix, "server")):
                    say("  no Python here has torch and transformers: --workload guest wants one (--server PROGRAM)")
            except Trouble as trouble:
                if given.server:
                    raise
                say(f"  no environment for servers: {trouble}")
        finally:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.rmtree(os.path.join(prefix, "server.making"), ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)
    return prefix


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - it is started with whatever Python a machine has
        sys.exit(f"unpack: gpuckpt needs Python 3.11 or later; start this with one: python3.X {sys.argv[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", default="/opt/gpuckpt", help="where everything goes (default /opt/gpuckpt)")
    parser.add_argument("--python", help="the Python that runs gpuckpt (default: the first that fits)")
    parser.add_argument("--server", help="the Python with torch and transformers (default: the first that has them)")
    parser.add_argument("--storage", default="/var/lib/gpuckpt-podman", help="podman's storage (%(default)s)")
    parser.add_argument("--run", default="/run/gpuckpt-podman", help="podman's folder until a reboot (%(default)s)")
    parser.add_argument("--no-test", action="store_true", help="do not try what works here")
    given = parser.parse_args()
    os.umask(0o022)
    if os.geteuid() != 0:
        sys.exit("unpack: must run as root: CRIU, podman's checkpoints and overlay mounts need it")
    try:
        prefix = unpack(given)
    except Trouble as trouble:
        sys.exit(f"unpack: {trouble}")
    except KeyboardInterrupt:
        sys.exit(130)
    say(f"  next: export PATH={prefix}/bin:$PATH; gpuckpt doctor")
    if given.no_test:
        return 0
    return subprocess.call([os.path.join(prefix, "bin", "self-test")])


if __name__ == "__main__":
    sys.exit(main())
