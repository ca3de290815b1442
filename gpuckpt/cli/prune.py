"""``gpuckpt prune``."""

from __future__ import annotations

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, dry_run: bool, as_json: bool) -> None:
    """Remove what killed commands, crashes and reboots left: half-made goldens, dead replicas, stray containers."""
    from gpuckpt.golden import catalogue
    from gpuckpt.golden.tools import tools

    settings = settings_from(ctx)
    done = catalogue.prune(settings, lambda: tools(settings), dry_run=dry_run)
    if as_json:
        print_json({"pruned": done, "dry_run": dry_run})
        return
    for line in done:
        click.echo(line)
