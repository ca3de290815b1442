"""What a shell is told when it completes an argument: cheap to find out, and silent when it cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.service.view import ModelView

_LONGEST_WAIT = 1.0  # seconds; nobody waits longer for a shell to complete a name


def golden_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the goldens in the store that begin with ``incomplete``; for click's ``shell_complete=``.

    Lists folders and opens none of them. Never raises: whatever is wrong, the command itself will say it better than
    a trace in the middle of the line being typed.
    """
    settings = _settings(ctx)
    if settings is None:
        return []
    disk = settings.store.disk or settings.paths.state / "goldens"
    places = (settings.store.path / "goldens", disk)
    return sorted({name for place in places for name in _folders(place, incomplete)})


def replica_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The same for replicas."""
    settings = _settings(ctx)
    return _folders(settings.paths.state / "replicas", incomplete) if settings else []


def pool_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The same for the models of the running pool."""
    return [one.name for one in _pool(ctx) if _can_complete(one.name, incomplete)]


def pool_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The same for the running pool's models and their replicas."""
    names = [name for one in _pool(ctx) for name in (one.name, *(each.name for each in one.replicas))]
    return [name for name in names if _can_complete(name, incomplete)]


def _pool(ctx: click.Context) -> list[ModelView]:
    try:
        from gpuckpt.cli.pool_client import client_for

        return client_for(ctx.params.get("socket"), timeout=_LONGEST_WAIT).state().models
    except Exception:
        return []


def _can_complete(name: str, incomplete: str) -> bool:
    return name.startswith(incomplete) and name.isprintable()


def _settings(ctx: click.Context) -> Settings | None:
    try:
        from gpuckpt.cli.context import settings_from

        return settings_from(ctx)
    except Exception:
        return None


def _folders(parent: Path, incomplete: str) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            # What begins with a dot is being made or removed.
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith(incomplete)
                and not entry.name.startswith(".")
                and entry.is_dir(follow_symlinks=False)
            )
    except OSError:
        return []
