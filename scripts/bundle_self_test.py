"""What works on this machine of an unpacked bundle, line by line: PREFIX/bin/self-test.

Where `gpuckpt doctor` looks, this does: a process is dumped and restored, a golden made of a small server and restored.
Ends with 0 if goldens can be made here, else with 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LAST = 12  # lines of a failed program


class Fault(Exception):
    """What does not work, and why."""


def said(argv: list[str | Path], *, env: dict[str, str] | None = None, timeout: float = 60) -> str:
    """What a program prints; Fault with its last lines if it fails."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise Fault(f"there is no {argv[0]}") from None
    except subprocess.TimeoutExpired:
        raise Fault(f"{' '.join(map(str, argv[:2]))} did not end within {timeout:g} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Fault("\n".join(lines[-_LAST:]) or f"{argv[0]} ended with status {done.returncode}")
    return done.stdout.strip()


@contextlib.contextmanager
def folder(parent: str) -> Iterator[Path]:
    new = not Path(parent).exists()
    Path(parent).mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="self-test-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                Path(parent).rmdir()


def podman(prefix: Path) -> str:
    version = said([prefix / "bin" / "podman", "--version"])
    told = json.loads(said([prefix / "bin" / "podman", "info", "--format", "json"]))
    return f"{version}, storage {told['store']['graphDriverName']} at {told['store']['graphRoot']}"


def runc(prefix: Path) -> str:
    return said([prefix / "bin" / "runc", "--version"]).partition("\n")[0]


def criu(prefix: Path) -> str:
    version = said([prefix / "bin" / "criu", "--version"]).partition("\n")[0]
    said([prefix / "bin" / "criu", "check"])
    return f"{version}; criu check passes"


def dump(prefix: Path) -> str:
    """Dump a process, restore it under its number, and see that it is there."""
    program = prefix / "bin" / "criu"
    with folder(tempfile.gettempdir()) as images:
        process = subprocess.Popen(
            ["sleep", "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        pid = process.pid
        try:
            time.sleep(0.2)
            _criu([program, "dump", "-t", str(pid), "-D", images, "-o", "log"], images)
            process.wait(10)  # a dead child keeps its number until it is waited for
            _criu([program, "restore", "-d", "-D", images, "-o", "log"], images)
            if Path(f"/proc/{pid}/comm").read_text().strip() != "sleep":
                raise Fault("the restored process is not there")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return "a process was dumped and restored"


def _criu(argv: list[str | Path], images: Path) -> None:
    try:
        said(argv)
    except Fault as fault:
        log = images / "log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        errors = [line for line in lines if "Error" in line]
        raise Fault("\n".join([f"criu {argv[1]}: {fault}", *errors[-_LAST:]])) from None


def overlay(prefix: Path) -> str:
    state = os.environ.get("GPUCKPT_PATHS__STATE", "/var/lib/gpuckpt")
    with folder(state) as place:
        for name in ("low", "up", "work", "merged"):
            (place / name).mkdir()
        options = f"lowerdir={place}/low,upperdir={place}/up,workdir={place}/work"
        said(["mount", "-t", "overlay", "overlay", "-o", options, place / "merged"])
        said(["umount", "-l", place / "merged"])
    return f"can be mounted in {state}"


def memory(prefix: Path) -> str:
    with folder("/run") as place:
        said(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", place])
        said(["umount", "-l", place])
    return "can be mounted in /run"


def freezer(prefix: Path) -> str:
    """Make a control group below our own, freeze and remove it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    unified = next((line[3:] for line in lines if line.startswith("0::")), None)
    old = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "freezer"), None)
    base = _CGROUP if old is None else _CGROUP / "freezer"
    for parent in (base / (old or unified or "").lstrip("/"), base):
        group = parent / f"gpuckpt-self-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            trouble = f"{parent}: {error.strerror}"
            continue
        try:
            if old is None:
                (group / "cgroup.freeze").write_text("1")
            else:
                (group / "freezer.state").write_text("FROZEN")
                (group / "freezer.state").write_text("THAWED")
        except OSError as error:
            raise Fault(f"{group}: {error.strerror}") from None
        finally:
            group.rmdir()
        return f"version {2 if old is None else 1}, groups can be made below {parent}"
    raise Fault(f"no control group can be made: {trouble}")


def golden(prefix: Path) -> str:
    """Make a golden of a small server with a store of its own, restore it, ask it, and remove all of it."""
    state = os.environ.get("GPUCKPT_PATHS__STATE", "/var/lib/gpuckpt")
    name = f"test-{os.getpid()}"  # short: a socket's path has few bytes
    program = prefix / "bin" / "gpuckpt"
    with folder(state) as kept, folder("/run") as run:
        env = {
            **os.environ,
            "GPUCKPT_STORE__PATH": str(run / "store"),
            "GPUCKPT_STORE__SIZE": "1GiB",
            "GPUCKPT_PATHS__STATE": str(kept),
            "GPUCKPT_PATHS__RUN": str(run / "run"),
            "GPUCKPT_PATHS__HOOKS": str(run / "hooks.d"),
        }
        try:
            # The container has this machine's root file system, so this Python, and maybe not the prefix.
            server = [str(Path(sys.executable).resolve()), "/srv/site.py", "{socket}"]
            volume = f"{prefix}/src/docs:/srv"
            said(
                [program, "create", name, "--volume", volume, "--canary", "GET /", "--", *server], env=env, timeout=300
            )
            started = time.monotonic()
            said([program, "restore", name], env=env, timeout=300)
            seconds = time.monotonic() - started
        finally:
            for words in (["stop", name], ["rm", name]):
                with contextlib.suppress(Fault):
                    said([program, *words], env=env)
            with contextlib.suppress(Fault):
                said(["umount", "-l", run / "store"])
            _end_service(run / "run")
    return f"made of a small server, and restored in {seconds:.1f} s"


def _end_service(run: Path) -> None:
    for file in run.glob("podman-*/service.pid"):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(file.read_text()), 15)


def network(prefix: Path) -> str:
    said([prefix / "bin" / "netavark", "--version"])
    if not shutil.which("iptables"):
        raise Fault("there is no iptables, which netavark calls: servers on Unix sockets work, `--publish` does not")
    return "netavark and iptables are there"


def driver(prefix: Path) -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        raise Fault("no NVIDIA driver here") from None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    version = found[1] if found else "?"
    asked = "from cuda.bindings import driver; driver.cuCheckpointProcessLock; import pynvml; pynvml.nvmlInit()"
    said([sys.executable, "-Ic", asked])
    return f"{version}; Python's interfaces to it load"


CHECKS: tuple[tuple[str, Callable[[Path], str], bool], ...] = (
    ("podman", podman, True),
    ("runc", runc, True),
    ("CRIU", criu, True),
    ("dump and restore", dump, True),
    ("overlay", overlay, True),
    ("tmpfs", memory, True),
    ("cgroup freezer", freezer, False),
    ("golden", golden, True),
    ("published ports", network, False),
    ("NVIDIA driver", driver, False),
)
"""Name, what tries it, and whether nothing can be frozen without."""


def main() -> int:
    prefix = Path(sys.argv[1])
    broken = []
    for name, check, needed in CHECKS:
        try:
            text, word = check(prefix), "ok"
        except Fault as fault:
            text, word = str(fault), "FAIL" if needed else "no"
        except Exception as error:  # the other lines are wanted all the more
            text, word = f"{type(error).__name__}: {error}", "FAIL" if needed else "no"
        first, *rest = text.splitlines()
        print(f"  {word:4}  {name:17} {first}", *(f"        {'':17} {line}" for line in rest), sep="\n", flush=True)
        broken += [name] if word == "FAIL" else []
    print(f"  not usable here: {', '.join(broken)}" if broken else "  usable: next, `gpuckpt doctor`", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
