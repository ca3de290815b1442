"""``gpuckpt doctor``: check this machine and say what to mend, and how."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence

import click

from gpuckpt.checks import Check
from gpuckpt.cli import render
from gpuckpt.cli.context import settings_from
from gpuckpt.errors import GpuckptError, PreflightError

# Words, not symbols: they survive any terminal, can be searched for, and mean the same without colour.
_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "red"), "skip": ("skip", "bright_black")}
_MARK_WIDTH = 6
_NARROW = 60


@click.command("doctor")
@click.option("--fix", is_flag=True, help="Apply the remedies that change nothing you may have set on purpose.")
@render.format_option
@click.pass_context
def command(ctx: click.Context, fix: bool, as_json: bool) -> None:
    """Check this machine and say what to mend, and how.

    Exits with 0 if nothing stops create and restore, with 4 if something does.
    """
    from gpuckpt.golden import doctor

    settings = settings_from(ctx)
    if fix and os.geteuid() != 0:
        raise PreflightError("only root can mend what is wrong", remedy="sudo gpuckpt doctor --fix")
    checks = doctor.diagnose(settings)
    fixed: list[str] = []
    if fix:
        tried = _apply(checks)
        checks = doctor.diagnose(settings) if tried else checks
        now = {check.id: check.verdict for check in checks}
        fixed = [id for id in tried if now.get(id) == "ok"]
    failed = any(check.verdict == "fail" for check in checks)
    if as_json:
        document = {"ok": not failed, "checks": [check.as_dict() for check in checks]}
        render.print_json({**document, "fixed": fixed} if fix else document)
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        for line in table(checks, width):
            click.echo(line, color=render.color())
        render.say(_summary(checks, fixed, fix))
    if failed:
        ctx.exit(PreflightError.exit_code)


def table(checks: Sequence[Check], width: int) -> Iterator[str]:
    """The lines of the table for a terminal of ``width`` columns, with colours.

    What was found and why are wrapped; the command that mends is never broken, so that it can be copied.
    """
    titles = max((len(check.title) for check in checks), default=0)
    narrow = width < _NARROW
    indent = " " * (_MARK_WIDTH if narrow else _MARK_WIDTH + titles + 2)
    for check in checks:
        mark, color = _MARKS[check.verdict]
        head = click.style(f"{mark:<{_MARK_WIDTH}}", fg=color, bold=check.verdict == "fail")
        found = _wrapped(check.found, width, indent)
        if narrow:
            yield head + click.style(check.title, bold=True)
            yield from found
        else:
            yield head + f"{check.title:<{titles}}  " + found[0][len(indent) :]
            yield from found[1:]
        if check.verdict in ("warn", "fail"):
            label = " " * _MARK_WIDTH
            yield from _wrapped(f"why:  {check.why}", width, label, hanging=6)
            if check.mend:
                yield label + "mend: " + click.style(check.mend, bold=True)


def _wrapped(text: str, width: int, indent: str, hanging: int = 0) -> list[str]:
    room = max(width, len(indent) + hanging + 20)
    lines = textwrap.wrap(
        text, room, initial_indent=indent, subsequent_indent=indent + " " * hanging, break_on_hyphens=False
    )
    return lines or [indent]


def _summary(checks: Sequence[Check], fixed: Sequence[str], fix: bool) -> str:
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in _MARKS}
    text = ", ".join(f"{count[verdict]} {verdict}" for verdict in ("ok", "warn", "fail", "skip") if count[verdict])
    if fixed:
        text += f"; mended: {', '.join(fixed)}"
    able = [check for check in checks if check.verdict in ("warn", "fail") and check.apply]
    if able and not fix and os.geteuid() == 0:
        text += f"; `gpuckpt doctor --fix` mends {', '.join(check.title for check in able)}"
    if count["fail"]:
        return f"not ready: {text}"
    return f"ready: {text}"


def _apply(checks: Sequence[Check]) -> list[str]:
    """Run the safe remedies of what is not ok; the ids of those that ran without an error."""
    done = []
    for check in checks:
        if check.verdict in ("warn", "fail") and check.apply is not None:
            render.say(f"mending {check.title}: {check.mend or check.found}")
            try:
                check.apply()
            except GpuckptError as error:
                render.show_error(error, as_json=False)
            except OSError as error:
                render.say(f"  failed: {error}")
            else:
                done.append(check.id)
    return done
