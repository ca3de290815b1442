"""The command line: one file per noun, loaded only when its command is used, so that starting stays cheap."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from gpuckpt import __version__
from gpuckpt.errors import GpuckptError, InterruptedByUser

# command → (module, help shown in the list). The module's attribute ``command`` is the click command.
COMMANDS: dict[str, tuple[str, str]] = {
    "create": ("create", "Start a server, warm it up and freeze it into a golden."),
    "restore": ("restore", "Bring a replica back from a golden."),
    "stop": ("stop", "Stop and remove a running replica."),
    "ls": ("ls", "List goldens and their replicas."),
    "inspect": ("inspect", "Show what a golden holds, without restoring it."),
    "verify": ("verify", "Read a golden back and compare it with its digests."),
    "rm": ("rm", "Remove goldens."),
    "prune": ("prune", "Sweep half-made goldens, dead replicas and stale mounts."),
    "df": ("df", "Show the space that goldens take."),
    "logs": ("logs", "Show the logs of a replica or of a golden's making."),
    "export": ("export", "Write a golden to an archive file."),
    "import": ("import_", "Read a golden from an archive file."),
    "doctor": ("doctor", "Check this machine and say what to mend, and how."),
    "config": ("config", "Show the configuration and where each value comes from."),
    "completion": ("completion", "Print the shell completion script."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"gpuckpt.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if close:
                raise click.UsageError(f"{error.message} Did you mean “{close[0]}”?", ctx) from error
            raise

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # click's own would import every command's module to ask for its help.
        names = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="gpuckpt")
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    envvar="GPUCKPT_CONFIG",
    help="TOML file to read instead of /etc/gpuckpt/gpuckpt.toml.",
)
@click.option(
    "--env-file",
    type=click.Path(dir_okay=False),
    help="File to read MODEL_ID, CONT_NAME, API_PORT and CHECKPOINT_DIR from instead of ./.env.",
)
@click.pass_context
def cli(ctx: click.Context, config_file: str | None, env_file: str | None) -> None:
    """Freeze a warmed-up model server into a golden and restore it in a fraction of a second."""
    ctx.obj = {"config_file": config_file, "env_file": env_file}


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # One exception for Ctrl-C, SIGTERM and a terminal that went away: every `with` on the way out puts back what it
    # took. A second signal during the roll-back must not cut it short.
    for one in _INTERRUPTS:
        signal.signal(one, signal.SIG_IGN)
    raise InterruptedByUser("interrupted", remedy="nothing was left behind; run the command again when you like")


def main(argv: list[str] | None = None) -> Any:
    """Entry point of the ``gpuckpt`` program; exits with the codes documented in ``gpuckpt.errors``."""
    for number in _INTERRUPTS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup(1) is meant
            signal.signal(number, _interrupt)
    _open_streams()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(args=arguments, prog_name="gpuckpt", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        if _wants_json(arguments):
            _report(_ours(error), arguments)
        else:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(InterruptedByUser.exit_code)
    except (GpuckptError, InterruptedByUser) as error:
        _report(error, arguments)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output (head, less) went away: end quietly, as other tools do.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        told = _told(error)
        _report(told, arguments)
        sys.exit(told.exit_code)


def _told(error: OSError) -> GpuckptError:
    """An error of the system that nothing else gave a meaning to: one line instead of a traceback."""
    from gpuckpt.errors import OutOfSpaceError, PreflightError

    if error.errno == errno.ENOSPC:
        return OutOfSpaceError(f"no space left for {error.filename or 'a file'}", remedy="gpuckpt df; df -h")
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return PreflightError("gpuckpt must run as root", cause=what, remedy="sudo gpuckpt …")
    return GpuckptError(what)


def _ours(error: click.ClickException) -> GpuckptError:
    from gpuckpt.errors import UsageError

    if not isinstance(error, click.UsageError):
        return GpuckptError(error.format_message())
    path = error.ctx.command_path if error.ctx else "gpuckpt"
    return UsageError(error.format_message(), remedy=f"{path} --help")


def _report(error: GpuckptError | InterruptedByUser, arguments: list[str]) -> None:
    from gpuckpt.cli.render import show_error

    show_error(error, as_json=_wants_json(arguments))


def _open_streams() -> None:
    """Fill closed standard streams: the next file opened, a lock or an image, would otherwise become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(handle, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


def _wants_json(arguments: list[str]) -> bool:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    pairs = zip(own, own[1:] + [""], strict=True)
    return any(word == "--format=json" or (word == "--format" and value == "json") for word, value in pairs)
