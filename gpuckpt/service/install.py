"""Install the pool as a systemd service, and take it away again.

Every file that is written begins with a line that holds a digest of the rest: what somebody has edited since is
recognised, and neither overwritten nor removed unasked. Settings that differ from ours belong into drop-ins.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from blake3 import blake3
from msgspec import Struct

import gpuckpt
from gpuckpt import proc
from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, NothingToDo, PreflightError
from gpuckpt.host import tmpfs
from gpuckpt.pool import config as pool_config
from gpuckpt.service import units

VARIABLES = Path("/etc/gpuckpt/pool.env")
_BOOTED = Path("/run/systemd/system")  # sd_booted(3)
_EXAMPLE = Path(pool_config.__file__).with_name("example.toml")
_HEADER = "# Written by `gpuckpt pool install`; of what follows, blake3 is {}"
_ENABLED = (units.SOCKET, units.SERVICE)

What = Literal["written", "changed", "unchanged", "kept", "removed"]


class Change(Struct, frozen=True):
    """What became of one file. ``kept``: it is not (or no more) ours. ``saved``: where an edited one was put aside."""

    path: Path
    what: What
    saved: Path | None = None


class Outcome(Struct, frozen=True):
    """What was done: files, the commands that were run, and what else the user should know."""

    changes: tuple[Change, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]


def install(
    settings: Settings,
    *,
    root: Path = Path("/"),
    config: Path = pool_config.DEFAULT_FILE,
    program: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    enable: bool = False,
    now: bool = False,
    force: bool = False,
) -> Outcome:
    """Write units, tmpfiles.d and a first configuration below ``root``, and tell systemd, if it is the one running.

    ``config`` is the pool's configuration as the service will see it, read for the front's addresses; it is written,
    with ``pool.env``, only where there is none. ``program`` is the command line of gpuckpt, by default this one's.
    ``environment`` (GPUCKPT_… variables that ``settings`` came from) goes into the first ``pool.env``. ``enable``: at
    every boot; ``now``: start it, or restart it if its units have changed (a larger store needs no restart). ``force``
    overwrites what was edited, and keeps a copy.

    Can be repeated. Nothing is written if anything is wrong: BusyError for a file that somebody has edited, UsageError
    for the configuration, PreflightError where ``now`` is not possible; proc.CommandError if systemd refuses.
    """
    here = root == Path("/")
    running = here and _BOOTED.is_dir()
    if now and not running:
        raise PreflightError(
            "the pool cannot be started now",
            cause="systemd does not run here" if here else f"{root} is not the running system",
            remedy="install without --now; gpuckpt pool run runs it in a terminal",
        )
    notes: list[str] = []
    first = _first_files(root, config, environment or {})
    front = pool_config.load(_EXAMPLE if config in first else _below(root, config)).front
    files = units.render(
        settings,
        front.listen,
        program=program or own_program(),
        config=config,
        systemd=units.version(root),
        environment=own_environment(),
        huge_pages=None if here else True,
    )
    if here and (found := tmpfs.info(settings.store.path)) is not None and found.source != tmpfs.SOURCE:
        # Of the system's own fstab, or of a unit that somebody wrote: ours would take its place.
        files.pop(units.UNITS / f"{units.escaped(settings.store.path)}.mount")
        notes.append(f"{settings.store.path} is mounted by something else already; no mount unit was written")
    edited = [path for path in files if _state(_below(root, path)) == "edited"]
    if edited and not force:
        raise BusyError(
            f"not overwritten: {', '.join(str(_below(root, path)) for path in edited)}",
            cause="somebody has edited it, or it was not written by gpuckpt",
            remedy=f"move the changes to a drop-in (systemctl edit {units.SERVICE}), then install with --force",
        )
    changes = [_put(_below(root, path), text, mode) for path, (text, mode) in first.items()]
    changes += [_put(_below(root, path), _signed(text), 0o644) for path, text in files.items()]
    changed = {one.path.name for one in changes if one.what in ("written", "changed")}
    mount = f"{units.escaped(settings.store.path)}.mount"
    commands = []
    if running:
        if units.SYSUSERS in files:
            commands.append(_run("systemd-sysusers", str(units.SYSUSERS)))
        commands.append(_run("systemd-tmpfiles", "--create", str(units.TMPFILES)))
        commands.append(_run("systemctl", "daemon-reload"))
    elif here:
        notes.append("systemd does not run here; it reads the units when it starts (in a terminal: gpuckpt pool run)")
    if enable:
        commands.append(_run("systemctl", *([] if here else [f"--root={root}"]), "enable", *_ENABLED))
    # What runs goes on as it was, goldens in the store too: a remount only changes its limits.
    stale = [["restart", *_ENABLED]] if running and changed & set(_ENABLED) and any(map(_active, _ENABLED)) else []
    stale += [["reload", mount]] if running and mount in changed and _active(mount) else []
    if now:
        commands += [_run("systemctl", *words, timeout=600) for words in [*stale, ["start", *_ENABLED]]]
    else:
        notes += [f"not in use yet: systemctl {' '.join(words)}" for words in stale]
    return Outcome(tuple(changes), tuple(commands), tuple(notes))


def uninstall(settings: Settings, *, root: Path = Path("/"), force: bool = False) -> Outcome:
    """Disable and stop the service, and remove the files that are ours.

    Configuration, goldens, and the store with what lies in it stay. What was edited stays too, unless ``force``.
    Raises NothingToDo if nothing is installed.
    """
    here = root == Path("/")
    running = here and _BOOTED.is_dir()
    mount = units.UNITS / f"{units.escaped(settings.store.path)}.mount"
    files = [units.UNITS / units.SERVICE, units.UNITS / units.SOCKET, mount, units.TMPFILES, units.SYSUSERS]
    present = {path: state for path in files if (state := _state(_below(root, path))) != "missing"}
    if not present:
        raise NothingToDo("the pool is not installed", cause=f"none of its files is in {_below(root, units.UNITS)}")
    commands = []
    installed = [name for name in _ENABLED if units.UNITS / name in present]
    if installed:
        # The socket with it, or a request in between would start the service again.
        options = ["--now"] if running else [] if here else [f"--root={root}"]
        commands.append(_run("systemctl", "disable", *options, *installed, timeout=600))
    changes = []
    for path, state in present.items():
        if state == "ours" or force:
            _below(root, path).unlink()
        changes.append(Change(_below(root, path), "removed" if state == "ours" or force else "kept"))
    if running:
        commands.append(_run("systemctl", "daemon-reload"))
    notes = [f"not touched: {settings.paths.state}, {settings.store.path}, /etc/gpuckpt"]
    return Outcome(tuple(changes), tuple(commands), tuple(notes))


def own_program() -> list[str]:
    """The command line that runs this gpuckpt: its script beside the interpreter, or else the interpreter."""
    script = Path(sys.executable).with_name("gpuckpt")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "gpuckpt"]


def own_environment() -> dict[str, str]:
    """``PYTHONPATH``, if this gpuckpt was found by it: a checkout that is not installed."""
    package = Path(gpuckpt.__file__).resolve().parents[1]
    named = [Path(word).resolve() for word in os.environ.get("PYTHONPATH", "").split(":") if word]
    return {"PYTHONPATH": str(package)} if package in named else {}


def _first_files(root: Path, config: Path, environment: Mapping[str, str]) -> dict[Path, tuple[str, int]]:
    """Files of the user's own that are not there yet, with their modes."""
    example = re.sub(r'(?m)^\[models\."example"\]$', '# [models."example"]', _EXAMPLE.read_text())
    lines = "".join(f"{name}={_assigned(value)}\n" for name, value in sorted(environment.items()))
    variables = "# Environment of the pool: GPUCKPT_TABLE__KEY=value as in `gpuckpt config show`, one a line.\n" + lines
    wanted = {config: (example, 0o644), VARIABLES: (variables, 0o600)}
    return {path: content for path, content in wanted.items() if not _below(root, path).exists()}


