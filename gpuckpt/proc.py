"""The only module that starts processes.

Commands are argument lists, never shell lines. A child gets a whitelisted environment (secrets of the caller's
environment do not reach podman, CRIU or a log), a closed standard input, its own limits of time, and dies with a
message that can be pasted back into a shell.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from msgspec import Struct

from gpuckpt.errors import DeadlineError, GpuckptError, NotFoundError

# What a child may see of our environment. PATH is fixed: root's commands must not depend on the caller's PATH.
_PASSED = ("HOME", "LANG", "LC_ALL", "TERM", "TMPDIR", "TZ", "XDG_RUNTIME_DIR")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# An unpacked bundle (docs/offline.md) brings podman and what it starts; they lie beside the environment we run in.
_BUNDLE = Path(sys.prefix).parent

# Terminal sequences as a whole (colours, titles), then what control characters are left; a tab may stay.
_CONTROL = (
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
_LONGEST = 500  # characters of a line that is shown
_daemons: list[subprocess.Popen[bytes]] = []


class Result(Struct, frozen=True):
    """What a finished command left: its exit status and its two outputs, decoded leniently."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str


class CommandError(GpuckptError):
    """A command ended with a status other than 0; ``log`` holds the end of its output."""


def environment(extra: Mapping[str, str] | None = None, *, path: Sequence[Path | str] = ()) -> dict[str, str]:
    """The environment of a child: the whitelist, ``path`` before the standard search path, then ``extra``."""
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    bundled = [str(_BUNDLE / "bin")] if (_BUNDLE / "bundle.json").exists() else []
    env["PATH"] = ":".join([*map(str, path), *bundled, _PATH])
    env.update(extra or {})
    return env


