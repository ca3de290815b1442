"""``gpuckpt session``: generations that stop between two layers, of a replica that runs the guest server."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from gpuckpt.cli.complete import replica_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import JSON_VERSION, format_option, print_json, print_table, say, size
from gpuckpt.cli.session_view import (
    REACHED,
    event_json,
    event_line,
    how,
    place,
    plain,
    print_lens,
    print_stream,
    quoted,
    reached,
    say_end,
    show_memory,
    show_result,
    show_session,
    where,
)
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    GpuckptError,
    InterruptedByUser,
    NotFoundError,
    NothingToDo,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from gpuckpt.sessions import Breakpoint, Client, Generating, Result
    from gpuckpt.workload.endpoint import Endpoint

_F = TypeVar("_F", bound=Callable[..., Any])
_COMPLETION_S = 1.0  # nobody waits longer for a shell to complete a name
_EDIT = "KIND:LAYER:FACTOR[:VECTOR]"


@click.group()
def command() -> None:
    """Stop generations between two layers, look at them, steer them, branch them, move them.

    REPLICA is the name of one that runs the guest server (gpuckpt create NAME --workload guest -- --model FOLDER), and
    is left out where --address says where a guest listens. Layers count from 0, which is behind the embeddings.
    """


class _Command(click.Command):
    """A command whose first argument, REPLICA, is not there if ``--address`` is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        return super().parse_args(ctx, ["", *args] if given.get("address") is not None else args)


def _on_replica(function: _F) -> _F:
    """Add REPLICA and ``--address``; the command receives a client in their place."""

    @click.argument("replica", shell_complete=replica_names)
    @click.option("--address", metavar="unix:PATH|http://HOST:PORT", help="Where a guest listens, instead of REPLICA.")
    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, /, *args: Any, replica: str, address: str | None, **kwargs: Any) -> Any:
        from gpuckpt.sessions import Client

        ctx.meta[REACHED] = f"--address {address}" if address is not None else replica
        return function(Client(_endpoint(ctx, replica, address)), *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _endpoint(ctx: click.Context, replica: str, address: str | None) -> Endpoint:
    from gpuckpt.golden import replica as replicas
    from gpuckpt.sessions import address as parsed
    from gpuckpt.store.layout import Layout

    if address is not None:
        return parsed(address)
    # Not by gpuckpt.golden.tools: that looks for CRIU and wakes podman, and neither is needed to open a socket.
    layout = Layout.of(settings_from(ctx))
    try:
        found = replicas.by_name(layout.replicas, replica)
    except NotFoundError as error:
        if replica in layout.names():
            error.remedy = f"there is a golden of that name: gpuckpt restore {replica}"
        raise
    if found.state == "prepared":
        raise DaemonUnreachableError(
            f"replica {replica} does not run",
            cause="it waits for its restore",
            remedy=f"gpuckpt restore {found.golden}",
        )
    if found.standby is not None:
        from gpuckpt.errors import BusyError

        raise BusyError(f"{replica} is a standby: it answers nobody", remedy=f"gpuckpt wake {replica}")
    return found.endpoint


def _seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    from gpuckpt.config import parse_seconds

    try:
        found = parse_seconds(value)
        return float(found)  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"{value}: it {error}") from error


