"""``gpuckpt config``: what is set, and by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gpuckpt.cli.context import load_settings
from gpuckpt.cli.render import format_option, print_json, print_table, say, size


@click.group()
def command() -> None:
    """Show the configuration and where each value comes from.

    Weakest first: defaults, /etc/gpuckpt/gpuckpt.toml, ./.env (MODEL_ID, CONT_NAME, API_PORT, CHECKPOINT_DIR),
    environment variables such as GPUCKPT_STORE__PATH, flags.
    """


@command.command()
@click.option("--origin", is_flag=True, help="Also show where each value comes from (JSON always does).")
@format_option
@click.pass_context
def show(ctx: click.Context, origin: bool, as_json: bool) -> None:
    """Show every setting as the other commands would see it."""
    loaded = load_settings(ctx)
    if as_json:
        import msgspec

        print_json({"settings": msgspec.to_builtins(loaded.settings, enc_hook=str), "origins": loaded.origins})
        return
    rows = []
    for key, source in loaded.origins.items():
        table, _, name = key.partition(".")
        row = [key, _shown(getattr(getattr(loaded.settings, table), name))]
        rows.append([*row, source] if origin else row)
    print_table(["SETTING", "VALUE", "ORIGIN"] if origin else ["SETTING", "VALUE"], rows)


@command.command()
@click.pass_context
def path(ctx: click.Context) -> None:
    """Print which TOML file is read (and say on stderr if it is not there)."""
    from gpuckpt.config_load import DEFAULT_FILE

    file = Path(ctx.obj["config_file"] or DEFAULT_FILE).absolute()
    click.echo(str(file))
    if not file.exists():
        say("this file does not exist: " + ("commands will fail" if ctx.obj["config_file"] else "the defaults hold"))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return ", ".join(f'"{item}"' for item in value)
    if isinstance(value, float):
        return f"{value:g} s"  # every float among the settings is a duration
    if isinstance(value, int) and value >= 1 << 20:
        return f"{value} ({size(value)})"  # and nothing but a size is that large
    return str(value)
