"""``gpuckpt verify``."""

from __future__ import annotations

import sys
import time

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, size


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=golden_names, metavar="NAME…")
@format_option
@click.pass_context
def command(ctx: click.Context, /, names: tuple[str, ...], as_json: bool) -> None:
    """Read goldens back, in every tier: compare every byte with its digest and decode CRIU's images."""
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.verify import verify
    from gpuckpt.store import locks
    from gpuckpt.store.layout import Layout

    layout = Layout.of(settings_from(ctx))
    verified = []
    for name in names:
        layout.golden(name)
        layout.prepare()
        with (
            progress(quiet=as_json or not sys.stderr.isatty()) as report,
            locks.shared(layout.golden_locks, "golden", name),
        ):
            for tier, folder in layout.tiers(name).items():
                began = time.monotonic()
                report.stage(f"verify {name} ({tier})")
                manifest = verify(folder, lambda done, report=report: report.bytes(done, 0))  # type: ignore[misc]
                total = sum(record.size for record in manifest.files.values())
                took = time.monotonic() - began
                facts = {"name": name, "tier": tier, "ok": True, "files": len(manifest.files)}
                verified.append({**facts, "bytes": total, "seconds": took})
                if not as_json:
                    rate = size(total / max(took, 1e-6))
                    click.echo(f"{name} ({tier}): whole ({len(manifest.files)} files, {size(total)} read at {rate}/s)")
    if as_json:
        print_json({"verified": verified})
