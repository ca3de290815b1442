"""What ``gpuckpt pool`` shows: the whole service on a page, a line for each event."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gpuckpt.cli.render import one_line, print_table, seconds, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from gpuckpt.service.view import EventView, GpuView, ModelView, PoolView, ReplicaView, UseView

PHASES = ("hot", "waking", "restoring", "starting", "freezing", "standby", "draining", "stopping")
_STYLES = {"hot": "bold green", "standby": "cyan", "cold": "dim", "ready": "bold green"}
_BAR, _SHORT_BAR = 24, 8  # columns
_WIDE, _NARROW = 100, 70  # columns from which on sizes of goldens, or goldens at all, have room
_FULL, _HIGH = 1.0, 0.9  # of a budget
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def console() -> Console:
    """Standard output; what is no terminal has lines of any length."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def page(view: PoolView, width: int, *, events: int = 0, trouble: str = "") -> RenderableType:
    """The service, its budgets, its models; with ``events``, also first tokens and the last so many events.

    ``width``: columns that there are; ``trouble``: why this is not of now.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(view)]
    if trouble:
        parts.append(Text(one_line(trouble), style="bold red"))
    parts += ["", _budgets(view, _BAR if width >= _NARROW else _SHORT_BAR)]
    if view.models:
        parts += ["", _models(view, width)]
    parts += _troubles(view)
    if events:
        parts += _first_tokens(view)
        if view.events:
            parts += ["", *(Text(event_line(one), overflow="fold") for one in view.events[-events:])]
    return Group(*parts)


def _head(view: PoolView) -> Text:
    from rich.text import Text

    where = ", ".join(map(one_line, view.listen))
    rest = f" for {span(view.now - view.started)} · {where} · process {view.pid} · gpuckpt {one_line(view.version)}"
    return Text.assemble((one_line(view.state), _STYLES.get(view.state, "bold yellow")), rest)


def _budgets(view: PoolView, columns: int) -> Table:
    table = _table("", "", "")
    gpus = [(f"GPU {index}", gpu) for index, gpu in enumerate(view.gpus)] if len(view.gpus) > 1 else [("GPU", view.gpu)]
    rows = (
        ("replicas", view.memory),
        *gpus,
        ("goldens in tmpfs", view.store),
        ("whole machine", view.host_memory),
    )
    for name, use in rows:
        if use.used or use.limit:
            table.add_row(name, _bar(use, columns), f"{size(use.used)}{' of ' + size(use.limit) if use.limit else ''}")
    table.show_header = False
    return table


def _bar(use: UseView | GpuView, columns: int) -> Text:
    from rich.text import Text

    if not use.limit:
        return Text("no limit", style="dim")
    share = use.used / use.limit
    style = "red" if share >= _FULL else "yellow" if share >= _HIGH else "green"
    full, empty = ("█", "░") if _can_write("█░") else ("#", ".")
    filled = min(columns, max(round(share * columns), int(use.used > 0)))
    return Text.assemble((full * filled, style), (empty * (columns - filled), "dim"))


def _can_write(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeError, LookupError):
        return False
    return True


def _models(view: PoolView, width: int) -> Table:
    """A row for each model; what is the least needed goes where there is no room."""
    cells = [_cells(one, view.now, brief=width < _WIDE) for one in view.models]
    columns = [name for name in cells[0] if width >= _NARROW or name not in ("WORK", "MEMORY", "GOLDEN", "ASKED")]
    table = _table(*columns)
    for column in table.columns:
        column.no_wrap = column.header not in ("MODEL", "REPLICAS", "GOLDEN")
        column.justify = "right" if column.header in ("WAIT", "WORK", "MEMORY") else "left"
    for row in cells:
        table.add_row(*(row[name] for name in columns))
    return table


def _cells(one: ModelView, now: float, *, brief: bool) -> dict[str, Text]:
    from rich.text import Text

    held = sum(each.memory + each.gpu for each in one.replicas)
    golden = one_line(one.golden.tier) + (f" {size(one.golden.bytes)}" if one.golden.bytes and not brief else "")
    asked = "–" if one.asked is None else span(now - one.asked, 1) + ("" if brief else " ago")
    return {
        "MODEL": Text(one_line(one.name)),
        "TIER": Text("drained", style="yellow") if one.drained else Text(one_line(one.tier), _STYLES.get(one.tier, "")),
        "REPLICAS": Text(counted(one.replicas) + ("" if one.scale is None else f" (of {one.scale})")),
        "WAIT": Text(str(one.waiting), style="yellow" if one.waiting else ""),
        "WORK": Text(str(one.requests)),
        "MEMORY": Text(size(held) if held else "–"),
        "GOLDEN": Text(golden, style="red" if one.golden.tier == "quarantined" else ""),
        "ASKED": Text(asked),
    }


def counted(replicas: Iterable[ReplicaView]) -> str:
    """Replicas by phase: ``1 hot, 2 standby``."""
    phases = [one.phase for one in replicas]
    known = sorted(set(phases), key=lambda phase: (PHASES.index(phase) if phase in PHASES else len(PHASES), phase))
    return ", ".join(f"{phases.count(phase)} {one_line(phase)}" for phase in known) or "–"


def _troubles(view: PoolView) -> list[RenderableType]:
    from rich.text import Text

    lines: list[RenderableType] = []
    for one in view.models:
        if one.trouble:
            again = ""
            if one.retry_at is not None and one.retry_at > view.now:
                again = f"; next try in {span(one.retry_at - view.now)}"
            lines.append(Text.assemble((one_line(one.name), "bold red"), f": {one_line(one.trouble)}{again}"))
    return ["", *lines] if lines else []


def _first_tokens(view: PoolView) -> list[RenderableType]:
    table = _table("FIRST TOKEN", "REQUESTS", "MEDIAN", "95 %")
    for column in table.columns[1:]:
        column.justify = "right"
    for tier, seen in view.ttft.items():
        if sum(seen.counts):
            times = ("–" if value is None else seconds(value) for value in (seen.p50, seen.p95))
            table.add_row(one_line(tier), str(sum(seen.counts)), *times)
    return ["", table] if table.row_count else []


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_replicas(view: PoolView) -> None:
    """A line for each replica."""
    with_gpu = any(each.gpu for one in view.models for each in one.replicas)
    columns = ["REPLICA", "MODEL", "PHASE", "REQUESTS", "MEMORY", *(["GPU"] if with_gpu else []), "PID", "FOR"]
    rows = [
        (
            one_line(each.name),
            one_line(one.name),
            one_line(each.phase),
            str(each.requests),
            size(each.memory),
            *([size(each.gpu)] if with_gpu else []),
            "–" if each.pid is None else str(each.pid),
            span(view.now - each.since, 1),
        )
        for one in view.models
        for each in one.replicas
    ]
    print_table(columns, rows, right=["REQUESTS", "MEMORY", "GPU", "PID", "FOR"])


def event_line(event: EventView) -> str:
    """When, what, to whom, how long, why."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    took = "" if event.seconds is None else seconds(event.seconds)
    took += f" from {one_line(event.tier)}" if took and event.tier else ""
    whom = event.replica or event.model
    if event.model and not event.replica.startswith(event.model):
        whom = " ".join(filter(None, (event.model, event.replica)))
    words = (when, f"{one_line(event.kind):<11}", one_line(whom), took, one_line(event.reason))
    return "  ".join(filter(None, words)).rstrip()


def span(value: float, most: int = 2) -> str:
    """A time in its largest units, ``most`` of them: ``2 h 13 min``; never less than nothing."""
    value = max(value, 0.0)
    if value < 10:
        return f"{value:.1f} s"
    left = round(value)
    words: list[tuple[int, str]] = []
    for length, unit in _UNITS:
        if left >= length or words:  # no unit is left out in the middle
            words.append((left // length, unit))
        left %= length
    return " ".join(f"{many} {unit}" for many, unit in words[:most] if many)


def can_draw() -> bool:
    """Whether standard output is a terminal that a page can be drawn on again and again."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def plain(value: Any) -> Any:
    from msgspec import to_builtins

    return to_builtins(value)
