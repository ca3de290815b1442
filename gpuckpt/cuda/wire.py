"""What the GPU helper and those who ask it say to each other: lines of JSON on a Unix socket, open files beside them.

A question is ``{"call": METHOD, "arguments": […]}`` with a method of :class:`~gpuckpt.cuda.driver.Driver`, its answer
``{"result": …}`` or ``{"error": {"code": …, "message": …}}``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

QUESTIONS = ("state", "gpus", "memory", "version")  # which change nothing: they can be asked twice
METHODS = (*QUESTIONS, "lock", "checkpoint", "restore", "unlock", "carry")
_LINE = 1 << 20
_FILES = 4


def send(connection: socket.socket, line: bytes, files: Sequence[int]) -> None:
    """A line, its end included, with open files (SCM_RIGHTS, unix(7)). Raises OSError."""
    if files:
        socket.send_fds(connection, [line], list(files))
    else:
        connection.sendall(line)


def received(connection: socket.socket) -> tuple[bytes, list[int]] | None:
    """A line, and the open files that came with it, the caller's now; None at the end. Raises OSError."""
    line, files = b"", list[int]()
    try:
        while not line.endswith(b"\n"):
            data, more, _, _ = socket.recv_fds(connection, _LINE, _FILES)
            files += more
            line += data
            if not data or len(line) > _LINE:
                raise EOFError
    except BaseException as error:
        for handle in files:
            os.close(handle)
        if isinstance(error, EOFError):
            return None
        raise
    return line, files
