"""What ``gpuckpt session`` prints: a generation as it comes, a stop, a table, a line for each event."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from gpuckpt.cli.render import CONTROLS, print_json, print_table, say, seconds, size
from gpuckpt.errors import GpuckptError

if TYPE_CHECKING:
    from gpuckpt.sessions import Client, Event, Memory, Result, Session


def print_stream(stream: Iterator[Event]) -> Event:
    """Print the text of a generation as it comes; returns its last event."""
    ended = True
    for event in stream:
        if event.text:
            write(event.text)
            ended = event.text.endswith("\n")
        last = event
    if not ended:
        click.echo()
    return last


def write(text: str) -> None:
    """What a model wrote, to a program as it is (click would take colours out), to a terminal without its commands."""
    click.echo(text.translate(CONTROLS) if sys.stdout.isatty() else text, nl=False, color=True)
    sys.stdout.flush()


def say_end(client: Client, name: str, last: Event) -> None:
    """Say on stderr how a streamed generation ended; GpuckptError if it failed."""
    if last.reason == "error":
        raise failed(name, last.error)
    if last.type == "paused":
        found = client.session(name).pause
        if found is not None:
            say(stopped(name, found.layer, found.layers, last.step, last.breakpoint))
    else:
        say(f"{name}: {last.reason}, {last.tokens} tokens")


def show_result(result: Result, *, as_json: bool) -> None:
    if result.finish_reason == "error":
        raise failed(result.session, result.error)
    if as_json:
        print_json({"result": plain(result)})
        return
    if result.text:
        write(result.text + "\n")
    if found := result.pause:
        say(stopped(result.session, found.layer, found.layers, found.step, found.breakpoint))
    else:
        say(f"{result.session}: {how(result)}, {len(result.tokens)} tokens")


REACHED = "gpuckpt.session.reached"


def reached() -> str:
    """How this command was told which guest is meant: a replica's name, or ``--address`` and what it said."""
    return str(click.get_current_context().meta.get(REACHED, "REPLICA"))


def failed(name: str, why: str | None) -> GpuckptError:
    return GpuckptError(
        f"the generation of session {name} failed", cause=why, remedy=f"gpuckpt session show {reached()} {name}"
    )


def stopped(name: str, layer: int, layers: int, step: int | None, breakpoint: str | None) -> str:
    return f"{name}: stopped after layer {layer} of {layers}, step {step}, breakpoint {breakpoint}"


def how(result: Result) -> str:
    return result.finish_reason or result.state


def place(one: Session) -> str:
    return f"layer {one.pause.layer} of {one.pause.layers}, step {one.pause.step}" if one.pause else "–"


def where(one: Session) -> str:
    """Where the cache is, in a word or two."""
    if one.memory is None:
        return "–"
    words = {"arriving": "coming back", "away": "off the device", "dropped": "dropped", "leaving": "leaving"}
    found = words.get(one.memory.state, "device") if one.tokens else "–"
    found += ", waits" if one.memory.waiting else ", pinned" if one.memory.pinned else ""
    return found + (", kept" if one.memory.durable else "")


def show_session(one: Session, *, as_json: bool) -> None:
    if as_json:
        print_json({"session": plain(one)})
        return
    from gpuckpt.sessions import words

    facts = [
        ("session", one.id + (f", a branch of {one.parent}" if one.parent else "")),
        ("state", one.state + (f": {one.failed}" if one.failed else "")),
        ("tokens", f"{one.tokens}, of which {one.length} are read; cache {size(one.cache_bytes)}"),
        *([("memory", memory_text(one.memory))] if one.memory else []),
        ("generations", f"{one.turns} ended, {one.passes} passes"),
        ("on the wire", f"{size(one.wire_bytes.received)} received, {size(one.wire_bytes.sent)} sent"),
    ]
    if one.text:
        facts.append(("has written", quoted(one.text)))
    if found := one.pause:
        copy = found.checkpoint
        landed = "under way" if copy.complete_us is None else f"{copy.complete_us:.0f} µs until it had landed"
        where = "in the ring" if copy.pinned else "in ordinary memory"
        facts += [
            ("stopped after", f"layer {found.layer} of {found.layers}, {seconds(found.seconds)} ago"),
            ("", words.strip(found)),
            ("in pass", f"step {found.step}: {found.tokens} tokens from position {found.position} on"),
            ("by", f"breakpoint {found.breakpoint}"),
            ("activation", f"{found.dtype} {list(found.shape)}" + (", uploaded" if found.replaced else "")),
            ("checkpoint", f"{size(copy.bytes)}, {copy.dispatch_us:.0f} µs to dispatch, {landed}, {where}"),
            ("wire since", f"{size(found.wire_bytes.received)} received, {size(found.wire_bytes.sent)} sent"),
        ]
        facts += [("edit here", edit_text(each)) for each in found.edits]
    facts += [("rule", f"{each.name}: {edit_text(each)}") for each in one.steering]
    for point in one.breakpoints:
        after = "any layer" if point.layer is None else f"layer {point.layer}"
        limits = [point.phase] if point.phase != "any" else []
        limits += [f"step {point.step}"] if point.step is not None else []
        limits += [f"position {point.position}"] if point.position is not None else []
        limits += [f"{key} {value}" for key, value in plain(point.condition).items() if value is not None]
        limits += ["once"] if point.once else []
        facts.append(("breakpoint", f"{point.id}: after {', '.join([after, *limits])}; {point.hits} hits"))
    print_table(["", ""], facts)


