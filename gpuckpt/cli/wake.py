"""``gpuckpt wake``."""

from __future__ import annotations

from functools import partial

import click

from gpuckpt.cli.complete import replica_names
from gpuckpt.cli.render import format_option
from gpuckpt.cli.standby import run
from gpuckpt.errors import UsageError


@click.command()
@click.argument("name", metavar="REPLICA", shell_complete=replica_names)
@click.option(
    "--gpu-wait", metavar="DURATION", default="0s", help="Longest wait for room on a GPU, as 30s.  [default: 0s]"
)
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str, gpu_wait: str, as_json: bool) -> None:
    """Let a standby answer again: thawed, its device memory where it was or on another GPU of that type."""
    from gpuckpt.golden.standby import wake

    run(ctx, name, state="running", as_json=as_json, change=partial(wake, timeout=waiting(gpu_wait)))


def waiting(text: str) -> float:
    """``--gpu-wait`` in seconds; raises UsageError."""
    from gpuckpt.config import parse_duration

    if text in ("0", "0s"):
        return 0.0
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"--gpu-wait: {error}", remedy="for example --gpu-wait 30s") from error