def _assigned(value: str) -> str:
    """A value in an environment file: there, unlike in a unit, neither % nor a line break is special in quotes."""
    return '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _signed(text: str) -> str:
    return f"{_HEADER.format(blake3(text.encode()).hexdigest()[:32])}\n{text}"


def _state(path: Path) -> Literal["missing", "ours", "edited"]:
    try:
        text = path.read_text(errors="surrogateescape")
    except FileNotFoundError:
        return "missing"
    first, _, rest = text.partition("\n")
    return (
        "ours" if first == _HEADER.format(blake3(rest.encode(errors="surrogateescape")).hexdigest()[:32]) else "edited"
    )


def _put(path: Path, text: str, mode: int) -> Change:
    """Write one file as a whole or not at all: systemd may read it at any time."""
    state, saved = _state(path), None
    if state != "missing" and path.read_text(errors="surrogateescape") == text:
        return Change(path, "unchanged")
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if state == "edited":
        saved = path.with_name(f"{path.name}.edited")  # a suffix that systemd does not read
        path.replace(saved)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "w") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return Change(path, "written" if state == "missing" else "changed", saved)


def _run(*argv: str, timeout: float = 60) -> str:
    proc.run(argv, timeout=timeout)
    return proc.quoted(argv)


def _active(unit: str) -> bool:
    return proc.run(["systemctl", "is-active", "--quiet", unit], check=False).code == 0
