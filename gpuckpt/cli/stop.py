"""``gpuckpt stop``."""

from __future__ import annotations

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="REPLICA…")
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], as_json: bool) -> None:
    """Stop replicas and remove everything that belongs to them; their goldens stay."""
    from gpuckpt.golden import replica
    from gpuckpt.golden.tools import tools

    work = tools(settings_from(ctx))
    found = [replica.by_name(work, name) for name in names]
    for entry in found:
        replica.stop(work, entry)
        if not as_json:
            click.echo(f"stopped {entry.name}")
    if as_json:
        print_json({"stopped": [entry.name for entry in found]})
