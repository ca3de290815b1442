"""``gpuckpt df``."""

from __future__ import annotations

from dataclasses import asdict

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
    layout = Layout.of(settings)
    goldens, tmpfs, disk = usage(layout)
    if as_json:
        store = {"path": str(settings.store.path), "mounted": tmpfs is not None}
        if tmpfs:
            store |= {"size": tmpfs.size, "used": tmpfs.used, "free": tmpfs.free, "huge": tmpfs.huge}
        print_json(
            {
                "store": store,
                "disk": {"path": str(layout.disk)} | (asdict(disk) if disk else {}),
                "memory_available": available_memory(),
                "goldens": [asdict(one) for one in goldens],
            }
        )
        return
    if goldens:
        rows = [(one.name, one.tier, size(one.allocated), size(one.apparent)) for one in goldens]
        print_table(["GOLDEN", "TIER", "ALLOCATED", "CONTENT"], rows, right=["ALLOCATED", "CONTENT"])
        click.echo()
    if disk and any(one.tier == "disk" for one in goldens):
        click.echo(f"disk {layout.disk}: {size(disk.free)} free of {size(disk.size)}")
    if tmpfs is None:
        say(f"no store is mounted at {settings.store.path}; `gpuckpt create` mounts it")
        return
    click.echo(
        f"store {settings.store.path}: {size(tmpfs.used)} used of {size(tmpfs.size)} (huge pages: {tmpfs.huge}); "
        f"memory available: {size(available_memory())}"
    )
