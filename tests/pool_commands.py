"""``gpuckpt pool``, asked of a daemon that pretends."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

from click.shell_completion import ShellComplete

from gpuckpt.cli import cli
from gpuckpt.service.view import PoolView
from tests.command_line import Done, run
from tests.fake_pool import FakePool, raw

STATE = "GET /v1/state"
NASTY = "a\x1b[2J\x9b\r\n\u202e[bold]x[/]"


def do(*words: str) -> Done:
    return run("pool", *words)


def as_json(*words: str) -> Any:
    done = do(*words, "--format", "json")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document.pop("version") == 1
    return document


def states(pool: FakePool, *views: PoolView) -> None:
    """Have the daemon tell these, one after the other; and a Ctrl-C come behind the last one."""
    left = list(views)

    def tell(connection: socket.socket) -> None:
        last = len(left) == 1
        connection.sendall(raw(left.pop(0) if left else views[-1]))
        if last:  # once: another one could come when the command has ended, and end the tests
            os.kill(os.getpid(), signal.SIGINT)

    pool.on(STATE, tell)


def completed(*words: str) -> list[str]:
    """What a shell is told for the last of ``words``, as the program finds it out."""
    *before, incomplete = words
    return [item.value for item in ShellComplete(cli, {}, "gpuckpt", "_X").get_completions(before, incomplete)]
