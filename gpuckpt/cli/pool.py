"""``gpuckpt pool``: the warm pool's daemon, what it has, and what it is to do."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import click

from gpuckpt.cli.complete import pool_models
from gpuckpt.cli.pool_check import check
from gpuckpt.cli.pool_client import on_pool
from gpuckpt.cli.pool_logs import logs
from gpuckpt.cli.pool_service import install, run, uninstall
from gpuckpt.cli.pool_view import can_draw, console, event_line, page, plain, print_replicas, span
from gpuckpt.cli.render import JSON_VERSION, format_option, many, one_line, print_json, say, seconds
from gpuckpt.errors import DaemonUnreachableError, DeadlineError, InterruptedByUser, NothingToDo, UsageError

if TYPE_CHECKING:
    from gpuckpt.service.client import Client, Woken
    from gpuckpt.service.view import EventView

_PAUSE = 1.0  # seconds between two looks
_EVENTS = 10  # of the last ones, below the models

_models = click.argument("models", nargs=-1, required=True, metavar="MODEL…", shell_complete=pool_models)


@click.group()
def command() -> None:
    """The warm pool: a service that keeps replicas of models hot, frozen, or as goldens, behind one address.

    What it serves and by which rules: /etc/gpuckpt/pool.toml. MODEL is the name of a table there.
    """


command.add_command(check)
command.add_command(logs)
command.add_command(run)
command.add_command(install)
command.add_command(uninstall)


# --- looking --------------------------------------------------------------------------------------------------


@command.command()
@on_pool
@format_option
def status(client: Client, /, as_json: bool) -> None:
    """Show the service, its budgets and its models."""
    view = client.state()
    if as_json:
        print_json({"pool": plain(view)})
        return
    screen = console()
    screen.print(page(view, screen.width))
    if not view.models:
        say("no models; add them to the configuration, then: gpuckpt pool reload")


@command.command()
@on_pool
@format_option
def ps(client: Client, /, as_json: bool) -> None:
    """List the replicas.

    FOR is the time since a replica's last request, or in its phase if it had none.
    """
    view = client.state()
    if as_json:
        print_json({"replicas": [{"model": one.name} | plain(each) for one in view.models for each in one.replicas]})
    elif any(one.replicas for one in view.models):
        print_replicas(view)
    else:
        say("no replicas; the first request for a model brings one, and so does: gpuckpt pool wake MODEL")


@command.command()
@on_pool
@click.option("--once", is_flag=True, help="Show it once.")
@format_option
def top(client: Client, /, once: bool, as_json: bool) -> None:
    """Show the service as it goes, once a second.

    Ctrl-C ends it. As JSON, one document a line.
    """
    with suppress(InterruptedByUser):  # how one leaves it
        if can_draw() and not once and not as_json:
            _draw(client)
        while True:
            view = client.state()
            if as_json:
                click.echo(json.dumps({"version": JSON_VERSION, "pool": plain(view)}))
            else:
                screen = console()
                screen.print(page(view, screen.width, events=_EVENTS), "")
            sys.stdout.flush()
            if once:
                return
            time.sleep(_PAUSE)


def _draw(client: Client) -> NoReturn:
    from rich.live import Live

    view, trouble, answered = client.state(), "", time.monotonic()
    with Live(console=console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(page(view, live.console.width, events=_EVENTS, trouble=trouble), refresh=True)
            time.sleep(_PAUSE)
            try:
                view, trouble, answered = client.state(), "", time.monotonic()
            except (DaemonUnreachableError, DeadlineError) as error:  # it may be starting again
                trouble = f"{error.message}; this is from {span(time.monotonic() - answered)} ago"


@command.command()
@on_pool
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until the service ends.")
@click.option("--model", metavar="MODEL", shell_complete=pool_models, help="Only what happens to this model.")
@click.option("--limit", "-n", type=click.IntRange(min=0), default=50, show_default=True, help="The last N.")
@format_option
def events(client: Client, /, follow: bool, model: str | None, limit: int, as_json: bool) -> None:
    """Print what has happened, the oldest first.

    With --follow as JSON: one document a line.
    """
    if model is not None:
        client.check_names((model,))
    past = client.events(model=model)
    shown = past[max(0, len(past) - limit) :]
    if not follow:
        if as_json:
            print_json({"events": plain(shown)})
            return
        for event in shown:
            click.echo(event_line(event))
        if not shown:
            say("nothing has happened yet")
        return

    def show(event: EventView) -> None:
        click.echo(json.dumps({"version": JSON_VERSION, "event": plain(event)}) if as_json else event_line(event))
        sys.stdout.flush()

    with suppress(InterruptedByUser):  # how one leaves it
        for event in shown:
            show(event)
        for event in client.follow_events(past[-1].seq if past else 0, model):
            show(event)
        say("the service sends no more events")


# --- acting ---------------------------------------------------------------------------------------------------


@command.command()
@on_pool
@_models
@click.option("--deadline", type=click.FloatRange(min=0), metavar="SECONDS", help="The longest wait for each.")
@format_option
def wake(client: Client, /, models: tuple[str, ...], deadline: float | None, as_json: bool) -> None:
    """Make a replica of each MODEL hot, and wait for it."""
    if deadline is not None and math.isnan(deadline):  # which is in every range
        raise click.BadParameter("it must be a number of seconds", param_hint="--deadline")
    done = []
    for name in _checked(client, models):
        if not as_json and sys.stderr.isatty():
            say(f"{one_line(name)}: waking …")
        woken = client.wake(name, deadline)
        done.append(plain(woken) | {"model": woken.model or name})
        if not as_json:
            click.echo(one_line(f"{name}: {woken.replica} {_how(woken)}"))
    if as_json:
        print_json({"woken": done})


def _how(woken: Woken) -> str:
    if woken.tier == "hot":
        return "was hot already"
    before = {"tmpfs": "its golden in the tmpfs", "disk": "its golden on disk", "cold": "a cold start"}
    return f"is hot, from {before.get(woken.tier, woken.tier)} in {seconds(woken.seconds)}"


@command.command()
@on_pool
@_models
@click.option("--release", is_flag=True, help="Remove them instead, standbys too; their goldens stay.")
@format_option
def sleep(client: Client, /, models: tuple[str, ...], release: bool, as_json: bool) -> None:
    """Freeze the hot replicas that are idle.

    Those of each MODEL that have no requests; a frozen one holds no GPU memory, and is awake in milliseconds.
    """
    done = [client.sleep(name, release) for name in _checked(client, models)]
    key = "stopped" if release else "frozen"
    found = {one.model: one.stopped if release else one.frozen for one in done}
    if not any(found.values()):
        raise NothingToDo(
            f"nothing was {'removed' if release else 'frozen'}",
            cause=f"no replica of {', '.join(found)} is {'' if release else 'hot and '}without requests,"
            " and more than its rules keep",
            remedy="gpuckpt pool ps",
        )
    if as_json:
        print_json({"slept": [{"model": model, key: names} for model, names in found.items()]})
        return
    for model, names in found.items():
        what = f"{'removing' if release else 'freezing'} {', '.join(names)}" if names else "nothing to do"
        click.echo(one_line(f"{model}: {what}"))


@command.command()
@on_pool
@click.argument("model", shell_complete=pool_models)
@click.argument("replicas", metavar="N|auto")
@format_option
def scale(client: Client, /, model: str, replicas: str, as_json: bool) -> None:
    """Keep N replicas of MODEL hot from now on.

    “auto”: as many as its rules say.
    """
    if replicas != "auto" and not (replicas.isascii() and replicas.isdigit() and len(replicas) < 6):
        raise UsageError(f"“{replicas}” is no number of replicas", remedy=f"gpuckpt pool scale {model} 2, or auto")
    done = client.scale(model, None if replicas == "auto" else int(replicas))
    if as_json:
        print_json(plain(done))
        return
    kept = "as many hot replicas as its rules say" if done.replicas is None else many(done.replicas, "hot replica")
    click.echo(one_line(f"{done.model}: keeps {kept}"))


@command.command()
@on_pool
@click.argument("models", nargs=-1, metavar="[MODEL]…", shell_complete=pool_models)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@format_option
def drain(client: Client, /, models: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Let models, or the service, come to an end.

    MODEL takes no more requests, finishes those at work and loses its replicas; it comes back with gpuckpt pool wake.
    Without MODEL the same for all of them; then the service ends.
    """
    if models:
        done = [client.drain(name) for name in _checked(client, models)]
        if as_json:
            print_json({"drained": plain(done)})
            return
        for one in done:
            going = f"; removing {', '.join(one.stopped)} behind the requests at work" if one.stopped else ""
            click.echo(one_line(f"{one.model}: takes no more requests{going}"))
        return
    if not yes and sys.stdin.isatty():
        view = client.state()
        at_work = sum(one.requests + one.waiting for one in view.models)
        if not click.confirm(
            f"End the service, with {many(len(view.models), 'model')} and {many(at_work, 'request')}?", err=True
        ):
            raise NothingToDo("the service goes on")
    client.drain()
    if as_json:
        print_json({})
        return
    click.echo("the service takes no more requests, and ends when those at work are answered")


@command.command()
@on_pool
@format_option
def reload(client: Client, /, as_json: bool) -> None:
    """Have the configuration read again."""
    done = client.reload()
    if as_json:
        print_json(plain(done))
        return
    for what, names in (("added", done.added), ("removed", done.removed), ("changed", done.changed)):
        if names:
            click.echo(one_line(f"{what}: {', '.join(names)}"))
    if not (done.added or done.removed or done.changed):
        say("no model has changed")
    for note in done.notes:
        say(one_line(f"note: {note}"))


def _checked(client: Client, models: tuple[str, ...]) -> tuple[str, ...]:
    """Each of ``models`` once; all must exist before anything is done to the first."""
    names = tuple(dict.fromkeys(models))
    if len(names) > 1:
        client.check_names(names)
    return names
