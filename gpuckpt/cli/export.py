"""``gpuckpt export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, size


@click.command()
@click.argument("name", shell_complete=golden_names)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--zstd", is_flag=True, help="Compress the archive.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str, file: Path, zstd: bool, as_json: bool) -> None:
    """Write the golden NAME to the archive FILE and print the archive's digest."""
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.archive import export_golden
    from gpuckpt.store.layout import Layout

    settings = settings_from(ctx)
    layout = Layout.of(settings)
    layout.golden(name)
    layout.prepare()
    with progress(quiet=as_json or not sys.stderr.isatty()) as report:
        report.stage(f"export {name}")
        archive = export_golden(settings, name, file, zstd=zstd, progress=report.bytes)
    if as_json:
        print_json({"name": name, "file": str(file), "bytes": archive.size, "blake3": archive.digest})
        return
    click.echo(f"{file}: {size(archive.size)}, blake3 {archive.digest}")
    click.echo(f"elsewhere: gpuckpt import {file.name} --trust --digest {archive.digest}")
