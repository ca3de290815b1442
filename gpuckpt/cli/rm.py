"""``gpuckpt rm``."""

from __future__ import annotations

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=golden_names, metavar="NAME…")
@click.option("--force", is_flag=True, help="Stop running replicas too.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove goldens and their stopped replicas."""
    from gpuckpt.golden import catalogue
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import tools

    names = tuple(dict.fromkeys(names))
    settings = settings_from(ctx)
    sweep(settings, lambda: tools(settings))
    work = tools(settings)
    for name in names:
        work.layout.golden(name)  # all must exist before the first goes
    for name in names:
        catalogue.remove(work, name, force=force)
        if not as_json:
            click.echo(f"removed {name}")
    if as_json:
        print_json({"removed": list(names)})
