"""What every command needs first: the settings, out of the files the user chose and the flags they gave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.config_load import Loaded


def load_settings(ctx: click.Context, **flags: Any) -> Loaded:
    """Load the settings and their origins, reading the files named by ``--config`` and ``--env-file``.

    A setting's flag is passed by its dotted key with ``__`` for the dot: ``load_settings(ctx, store__path=path)``.
    None means not given, and so does the default of the option it came from: otherwise it would hide the files.
    Raises what :func:`gpuckpt.config_load.load` raises.
    """
    # Here: a shell that completes a command's name, and --help, need no settings.
    from gpuckpt.config_load import load

    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for word, value in flags.items():
        key = word.replace("__", ".")
        parameter = _parameter(ctx, key, value)
        if parameter is not None and parameter.name is not None:
            if ctx.get_parameter_source(parameter.name) in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP):
                continue
            names[key] = max(parameter.opts, key=len)
        values[key] = value
    config_file, env_file = _files(ctx)
    return load(config_file, environ=os.environ, env_file=env_file, flags=values, flag_names=names)


def settings_from(ctx: click.Context, **flags: Any) -> Settings:
    """Like :func:`load_settings`, for commands that do not ask where the values came from."""
    return load_settings(ctx, **flags).settings


def _files(ctx: click.Context) -> tuple[Path | None, Path | None]:
    # While a shell asks for completions, click parses the options but does not call the group that fills ctx.obj.
    given = ctx.obj if isinstance(ctx.obj, dict) else ctx.find_root().params
    config_file, env_file = given.get("config_file"), given.get("env_file")
    return Path(config_file) if config_file else None, Path(env_file) if env_file else None


def _parameter(ctx: click.Context, key: str, value: object) -> click.Parameter | None:
    """The option or argument a value came from, so that errors and origins call it what the user called it."""
    names = (key.replace(".", "_"), *reversed(key.split(".")))
    for parameter in ctx.command.params:
        if parameter.name in names and ctx.params.get(parameter.name) is value:
            return parameter
    return None