def quoted(argv: Sequence[str]) -> str:
    """``argv`` as one line that a shell would take."""
    import shlex

    return shlex.join(argv)


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float = 60,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    path: Sequence[Path | str] = (),
    cwd: Path | None = None,
) -> Result:
    """Run ``argv`` to its end and return what it printed.

    ``timeout`` is in seconds. Raises :class:`NotFoundError` if the program does not exist, :class:`DeadlineError`
    if it does not end in time (it is killed then), and :class:`CommandError` if ``check`` and its status is not 0.
    """
    words = tuple(str(word) for word in argv)
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env=environment(env, path=path),
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise NotFoundError(
            f"cannot run {words[0]}: no such program",
            remedy="install it: make setup",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(
            f"{words[0]} did not end within {timeout:g} s",
            cause=f"the command was: {quoted(words)}",
            log=tail(_text(error.stderr) or _text(error.stdout)),
        ) from error
    result = Result(words, done.returncode, _text(done.stdout), _text(done.stderr))
    if check and result.code != 0:
        raise CommandError(
            f"{words[0]} failed with status {result.code}",
            cause=f"the command was: {quoted(words)}",
            log=tail(result.stderr or result.stdout),
        )
    return result


class Child:
    """A program that may be told to stop, and is told so by the kernel if we die: it must not outlive us.

    Its output is kept for :meth:`wait`, which is called once. A program that does not exist ends with status 127.
    """

    def __init__(self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> None:
        # Set by a program, as code of ours between fork and exec may deadlock where there are threads. The kernel takes
        # the death of the thread that has started it for ours, so that one has to live as long.
        self._words = ("setpriv", "--pdeathsig", "INT", *(str(word) for word in argv))
        self._out = _unnamed_file()
        self._err = _unnamed_file()
        try:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=self._err,
                env=environment(env),
                start_new_session=True,  # a Ctrl-C on our terminal is ours to pass on
            )
        except BaseException as error:
            self._close()
            if isinstance(error, FileNotFoundError):
                raise NotFoundError("cannot run setpriv: no such program", remedy="install util-linux") from error
            raise

    def interrupt(self) -> None:
        """Ask it to undo what it has begun, and end."""
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout: float) -> Result:
        """Wait for its end, and return what it printed. It is killed after ``timeout`` seconds (DeadlineError)."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            self._process.wait()
            raise DeadlineError(
                f"{self._words[3]} did not end within {timeout:g} s",
                cause=f"the command was: {quoted(self._words[3:])}",
                log=tail(self._read(self._err)),
            ) from error
        else:
            return Result(self._words[3:], code, self._read(self._out), self._read(self._err))
        finally:
            self._close()

    def _close(self) -> None:
        self._out.close()
        self._err.close()

    @staticmethod
    def _read(file: IO[bytes]) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")


def spawn(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    path: Sequence[Path | str] = (),
) -> subprocess.Popen[bytes]:
    """Start ``argv`` as a daemon of its own session, its output appended to ``log``; return without waiting."""
    words = tuple(str(word) for word in argv)
    # Those that have ended are waited for, or a process of ours that stays would collect their remains.
    _daemons[:] = [daemon for daemon in _daemons if daemon.poll() is None]
    with log.open("ab") as output:
        try:
            started = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(env, path=path),
                cwd="/",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise NotFoundError(f"cannot run {words[0]}: no such program", remedy="install it: make setup") from error
    _daemons.append(started)
    return started


def tail(text: str, lines: int = 15) -> tuple[str, ...]:
    """The last ``lines`` non-empty lines of ``text``, without control characters and cut where they are very long.

    They end on a terminal, and the programs that wrote them are not to move its cursor or set its title.
    """
    cleaned = (re.sub(_CONTROL, "", line) for line in text.splitlines())
    return tuple(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…" for line in cleaned if line.strip())[-lines:]


def memory_of(pids: Sequence[int]) -> int:
    """Bytes of memory that a dump of these processes would carry: anonymous, shared and swapped pages."""
    return _memory(pids, ("RssAnon:", "RssShmem:", "VmSwap:"))


def own_memory_of(pids: Sequence[int]) -> int:
    """Bytes that these processes hold beside what they map from files (a tmpfs' too): anonymous and swapped pages."""
    return _memory(pids, ("RssAnon:", "VmSwap:"))


def _memory(pids: Sequence[int], kinds: tuple[str, ...]) -> int:
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
                for line in status:
                    if line.startswith(kinds):
                        total += int(line.split()[1]) * 1024
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def processes_below(pid: int) -> list[int]:
    """``pid`` and all its descendants, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as stat:
                    parent = int(stat.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        queue += children.get(current, [])
    return found


def inside(pid: int) -> int:
    """What a process is called in its own pid namespace; ``pid`` itself if that is ours, or it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return pid
    return next((int(line.split()[-1]) for line in lines if line.startswith("NSpid:")), pid)


def is_killed(pid: int) -> bool:
    """Whether the process is gone, or was sent SIGKILL: one in a frozen group of version 1 dies when it is thawed."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    pending = re.findall(r"^(?:Shd|Sig)Pnd:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) & 1 << (signal.SIGKILL - 1) for mask in pending)


def wait_for_end(pid: int, argument: str, timeout: float) -> None:
    """Wait, at most ``timeout`` seconds, for the end of the process ``pid`` that has ``argument`` in its command line.

    One without it has got the number of the process that is meant, which has ended.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Read after the handle was taken: what this says is said of the process that is waited for.
        if os.fsencode(argument) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            select.select([handle], [], [], timeout)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has ended between the two
    finally:
        os.close(handle)


def mapped_files(pids: Sequence[int]) -> set[str]:
    """Paths of the files that these processes have mapped, as they see them."""
    found: set[str] = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
                found.update(words[5].rstrip("\n") for line in maps if len(words := line.split(None, 5)) > 5)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {path for path in found if path.startswith("/")}


def _unnamed_file() -> IO[bytes]:
    return open(os.memfd_create("gpuckpt-output", os.MFD_CLOEXEC), "w+b")


def _text(data: bytes | str | None) -> str:
    if data is None:
        return ""
    return data if isinstance(data, str) else data.decode("utf-8", "replace")
