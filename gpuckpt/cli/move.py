"""``gpuckpt move``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import TIERS, WORDS, format_option, print_json, size

if TYPE_CHECKING:
    from gpuckpt.golden.tiers import Placed
    from gpuckpt.store.layout import Tier


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=golden_names, metavar="NAME…")
@click.option("--to", type=click.Choice(TIERS), required=True, help="Where they shall be.")
@click.option("--keep", is_flag=True, help="Copy: they stay where they are, too.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], to: Tier, keep: bool, as_json: bool) -> None:
    """Move goldens to disk, where they take no memory and survive a reboot, or back into the tmpfs.

    \b
    gpuckpt move NAME --to disk --keep    save it: it stays in memory, and is there after a reboot
    gpuckpt move NAME --to disk           and free its memory
    gpuckpt move NAME --to tmpfs --keep   load it, for the fastest restores
    """
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden import tiers
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import open_store, tools

    names = tuple(dict.fromkeys(names))
    settings = settings_from(ctx)
    moved = []
    with progress(quiet=as_json or not sys.stderr.isatty()) as report:
        for line in sweep(settings, lambda: tools(settings)):
            report.note(line)
        work = tools(settings, report=report)
        for name in names:
            work.layout.golden(name)  # all must exist before the first goes
        if to == "tmpfs" and open_store(settings):
            report.note(f"mounted a tmpfs for goldens at {settings.store.path}")
        for name in names:
            report.stage(f"{name} to {to}")
            began = time.monotonic()
            placed = tiers.move(work, name, to, keep=keep)
            moved.append((name, placed, time.monotonic() - began))
    if as_json:
        print_json({"moved": [_document(name, to, keep, placed, took) for name, placed, took in moved]})
        return
    for name, placed, took in moved:
        click.echo(f"{name}: {_told(to, placed, took)}")


def _document(name: str, to: Tier, keep: bool, placed: Placed | None, took: float) -> dict[str, object]:
    return {
        "name": name,
        "to": to,
        "kept": keep,
        "bytes": placed.copied if placed else 0,
        "shared": placed.shared if placed else 0,
        "seconds": took,
    }


def _told(to: Tier, placed: Placed | None, took: float) -> str:
    if placed is None:
        return f"was in {WORDS[to]} already, and is there alone now" if to == "tmpfs" else "is on disk alone now"
    shared = f", {size(placed.shared)} shared with other goldens" if placed.shared else ""
    where = "in the tmpfs" if to == "tmpfs" else "on disk"
    return f"{where} ({size(placed.copied)} in {took:.1f} s, {size(placed.copied / max(took, 1e-6))}/s{shared})"
