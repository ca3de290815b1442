"""What ``gpuckpt suspend`` and ``gpuckpt wake`` have in common."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import print_json, print_table, seconds, size

if TYPE_CHECKING:
    from gpuckpt.golden.standby import Changed
    from gpuckpt.golden.tools import Tools
    from gpuckpt.manifest import Manifest
    from gpuckpt.timing import PhaseTable

Change = Callable[["Tools", str, "Manifest | None", "PhaseTable"], "Changed"]


def run(ctx: click.Context, name: str, *, state: str, as_json: bool, change: Change) -> None:
    """Have ``change`` done to the replica ``name``, which becomes ``state``, and tell of it."""
    from gpuckpt import manifest as manifests
    from gpuckpt.cli.progress import progress
    from gpuckpt.errors import NotFoundError
    from gpuckpt.golden import replica as replicas
    from gpuckpt.golden.tools import tools
    from gpuckpt.timing import PhaseTable, now_ns, process_started_ns

    phases = PhaseTable(started_ns=process_started_ns())
    settings = settings_from(ctx)
    phases.add("start-up", phases.started_ns, now_ns())
    with progress(quiet=as_json and not sys.stderr.isatty()) as report:
        with phases.phase("podman service"):
            work = tools(settings, report=report)
        golden = None
        replica = replicas.by_name(work.layout.replicas, name)
        with contextlib.suppress(NotFoundError):
            golden = manifests.read(work.layout.golden(replica.golden))
        changed = change(work, name, golden, phases)
    endpoint = changed.replica.endpoint
    if as_json:
        print_json(
            {
                "replica": name,
                "golden": changed.replica.golden,
                "state": state,
                "socket": str(endpoint.socket) if endpoint.socket else None,
                "url": None if endpoint.socket else str(endpoint),
                "gpu_bytes": changed.gpu_bytes,
                "seconds": changed.phases.wall_seconds,
                "phases": changed.phases.as_list(),
            }
        )
        return
    rows = [(row.name, seconds(row.seconds)) for row in changed.phases.rows()]
    rows.append(("wall time", seconds(changed.phases.wall_seconds)))
    print_table(["PHASE", "TIME"], rows, right=["TIME"], bold_last=True)
    memory = f", {size(changed.gpu_bytes)} of GPU memory" if changed.gpu_bytes else ""
    if state == "standby":
        click.echo(f"\n{name} is a standby{memory and memory + ' given back'}")
        click.echo(f"wake it: gpuckpt wake {name}")
    else:
        click.echo(f"\n{name} answers again on {endpoint}{memory and memory + ' taken'}")
