"""``gpuckpt rm``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import TIERS, WORDS, format_option, print_json

if TYPE_CHECKING:
    from gpuckpt.store.layout import Tier


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=golden_names, metavar="NAME…")
@click.option("--force", is_flag=True, help="Stop running replicas too.")
@click.option("--tier", type=click.Choice(TIERS), help="Remove them from there only; default: wherever they are.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], force: bool, tier: Tier | None, as_json: bool) -> None:
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
        catalogue.remove(work, name, force=force, tier=tier)
        if not as_json:
            click.echo(f"removed {name}" + (f" from {WORDS[tier]}" if tier else ""))
    if as_json:
        print_json({"removed": list(names), "tier": tier})
