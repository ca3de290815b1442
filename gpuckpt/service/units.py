"""The files that systemd reads: packaged templates, filled in with this installation's paths and addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpuckpt.config import Settings
from gpuckpt.errors import UsageError
from gpuckpt.host import tmpfs

TEMPLATES = Path(__file__).resolve().parents[1] / "data" / "systemd"
SERVICE = "gpuckpt-pool.service"
SOCKET = "gpuckpt-pool.socket"
UNITS = Path("/etc/systemd/system")
TMPFILES = Path("/etc/tmpfiles.d/gpuckpt.conf")
SYSUSERS = Path("/etc/sysusers.d/gpuckpt.conf")
_NOTIFY_RELOAD = 253  # the first systemd that knows Type=notify-reload


def render(
    settings: Settings,
    listen: Sequence[str],
    *,
    program: Sequence[str],
    config: Path,
    systemd: int,
    environment: Mapping[str, str],
    huge_pages: bool | None = None,
) -> dict[Path, str]:
    """The files by their paths.

    ``listen`` is ``[front].listen``; ``program`` the command line of gpuckpt; ``systemd`` the version that will read
    them, 0 if unknown; ``environment`` what the program itself needs; ``huge_pages`` whether the kernel knows them,
    None for this one's. Raises UsageError for addresses that systemd cannot listen on.
    """
    streams = [_stream(address) for address in listen]
    local = any(stream.startswith("/") for stream in streams)
    words = {
        "GPUCKPT": command_line(program),
        "CONFIG": command_line([str(config)]),
        "STORE": quoted(str(settings.store.path)),
        "TYPE": _type(systemd, program),
        "ENVIRONMENT": "\n".join(f"Environment={quoted(f'{name}={value}')}" for name, value in environment.items()),
        "LISTEN": "\n".join(f"ListenStream={stream}" for stream in streams),
        "ACCESS": "# Who may use the Unix socket.\nSocketGroup=gpuckpt\nSocketMode=0660" if local else "",
        "RUN": _specifiers(str(settings.paths.run)),
        "STATE": _specifiers(str(settings.paths.state)),
    }
    # Where= is one path, to the end of the line: it knows no quotes.
    mount = {
        "STORE": _specifiers(str(settings.store.path)),
        "OPTIONS": _specifiers(
            tmpfs.mount_options(settings.store)
            if huge_pages is None
            else tmpfs.mount_options(settings.store, thp=None if huge_pages else Path("/nonexistent"))
        ),
    }
    files = {
        UNITS / SERVICE: _filled(SERVICE, words),
        UNITS / SOCKET: _filled(SOCKET, words),
        UNITS / f"{escaped(settings.store.path)}.mount": _filled("store.mount", mount),
        TMPFILES: _filled("tmpfiles.conf", words),
    }
    return files | ({SYSUSERS: _filled("sysusers.conf", words)} if local else {})


def escaped(path: Path) -> str:
    """A path as part of a unit's name, as ``systemd-escape --path`` writes it."""
    text = "/".join(part for part in path.parts if part != "/")
    made = "".join("-" if c == "/" else c if re.fullmatch(r"[A-Za-z0-9:_.]", c) else _hexed(c) for c in text)
    return (_hexed(".") + made[1:] if made.startswith(".") else made) or "-"


def quoted(word: str) -> str:
    """One word of a unit's list: systemd's quotes, no specifiers."""
    text = _specifiers(word)
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def command_line(words: Sequence[str]) -> str:
    """The same of ``ExecStart=``, where alone $ begins a variable."""
    return " ".join(quoted(word).replace("$", "$$") for word in words)


def version(root: Path) -> int:
    """The version of the systemd in ``root``, by its library's name (no process is needed, nor that it runs); or 0."""
    for folder in ("usr/lib/*-linux-gnu*/systemd", "usr/lib/systemd", "usr/lib64/systemd", "lib/systemd"):
        for path in root.glob(f"{folder}/libsystemd-shared-*.so"):
            if match := re.match(r"libsystemd-shared-(\d+)", path.name):
                return int(match[1])
    return 0


def _type(systemd: int, program: Sequence[str]) -> str:
    """How the service says that it is ready, and is told to reload."""
    if systemd >= _NOTIFY_RELOAD:
        return "# A reload is a SIGHUP, and over when the daemon says READY=1 again.\nType=notify-reload"
    # An older one ignores a type that it does not know, and takes the service for ready before it is.
    return (
        "# This systemd knows no Type=notify-reload: the command waits until the daemon has reloaded.\n"
        f"Type=notify\nExecReload={command_line([*program, 'pool', 'reload'])}"
    )


def _stream(address: str) -> str:
    """``ListenStream=`` of an address that ``[front].listen`` may hold."""
    if address.startswith("unix:"):
        return _specifiers(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise UsageError(
            f"systemd cannot listen on {address}",
            cause="it takes addresses, not names, because it begins before names can be looked up",
            remedy="write the address in [front].listen, for example 0.0.0.0 for all of this host's",
        ) from None
    return f"{host}:{port}"


def _filled(template: str, words: Mapping[str, str]) -> str:
    text = re.sub(r"@([A-Z]+)@", lambda match: words[match[1]], (TEMPLATES / template).read_text())
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _hexed(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))
