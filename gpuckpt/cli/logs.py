"""``gpuckpt logs``."""

from __future__ import annotations

import time

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import say
from gpuckpt.errors import NotFoundError


@click.command()
@click.argument("name")
@click.option("--tail", "-n", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@click.option("--follow", "-f", is_flag=True, help="Go on as long as the replica runs.")
@click.option("--failed", is_flag=True, help="The kept logs of failed operations instead (newest last).")
@click.pass_context
def command(ctx: click.Context, /, name: str, tail: int | None, follow: bool, failed: bool) -> None:
    """Show what the server of a replica prints, or what failed operations on NAME left."""
    from gpuckpt.golden import replica as replicas
    from gpuckpt.golden.tools import tools
    from gpuckpt.store.layout import Layout

    settings = settings_from(ctx)
    kept = sorted(Layout.of(settings).logs.glob(f"*-{name}-*.log"), key=lambda path: path.stat().st_mtime)
    if failed:
        if not kept:
            raise NotFoundError(f"no failed operation on {name} left a log")
        for path in kept:
            say(f"==> {path}")
            lines = path.read_text(errors="replace").splitlines()
            click.echo("\n".join(lines[-tail:] if tail else lines))
        return
    work = tools(settings)
    try:
        one = replicas.by_name(work, name)
    except NotFoundError as error:
        if kept:
            error.remedy = f"gpuckpt logs --failed {name} shows the logs that failed operations left"
        raise
    shown = work.containers.logs(one.container, tail=tail)
    click.echo(shown, nl=False)
    length = len(work.containers.logs(one.container)) if follow else 0
    while follow and replicas.status(work, one) in ("running", "paused"):
        time.sleep(0.5)
        text = work.containers.logs(one.container)
        click.echo(text[length:], nl=False)
        length = len(text)
