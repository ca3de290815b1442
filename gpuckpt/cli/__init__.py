"""The command line: one file per noun, loaded only when its command is used, so that starting stays cheap."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from gpuckpt import __version__
from gpuckpt.errors import GpuckptError, InterruptedByUser

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# command → (module, help shown in the list). The module's attribute ``command`` is the click command.
COMMANDS: dict[str, tuple[str, str]] = {
    "create": ("create", "Start a server, warm it up and freeze it into a golden."),
    "restore": ("restore", "Bring a replica back from a golden."),
    "suspend": ("suspend", "Make a standby of a running replica: frozen, without GPU memory."),
    "wake": ("wake", "Let a standby answer again."),
    "stop": ("stop", "Stop and remove a running replica."),
    "ls": ("ls", "List goldens and their replicas."),
    "inspect": ("inspect", "Show what a golden holds, without restoring it."),
    "verify": ("verify", "Read a golden back and compare it with its digests."),
    "move": ("move", "Move or copy goldens between memory and disk."),
    "rm": ("rm", "Remove goldens."),
    "prune": ("prune", "Sweep half-made goldens, dead replicas and stale mounts."),
    "df": ("df", "Show the space that goldens take."),
    "session": ("session", "Stop generations between two layers, look at them, steer and move them."),
    "pool": ("pool", "The warm pool: replicas kept ready behind one address."),
    "logs": ("logs", "Show the logs of a replica or of a golden's making."),
    "export": ("export", "Write a golden to an archive file."),
    "import": ("import_", "Read a golden from an archive file."),
    "doctor": ("doctor", "Check this machine and say what to mend, and how."),
    "config": ("config", "Show the configuration and where each value comes from."),
    "completion": ("completion", "Print the shell completion script."),
}


class _ReaderGone(Exception):
    """EPIPE, under a name that click does not know: it would end the program with 1, and main() promises 0."""


@contextlib.contextmanager
def _epipe_renamed() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGone from error


class _Commands(click.Group):
    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _epipe_renamed():  # --help and --version print here
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _epipe_renamed():
            return super().invoke(ctx)

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
        from click.shell_completion import CompletionItem

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
    sys.exit(_run(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> int:
    try:
        code = cli.main(args=arguments, prog_name="gpuckpt", standalone_mode=False)
        sys.stdout.flush()  # at the interpreter's end nobody could report that it failed
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        if _wants_json(arguments):
            _report(_ours(error), arguments)
        else:
            with contextlib.suppress(OSError):
                error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return InterruptedByUser.exit_code
    except (GpuckptError, InterruptedByUser) as error:
        _report(error, arguments)
        return error.exit_code
    except SystemExit as leave:
        # rich meets EPIPE by itself, and makes it an exit with 1.
        if not isinstance(leave.__context__, BrokenPipeError):
            raise
        _to_nowhere(sys.stdout)
        return 0
    except (_ReaderGone, BrokenPipeError):
        # The reader of our output (head, less) went away: end quietly, as other tools do.
        _to_nowhere(sys.stdout)
        return 0
    except OSError as error:
        told = _told(error)
        _report(told, arguments)
        return told.exit_code
    except Exception as error:
        told = _unexpected(error)
        _report(told, arguments)
        return told.exit_code


def _told(error: OSError) -> GpuckptError:
    """An error of the system that nothing else gave a meaning to: one line instead of a traceback."""
    from gpuckpt.errors import OutOfSpaceError, PreflightError

    if error.errno == errno.ENOSPC:
        if not isinstance(error.filename, str | bytes):
            return OutOfSpaceError("no space left for a file", remedy="df -h shows which file system is full")
        import shlex

        path = os.fsdecode(error.filename)
        mount = _mount_of(path)
        return OutOfSpaceError(
            f"no space left for {path}",
            cause=f"the file system mounted on {mount} is full",
            remedy=f"make room there (df -h {shlex.quote(mount)}); if it is the store: gpuckpt df",
        )
    what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return PreflightError("gpuckpt must run as root", cause=what, remedy="sudo gpuckpt …")
    # Root is refused, and folders cannot be made, where the kernel keeps files of its own (/proc, /sys), too.
    remedy = "correct that path; gpuckpt config show --origin tells where a configured one comes from"
    return GpuckptError(what, remedy=remedy if error.filename else None)


def _mount_of(path: str) -> str:
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _unexpected(error: Exception) -> GpuckptError:
    """An error of this program's own: one line, with the traceback in a file of the caller's alone."""
    import tempfile
    import traceback

    lines = traceback.format_exception(error)
    kept: str | None = None
    with contextlib.suppress(OSError):
        handle, kept = tempfile.mkstemp(prefix="gpuckpt-", suffix=".txt")  # mode 0600
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    text = " ".join(str(error).split())
    return GpuckptError(
        "unexpected error, please report it",
        cause=f"{type(error).__name__}: {text}" if text else type(error).__name__,
        log_path=kept,
    )


def _ours(error: click.ClickException) -> GpuckptError:
    from gpuckpt.errors import UsageError

    if not isinstance(error, click.UsageError):
        return GpuckptError(error.format_message())
    path = error.ctx.command_path if error.ctx else "gpuckpt"
    return UsageError(error.format_message(), remedy=f"{path} --help")


def _report(error: GpuckptError | InterruptedByUser, arguments: list[str]) -> None:
    from gpuckpt.cli.render import show_error

    # A report that cannot be written (its reader is gone, the disk is full) does not change how the command ended.
    try:
        show_error(error, as_json=_wants_json(arguments))
        sys.stdout.flush()
    except OSError:
        _to_nowhere(sys.stdout)


class _Lossy(io.TextIOWrapper):
    """A standard error that loses what it cannot write: no command fails, or stops halfway, for want of a listener."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            _to_nowhere(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            _to_nowhere(self)


def _to_nowhere(stream: Any) -> None:
    """Let a stream's file be /dev/null: what is left in its buffer would fail again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, number)
        os.close(null)


def _open_streams() -> None:
    """Fill closed standard streams: the next file opened, a lock or an image, would otherwise become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(handle, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    if type(sys.stderr) is io.TextIOWrapper and sys.stderr.fileno() == 2:
        raw = io.BufferedWriter(io.FileIO(2, "w", closefd=False))
        sys.stderr = _Lossy(raw, encoding=sys.stderr.encoding, errors="replace", line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and logs may hold what the terminal's encoding does not
            stream.reconfigure(errors="replace")


def _wants_json(arguments: list[str]) -> bool:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    pairs = itertools.pairwise([*own, ""])
    return any(word == "--format=json" or (word == "--format" and value == "json") for word, value in pairs)
