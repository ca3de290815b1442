"""``gpuckpt completion``: the script that teaches a shell to complete our commands, options and goldens."""

from __future__ import annotations

import os
from pathlib import PurePath

import click

from gpuckpt.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
def command(shell: str | None) -> None:
    """Print the completion script for SHELL (default: the one $SHELL names).

    \b
    bash:  gpuckpt completion bash > /etc/bash_completion.d/gpuckpt
    zsh:   gpuckpt completion zsh > "${fpath[1]}/_gpuckpt"
    fish:  gpuckpt completion fish > ~/.config/fish/completions/gpuckpt.fish
    For this session only: eval "$(gpuckpt completion bash)"
    """
    from click.shell_completion import get_completion_class

    from gpuckpt.cli import cli

    name = shell or PurePath(os.environ.get("SHELL", "")).name
    found = get_completion_class(name) if name in SHELLS else None
    if found is None:
        what = f"no completion for the shell {name}" if name else "cannot tell which shell: $SHELL is not set"
        raise UsageError(what, remedy=f"name one: gpuckpt completion {'|'.join(SHELLS)}")
    # The names click itself listens to in cli.main(prog_name="gpuckpt"). Not its source(): for bash that starts a bash
    # to ask its version, and processes are started in gpuckpt.proc only.
    script = found(cli, {}, "gpuckpt", "_GPUCKPT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
