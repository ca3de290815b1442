"""``gpuckpt pool logs``: what the servers of a model's replicas print."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from gpuckpt.cli.complete import pool_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.logs import Growing, last
from gpuckpt.cli.pool_client import on_pool
from gpuckpt.cli.render import format_option, print_json
from gpuckpt.errors import (
    DaemonUnreachableError,
    GpuckptError,
    InterruptedByUser,
    NotFoundError,
    NothingToDo,
    UsageError,
)

if TYPE_CHECKING:
    from gpuckpt.golden.replica import Replica
    from gpuckpt.golden.tools import Tools
    from gpuckpt.service.client import Client
    from gpuckpt.service.view import ModelView

_PAUSE = 0.5  # seconds between two looks


@click.command()
@on_pool
@click.argument("name", metavar="MODEL|REPLICA", shell_complete=pool_names)
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines (of each log).")
@click.option("--follow", "-f", is_flag=True, help="Go on: of a model, with the replicas that come, too.")
@format_option
@click.pass_context
def logs(ctx: click.Context, client: Client, /, name: str, tail: int | None, follow: bool, as_json: bool) -> None:
    """Show what a model's replicas print.

    Of a model each line stands behind its replica's name.
    """
    from gpuckpt.golden.tools import tools

    if follow and as_json:
        raise UsageError("--follow and --format json exclude each other")
    settings = settings_from(ctx)
    unreachable: DaemonUnreachableError | None = None
    try:
        model, names = _meant(client, name)
    except DaemonUnreachableError as error:  # replicas outlive it
        model, names, unreachable = None, [name], error
    work = tools(settings)
    if unreachable is not None and _known(work, name) is None:
        raise unreachable
    if model is None:
        _known(work, name, must_exist=True)
    if follow:
        with suppress(InterruptedByUser):  # how one leaves it
            _follow(work, client, model, names, tail)
        return
    found = [(one, last(work.containers.logs(one.container), tail)) for one in _recorded(work, names)]
    if not found and model is not None:
        raise NothingToDo(
            f"no replica of {model.name} runs",
            cause=f"its last start failed: {model.trouble}" if model.trouble else None,
            remedy=f"gpuckpt pool wake {model.name}; gpuckpt logs --failed {model.golden.name} shows what starts left",
        )
    if as_json:
        print_json({"logs": [{"replica": one.name, "lines": text.splitlines()} for one, text in found]})
        return
    for one, text in found:
        _print(one.name if model else "", text)


def _meant(client: Client, name: str) -> tuple[ModelView | None, list[str]]:
    """The model of that name or alias and its replicas; or only the replica of that name."""
    models = client.state().models
    for one in models:
        if name in (one.name, *one.aliases):
            # While its golden is made, the server that is started for that is called after it.
            starting = [one.golden.name] if any(each.phase == "starting" for each in one.replicas) else []
            return one, [*(each.name for each in one.replicas), *starting]
    if not any(name == each.name for one in models for each in one.replicas):
        client.check_names((name,))
    return None, [name]


def _recorded(work: Tools, names: Sequence[str]) -> list[Replica]:
    return [found for name in names if (found := _known(work, name))]


def _known(work: Tools, name: str, *, must_exist: bool = False) -> Replica | None:
    """The replica ``name``; None if it has no record: its making has only begun, or it is gone."""
    from gpuckpt.golden import replica as replicas

    try:
        return replicas.by_name(work.layout.replicas, name)
    except (NotFoundError, UsageError):
        if must_exist:
            raise
        return None


def _follow(work: Tools, client: Client, model: ModelView | None, names: list[str], tail: int | None) -> None:
    """Print what comes until the one replica has ended, or for a model without end."""
    logs: dict[str, _Lines] = {}
    while True:
        made = {one.name: one for one in _recorded(work, names)}
        # One that ended stays, so that it is not new; what is gone may come again by the same name.
        logs = {name: log for name, log in logs.items() if name in made}
        for name, one in made.items():
            if name not in logs:
                logs[name] = _Lines(Growing(work, one), name if model else "", tail)
            logs[name].show()
        sys.stdout.flush()
        if model is None and not any(log.goes_on for log in logs.values()):
            return
        tail = None  # of those that come later, everything
        time.sleep(_PAUSE)
        if model is not None:
            with suppress(GpuckptError):  # it may be starting again; its replicas run on
                names = [each.name for one in client.state().models if one.name == model.name for each in one.replicas]


class _Lines:
    """A log that is printed in whole lines, so that those of several do not run into each other."""

    def __init__(self, log: Growing, name: str, tail: int | None) -> None:
        self._log, self._name, self._tail = log, name, tail
        self._rest = ""

    @property
    def goes_on(self) -> bool:
        return self._log.running

    def show(self) -> None:
        text = last(self._rest + self._log.more(), self._tail)
        self._tail = None
        whole, newline, self._rest = text.rpartition("\n")
        if not self._log.running:
            whole, newline, self._rest = text, "", ""
        _print(self._name, whole + newline)


def _print(name: str, text: str) -> None:
    if not name:
        click.echo(text, nl=False)
        return
    for line in text.splitlines():
        click.echo(click.style(f"{name} │ ", dim=True) + line)