def memory_text(found: Memory) -> str:
    """Where a session's cache is, in words."""
    parts = [f"{size(count)} {where}" for where, count in _places(found.bytes) if count]
    text = {
        "device": "all of it is there",
        "arriving": "on its way to the device",
        "leaving": "on its way out",
        "away": "off the device",
        "dropped": "dropped: it is computed again when it is needed",
    }[found.state]
    text += f" ({', '.join(parts)})" if parts else ""
    text += "; waits for room" if found.waiting else ""
    text += f"; pinned for {about(found.pinned)}" if found.pinned else ""
    text += f"; expected in {about(found.expected)}" if found.expected is not None else ""
    return text + ("; kept in files" if found.durable else "")


def about(value: float) -> str:
    """Seconds that run down while one reads them."""
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def _places(bytes: dict[str, int]) -> list[tuple[str, int]]:
    words = {"device": "on the device", "host": "in host memory", "disk": "on disk"}
    return [(words.get(name, name), count) for name, count in bytes.items()]


def show_memory(found: dict[str, Any]) -> None:
    """Budgets and traffic of the memory for caches."""
    rows = [
        (
            name,
            size(found[name]["budget"]),
            size(used),
            f"{used / found[name]['budget']:.0%}" if found[name]["budget"] else "–",
        )
        for name, used in (
            ("device", found["device"]["budget"] - found["device"]["free"]),
            ("host", found["host"]["budget"] - found["host"]["free"]),
            ("disk", found["disk"]["used"]),
        )
    ]
    print_table(["MEMORY", "BUDGET", "USED", ""], rows, right=["BUDGET", "USED", ""])
    moved = [
        (
            words,
            size(found[name]["bytes"]),
            str(found[name]["blocks"]),
            f"{found[name]['bytes'] / found[name]['seconds'] / 1e9:.1f} GB/s" if found[name]["seconds"] else "–",
        )
        for name, words in (("out", "out"), ("in", "in"), ("to_disk", "to disk"))
    ]
    click.echo()
    print_table(["MOVED", "BYTES", "BLOCKS", "SPEED"], moved, right=["BYTES", "BLOCKS", "SPEED"])
    spared = found["out"]["spared"]
    click.echo()
    print_table(
        ["", ""],
        [
            ("block", size(found["block_bytes"])),
            ("longest session", f"{found['longest']} tokens"),
            ("evicted", f"{found['evicted']} times, {found['preempted']} of them between two tokens"),
            ("left uncopied", f"{spared} blocks, of which the host had a copy"),
            ("dropped", f"{found['dropped']} times"),
            ("waiting for room", f"{found['waiting']} sessions"),
            *([("disk", found["disk"]["error"])] if found["disk"]["error"] else []),
        ],
    )


def edit_text(edit: Any) -> str:
    text = f"{edit.kind} {edit.factor:g} after layer {edit.layer}"
    if edit.vector is not None:
        text += f", a vector of length {edit.vector:.4g}"
    if edit.first or edit.last is not None:
        text += f", positions {edit.first} to {'the end' if edit.last is None else edit.last - 1}"
    return text


def print_lens(tokens: Sequence[tuple[str, int, float]]) -> None:
    rows = [
        (f"{share:.4f}" if share >= 0.001 else f"{share:.2g}", str(number), quoted(text))
        for text, number, share in tokens
    ]
    print_table(["PROBABILITY", "ID", "TOKEN"], rows, right=["PROBABILITY", "ID"])


def event_line(event: Event) -> str:
    if event.type == "state" and event.state:
        return f"state {event.state.state}"
    facts = {name: value for name, value in event_json(event).items() if name not in ("type", "session")}
    return " ".join([event.type, *(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in facts.items())])


def event_json(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = plain(event)
    return {name: value for name, value in fields.items() if value is not None and (name, value) != ("text", "")}


def quoted(text: str) -> str:
    """Text as one line in which nothing is lost."""
    return json.dumps(text, ensure_ascii=False).translate(CONTROLS)


def plain(value: Any) -> Any:
    from msgspec import to_builtins

    return to_builtins(value)
