"""``gpuckpt suspend``."""

from __future__ import annotations

import click

from gpuckpt.cli.complete import replica_names
from gpuckpt.cli.render import format_option
from gpuckpt.cli.standby import run


@click.command()
@click.argument("name", metavar="REPLICA", shell_complete=replica_names)
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str, as_json: bool) -> None:
    """Make a standby of a running replica: frozen, without GPU memory, and back in a moment.

    A server on a GPU finishes its requests first; its device memory goes to host memory, and its weights, where they
    lie outside its image, are given up: they are read again. Requests that come meanwhile wait for `gpuckpt wake`.
    """
    from gpuckpt.golden.standby import suspend

    run(ctx, name, state="standby", as_json=as_json, change=suspend)
