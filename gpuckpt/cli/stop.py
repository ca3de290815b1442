"""``gpuckpt stop``."""

from __future__ import annotations

import click

from gpuckpt.cli.complete import replica_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="REPLICA…", shell_complete=replica_names)
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], as_json: bool) -> None:
    """Stop replicas and remove everything that belongs to them; their goldens stay."""
    from gpuckpt.golden import replica
    from gpuckpt.golden.tools import tools

    work = tools(settings_from(ctx))
    for name in names:
        replica.by_name(work.layout.replicas, name)  # all must exist before the first is stopped
    for name in dict.fromkeys(names):
        replica.stop(work, name)
        if not as_json:
            click.echo(f"stopped {name}")
    if as_json:
        print_json({"stopped": list(dict.fromkeys(names))})
