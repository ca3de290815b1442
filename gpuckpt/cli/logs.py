"""``gpuckpt logs``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuckpt.cli.complete import replica_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, say
from gpuckpt.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from gpuckpt.golden.replica import Replica
    from gpuckpt.golden.tools import Tools

_PAUSE = 0.5  # seconds between two looks


@click.command()
@click.argument("name", shell_complete=replica_names)
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines (of each log).")
@click.option("--follow", "-f", is_flag=True, help="Go on as long as the replica runs.")
@click.option("--failed", is_flag=True, help="The kept logs of failed operations instead (newest last).")
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str, tail: int | None, follow: bool, failed: bool, as_json: bool) -> None:
    """Show what the server of a replica prints, or what failed operations on NAME left."""
    from gpuckpt.golden import replica as replicas
    from gpuckpt.golden.tools import tools
    from gpuckpt.store.layout import Layout

    if follow and (as_json or failed):
        raise UsageError(f"--follow and {'--failed' if failed else '--format json'} exclude each other")
    settings = settings_from(ctx)
    kept = kept_logs(Layout.of(settings).logs, name)
    if failed:
        if not kept:
            raise NotFoundError(f"no failed operation on {name} left a log")
        _show_kept(name, kept, tail, as_json)
        return
    work = tools(settings)
    try:
        one = replicas.by_name(work.layout.replicas, name)
    except NotFoundError as error:
        if kept:
            error.remedy = f"gpuckpt logs --failed {name} shows the logs that failed operations left"
        raise
    text = work.containers.logs(one.container)
    if as_json:
        print_json({"replica": one.name, "lines": last(text, tail).splitlines()})
        return
    if not text:  # as after every restore: what came before was the frozen server's
        say(f"{one.name} has printed nothing yet")
    click.echo(last(text, tail), nl=False)
    if follow:
        _follow(work, one, text)


def kept_logs(folder: Path, name: str) -> list[Path]:
    """What failed operations on exactly ``name`` left, the newest last: TIME-NAME-KIND.log."""
    pattern = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(name)}-[a-z]+(-\d+)?\.log")
    try:
        found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: path.stat().st_mtime)


def last(text: str, count: int | None) -> str:
    """The last ``count`` lines of ``text``, or all."""
    lines = text.splitlines(keepends=True)
    return text if count is None else "".join(lines[max(0, len(lines) - count) :])


def _show_kept(name: str, kept: list[Path], tail: int | None, as_json: bool) -> None:
    texts = [(path, last(path.read_text(errors="replace"), tail)) for path in kept]
    if as_json:
        print_json({"name": name, "failed": [{"path": str(path), "lines": text.splitlines()} for path, text in texts]})
        return
    for path, text in texts:
        say(f"==> {path}")
        click.echo(text, nl=bool(text) and not text.endswith("\n"))


def _follow(work: Tools, one: Replica, shown: str) -> None:
    log = Growing(work, one, shown)
    while log.running:
        time.sleep(_PAUSE)
        click.echo(log.more(), nl=False)


class Growing:
    """The log of a replica, as it grows; ``running`` until the replica has ended. ``shown``: what is known of it."""

    def __init__(self, work: Tools, one: Replica, shown: str = "") -> None:
        self.running = True
        self._work, self._one, self._shown = work, one, shown

    def more(self) -> str:
        """What was printed since the last look."""
        from gpuckpt.golden import replica as replicas

        # Asked before the log is read, so that what the server printed before it ended is in the log read last.
        self.running = replicas.status(self._work, self._one) in ("running", "paused")
        try:
            text = self._work.containers.logs(self._one.container)
        except NotFoundError:  # stopped and removed meanwhile
            self.running = False
            return ""
        # A log that was rotated, or began anew with the container, is new as a whole.
        new = text[len(self._shown) :] if text.startswith(self._shown) else text
        self._shown = text
        return new
