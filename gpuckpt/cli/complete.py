"""What a shell is told when it completes an argument: cheap to find out, and silent when it cannot be."""

from __future__ import annotations

import os

import click


def golden_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the goldens in the store that begin with ``incomplete``; for click's ``shell_complete=``.

    Lists folders and opens none of them. Never raises: whatever is wrong, the command itself will say it better than
    a trace in the middle of the line being typed.
    """
    try:
        from gpuckpt.cli.context import settings_from

        with os.scandir(settings_from(ctx).store.path / "goldens") as entries:
            # What begins with a dot is being made or removed.
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith(incomplete)
                and not entry.name.startswith(".")
                and entry.is_dir(follow_symlinks=False)
            )
    except Exception:
        return []
