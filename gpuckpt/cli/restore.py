"""``gpuckpt restore``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpuckpt.cli.complete import golden_names
from gpuckpt.cli.context import settings_from
from gpuckpt.cli.render import format_option, print_json, print_table, say, seconds
from gpuckpt.cli.wake import waiting
from gpuckpt.errors import GpuckptError, UsageError
from gpuckpt.golden.identity import FIELDS

if TYPE_CHECKING:
    from gpuckpt.config import Settings
    from gpuckpt.golden.prepare import Options
    from gpuckpt.golden.restore import Restored
    from gpuckpt.golden.tools import Tools
    from gpuckpt.manifest import Port
    from gpuckpt.timing import PhaseTable

_HOW = {"mapped": "mapped", "copy": "copied"}


@click.command()
@click.argument("name", required=False, shell_complete=golden_names)
@click.option("--as", "names", multiple=True, metavar="REPLICA", help="Name of the replica; repeat it for several.")
@click.option("--prepare", type=click.IntRange(1), metavar="N", help="Only see to it that N replicas wait prepared.")
@click.option(
    "--publish",
    "-p",
    multiple=True,
    metavar="[IP:]PORT",
    help="Publish the golden's port here instead; once for each --as.",
)
@click.option("--no-canary", is_flag=True, help="Do not replay the canary; only wait for health.")
@click.option("--keep", is_flag=True, help="Keep CRIU's log and statistics in the replica's folder.")
@click.option("--criu", "criu_path", metavar="PATH", help="The criu program to use.")
@click.option("--ignore-static-ip", is_flag=True, help="Take any address on the bridge, not the golden's.")
@click.option("--ignore-static-mac", is_flag=True, help="Take any hardware address, not the golden's.")
@click.option("--ignore-volumes", is_flag=True, help="Leave volumes that are made anew empty.")
@click.option("--ignore-rootfs", is_flag=True, help="Do not bring back the files that the server had written.")
@click.option("--tcp-established", is_flag=True, help="Restore open TCP connections (the golden must hold them).")
@click.option(
    "--ignore-identity",
    multiple=True,
    type=click.Choice(FIELDS),
    help="Restore although this field of the machine differs; repeatable, at your own risk.",
)
@click.option("--no-huge-pages", is_flag=True, help="Do not switch transparent huge pages on for the restore.")
@click.option("--fallback", type=click.Choice(["cold"]), help="Start the server cold if it cannot be restored.")
@click.option(
    "--gpu-wait", metavar="DURATION", default="0s", help="Longest wait for room on a GPU, as 30s.  [default: 0s]"
)
@click.option("--stage", is_flag=True, help="A golden on disk: copy it into the tmpfs first, and keep it there.")
@click.option("--import", "archive", metavar="FILE", help="Import the golden from this archive first.")
@click.option("--trust", is_flag=True, help="With --import: trust the archive's processes to run as root.")
@click.option("--digest", metavar="HEX", help="With --import: the blake3 digest that `gpuckpt export` printed.")
@format_option
@click.pass_context
def command(ctx: click.Context, /, name: str | None, as_json: bool, **options: Any) -> None:
    """Bring the golden NAME back as a running replica, and check its answer.

    The replica is called like the golden, or as one that was prepared; with --as several are restored side by side.

    \b
    gpuckpt restore qwen
    gpuckpt restore qwen --as alice --as bob
    gpuckpt restore qwen --prepare 2     # make containers now, so that the next two restores need not
    """
    from gpuckpt.cli.progress import progress
    from gpuckpt.golden.doctor import require
    from gpuckpt.golden.restore import RestoreRequest, restore
    from gpuckpt.golden.sweep import sweep
    from gpuckpt.golden.tools import open_store, tools
    from gpuckpt.timing import PhaseTable, now_ns, process_started_ns

    if not options["archive"] and (options["trust"] or options["digest"] is not None):
        raise UsageError("--trust and --digest are about an archive", remedy="add --import FILE, or leave them out")
    phases = PhaseTable(started_ns=process_started_ns())
    settings = settings_from(ctx, criu__path=options["criu_path"])
    phases.add("start-up", phases.started_ns, now_ns())
    with progress(quiet=as_json and not sys.stderr.isatty()) as report:
        with phases.phase("preflight"):
            require(settings, "restore")
            for line in sweep(settings, lambda: tools(settings)):
                report.note(line)
        if options["archive"]:
            from gpuckpt.golden.archive import import_golden

            with phases.phase("import"):
                open_store(settings)
                name = import_golden(
                    settings, Path(options["archive"]), name=name, trust=options["trust"], digest=options["digest"]
                ).name
        chosen = name or settings.create.name
        if not chosen:
            raise UsageError("no name of a golden is given", remedy="gpuckpt restore NAME; gpuckpt ls shows the names")
        with phases.phase("podman service"):
            work = tools(settings, report=report)
        if options["stage"]:
            _stage(settings, work, phases, chosen)
        requests = [
            RestoreRequest(
                name=chosen,
                replica=replica,
                options=part,
                canary=not options["no_canary"],
                keep=options["keep"],
                ignore_identity=options["ignore_identity"],
                huge_pages=not options["no_huge_pages"],
                fallback=options["fallback"],
                start_timeout=settings.create.start_timeout,
                gpu_wait=waiting(options["gpu_wait"]),
            )
            for replica, part in _replicas(options)
        ]
        if options["prepare"]:
            _prepare(work, chosen, options["prepare"], requests[0].options, as_json=as_json)
            return
        failed: list[tuple[str, GpuckptError]] = []
        if len(requests) == 1:
            ready = [restore(requests[0], work, phases)]
        else:
            from gpuckpt.golden.several import restore_all

            ready, failed = restore_all(requests, work, phases)
    if as_json and len(requests) == 1:
        print_json(_document(ready[0]))
    elif as_json:
        print_json(
            {
                "golden": chosen,
                "replicas": [_document(one) for one in ready],
                "failed": [{"replica": name} | error.as_dict() for name, error in failed],
                "wall_s": phases.wall_seconds,
            }
        )
    elif len(requests) == 1:
        _show(ready[0])
    else:
        _show_all(ready, phases.wall_seconds)
    if failed:
        for name, error in failed[1:]:
            say(f"{name} failed: {error.message}")
        raise failed[0][1]


def _replicas(options: dict[str, Any]) -> Iterator[tuple[str | None, Options]]:
    """The replicas that are asked for: their names, None for the one that needs none, and their options."""
    from gpuckpt.golden.prepare import Options
    from gpuckpt.store.layout import check_name

    names: tuple[str | None, ...] = options["names"] or (None,)
    ports = [_port(text) for text in options["publish"]]
    if options["prepare"] and options["names"]:
        raise UsageError("--prepare chooses the names itself", remedy="leave --as out")
    if len(set(names)) != len(names):
        raise UsageError("--as names a replica twice", remedy="give each a name of its own")
    if ports and len(ports) != len(names):
        raise UsageError(
            f"{len(ports)} ports for {len(names)} replicas", remedy="give --publish once for each --as, in their order"
        )
    for index, name in enumerate(names):
        yield (
            check_name(name) if name is not None else None,
            Options(
                ignore_static_ip=options["ignore_static_ip"],
                ignore_static_mac=options["ignore_static_mac"],
                ignore_volumes=options["ignore_volumes"],
                ignore_rootfs=options["ignore_rootfs"],
                tcp_established=options["tcp_established"],
                publish=ports[index] if ports else None,
            ),
        )


def _port(text: str) -> Port:
    from gpuckpt.cli.creation import port_from  # and all that a creation needs, which a restore does not

    return port_from(text)


def _prepare(work: Tools, name: str, number: int, options: Options, *, as_json: bool) -> None:
    from gpuckpt.golden.prepare import prepare_ahead

    waiting = prepare_ahead(work, name, number, options)
    if as_json:
        print_json({"golden": name, "prepared": [one.name for one in waiting]})
    else:
        click.echo(f"prepared: {', '.join(one.name for one in waiting)}")
        click.echo(f"restore the next one: gpuckpt restore {name}")


def _stage(settings: Settings, work: Tools, phases: PhaseTable, name: str) -> None:
    from gpuckpt.errors import NothingToDo
    from gpuckpt.golden import tiers
    from gpuckpt.golden.tools import open_store, phase

    work.layout.golden(name)
    with phase(work, phases, "stage"), contextlib.suppress(NothingToDo):
        open_store(settings)
        tiers.place(work.layout, name, "tmpfs", work.report)
        tiers.withdraw_prepared(work, name)


def _document(restored: Restored) -> dict[str, Any]:
    endpoint = restored.replica.endpoint
    return {
        "replica": restored.replica.name,
        "golden": restored.replica.golden,
        "container": restored.replica.container,
        "tier": restored.replica.tier,
        "memory": restored.replica.memory,
        "socket": str(endpoint.socket) if endpoint.socket else None,
        "url": None if endpoint.socket else str(endpoint),
        "ttft_s": restored.ttft_s,
        "first_token_monotonic_ns": restored.first_token_ns,
        "canary_match": restored.canary_match,
        "wall_s": restored.phases.wall_seconds,
        "phases": restored.phases.as_list(),
        "fallback": restored.fallback_reason.as_dict() if restored.fallback_reason else None,
    }


def _show_all(ready: list[Restored], wall: float) -> None:
    rows = [
        (
            one.replica.name,
            str(one.replica.endpoint),
            "cold" if one.replica.tier == "cold" else one.replica.memory,
            seconds(one.ttft_s) if one.ttft_s is not None else "–",
            "equal" if one.canary_match else "–",
        )
        for one in ready
    ]
    print_table(["REPLICA", "LISTENS ON", "MEMORY", "FIRST TOKEN", "CANARY"], rows, right=["FIRST TOKEN"])
    if not ready:
        return
    click.echo(f"\n{len(ready)} {'replica is' if len(ready) == 1 else 'replicas are'} ready after {wall:.3f} s")
    click.echo(f"stop them: gpuckpt stop {' '.join(one.replica.name for one in ready)}")


def _show(restored: Restored) -> None:
    rows = [(row.name, seconds(row.seconds)) for row in restored.phases.rows()]
    rows.append(("wall time", seconds(restored.phases.wall_seconds)))
    print_table(["PHASE", "TIME"], rows, right=["TIME"], bold_last=True)
    click.echo()
    if restored.fallback_reason:
        say(f"started cold, because: {restored.fallback_reason.message}")
    ttft = f", first token after {restored.ttft_s:.3f} s" if restored.ttft_s is not None else ""
    how = "started cold" if restored.replica.tier == "cold" else f"memory {_HOW[restored.replica.memory]}"
    canary = {True: ", canary equal", None: ""}[restored.canary_match or None]
    click.echo(f"replica {restored.replica.name} is ready ({how}{ttft}{canary})")
    endpoint = restored.replica.endpoint
    hint = f"curl --unix-socket {endpoint.socket} http://localhost/…" if endpoint.socket else f"curl {endpoint}/…"
    click.echo(f"ask it:  {hint}")
    click.echo(f"stop it: gpuckpt stop {restored.replica.name}")