def session_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the replica's sessions that begin with ``incomplete``; for click's ``shell_complete=``. Never raises."""
    try:
        from gpuckpt.sessions import Client

        endpoint = _endpoint(ctx, ctx.params.get("replica") or "", ctx.params.get("address"))
        found = Client(endpoint, timeout=_COMPLETION_S).sessions()
        return sorted(one.id for one in found if one.id.startswith(incomplete))
    except Exception:
        return []


_id = click.argument("id", shell_complete=session_ids)


# --- making and running ---------------------------------------------------------------------------------------


@command.command(cls=_Command)
@_on_replica
@click.argument("id", required=False, shell_complete=session_ids)
@click.option("--prompt", metavar="TEXT", help="What to read; “-” is standard input.")
@click.option("--chat", is_flag=True, help="The prompt is a message of the user's, in the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=16, show_default=True, metavar="N")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0, the default: all.")
@click.option("--seed", type=int, help="Of the session's random numbers.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--ignore-eos", is_flag=True, help="Go on behind the model's end of text.")
@click.option("--stop-at", multiple=True, metavar="LAYER|any", help="Stop after so many layers; repeatable.")
@click.option("--phase", type=click.Choice(["any", "prefill", "decode"]), help="Stop there only.  [default: any]")
@click.option("--step", type=click.IntRange(min=0), help="Stop in this pass only; 0 reads the prompt.")
@click.option("--when", multiple=True, metavar="CONDITION", help="entropy>2.5, entropy<1, norm>30, norm<5, token=17.")
@click.option("--once", is_flag=True, help="A breakpoint goes when it was hit.")
@click.option("--steer", "edits", multiple=True, metavar=_EDIT, help="Edit in every pass (scale, add …); repeatable.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with the session ID, which is there already.")
@click.option("--detach", is_flag=True, help="Return as soon as it runs.")
@format_option
def start(client: Client, /, id: str | None, go_on: bool, detach: bool, as_json: bool, **options: Any) -> None:
    """Make the session ID and generate: text on stdout as it comes, and where it stopped on stderr.

    An interrupt removes the session again (with --continue: cancels what was begun).
    """
    from gpuckpt.sessions import words

    rules = [words.edit(word) for word in options["edits"]]
    what = _generating(options)
    if go_on:
        if id is None:
            raise UsageError("--continue needs the ID of a session")
        name = client.session(id).id
        if rules:
            client.steer(name, *rules, standing=True)
    else:
        name = client.create(id, steering=rules).id
    try:
        if detach:
            result: Result | None = client.generate(name, wait=False, **what)
        elif as_json:
            result = client.generate(name, **what)
        else:
            result = None
            last = print_stream(client.stream(name, **what))
    except (GpuckptError, InterruptedByUser):
        if not go_on:
            with suppress(GpuckptError):  # the guest is gone, and the session with it
                client.delete(name)
        raise
    if result is None:
        say_end(client, name, last)
    else:
        show_result(result, as_json=as_json)


def _generating(options: dict[str, Any]) -> Generating:

    what: Generating = {
        "max_tokens": options["max_tokens"],
        "temperature": options["temperature"],
        "top_p": options["top_p"],
        "top_k": options["top_k"],
        "seed": options["seed"],
        "stop": list(options["stops"]),
        "ignore_eos": options["ignore_eos"],
    }
    prompt = sys.stdin.read() if options["prompt"] == "-" else options["prompt"]
    if options["chat"]:
        if prompt is None:
            raise UsageError("--chat needs a --prompt")
        what["messages"] = [{"role": "user", "content": prompt}]
    elif prompt is not None:
        what["prompt"] = prompt
    if options["stop_at"]:
        what["breakpoints"] = [_breakpoint(options)]
    elif options["phase"] or options["step"] is not None or options["when"] or options["once"]:
        raise UsageError(
            "--phase, --step, --when and --once say more about --stop-at", remedy="--stop-at LAYER, or any"
        )
    return what


def _breakpoint(options: dict[str, Any]) -> Breakpoint:
    from gpuckpt.sessions import Breakpoint, words

    layers = []
    for word in options["stop_at"]:
        if word != "any" and not (word.isascii() and word.isdigit() and len(word) < 10):
            raise UsageError(f"--stop-at {word}: a number of layers, or “any”, is needed")
        layers.append(word)
    if "any" in layers and len(layers) > 1:
        raise UsageError("--stop-at any stands alone")
    return Breakpoint(
        layer=None if "any" in layers else tuple(dict.fromkeys(map(int, layers))),
        phase=options["phase"] or "any",
        step=options["step"],
        condition=words.condition(options["when"]),
        once=options["once"],
    )


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--layer", type=click.IntRange(min=0), metavar="N", help="After N layers.  [default: the next layer]")
@format_option
def pause(client: Client, /, id: str, layer: int | None, as_json: bool) -> None:
    """Stop a running generation between two layers."""
    found = client.pause(id, layer=layer)
    if not found.pause and not as_json:
        say("it ended before it got there")
    show_session(found, as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--wait", type=click.Choice(["token", "end", "none"]), default="end", show_default=True, help="Until.")
@format_option
def resume(client: Client, /, id: str, wait: Literal["none", "token", "end"], as_json: bool) -> None:
    """Go on where it stopped, or bring a suspended session's cache back; prints what the generation has written."""
    from gpuckpt.sessions import Session

    found = client.resume(id, wait=wait)
    if isinstance(found, Session):
        show_session(found, as_json=as_json)
    else:
        show_result(found, as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--durable", is_flag=True, help="Also keep it in files: it is there again after a restart.")
@format_option
def suspend(client: Client, /, id: str, durable: bool, as_json: bool) -> None:
    """Take an idle or stopped session's cache off the device until it is resumed."""
    show_session(client.suspend(id, durable=durable), as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--wait", is_flag=True, help="Return when it has arrived.")
@format_option
def prefetch(client: Client, /, id: str, wait: bool, as_json: bool) -> None:
    """Bring a session's cache back to the device ahead of being needed; a suspended one is resumed by it.

    One that was dropped has nothing to bring: it is computed again when it goes on.
    """
    show_session(client.prefetch(id, wait=wait), as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@_id
@click.argument("for_", metavar="TIME", callback=_seconds)
@format_option
def pin(client: Client, /, id: str, for_: float, as_json: bool) -> None:
    """Keep a session's cache on the device for TIME (90, 90s, 5m), whoever else needs the memory; 0: no longer."""
    show_session(client.pin(id, for_), as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@_id
@click.argument("for_", metavar="TIME", callback=_seconds)
@format_option
def idle(client: Client, /, id: str, for_: float, as_json: bool) -> None:
    """Say that a session will not go on for TIME (90, 90s, 5m): others may have its memory until shortly before."""
    show_session(client.idle(id, for_), as_json=as_json)


@command.command(cls=_Command)
@_on_replica
@format_option
def memory(client: Client, /, as_json: bool) -> None:
    """Show the memory for sessions' caches: how much there is on the device and off it, and what was moved."""
    found = client.engine().memory
    if found is None:
        raise NotFoundError(f"{reached()} does not say", cause="it runs a guest server of an earlier version")
    if as_json:
        print_json({"memory": found})
    else:
        show_memory(found)


@command.command(cls=_Command)
@_on_replica
@_id
@click.option(
    "--variant",
    "variants",
    multiple=True,
    required=True,
    metavar="WORDS",
    help=f"{_EDIT} at the stop, temperature=, top_p=, top_k=, seed=, max_tokens=, id=, standing={_EDIT}, between"
    " commas; “” is like the parent. Repeatable: each is a branch.",
)
@click.option("--paused", is_flag=True, help="Leave the branches where the parent has stopped.")
@click.option("--detach", is_flag=True, help="Return as soon as they run.")
@format_option
def branch(client: Client, /, id: str, variants: tuple[str, ...], paused: bool, detach: bool, as_json: bool) -> None:
    """Make sessions that go on from where ID has stopped, each in its own way; ID stays as it is."""
    from gpuckpt.sessions import words

    made = client.branch(id, [words.variant(word) for word in variants], resume=not paused, wait=not detach)
    if as_json:
        print_json({"result": plain(made)})
        return
    results = made.results or (None,) * len(made.sessions)
    rows = [
        (
            name,
            word or "–",
            how(result) if result else client.session(name).state,
            quoted(result.text) if result else "–",
        )
        for name, word, result in zip(made.sessions, variants, results, strict=True)
    ]
    print_table(["SESSION", "VARIANT", "STATE", "TEXT"], rows)


# --- looking and changing -------------------------------------------------------------------------------------


@command.command(cls=_Command)
@_on_replica
@format_option
def ls(client: Client, /, as_json: bool) -> None:
    """List the sessions."""
    found = client.sessions()
    if as_json:
        print_json({"sessions": plain(found)})
        return
    if not found:
        say(f"no sessions; make one: gpuckpt session start {reached()} --prompt TEXT")
        return
    rows = [
        (
            one.id,
            one.state,
            place(one),
            str(one.tokens),
            size(one.cache_bytes),
            where(one),
            one.parent or "–",
            str(len(one.steering)),
        )
        for one in found
    ]
    columns = ["SESSION", "STATE", "STOPPED AFTER", "TOKENS", "CACHE", "LIES", "PARENT", "RULES"]
    print_table(columns, rows, right=["TOKENS", "CACHE", "RULES"])


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--lens", "top", type=click.IntRange(1, 1000), metavar="N", help="Also the N most likely next tokens.")
@format_option
def show(client: Client, /, id: str, top: int | None, as_json: bool) -> None:
    """Show a session: its state, where it has stopped, what is done to it, what it has written."""
    found = client.session(id)
    seen = client.lens(id, top) if top else None
    if as_json:
        print_json({"session": plain(found)} | ({"lens": plain(seen)} if seen else {}))
        return
    show_session(found, as_json=False)
    if seen:
        click.echo("\nMost likely next tokens by the model's head on the hidden state here")
        print_lens([(token.text, token.id, token.probability) for token in seen.tokens])


@command.command(cls=_Command)
@_on_replica
@_id
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, metavar="N", help="How many.")
@format_option
def lens(client: Client, /, id: str, top: int, as_json: bool) -> None:
    """Show the most likely next tokens, by the model's own head on the hidden state at the stop (logit lens)."""
    seen = client.lens(id, top)
    if as_json:
        print_json({"lens": plain(seen)})
        return
    print_lens([(token.text, token.id, token.probability) for token in seen.tokens])


@command.command(cls=_Command)
@_on_replica
@_id
@click.argument("edits", nargs=-1, metavar=f"[{_EDIT}]…")
@click.option("--standing", is_flag=True, help="In all passes to come, not at the stop.")
@click.option("--first", type=click.IntRange(min=0), default=0, metavar="P", help="From the token at position P on.")
@click.option("--last", type=click.IntRange(min=0), metavar="P", help="Up to the token before position P.")
@click.option("--remove", multiple=True, metavar="NAME", help="Remove a standing rule; repeatable.")
@click.option("--clear", is_flag=True, help="Remove all standing rules, and the edits at the stop, first.")
@format_option
def steer(
    client: Client,
    /,
    id: str,
    edits: tuple[str, ...],
    standing: bool,
    first: int,
    last: int | None,
    remove: tuple[str, ...],
    clear: bool,
    as_json: bool,
) -> None:
    """Edit the hidden state where the session has stopped (scale::0.9), or in all passes to come.

    \b
    scale:LAYER:F       h · F
    add:LAYER:F:V       h + F · V, where V names a stored vector (gpuckpt session vectors)
    set:LAYER:F:V       F · V
    project:LAYER:F:V   h less F times its part along V

    Keys and values that the layers up to LAYER have written in this pass stay as they are.
    """
    from msgspec.structs import replace

    from gpuckpt.sessions import words

    made = [replace(words.edit(word), first=first, last=last) for word in edits]
    if not made and not remove and not clear:
        raise NothingToDo("no edit was given", remedy=f"for example gpuckpt session steer {reached()} {id} scale::0.9")
    if clear:
        client.unsteer(id)
    for name in remove:
        client.unsteer(id, name)
    names = client.steer(id, *made, standing=standing) if made else ()
    if as_json:
        print_json({"ids": list(names), "session": plain(client.session(id))})
        return
    for name in names:
        click.echo(name)
    if made and not standing:
        say(f"edits wait at the stop for: gpuckpt session resume {reached()} {id}")


@command.command(cls=_Command)
@_on_replica
@click.option("--put", metavar="NAME=FILE", help="Store the one tensor of a safetensors file under a name.")
@click.option("--rm", "gone", metavar="NAME", help="Forget one.")
@format_option
def vectors(client: Client, /, put: str | None, gone: str | None, as_json: bool) -> None:
    """List the vectors that edits can name; store or forget one."""
    from gpuckpt.sessions import read

    if put is not None:
        name, equals, file = put.partition("=")
        if not equals:
            raise UsageError(f"--put {put}: NAME=FILE is needed")
        try:
            held, _ = read(_contents(Path(file)))
        except VerificationError as error:
            raise UsageError(f"{file}: {error.message}", cause=error.cause) from error
        if len(held) != 1:
            raise UsageError(f"{file} has {len(held)} tensors", cause="a vector is the only one of its file")
        client.set_vector(name, next(iter(held.values())))
    if gone is not None:
        client.delete_vector(gone)
    found = client.vectors()
    if as_json:
        print_json(plain(found))
        return
    for name in found.vectors:
        click.echo(name)
    if not found.vectors:
        say(f"no vectors; one has {found.features} numbers")


@command.command(cls=_Command)
@_on_replica
@_id
@format_option
def events(client: Client, /, id: str, as_json: bool) -> None:
    """Print what happens to a session, until it is removed; as JSON, one document a line."""
    for event in client.events(id):
        if as_json:
            click.echo(json.dumps({"version": JSON_VERSION, "event": event_json(event)}))
        else:
            click.echo(event_line(event))
        sys.stdout.flush()


@command.command(cls=_Command)
@_on_replica
@click.argument("ids", nargs=-1, metavar="[ID]…", shell_complete=session_ids)
@click.option("--all", "everything", is_flag=True, help="All sessions.")
@format_option
def rm(client: Client, /, ids: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Remove sessions in whatever state; what they are generating ends as cancelled."""
    if bool(ids) == everything:
        raise UsageError("name the sessions to remove, or give --all")
    names = tuple(dict.fromkeys(ids)) if ids else tuple(one.id for one in client.sessions())
    for name in ids:
        client.session(name)  # all must exist before the first goes
    for name in names:
        client.delete(name)
        if not as_json:
            click.echo(f"removed {name}")
    if as_json:
        print_json({"removed": list(names)})


# --- moving ---------------------------------------------------------------------------------------------------


@command.command(cls=_Command)
@_on_replica
@_id
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@format_option
def export(client: Client, /, id: str, file: Path, force: bool, as_json: bool) -> None:
    """Write a session, stopped or idle, to a safetensors FILE that appears whole or not at all."""
    from gpuckpt.sessions.files import write_whole

    if str(file) == "-":
        raise UsageError("a session is not written to standard output", remedy="give a file")
    if os.path.lexists(file) and not force:
        raise BusyError(f"{file} exists already", remedy="choose another file, or --force")
    total = write_whole(file, client.exported(id))
    if as_json:
        print_json({"id": id, "file": str(file), "bytes": total})
        return
    click.echo(f"{file}: {size(total)}")


@command.command("import", cls=_Command)
@_on_replica
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--as", "name", metavar="ID", help="Give it this name instead of its own.")
@format_option
def import_(client: Client, /, file: Path, name: str | None, as_json: bool) -> None:
    """Make a session out of what export wrote; the guest must serve the same model."""
    try:
        made = client.import_(_contents(file), name)
    except UsageError as error:
        raise UsageError(
            f"{file} is not imported", cause=error.message, remedy="give a file that gpuckpt session export has written"
        ) from error
    show_session(made, as_json=as_json)


def _contents(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {file}") from None
    except IsADirectoryError:
        raise UsageError(f"{file} is a folder") from None
