"""What systemd hands to the daemon: listening sockets (sd_listen_fds(3)) and credentials (systemd.exec(5))."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from gpuckpt.errors import UsageError

API_KEYS = "api-keys"
NO_KEYS = "none"
"""What the credential holds where there is no file of keys.

``LoadCredential=`` of a missing file fails the start; with a ``SetCredential=`` beside it systemd takes that text
instead. It is not the empty text, because a file of keys that somebody has emptied must not open the front to all.
"""
BACKLOG = 4096
"""``Backlog=`` of the socket unit. A server that is given a socket calls listen(2) once more, and unless it is told
otherwise with less: asyncio with 100, uvicorn with 2,048."""
_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Listener(NamedTuple):
    """A socket that listens, and its unit's ``FileDescriptorName=``."""

    name: str
    socket: socket.socket


def listeners(environ: MutableMapping[str, str] = os.environ, *, first: int = _FIRST) -> list[Listener]:
    """The sockets we were started with; an empty list if there are none, or they are meant for another process.

    TCP or Unix stream sockets that listen; no child inherits them. The variables are removed, so that a second call,
    or a child, does not take what it must not. Raises UsageError for anything else than such sockets.
    """
    said = {name: environ.pop(name, None) for name in _VARIABLES}
    if said["LISTEN_PID"] != str(os.getpid()) or not said["LISTEN_FDS"]:
        return []
    try:
        count = int(said["LISTEN_FDS"])
    except ValueError:
        raise UsageError(
            f"LISTEN_FDS cannot be {said['LISTEN_FDS']!r}", cause="it is no number", remedy="start the pool by systemd"
        ) from None
    names = (said["LISTEN_FDNAMES"] or "").split(":")
    names += [""] * (count - len(names))
    return [Listener(names[at] or "unknown", _checked(first + at, names[at])) for at in range(count)]


def credential(name: str = API_KEYS, environ: MutableMapping[str, str] = os.environ) -> Path | None:
    """The file of a credential, None if systemd has passed none of that name.

    Raises UsageError if there is one that cannot be read: what it protects must not be open then.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    path = Path(folder, name)
    try:
        with path.open("rb") as file:
            # One byte more than the word, and the line break that an editor adds.
            return None if file.read(len(NO_KEYS) + 2).strip() == NO_KEYS.encode() else path
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(
            f"the credential {name} cannot be read", cause=f"{path}: {error.strerror}", remedy="systemctl cat the unit"
        ) from error


def _checked(number: int, name: str) -> socket.socket:
    def refuse(cause: str) -> UsageError:
        return UsageError(
            f"the pool was handed something else than a listening socket: descriptor {number} “{name}”",
            cause=cause,
            remedy="the socket unit needs ListenStream= and Accept=no, and nothing else",
        )

    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise refuse("it is no socket")
    except OSError as error:
        raise refuse(f"it is not open ({error.strerror})") from error
    os.set_inheritable(number, False)
    made: Any = socket.socket(fileno=number)
    if made.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or made.type != socket.SOCK_STREAM:
        cause = f"its family and type are {made.family!r} and {made.type!r}"
    elif not made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        cause = "it does not listen (a connection, or Accept=yes)"
    else:
        made.setblocking(False)
        return made  # type: ignore[no-any-return]
    made.detach()
    raise refuse(cause)
