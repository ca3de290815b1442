"""How results reach people and programs: tables for the first, versioned JSON for the second.

Data goes to stdout, everything said to a human besides it to stderr. ``NO_COLOR`` and a pipe switch colours off.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import click

from gpuckpt.errors import GpuckptError, InterruptedByUser

JSON_VERSION = 1
TIERS = ("tmpfs", "disk")  # of gpuckpt.store.layout, whose import would cost more than most commands take
WORDS = {"tmpfs": "the tmpfs", "disk": "disk"}
_F = TypeVar("_F", bound=Callable[..., Any])
# What would move the cursor, change the terminal or turn the line around; tabs and ends of lines stay.
CONTROLS = dict.fromkeys(
    (*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "�"
)


def format_option(function: _F) -> _F:
    """Add ``--format table|json``; the command receives it as ``as_json: bool``."""

    @click.option(
        "--format",
        "output_format",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="What to print on stdout.",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, output_format: str, **kwargs: Any) -> Any:
        return function(*args, as_json=output_format == "json", **kwargs)

    return wrapper  # type: ignore[return-value]


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON document; every document of ours carries the contract's ``version``."""
    click.echo(json.dumps({"version": JSON_VERSION, **value}, indent=2, default=str))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = (), bold_last: bool = False
) -> None:
    """Print a plain table on stdout; columns named in ``right`` are right-aligned, ``bold_last`` is for a sum.

    Cells are text, never markup: what stands in them comes from archives and servers, too.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell.translate(CONTROLS)) for cell in row))
    if bold_last and table.rows:
        table.rows[-1].style = "bold"
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else 200).print(table)


def say(message: str) -> None:
    """Tell a human something on stderr."""
    click.echo(message, err=True, color=color())


def color() -> bool | None:
    """What click.echo is told about colours: none if NO_COLOR (no-color.org) is set, else by what it writes to."""
    return False if os.environ.get("NO_COLOR") else None


def show_error(error: GpuckptError | InterruptedByUser, *, as_json: bool) -> None:
    """Report a failure: one line of what, then why, what to do, and the log lines that show it."""
    if as_json:
        print_json({"error": error.as_dict()})
        return
    say(click.style("error: ", fg="red", bold=True) + error.message.translate(CONTROLS))
    if error.cause:
        say(f"  why:    {error.cause.translate(CONTROLS)}")
    if error.remedy:
        say(f"  remedy: {error.remedy.translate(CONTROLS)}")
    for line in error.log:
        say(f"  │ {line.translate(CONTROLS)}")
    if error.log_path:
        say(f"  whole log: {error.log_path}")


def size(count: int | float) -> str:
    """Bytes for a human, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def one_line(text: str) -> str:
    """Text of a stranger's as a part of a line: nothing in it commands a terminal or ends the line."""
    return text.translate(CONTROLS | {9: " ", 10: "�"})


def many(count: int, thing: str) -> str:
    """So many things: ``1 model``, ``2 models``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def seconds(value: float) -> str:
    return f"{value:.3f} s" if abs(value) >= 0.1 else f"{value * 1000:.1f} ms"
