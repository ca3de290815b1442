"""An open file, handed by one process of a container to another.

Another process' file can be opened anew by its path in /proc, but not one that has no file system behind it, like what
stands for a device's memory. So it goes through a Unix socket (SCM_RIGHTS) that is there for the moment of the call
which tells the other process its path. Only the user who made it can connect.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

_PATIENCE = 10.0  # seconds for the other one to answer


@contextmanager
def offered(file: int, folder: str) -> Iterator[str]:
    """Hand ``file`` to everybody of this user who asks at the path that is yielded, by a thread. Raises OSError."""
    path = os.path.join(os.path.abspath(folder), f"carried-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener, ExitStack() as stack:
        _unlink(path)  # of a process with this number that was killed
        listener.bind(path)
        stack.callback(_unlink, path)
        os.chmod(path, 0o600)  # before anybody can connect
        listener.listen(8)
        thread = threading.Thread(target=_hand, args=(listener, file), name="gpuckpt-handing", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)  # who waits in accept(2) wakes up
        yield path


@contextmanager
def taken(path: str) -> Iterator[int]:
    """The file that is offered at a path, for as long as the caller needs it. Raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(_PATIENCE)
        connection.connect(path)
        _, files, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise OSError(f"no file was handed over at {path}")
    try:
        yield files[0]
    finally:
        os.close(files[0])


def _hand(listener: socket.socket, file: int) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # shut down
            return
        with connection, suppress(OSError):  # it has gone
            connection.settimeout(_PATIENCE)
            socket.send_fds(connection, [b"\n"], [file])


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
