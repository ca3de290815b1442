"""``gpuckpt pool check``: what a configuration says, read as the service would read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuckpt.cli.context import settings_from
from gpuckpt.cli.pool_view import span
from gpuckpt.cli.render import format_option, many, one_line, print_json, print_table, say, size
from gpuckpt.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.pool.config import Model, Pool, Window
    from gpuckpt.store.layout import Layout

_STORE_SHARE = 0.8  # of all memory: the tmpfs, where nothing is mounted yet and nothing is configured


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@format_option
@click.pass_context
def check(ctx: click.Context, /, file: Path | None, as_json: bool) -> None:
    """Read a configuration and show what it says.

    FILE is /etc/gpuckpt/pool.toml if none is given. Nothing is done but that: no daemon is asked, or told.
    """
    from gpuckpt.pool.config import DEFAULT_FILE
    from gpuckpt.store.layout import Layout

    file = file or DEFAULT_FILE
    pool = _read(file)
    settings = settings_from(ctx)
    layout = Layout.of(settings)
    places = {name: _places(layout, one.golden or name) for name, one in pool.models.items()}
    notes = [note for name, one in pool.models.items() if one.create and (note := _creation(ctx, name, one))]
    budget = _budget(pool, settings)
    if as_json:
        from msgspec import to_builtins

        document = to_builtins(pool, enc_hook=str)
        for name, one in pool.models.items():
            document["models"][name] |= {
                "golden": one.golden or name,
                "tiers": places[name],
                "schedule": [_window(window) for window in one.schedule],
            }
        document["budget"] = {name: held for name, (held, _) in budget.items()}
        print_json({"file": str(file)} | document)
        return
    click.echo(f"{file}: {many(len(pool.models), 'model')}, listens on {', '.join(pool.front.listen)}\n")
    rows = [(name, "–" if held is None else size(held), why) for name, (held, why) in budget.items()]
    print_table(["BUDGET", "LIMIT", ""], rows, right=["LIMIT"])
    if pool.models:
        click.echo()
        _print_models(pool.models, places)
    for name, one in pool.models.items():
        if one.schedule:
            click.echo(one_line(f"{name}: kept ready {', '.join(map(_window, one.schedule))}"))
    if (keys := pool.front.keys) is not None:
        from gpuckpt.service.keys import Keys

        try:
            Keys.read(keys)
        except (NotFoundError, UsageError) as error:
            say(one_line(f"{error.message}{': ' + error.cause if error.cause else ''}; the service would not start"))
    for name, one in pool.models.items():
        if places[name] == [] and not one.create:
            golden = one.golden or name
            say(one_line(f"{name}: there is no golden {golden}; gpuckpt create {golden} …, or create = […]"))
    for note in notes:
        say(one_line(note))


def _read(file: Path) -> Pool:
    from gpuckpt.pool import config

    try:
        return config.load(file)
    except (NotFoundError, UsageError) as error:
        if "--config" in (error.remedy or ""):  # said of the settings' file
            example = Path(config.__file__).with_name("example.toml")
            error.remedy = f"every key, commented, is in {example}: copy it there, or name another file"
        raise


def _creation(ctx: click.Context, name: str, one: Model) -> str | None:
    """What would go wrong when the golden is made, as far as that can be seen. Raises UsageError for wrong words."""
    from gpuckpt.cli.create import requested
    from gpuckpt.cli.creation import unheard

    try:
        request = requested(ctx, one.golden or name, one.create)
        request.adapter.launch(request.arguments, port=8000 if request.publish else None, python=None)
        told = unheard(request)
    except (click.UsageError, UsageError) as error:
        cause = error.format_message() if isinstance(error, click.UsageError) else str(error)
        remedy = "it is what follows `gpuckpt create NAME`; see gpuckpt create --help"
        raise UsageError(f"models.{name}.create cannot be used", cause=cause, remedy=remedy) from error
    except NotFoundError as error:
        told = ": ".join(filter(None, (error.message, error.cause)))
    return f"{name}: {told}" if told else None


def _places(layout: Layout, golden: str) -> list[str] | None:
    """The tiers that have the golden; None if this user may not look."""
    try:
        return [str(tier) for tier in layout.tiers(golden)]
    except PermissionError:
        return None


def _budget(pool: Pool, settings: Settings) -> dict[str, tuple[int | None, str]]:
    """The limit and where it comes from, for each budget."""
    from gpuckpt.cuda.checks import driver_version
    from gpuckpt.host import tmpfs
    from gpuckpt.pool.config import MEMORY_SHARE

    total = tmpfs.memory_total()
    store = settings.store
    mounted = tmpfs.info(store.path)
    if mounted is not None:
        room, why = mounted.size, f"the tmpfs {store.path} has so much room"
    else:
        room, why = store.size or int(total * _STORE_SHARE), f"the tmpfs {store.path} will have so much room"
    gpu = "no GPU" if driver_version() is None else "all of each"
    given = pool.budget
    return {
        "memory": _told(given.memory, int(total * MEMORY_SHARE), f"{MEMORY_SHARE:.0%} of {size(total)}"),
        "gpu": _told(given.gpu, None, gpu),
        "store": _told(given.store, room, why),
    }


def _told(given: int | None, otherwise: int | None, why: str) -> tuple[int | None, str]:
    return (otherwise, f"default: {why}") if given is None else (given, "the file says so")


def _print_models(models: dict[str, Model], places: dict[str, list[str] | None]) -> None:
    """A row for each model; a rule that all leave at its default has no column."""
    from gpuckpt.pool.config import Model

    always: list[tuple[str, Callable[[str, Model], str]]] = [
        ("MODEL", lambda name, one: "\n".join(map(one_line, (name, *one.aliases)))),
        ("GOLDEN", lambda name, one: _golden(name, one, places[name])),
        ("KEPT", lambda name, one: str(one.min_standby)),
        ("MOST", lambda name, one: str(one.max_replicas)),
        ("EACH", lambda name, one: str(one.concurrency)),
        ("FREEZE", lambda name, one: span(one.idle_freeze)),
        ("RELEASE", lambda name, one: span(one.idle_release)),
    ]
    sometimes: list[tuple[str, str, Callable[[Any], str]]] = [
        ("DISK", "idle_disk", lambda value: "–" if value is None else span(value)),
        ("PRIORITY", "priority", str),
        ("PIN", "pin", str),
        ("PREWARM", "prewarm", lambda value: "yes" if value else "no"),
        ("MEMORY", "memory", lambda value: "–" if value is None else size(value)),
    ]
    default = Model()
    used = [
        each for each in sometimes if any(getattr(one, each[1]) != getattr(default, each[1]) for one in models.values())
    ]
    rows = [
        [*(tell(name, one) for _, tell in always), *(tell(getattr(one, key)) for _, key, tell in used)]
        for name, one in models.items()
    ]
    columns = [title for title, _ in always] + [title for title, _, _ in used]
    print_table(columns, rows, right=["KEPT", "MOST", "EACH", "PRIORITY"])


def _golden(name: str, one: Model, places: list[str] | None) -> str:
    where = "?" if places is None else "+".join(places) or ("to be made" if one.create else "missing")
    return where if one.golden in (None, name) else f"{one.golden}: {where}"


def _window(window: Window) -> str:
    from gpuckpt.pool.config import DAYS

    days = sorted(window.days)
    text = ",".join(DAYS[day] for day in days)
    if len(days) > 2 and days == list(range(days[0], days[-1] + 1)):
        text = f"{DAYS[days[0]]}-{DAYS[days[-1]]}"
    first, last = (f"{minute // 60:02}:{minute % 60:02}" for minute in (window.first, window.last))
    return f"{first}-{last}" if len(days) == len(DAYS) else f"{text} {first}-{last}"
