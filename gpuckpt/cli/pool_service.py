"""``gpuckpt pool run``, ``install`` and ``uninstall``: the daemon itself, and its place in systemd."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, say

if TYPE_CHECKING:
    from gpuckpt.service.install import Outcome

_file = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    default="/etc/gpuckpt/pool.toml",
    show_default=True,
    help="The pool's configuration.",
)
_root = click.option(
    "--root", type=click.Path(path_type=Path), default="/", help="Another system's root folder, such as an image's."
)


@click.command()
@_file
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="GPUCKPT_POOL_SOCKET",
    help="Where it listens for the other commands, if not on /run/gpuckpt/pool.sock.  [env: GPUCKPT_POOL_SOCKET]",
)
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@click.pass_context
def run(ctx: click.Context, /, file: Path, socket: Path | None, verbose: bool) -> None:
    """Run the service in the foreground, until SIGTERM or Ctrl-C.

    systemd runs it so; see `gpuckpt pool install`.
    """
    import logging

    from gpuckpt.service.client import DEFAULT_SOCKET
    from gpuckpt.service.daemon import run as run_daemon

    run_daemon(
        settings_from(ctx),
        file.absolute(),
        admin=(socket or DEFAULT_SOCKET).absolute(),
        level=logging.DEBUG if verbose else logging.INFO,
    )


@click.command()
@_file
@click.option("--enable", is_flag=True, help="Start it at every boot, or at the first request after one.")
@click.option("--now", is_flag=True, help="Start it now; if it runs and its units have changed, restart it.")
@click.option("--force", is_flag=True, help="Overwrite units that were edited; a copy is kept.")
@_root
@format_option
@click.pass_context
def install(ctx: click.Context, /, file: Path, enable: bool, now: bool, force: bool, root: Path, as_json: bool) -> None:
    """Write the service's systemd units, and a first configuration if there is none."""
    from gpuckpt.service.install import install as write

    given = {name: value for name, value in os.environ.items() if name.startswith("GPUCKPT_") and "__" in name}
    if prefix := os.environ.get("GPUCKPT_PREFIX"):
        given["GPUCKPT_PREFIX"] = prefix
    outcome = write(
        settings_from(ctx), root=root, config=file.absolute(), environment=given, enable=enable, now=now, force=force
    )
    _show(outcome, as_json=as_json)


@click.command()
@click.option("--force", is_flag=True, help="Remove units that were edited, too.")
@_root
@format_option
@click.pass_context
def uninstall(ctx: click.Context, /, force: bool, root: Path, as_json: bool) -> None:
    """Stop the service and remove its systemd units; configuration and goldens stay."""
    from gpuckpt.service.install import uninstall as remove

    _show(remove(settings_from(ctx), root=root, force=force), as_json=as_json)


def _show(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(outcome, enc_hook=str))
        return
    for change in outcome.changes:
        click.echo(f"{change.what:9}  {change.path}" + (f" (the former one: {change.saved})" if change.saved else ""))
    for line in outcome.commands:
        click.echo(f"ran        {line}")
    for note in outcome.notes:
        say(note)
