"""``gpuckpt df``."""

from __future__ import annotations

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, print_table, say, size


@click.command()
@format_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool) -> None:
    """Show the space that goldens take, and what is left."""
    from gpuckpt.golden.catalogue import usage
    from gpuckpt.host.tmpfs import available_memory
    from gpuckpt.store.layout import Layout

    settings = settings_from(ctx)
    goldens, tmpfs = usage(Layout.of(settings))
    if as_json:
        store = {"path": str(settings.store.path), "mounted": tmpfs is not None}
        if tmpfs:
            store |= {"size": tmpfs.size, "used": tmpfs.used, "free": tmpfs.free, "huge": tmpfs.huge}
        print_json(
            {
                "store": store,
                "memory_available": available_memory(),
                "goldens": [
                    {"name": one.name, "allocated": one.allocated, "apparent": one.apparent} for one in goldens
                ],
            }
        )
        return
    if goldens:
        rows = [(one.name, size(one.allocated), size(one.apparent)) for one in goldens]
        print_table(["GOLDEN", "ALLOCATED", "CONTENT"], rows, right=["ALLOCATED", "CONTENT"])
        click.echo()
    if tmpfs is None:
        say(f"no store is mounted at {settings.store.path}; `gpuckpt create` mounts it")
        return
    click.echo(
        f"store {settings.store.path}: {size(tmpfs.used)} used of {size(tmpfs.size)} (huge pages: {tmpfs.huge}); "
        f"memory available: {size(available_memory())}"
    )
