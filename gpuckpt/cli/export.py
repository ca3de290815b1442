"""``gpuckpt export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, size
from gpuckpt.errors import UsageError


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
    if str(file) == "-":
        raise UsageError(
            "an archive is not written to standard output",
            cause="it takes its name in one step, once it is whole",
            remedy=f"give a file, for example gpuckpt export {name} {name}.tar",
        )
    for store in (layout.store, layout.disk):
        if file.resolve().is_relative_to(store.resolve()):
            raise UsageError(
                f"{file} lies in the store itself",
                cause=f"{store} holds goldens and nothing else",
                remedy="give a file somewhere else, on a disk",
            )
    layout.prepare()
    with progress(quiet=as_json or not sys.stderr.isatty()) as report:
        report.stage(f"export {name}")
        archive = export_golden(settings, name, file, zstd=zstd, progress=report.bytes)
    if as_json:
        print_json({"name": name, "file": str(file), "bytes": archive.size, "blake3": archive.digest})
        return
    click.echo(f"{file}: {size(archive.size)}, blake3 {archive.digest}")
    click.echo(f"elsewhere: gpuckpt import {file.name} --trust --digest {archive.digest}")
