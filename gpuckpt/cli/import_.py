"""``gpuckpt import``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, size


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Name of the golden here; default: the one it was exported under.")
@click.option("--trust", is_flag=True, help="The archive's processes may run as root on this machine.")
@click.option("--digest", metavar="HEX", help="Its blake3 digest, as `gpuckpt export` printed it; needed.")
@format_option
@click.pass_context
def command(
    ctx: click.Context, /, file: Path, name: str | None, trust: bool, digest: str | None, as_json: bool
) -> None:
    """Read the golden in the archive FILE into the store, after comparing every byte with its digest."""
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.archive import import_golden, require_trust
    from gpuckpt.golden.doctor import require
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import open_store, tools

    require_trust(file, trust=trust, digest=digest)
    settings = settings_from(ctx)
    require(settings, "restore")
    with progress(quiet=as_json or not sys.stderr.isatty()) as report:
        if open_store(settings):
            report.note(f"mounted a tmpfs for goldens at {settings.store.path}")
        sweep(settings, lambda: tools(settings))
        report.stage("import")
        archive = import_golden(settings, file, name=name, trust=trust, digest=digest, progress=report.bytes)
    if as_json:
        print_json({"name": archive.name, "file": str(file), "bytes": archive.size, "blake3": archive.digest})
        return
    click.echo(f"golden {archive.name}: imported from {file} ({size(archive.size)})")
    click.echo(f"restore it with: gpuckpt restore {archive.name}")
